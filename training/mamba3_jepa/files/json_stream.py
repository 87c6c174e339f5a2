"""Large JSON files entry by entry: what is in memory is one entry of a list, never the list."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import ijson

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.encodings import open_text
from mamba3_jepa.files.special import is_special

_LONGEST = 1 << 26  # characters of one entry
_DEEPEST = 200  # lists and objects around a value
_Events = Iterator[tuple[str, Any]]


class Entry(NamedTuple):
    """One value of a file. key: what it, or the list it is in, stands under; where: file and place, for messages."""

    key: str
    value: Any
    where: str


def json_members(path: Path) -> Iterator[Entry]:
    """The members of the object that a file holds: of a list each entry, of anything else the whole value.

    Raises:
        UserError: the file cannot be read, holds no object, is not JSON, or has an entry of more than 64 Mi characters;
            names the file and the place.
    """
    with _opened(path) as reader:
        if (found := reader.first()) != "start_map":
            raise UserError(f"{path}: expected a JSON object, {{...}}, found {_named(found)}")
        for _, key in takewhile(lambda event: event[0] == "map_key", reader.events):
            kind, value = next(reader.events)
            if kind == "start_array":
                yield from reader.entries(key)
            else:
                yield Entry(key, reader.value(kind, value), f'{path}: "{key}"')
            reader.place = f'"{key}"'
        reader.demand_end()


def json_entries(path: Path) -> Iterator[Entry]:
    """The entries of the list that a file holds, or of a file of one JSON value a line, whatever its suffix.

    Raises:
        UserError: as `json_members`, or there is neither.
    """
    with _opened(path) as reader:
        found = reader.first()
        if found == "start_array":
            yield from reader.entries()
            reader.demand_end()
        elif found == "start_map":
            yield from reader.entries(start=found)
        else:
            raise UserError(f"{path}: expected a JSON list, [...], or one JSON object a line, found {_named(found)}")


def _named(event: str) -> str:
    return {"start_array": "a list", "start_map": "an object"}.get(event, f"a {event}")


@contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    if is_special(path):
        raise UserError(f"{path}: a pipe, socket or device, not a file")
    reader: _Reader | None = None
    try:
        with path.open("rb") as file:
            reader = _Reader(io.TextIOWrapper(file, open_text(file, path), newline=""), path)
            yield reader
    except ijson.JSONError as error:
        # what the parser says, the text there, and a line that points at it
        what, *there = str(error).split("\n")
        text = f", in {there[0].strip()!r}" if there and there[0].strip() else ""
        place = "the start" if reader is None else reader.place
        raise UserError(f"{path}: not valid JSON after {place}: {what}{text}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding.upper()} text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error


class _Reader:
    """What a parser finds in a file, and how far it is."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._since = 0  # characters read since the last entry
        self.place = "the start"
        self.events: _Events = iter(ijson.basic_parse(self, multiple_values=True))

    def read(self, size: int) -> bytes:
        """For the parser, which takes UTF-8."""
        if self._since > _LONGEST:
            raise UserError(f"{self._path}: more than {_LONGEST:,} characters without an end after {self.place}")
        text = self._file.read(size)
        self._since += len(text)
        return text.encode()

    def first(self) -> str:
        """The kind of the first event."""
        return next(self.events)[0]

    def demand_end(self) -> None:
        if next(self.events, None) is not None:
            raise UserError(f"{self._path}: not valid JSON: there is more behind the end, after {self.place}")

    def entries(self, key: str = "", start: str | None = None) -> Iterator[Entry]:
        """The values of a list behind its opening bracket, or, given the event that it starts with, of a file."""
        events = self.events if start is None else chain([(start, None)], self.events)
        for number, (kind, value) in enumerate(events, start=1):
            if kind == "end_array":
                return
            place = f'"{key}" entry {number}' if key else f"entry {number}"
            yield Entry(key, self.value(kind, value), f"{self._path}: {place}")
            self.place, self._since = place, 0

    def value(self, kind: str, value: Any) -> Any:
        """The value that starts with this event."""
        builder, depth = ijson.ObjectBuilder(), 0
        for event, scalar in chain([(kind, value)], self.events):
            depth += event.startswith("start") - event.startswith("end")
            if depth > _DEEPEST:
                raise UserError(f"{self._path}: more than {_DEEPEST} lists in each other after {self.place}")
            builder.event(event, float(scalar) if isinstance(scalar, Decimal) else scalar)
            if depth == 0:
                break
        return builder.value
