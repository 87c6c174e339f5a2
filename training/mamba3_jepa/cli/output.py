"""What the commands print."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mamba3_jepa.files.json_file import to_json
from mamba3_jepa.files.path_text import path_text


def open_streams() -> None:
    r"""Let the standard streams take every text: a letter that their encoding lacks is written as \xNN or \uNNNN.

    A stream that was closed before the program started leads nowhere; so does the standard error, when it can no longer
    be written: what ends a program is what went wrong in it, not that nobody hears of it.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (it stays open)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if type(sys.stderr) is io.TextIOWrapper:
        binary = io.BufferedWriter(io.FileIO(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = _Unfailing(binary, sys.stderr.encoding, "backslashreplace", line_buffering=True)


class _Unfailing(io.TextIOWrapper):
    """What cannot be written is dropped."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def write_out(results: Any) -> None:
    """JSON to the standard output, unwrapped and uncoloured, for other programs to read: what `--json` prints.

    Args:
        results: JSON's own values, dataclasses, which become objects of their fields, and paths.
    """
    values = _plain(results)
    text = to_json(values)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = to_json(values, ascii_only=True)  # the stream's own escapes are not JSON's
    write_line(text)


def _plain(value: Any) -> Any:
    """Without dataclasses and paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return path_text(value) if isinstance(value, Path) else value


def write_line(text: str) -> None:
    """A line to the standard output as it is: unwrapped and uncoloured, and no word in it means an emoji."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """A line for people: what is in it, paths too, is neither markup nor steers the terminal."""
    write_line(printable(path_text(text)))


def show(made: RenderableType) -> None:
    """A table or a panel to the standard output."""
    Console().print(made)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table: the first column to the left, the others to the right; nothing in it is markup or steers."""
    made = Table(box=box.SIMPLE)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def printable(text: str) -> str:
    """The text in one line, without characters that would steer a terminal: an untrained decoder may say any byte."""
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "\ufffd" for character in text
    )
