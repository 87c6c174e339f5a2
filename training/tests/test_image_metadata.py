"""Orientation is read wherever it stands, and no other metadata costs a picture, however damaged."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from png_chunk import png_chunk

from mamba3_jepa.data.images import load_image, upright
from mamba3_jepa.data.metadata import split_metadata

# a JPEG or WebP keeps these apart well enough to see which corner is where
_CORNERS = np.zeros((16, 32, 3), np.uint8)
_CORNERS[:8, :16], _CORNERS[:8, 16:], _CORNERS[8:, :16], _CORNERS[8:, 16:] = (
    (250, 0, 0),
    (0, 250, 0),
    (0, 0, 250),
    (250, 250, 250),
)
_UNDO: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    Image.fromarray(_CORNERS).save(buffer, kind, **options.get(kind, {}))
    return buffer.getvalue()


def _tiff(*entries: tuple[int, int, int, bytes], order: str = "<", tail: bytes = b"") -> bytes:
    """A TIFF structure with one directory; `tail` starts at offset 14 + 12 * entries."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return (
        head + struct.pack(order + "I", 8) + struct.pack(order + "H", len(entries)) + body + struct.pack("I", 0) + tail
    )


def _turn(value: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return (0x0112, 3, 1, struct.pack(order + "H", value))


def _jpeg(*segments: tuple[int, bytes]) -> bytes:
    data = _encoded("JPEG")
    inserted = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return data[:2] + inserted + data[2:]


def _png(*chunks: bytes, last: bool = False) -> bytes:
    data = _encoded("PNG")
    at = len(data) - 12 if last else 33
    return data[:at] + b"".join(chunks) + data[at:]


def _webp(flags: int, *chunks: tuple[bytes, bytes]) -> bytes:
    data = _encoded("WEBP")
    header = struct.pack("<B3x", flags) + struct.pack("<I", 31)[:3] + struct.pack("<I", 15)[:3]
    body = b"WEBP" + struct.pack("<4sI", b"VP8X", 10) + header + data[12:]
    for kind, content in chunks:
        body += struct.pack("<4sI", kind, len(content)) + content + b"\0" * (len(content) % 2)
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def _xmp(value: int, element: bool = False) -> bytes:
    return (f"<tiff:Orientation>{value}<" if element else f'<x tiff:Orientation="{value}"/>').encode()


def _raw_profile(exif: bytes) -> bytes:
    digits = exif.hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    return f"\nexif\n{len(exif):8}\n{lines}\n".encode()


_EXIF = b"Exif\0\0"
_ADOBE_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_KEY = b"XML:com.adobe.xmp"


def _assert_turned(data: bytes, orientation: int) -> None:
    assert split_metadata(data)[1] == orientation
    assert np.abs(np.asarray(load_image(data)).astype(int) - _UNDO[orientation](_CORNERS)).max() <= 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format(orientation: int) -> None:
    for order in "<>":
        tiff = _tiff((0x0100, 4, 1, b"\x20"), _turn(orientation, order), order=order)
        _assert_turned(_jpeg((0xE1, _EXIF + tiff)), orientation)
        _assert_turned(_png(png_chunk(b"eXIf", tiff)), orientation)
        _assert_turned(_webp(0x08, (b"EXIF", tiff)), orientation)


@pytest.mark.parametrize(
    "data",
    [
        _jpeg((0xE1, _ADOBE_XMP + _xmp(6))),
        _jpeg((0xE1, _ADOBE_XMP + _xmp(6, element=True)), (0xE1, b"Exif\0\0" + _tiff())),
        _jpeg((0xE1, _EXIF + _EXIF + _tiff(_turn(6)))),
        _jpeg((0xE1, _EXIF + _tiff(_turn(6))[:15]), (0xE1, _EXIF + _tiff(_turn(6))[15:])),
        _jpeg((0xE1, _EXIF + _tiff((0x0112, 4, 1, b"\x06")))),
        _png(png_chunk(b"eXIf", _EXIF + _tiff(_turn(6))), last=True),
        _png(png_chunk(b"tEXt", b"Raw profile type exif\0" + _raw_profile(_EXIF + _tiff(_turn(6))))),
        _png(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(_raw_profile(_tiff(_turn(6)))))),
        _png(png_chunk(b"iTXt", _XMP_KEY + b"\0\0\0\0\0" + _xmp(6))),
        _png(png_chunk(b"iTXt", _XMP_KEY + b"\0\1\0en\0key\0" + zlib.compress(_xmp(6)))),
        _webp(0x04, (b"XMP ", _xmp(6))),
        _webp(0x04, (b"XMP ", _xmp(6).replace(b'"', b"'"))),
        _webp(0x0C, (b"junk", b"odd"), (b"EXIF", _EXIF + _tiff(_turn(6))), (b"XMP ", _xmp(3))),
    ],
)
def test_other_places_of_the_orientation(data: bytes) -> None:
    _assert_turned(data, 6)


