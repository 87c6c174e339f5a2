"""Large JSON files entry by entry: what is in memory is one entry of a list, never the list."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.encodings import GZIP_MARK, LONGEST_MARK, encoding_of
from mamba3_jepa.files.special import is_special

_CHUNK = 1 << 20
_LONGEST = 1 << 26  # characters of one entry; the whole file, where it is not what it should be
_BLANKS, _IN_NUMBERS = " \t\n\r", ".eE+-"


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
        if not reader.accept("{"):
            raise UserError(f"{path}: expected a JSON object, {{...}}, found {reader.found()}")
        if reader.accept("}"):
            return
        while True:
            key = reader.value()
            if not isinstance(key, str) or not reader.accept(":"):
                raise reader.error("expected a name in quotes and a colon")
            if reader.accept("["):
                for number, value in enumerate(reader.entries(), start=1):
                    yield Entry(key, value, f'{path}: "{key}" entry {number}')
            else:
                yield Entry(key, reader.value(), f'{path}: "{key}"')
            if reader.accept("}"):
                return
            if not reader.accept(","):
                raise reader.error("expected a comma or a closing brace")


def json_entries(path: Path) -> Iterator[Entry]:
    """The entries of the list that a file holds, or of a file of one JSON value a line, whatever its suffix.

    Raises:
        UserError: as `json_members`, or there is neither.
    """
    with _opened(path) as reader:
        if reader.accept("["):
            for number, value in enumerate(reader.entries(), start=1):
                yield Entry("", value, f"{path}: entry {number}")
            return
        if reader.peek() != "{":
            raise UserError(f"{path}: expected a JSON list, [...], or one JSON object a line, found {reader.found()}")
        number = 0
        while reader.peek():
            number += 1
            yield Entry("", reader.value(), f"{path}: entry {number}")


@contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    if is_special(path):
        raise UserError(f"{path}: a pipe, socket or device, not a file")
    try:
        with path.open("rb") as file:
            start = file.read(LONGEST_MARK)
            if start.startswith(GZIP_MARK):
                raise UserError(f"{path}: compressed with gzip: unpack it first")
            encoding, mark = encoding_of(start)
            file.seek(mark)
            yield _Reader(io.TextIOWrapper(file, encoding), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding.upper()} text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error


class _Reader:
    """A window onto the text, moved along it."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at = "", 0
        self._before = 0  # characters that came before the window
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANKS:
                    return self._text[self._at]
                self._at += 1
            if not self._more(_CHUNK):
                return ""

    def accept(self, character: str) -> bool:
        """Whether this comes next; it is passed over then."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> Any:
        """The JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # it may only be cut off; twice as much each time, so that a long one is not read too often
                if len(self._text) - self._at < _LONGEST and self._more(max(_CHUNK, len(self._text) - self._at)):
                    continue
                raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            # a number that is cut off is another number
            if (end < len(self._text) and self._text[end] not in _IN_NUMBERS) or not self._more(_CHUNK):
                self._at = end
                return value

    def entries(self) -> Iterator[Any]:
        """The values of a list, behind its opening bracket."""
        if self.accept("]"):
            return
        while True:
            yield self.value()
            if self.accept("]"):
                return
            if not self.accept(","):
                raise self.error("expected a comma or a closing bracket")

    def found(self) -> str:
        """What comes next, in words."""
        self.peek()
        while len(self._text) - self._at < 20 and self._more(_CHUNK):
            pass
        return repr(self._text[self._at : self._at + 20]) if self._at < len(self._text) else "nothing"

    def error(self, what: str, at: int | None = None) -> UserError:
        """What is wrong there, or here."""
        place = self._before + (self._at if at is None else at) + 1
        return UserError(f"{self._path}: not valid JSON at character {place:,}: {what}")

    def _more(self, size: int) -> bool:
        """Read on, and forget what has been passed over; False at the end."""
        further = self._file.read(size)
        if further:
            self._before += self._at
            self._text, self._at = self._text[self._at :] + further, 0
        return bool(further)
