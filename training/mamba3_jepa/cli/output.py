"""What the commands print."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mamba3_jepa.files.json_file import to_json


def write_out(values: Any) -> None:
    """JSON to the standard output, unwrapped and uncoloured, for other programs to read.

    Raises:
        UserError: a number is not finite.
    """
    write_line(to_json(values))


def write_line(text: str) -> None:
    """A line to the standard output as it is: unwrapped and uncoloured, and no word in it means an emoji."""
    sys.stdout.write(text + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table: the first column to the left, the others to the right; nothing in it is markup or steers."""
    made = Table(box=box.SIMPLE)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def printable(text: str) -> str:
    """The text without characters that would steer a terminal: an untrained decoder may say any byte."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
