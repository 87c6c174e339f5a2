"""Lists of texts from files: one text a line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.encodings import read_text_file


def read_lines(path: str | Path, what: str) -> list[str]:
    """The different lines of a file in UTF-8, or in UTF-16 with its mark, stripped, without empty ones, in their order.

    Args:
        what: what a line is, for messages, such as "answer".

    Raises:
        UserError: the file is missing, not UTF-8, or has no line with text.
    """
    try:
        text = read_text_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}; expected a text file, one {what} a line") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not {error.encoding.upper()} text ({error.reason} at byte {error.start}); expected one {what} a "
            "line, saved as UTF-8"
        ) from error
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise UserError(f"{path}: the file has no text; expected one {what} a line")
    return lines


def texts_or_file(values: Sequence[str], what: str) -> list[str]:
    """The different texts given, or the lines of the file that the only one of them names."""
    if len(values) == 1 and os.path.isfile(values[0]):
        return read_lines(values[0], what)
    return list(dict.fromkeys(values))
