"""JSON files that are either whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mamba3_jepa.errors import UserError


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` to a temporary file beside `path`, then rename it; makes the folder if need be.

    Raises:
        UserError: the file cannot be written; what was at `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(values, indent=2) + "\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
