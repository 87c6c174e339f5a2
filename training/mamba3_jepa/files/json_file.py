"""JSON in the strict sense, which has no NaN and no infinity, and files of it that are either whole or not there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.whole_file import whole_file


def to_json(values: Any, *, ascii_only: bool = False) -> str:
    r"""Indented JSON. Letters are written as they are, lone surrogates escaped (\udNNN); `ascii_only` escapes more.

    Raises:
        UserError: a number is not finite.
    """
    try:
        text = json.dumps(values, indent=2, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError as error:
        raise UserError(f"a number is not finite, which JSON cannot say: {error}") from error
    return text.encode(errors="backslashreplace").decode()


def finite_or_null(values: Any) -> Any:
    """The values with None for every number that is not finite, for measures that may be undefined."""
    if isinstance(values, dict):
        return {name: finite_or_null(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite_or_null(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_json(path: Path, values: Any) -> None:
    """Write `values` through `whole_file`.

    Raises:
        UserError: a number is not finite, or the file cannot be written; what was at `path` is unchanged.
    """
    try:
        text = to_json(values) + "\n"
    except UserError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    with whole_file(path) as file:
        file.write(text.encode())
