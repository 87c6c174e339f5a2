"""What the pixels of a PNG must be: the same cases as in the Rust side's `image/tests/png.rs`."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from png_chunk import png_chunk

from mamba3_jepa.data.images import BadSampleError, load_image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
# Width, height, bits of a sample, colour type, interlaced
_MODES = [
    (40, 30, 8, 2, 0),
    (200, 200, 8, 2, 0),  # more than is inflated at once
    (41, 30, 1, 0, 0),
    (7, 5, 16, 6, 0),
    (40, 30, 8, 2, 1),
    (1, 1, 8, 2, 1),
    (3, 2, 4, 0, 1),  # passes without pixels
    (1, 5, 16, 4, 1),
]
_Mode = tuple[int, int, int, int, int]


_END = png_chunk(b"IEND", b"")


def _header(mode: _Mode) -> bytes:
    width, height, depth, colour, interlaced = mode
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def _file(mode: _Mode, *bodies: bytes) -> bytes:
    return b"".join([_SIGNATURE, _header(mode), *(png_chunk(b"IDAT", body) for body in bodies), _END])


def _rows(mode: _Mode) -> list[bytes]:
    """Rows of noise, each with its filter."""
    width, height, depth, colour, interlaced = mode
    random = np.random.default_rng(0)
    rows = []
    for first_x, first_y, step_x, step_y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns = len(range(first_x, width, step_x))
        length = -(-columns * depth * _CHANNELS[colour] // 8)
        for _ in range(first_y, height, step_y) if columns else ():
            rows.append(bytes([random.integers(5)]) + random.bytes(length))
    return rows


def _flipped(data: bytes, from_end: int) -> bytes:
    flipped = bytearray(data)
    flipped[-from_end] ^= 1
    return bytes(flipped)


@pytest.mark.parametrize("mode", _MODES)
def test_what_no_pixel_needs_may_be_damaged_or_missing(mode: _Mode) -> None:
    rows = _rows(mode)
    good, more = zlib.compress(b"".join(rows)), zlib.compress(b"".join(rows + rows))
    file = _file(mode, good)
    expected = np.asarray(load_image(file))
    for what, data in {
        "no checksum": _file(mode, good[:-4]),
        "half a checksum": _file(mode, good[:-2]),
        "a chunk for each byte": _file(mode, *(bytes([byte]) for byte in good)),
        "empty chunks": _file(mode, b"", good, b""),
        "bytes after the end": _file(mode, good, b"junk"),
        "more rows": _file(mode, more),
        "no end": file[:-12],
        "cut in the chunk's checksum": file[:-14],
        "cut in the pixels' checksum": file[:-18],
        "the chunk's checksum": _flipped(file, 13),
        "a text cut short": file[:-12] + png_chunk(b"tEXt", b"Comment\0red")[:15],
        "stray bytes": file[:-12] + bytes([7]) * 9,
    }.items():
        assert np.array_equal(np.asarray(load_image(data)), expected), what


@pytest.mark.parametrize("mode", _MODES)
def test_damaged_and_missing_pixels_are_refused(mode: _Mode) -> None:
    rows = _rows(mode)
    whole = b"".join(rows)
    good, more = zlib.compress(whole), zlib.compress(whole + whole)
    for what, data in {
        "checksum": _file(mode, _flipped(good, 1)),
        "checksum in a chunk of its own": _file(mode, good[:-4], _flipped(good, 1)[-4:]),
        "checksum after more rows": _file(mode, _flipped(more, 1)),
        "a row less": _file(mode, zlib.compress(b"".join(rows[:-1]))),
        "half of the rows": _file(mode, zlib.compress(b"".join(rows[: len(rows) // 2]))),
        "a byte less": _file(mode, zlib.compress(whole[:-1])),
        "no bytes": _file(mode, zlib.compress(b"")),
        "nothing": _file(mode, b""),
        "an unknown filter": _file(mode, zlib.compress(b"\5" + whole[1:])),
        "no pixels": _file(mode),
        "header": _file(mode, good)[:32] + b"!" + _file(mode, good)[33:],
    }.items():
        with pytest.raises(BadSampleError, match=f"^{what}: not a readable image"):
            load_image(data, name=what)


def test_chunks_in_the_wrong_place_do_not_count() -> None:
    mode = (4, 1, 8, 3, 0)
    colours = png_chunk(b"PLTE", bytes([9, 8, 7, 200, 0, 0, 0, 100, 0]))
    other = png_chunk(b"PLTE", bytes(9))
    key = png_chunk(b"tRNS", b"\xff\0")
    body = zlib.compress(bytes([0, 1, 1, 0, 2]))
    data = png_chunk(b"IDAT", body)
    plain = [[200, 0, 0], [200, 0, 0], [9, 8, 7], [0, 100, 0]]

    def row(*chunks: bytes) -> list[list[int]]:
        return np.asarray(load_image(b"".join([_SIGNATURE, _header(mode), *chunks, _END])))[0].tolist()

    assert row(colours, data) == plain
    assert row(colours, key, data)[:3] == [[255] * 3, [255] * 3, [9, 8, 7]]
    assert row(key, colours, data) == plain
    assert row(colours, data, key) == plain
    assert row(colours, other, data, other) == plain
    assert row(colours, png_chunk(b"tRNS", b"\xff"), key, data) == plain
    assert row(colours, _header((4, 1, 8, 0, 0)), data) == plain
    assert row(colours, png_chunk(b"IDAT", body[:5]), other, png_chunk(b"IDAT", body[5:])) == plain
    # their checksums count
    for chunks in [(_flipped(colours, 1), data), (colours, _flipped(key, 1), data)]:
        with pytest.raises(BadSampleError):
            row(*chunks)
    mode = (4, 1, 8, 0, 0)
    with pytest.raises(BadSampleError):
        row(_flipped(png_chunk(b"tRNS", b"\0\1"), 1), data)


def test_transparency_reaches_beyond_the_palette() -> None:
    """4 x 1 with the indices 0 to 3, one colour and three alphas: what has no colour is black."""

    def file(alphas: bytes) -> bytes:
        pixels = png_chunk(b"IDAT", zlib.compress(bytes([0, 0b00011011])))
        colours = png_chunk(b"PLTE", bytes([200, 100, 0])) + png_chunk(b"tRNS", alphas)
        return b"".join([_SIGNATURE, _header((4, 1, 2, 3, 0)), colours, pixels, _END])

    expected = [[200, 100, 0], [255] * 3, [51] * 3, [0] * 3]
    assert np.asarray(load_image(file(bytes([255, 0, 204]))))[0].tolist() == expected
    # more than there can be indices is no transparency
    assert np.asarray(load_image(file(bytes([9]) * 257)))[0].tolist() == [[200, 100, 0], [0] * 3, [0] * 3, [0] * 3]


def test_many_small_chunks_are_one_piece() -> None:
    mode = (40, 30, 8, 2, 0)
    pixels = zlib.compress(b"".join(_rows(mode)))
    empty = png_chunk(b"IDAT", b"") * 20_000
    file = _file(mode, pixels).replace(png_chunk(b"IDAT", pixels), empty + png_chunk(b"IDAT", pixels) + empty)
    assert np.array_equal(np.asarray(load_image(file)), np.asarray(load_image(_file(mode, pixels))))


def test_a_row_that_is_too_long_is_said() -> None:
    """However few rows: Pillow's decoder ends with a MemoryError there."""
    mode = (2**24 + 1, 1, 8, 0, 0)
    data = _file(mode, zlib.compress(bytes(2**24 + 2)))
    with pytest.raises(BadSampleError, match=r"too large to decode safely: 16777217 x 1 pixels.*16,777,216 a side"):
        load_image(data)
    assert load_image(_file((2**24, 1, 1, 0, 0), zlib.compress(bytes(2**21 + 1)))).size == (2**24, 1)
