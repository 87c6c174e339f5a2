"""Calls a Python function that is a tool, in a process of its own (see `tools.EntryPointTool`)."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import traceback


def main(name: str) -> None:
    """`name`: module:function. Reads {"question": ..., "image": ...} from the standard input.

    Whatever the function itself prints goes to the standard error.
    """
    asked = json.load(sys.stdin)
    result_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, _, function = name.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(**asked)
    except Exception as error:
        traceback.print_exc()
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))  # the last line is what the agent is told
    if inspect.iscoroutine(result):
        result.close()  # else Python's complaint about it would be the last line
    if result is not None and not isinstance(result, str):
        sys.exit(f"{name} returned {type(result).__name__}, expected a text or None")
    result_file.write(result or "")
    result_file.close()


if __name__ == "__main__":
    main(sys.argv[1])