@pytest.mark.parametrize(
    "tiff",
    [
        _tiff(_turn(6), (0x011A, 10, 1, struct.pack("<I", 38)), tail=struct.pack("<ii", -1, 0)),
        _tiff((0x0100, 2, 4, b"abc\0"), _turn(6)),
        _tiff(_turn(6), (0x0132, 5, 1, struct.pack("<I", 38)), tail=struct.pack("<II", 1, 2)),
        _tiff((0x010F, 2, 2**31, struct.pack("<I", 2**31)), _turn(6)),  # a text outside the structure
        _tiff((0x010F, 77, 1, b""), _turn(6)),  # a type that does not exist
        _tiff((0x0112, 5, 1, struct.pack("<I", 0)), _turn(6)),
    ],
)
def test_damage_beside_the_orientation_costs_nothing(tiff: bytes) -> None:
    _assert_turned(_jpeg((0xE1, _EXIF + tiff)), 6)
    _assert_turned(_png(png_chunk(b"eXIf", tiff)), 6)


@pytest.mark.parametrize(
    "tiff",
    [
        b"",
        b"garbage!",
        b"II*\0",
        b"II*\0" + struct.pack("<I", 2**32 - 1),
        _tiff(_turn(6))[:18],
        _tiff(_turn(0)),
        _tiff(_turn(9)),
        _tiff((0x0112, 3, 2, struct.pack("<HH", 6, 6))),
        _tiff((0x0112, 2, 2, b"6\0")),
    ],
)
def test_an_unreadable_orientation_is_none(tiff: bytes) -> None:
    _assert_turned(_jpeg((0xE1, _EXIF + tiff)), 1)
    _assert_turned(_png(png_chunk(b"eXIf", tiff)), 1)
    _assert_turned(_webp(0x08, (b"EXIF", tiff)), 1)


def test_exif_goes_before_xmp_and_unannounced_chunks_do_not_count() -> None:
    _assert_turned(_jpeg((0xE1, _ADOBE_XMP + _xmp(3)), (0xE1, _EXIF + _tiff(_turn(6)))), 6)
    _assert_turned(_jpeg((0xE1, _ADOBE_XMP + _xmp(3)), (0xE1, _EXIF + _tiff(_turn(77)))), 1)
    _assert_turned(_webp(0, (b"EXIF", _tiff(_turn(6))), (b"XMP ", _xmp(6))), 1)


@pytest.mark.parametrize(
    "data",
    [
        _png(png_chunk(b"tEXt", b"Comment\0hello", checksum=1)),
        _png(png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (1 << 21)))),
        _png(png_chunk(b"zTXt", b"Comment\0\x07junk")),
        _png(png_chunk(b"iCCP", b"")),
        _png(png_chunk(b"iCCP", b"name\0\x01junk")),
        _png(png_chunk(b"gAMA", b""), png_chunk(b"cHRM", b"1"), png_chunk(b"pHYs", b""), png_chunk(b"sRGB", b"")),
        _png(png_chunk(b"acTL", b""), png_chunk(b"fcTL", b"\0\0\0\x07")),
        _png(png_chunk(b"zTXt", b"Raw profile type exif\0\0junk"), png_chunk(b"iTXt", _XMP_KEY)),
        _png(png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  3\nnot hexadecimal")),
        _jpeg((0xE0, b"JFIF\0")),
        _jpeg((0xE2, b"ICC_PROFILE\0")),
        _jpeg((0xE2, b"MPF\0junk")),
        _jpeg((0xED, b"Photoshop 3.0\x008BIM\4\4")),
        _jpeg((0xEE, b"Adobe")),
        _jpeg((0xFE, b""), (0xEB, b"\xff" * 99)),
    ],
)
def test_damaged_metadata_costs_nothing(data: bytes) -> None:
    _assert_turned(data, 1)


