"""Calls a Python function that is a tool, in a process of its own (see `tools.EntryPointTool`)."""

from __future__ import annotations

import importlib
import json
import os
import sys


def main(name: str) -> None:
    """`name`: module:function. Reads {"question": ..., "image": ...} from the standard input.

    Whatever the function itself prints goes to the standard error.
    """
    asked = json.load(sys.stdin)
    result_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, _, function = name.partition(":")
    result = getattr(importlib.import_module(module), function)(**asked)
    if result is not None and not isinstance(result, str):
        sys.exit(f"{name} returned {type(result).__name__}, expected a text or None")
    result_file.write(result or "")
    result_file.close()


if __name__ == "__main__":
    main(sys.argv[1])
