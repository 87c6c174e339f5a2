"""Whether a PNG holds all of its pixels, undamaged.

Pillow takes a file with too few rows for a whole one, and may not look at what follows the last row, the checksum of
all pixels among it. Up to the last row the rules here are those of the Rust side's `image/png.rs`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_STEP = 2**16  # bytes inflated at once
# First column and row, distance of columns and rows of each pass of Adam7; what is not interlaced is one pass
_INTERLACED = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PLAIN = ((0, 0, 1, 1),)


def check_rows(data: bytes) -> None:
    """Inflates the pixels of a PNG whose header a decoder has read.

    More rows than the height are accepted, and so is a missing checksum.

    Raises:
        ValueError: the pixels are damaged, or some are missing.
    """
    expected = _inflated_size(data)
    limit = 2 * expected + _STEP  # what has no end is not pixels
    inflate = zlib.decompressobj()
    size = 0
    try:
        for body in _pixel_chunks(data):
            while body and not inflate.eof and size <= limit:
                size += len(inflate.decompress(body, _STEP))
                body = inflate.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"its pixels are damaged ({error})") from error
    if size < expected:
        raise ValueError(f"its pixels are damaged ({size} bytes of {expected} are there)")


def _inflated_size(data: bytes) -> int:
    """Bytes of all rows, each with the byte that names its filter."""
    if data[8:16] != b"\0\0\0\x0dIHDR":
        raise ValueError("its header is damaged")
    width, height, depth, colour, compression, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if compression != 0 or interlace > 1:
        raise ValueError(f"unknown compression method {compression} or interlace method {interlace}")
    size = 0
    for first_x, first_y, step_x, step_y in _INTERLACED if interlace else _PLAIN:
        columns = max(0, -((first_x - width) // step_x))
        rows = max(0, -((first_y - height) // step_y))
        if columns:
            size += rows * (1 + (columns * depth * _CHANNELS[colour] + 7) // 8)
    return size


def _pixel_chunks(data: bytes) -> Iterator[bytes]:
    """What each `IDAT` chunk holds; of one that is cut short, what is there."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            yield data[position + 8 : position + 8 + length]
        position += 12 + length