def test_a_file_without_metadata_reaches_the_decoder_as_it_is() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        assert split_metadata(_encoded(kind) if kind != "JPEG" else _jpeg()) == (_encoded(kind), 1)
    for data in (b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8X", b"junk"):
        assert split_metadata(data) == (data, 1)


def test_exif_of_many_segments_is_put_together() -> None:
    tiff = _tiff(_turn(6))
    _assert_turned(_jpeg((0xE1, _EXIF + tiff), *[(0xE1, _EXIF)] * 100_000), 6)


def test_of_many_texts_the_last_counts() -> None:
    head = _XMP_KEY + b"\0\0\0\0\0"
    _assert_turned(_png(*[png_chunk(b"iTXt", head + _xmp(3))] * 100, png_chunk(b"iTXt", head + _xmp(6))), 6)


def test_a_png_cut_anywhere_is_left_to_the_decoder() -> None:
    """As it is before the pixels, and with an end behind them, since what is missing there may not be needed."""
    data = _encoded("PNG")
    pixels, end = data.index(b"IDAT"), data.index(b"IEND")
    for length in range(len(data)):
        given, orientation = split_metadata(data[:length])
        assert orientation == 1
        if length < pixels + 4:
            assert given == data[:length]
        else:
            assert given.endswith(png_chunk(b"IEND", b""))
            assert given[: pixels - 4] == data[: pixels - 4]
            assert length < end - 4 or given == data


@pytest.mark.parametrize("data", [_webp(0x08, (b"EXIF", _tiff(_turn(6)))), _webp(0x04, (b"XMP ", _xmp(6)))])
def test_an_image_is_turned_once(data: bytes) -> None:
    once = load_image(data)
    assert np.array_equal(np.asarray(upright(once)), np.asarray(once))
    assert np.array_equal(np.asarray(upright(upright(Image.open(io.BytesIO(data))))), np.asarray(once))


def test_an_image_in_memory_is_turned_too() -> None:
    image = Image.open(io.BytesIO(_png(png_chunk(b"eXIf", _tiff(_turn(6))))))
    assert np.array_equal(np.asarray(upright(image)), _UNDO[6](_CORNERS))
    damaged = Image.open(io.BytesIO(_png(png_chunk(b"eXIf", b"garbage!"))))
    assert np.array_equal(np.asarray(upright(damaged)), _CORNERS)


@pytest.mark.parametrize(
    "extension",
    [
        b"!\xff\x0bNETSCAPE2.0\0",  # without the block that says how often
        b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0",
        b"!\xff\x0bXMP DataXMP\x04junk\xff" + b"x" * 255 + b"\0",
        b"!\xfe\0" + b"!\xfe\x03abc\0",
        b"!\x01\x0c" + b"t" * 12 + b"\0",
    ],
)
def test_what_applications_keep_in_a_gif_costs_nothing(extension: bytes) -> None:
    picture = Image.fromarray(_CORNERS).quantize(8)
    plain = io.BytesIO()
    picture.save(plain, "GIF")
    seen = io.BytesIO()
    picture.save(seen, "GIF", transparency=picture.getpixel((0, 0)))
    for whole in (plain.getvalue(), seen.getvalue()):
        at = 13 + 3 * 2 ** ((whole[10] & 7) + 1)
        expected = load_image(whole)
        assert np.array_equal(load_image(whole[:at] + extension + whole[at:]), expected)
    assert load_image(seen.getvalue()).getpixel((0, 0)) == (255, 255, 255)
