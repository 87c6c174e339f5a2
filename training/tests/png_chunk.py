"""Parts of a PNG file, for tests that write what Pillow would not."""

from __future__ import annotations

import struct
import zlib


def png_chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """One chunk, by default with the checksum that it should have."""
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
