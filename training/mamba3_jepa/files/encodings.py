"""Text files of other programs: UTF-8, or UTF-16 as PowerShell's `>` and Windows' editors write it."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mamba3_jepa.errors import UserError

# the longer marks first: UTF-32's begins as UTF-16's does
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What JSON begins with: UTF-16 without a mark is still no UTF-8.
_BRACES = {b"{\0": "utf-16-le", b"\0{": "utf-16-be", b"[\0": "utf-16-le", b"\0[": "utf-16-be"}
_LONGEST_MARK = 4
# What a file begins with that is no text yet, and what made it.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"(\xb5/\xfd": "zstd"}


def open_text(file: BinaryIO, name: str | Path) -> str:
    """The encoding of the text file called `name`, read from its start; then it stands behind its mark.

    Raises:
        UserError: it is compressed.
    """
    start = file.read(_LONGEST_MARK)
    for begin, program in _COMPRESSED.items():
        if start.startswith(begin):
            raise UserError(f"{name}: compressed with {program}; what is read here is plain text: unpack it first")
    encoding, mark = encoding_of(start)
    file.seek(mark)
    return encoding


def encoding_of(start: bytes) -> tuple[str, int]:
    """The encoding of a text that begins with `start`, by its byte-order mark, and the bytes of the mark."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding, len(mark)
    return _BRACES.get(start[:2], "utf-8"), 0


def decoded(content: bytes) -> str:
    """The text of a whole file, without mark.

    Raises:
        UnicodeDecodeError: its `encoding` says what it was read as.
    """
    encoding, mark = encoding_of(content[:_LONGEST_MARK])
    return content[mark:].decode(encoding)


def read_text_file(path: str | Path) -> str:
    """The text of a file, its lines ended as on Unix.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: as `decoded`.
    """
    return decoded(Path(path).read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def lines_of(file: BinaryIO, encoding: str) -> Iterator[tuple[int, bytes]]:
    """Byte offset of every line and its content in UTF-8, from where the file stands, behind its mark.

    A mark at the start of a later line, as in files written one behind the other, is no part of the line.

    Raises:
        UnicodeDecodeError: UTF-16 or UTF-32 that is none. UTF-8 is not checked.
    """
    offset = file.tell()
    if encoding == "utf-8":
        for line in file:
            content = line.removeprefix(codecs.BOM_UTF8)
            yield offset + len(line) - len(content), content
            offset += len(line)
        return
    for text in io.TextIOWrapper(file, encoding, newline="\n"):
        after = offset + len(text.encode(encoding))
        unmarked = text.removeprefix("\ufeff")
        yield after - len(unmarked.encode(encoding)), unmarked.encode()
        offset = after
