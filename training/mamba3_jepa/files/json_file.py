"""JSON in the strict sense, which has no NaN and no infinity: what we print and write says null there.

All JSON that others read is made here, so that a measure that is not defined or a loss that overflowed never makes a
file or an output that only Python reads. Numbers that must be finite are checked where they are made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba3_jepa.files.whole_file import whole_file


def to_json(values: Any, *, indent: int | None = 2, ascii_only: bool = False) -> str:
    r"""JSON, indented or (None) in one line, with null for every number that is not finite.

    Letters are written as they are, lone surrogates escaped (\udNNN); `ascii_only` escapes more.
    """
    text = json.dumps(finite_or_null(values), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()


def from_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    r"""What JSON says, unless that is half a character (`\ud800`), which no file and no reader in Rust can hold.

    Args:
        pairs: makes an object of its names and values; default: a dict.

    Raises:
        ValueError: it is no JSON, or says half a character.
        RecursionError: it is too deep.
    """
    values = json.loads(text, object_pairs_hook=pairs)
    json.dumps(values, ensure_ascii=False).encode()
    return values


def finite_or_null(values: Any) -> Any:
    """The values with None for every number that is not finite."""
    if isinstance(values, dict):
        return {name: finite_or_null(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite_or_null(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def json_line(values: Any) -> bytes:
    """A line of a JSON Lines file, as `to_json` has it."""
    return to_json(values, indent=None).encode() + b"\n"


def write_json(path: Path, values: Any) -> None:
    """Write `values` as `to_json` has them, through `whole_file`.

    Raises:
        UserError: the file cannot be written; what was at `path` is unchanged.
    """
    with whole_file(path) as file:
        file.write((to_json(values) + "\n").encode())
