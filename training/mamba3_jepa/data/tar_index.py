"""Where the files in a tar archive lie, by its headers alone; their contents are not read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.special import is_special

_BLOCK, _RECORD = 512, 10_240  # an archive is filled up to whole records
_REGULAR = (b"0", b"\0", b"7")  # of whatever age and layout
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, whatever size they state
_CURE = "download or write it again, or use what is whole in it with `on_bad_sample` skip"


class ShardDamagedError(UserError):
    """A shard that is no tar archive, damaged or cut off: what comes before the damage can be used."""


class Member(NamedTuple):
    """One regular file in a tar archive: its name, where its bytes start, and how many they are."""

    name: str
    offset: int
    size: int

    @property
    def extension(self) -> str:
        """Everything after the first dot of the file's name, in lower case."""
        return os.path.basename(self.name).partition(".")[2].lower()


def read_tar_index(path: str | Path, unread: list[str] | None = None) -> Iterator[Member]:
    """The regular files of an uncompressed tar archive (v7, ustar, pax or GNU), without reading their contents.

    A hard link has the bytes of the member before it that it names.

    Args:
        unread: takes the names of members that are no regular files, folders aside: symbolic links, files with holes.

    Raises:
        ShardDamagedError: not such an archive, damaged, or cut off (the end mark is missing).
        UserError: the system does not give the file.
    """
    if is_special(path):
        raise UserError(f"{path}: cannot read the shard: a pipe, socket or device, not a file")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            yield from _members(file, size, str(path), [] if unread is None else unread)
    except OSError as error:
        raise UserError(f"{path}: cannot read the shard: {error.strerror}") from error


def _members(file: BinaryIO, file_size: int, path: str, unread: list[str]) -> Iterator[Member]:
    position = 0
    long: dict[bytes, str] = {}  # of the next member: its name and what it links to
    pax: dict[str, str] = {}
    places: dict[str, tuple[int, int]] = {}
    while True:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise ShardDamagedError(
                f"{path}: the shard is truncated: it stops at byte {file_size:,} without tar's end mark; {_CURE}"
            )
        if not header.strip(b"\0"):
            following = _next_archive(file, position)
            if following is None:
                return
            position = following
            continue
        size = _number(header[124:136], path, position)
        if pax.get("size", "").isdigit():
            size = int(pax["size"])
        if not _is_header(header):
            raise ShardDamagedError(
                f"{path}: not an uncompressed tar archive, or damaged, at byte {position:,}; {_CURE}"
            )
        kind = header[156:157]
        start = position + _BLOCK * (1 + _map_blocks(file, header))
        position = start + -(-size // _BLOCK) * _BLOCK if kind not in _WITHOUT_BYTES else start
        if position > start and start + size > file_size:
            raise ShardDamagedError(
                f"{path}: the shard is truncated: a member at byte {start:,} needs {size:,} bytes and the "
                f"file has {file_size:,}; {_CURE}"
            )
        if kind == b"x":
            pax = _pax_fields(file.read(size))
        elif kind in (b"L", b"K"):
            long[kind] = _text(file.read(size))
        elif kind != b"g":
            name = pax.get("GNU.sparse.name") or pax.get("path") or long.get(b"L") or _name(header)
            target = os.path.normpath(pax.get("linkpath") or long.get(b"K") or _text(header[157:257]))
            if kind == b"1" and target in places:
                yield Member(name, *places[target])
            elif kind in _REGULAR and not any(key.startswith("GNU.sparse.") for key in pax):
                places[os.path.normpath(name)] = start, size
                yield Member(name, start, size)
            elif kind != b"5":
                unread.append(name)
            pax, long = {}, {}


def _map_blocks(file: BinaryIO, header: bytes) -> int:
    """How many blocks with the map of a file with holes come next, behind a `header` just read."""
    count, goes_on = 0, header[156:157] == b"S" and header[482:483] == b"\1"
    while goes_on:
        goes_on = file.read(_BLOCK)[504:505] == b"\1"
        count += 1
    return count


def _is_header(block: bytes) -> bool:
    """By the magic number, or, of tar's first format, which has none, by the checksum."""
    if block[257:262] == b"ustar":
        return True
    stated = block[148:156].strip(b"\0 ")
    is_octal = bool(stated) and not stated.strip(b"01234567")
    return is_octal and int(stated, 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _next_archive(file: BinaryIO, end_mark: int) -> int | None:
    """Where another archive begins behind the end mark and its padding, as `cat a.tar b.tar` leaves it."""
    file.seek(end_mark)
    padding = file.read(_RECORD + _BLOCK)
    for offset in range(_BLOCK, len(padding), _BLOCK):
        block = padding[offset : offset + _BLOCK]
        if block.strip(b"\0"):
            return end_mark + offset if _is_header(block) else None
    return None


def _number(field: bytes, path: str, position: int) -> int:
    """Octal text, or big-endian binary behind a byte 0x80 where the number is too large for that."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ") or b"0"
    if digits.strip(b"01234567"):  # `int` alone would also take signs, and a negative size never ends
        raise ShardDamagedError(f"{path}: not an uncompressed tar archive, or damaged, at byte {position:,}; {_CURE}")
    return int(digits, 8)


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    is_posix = header[257:263] == b"ustar\0"  # GNU keeps other things in the place of the prefix
    return f"{_text(prefix)}/{name}" if is_posix and prefix[0] else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_fields(content: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record."""
    fields: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or length <= len(digits):
            break  # damaged: the name and size in the ordinary header still stand
        fields[_text(key)] = _text(value)
        content = content[length:]
    return fields
