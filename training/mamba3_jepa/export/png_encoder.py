"""PNG files of kinds that Pillow reads but cannot write: any bit depth, several channels at 16 bits, interlaced.

The format: https://www.w3.org/TR/png-3/. Shapes: H rows of W pixels of C channels.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # grey, grey and alpha, RGB, RGB and alpha
_WHOLE = ((0, 0, 1, 1),)
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def encode_png(
    samples_hwc: NDArray[np.integer],
    bits: int,
    *,
    interlaced: bool = False,
    transparent: tuple[int, ...] | None = None,
) -> bytes:
    """A PNG file of samples (H, W, C), each under 2^bits, without palette and without filters.

    Args:
        bits: 1, 2, 4, 8 or 16; under 8 only with one channel.
        interlaced: in the seven passes of Adam7.
        transparent: the C samples of the colour that is transparent (`tRNS`).
    """
    height, width, channels = samples_hwc.shape
    passes = _ADAM7 if interlaced else _WHOLE  # first column, first row, columns and rows to the next
    rows = [row for x, y, dx, dy in passes for row in samples_hwc[y::dy, x::dx] if row.size]
    data = b"".join(b"\0" + _packed(row.reshape(-1), bits) for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, _COLOUR_TYPES[channels], 0, 0, interlaced)
    key = [] if transparent is None else [(b"tRNS", struct.pack(f">{channels}H", *transparent))]
    chunks = [(b"IHDR", header), *key, (b"IDAT", zlib.compress(data, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _packed(samples: NDArray[np.integer], bits: int) -> bytes:
    """Samples one after another, the first in the highest bits; the last byte is filled with zeros."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((samples[:, None] >> shifts & 1).astype(np.uint8)).tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
