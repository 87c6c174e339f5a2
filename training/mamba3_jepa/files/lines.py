"""Lists of texts from files: one text a line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.encodings import read_text_file

_TEXT_FILE = re.compile(r"\.(txt|text|csv|tsv|json|jsonl|md|lst|names)$", re.IGNORECASE)


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


def texts_or_file(values: Sequence[str], what: str, setting: str) -> list[str]:
    """The different texts given, or the lines of the file that the only one of them names.

    A file's name is never a text: neither a value that ends as those of text files do, nor one that stands alone and
    begins with a folder that is there. In a file every line is a text.

    Args:
        what: what a text is, for messages, such as "label".
        setting: where the values come from.

    Raises:
        UserError: a value looks like the name of a file that is not there, or does not stand alone; as `read_lines`.
    """
    alone = len(values) == 1
    if alone and os.path.isfile(values[0]):
        return read_lines(values[0], what)
    for value in values:
        if _TEXT_FILE.search(value) or (alone and _is_path(value)):
            is_there = "a file must stand alone" if os.path.isfile(value) else "it is no file"
            found = is_there if os.path.exists(value) else "there is no such file"
            raise UserError(
                f"`{setting}` {value}: {found}; if it is the {what} itself, write it into a text file, one {what} a "
                f"line, and give that as `{setting}`"
            )
    return list(dict.fromkeys(values))


def _is_path(value: str) -> bool:
    """Whether it reads as a path: "/my data/labels", or "data/labels" where there is such a folder; not "km/h"."""
    folder = os.path.dirname(value)
    return bool(folder) and (os.path.isabs(value) or os.path.isdir(folder))
