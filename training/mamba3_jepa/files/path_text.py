"""Names of files as text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# a byte that is not UTF-8 is a lone surrogate in the names that Python is given (PEP 383)
_BYTES = {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}


def path_text(path: str | Path) -> str:
    r"""The path as it is printed, and written where names are kept: of what is not UTF-8 in it, each byte is `\xNN`."""
    return str(path).translate(_BYTES)


@contextmanager
def utf8_name(path: str | Path) -> Iterator[str]:
    """A name of the file at `path` for libraries that know only UTF-8: its own, or that of the open file.

    Raises:
        OSError: the file cannot be opened.
    """
    if path_text(path) == str(path):
        yield str(path)
        return
    with open(path, "rb") as file:
        yield f"/dev/fd/{file.fileno()}"
