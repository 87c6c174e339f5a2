"""Images: exact pixels where they can be known, geometry, and every kind of file that must be refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from png_chunk import png_chunk

from mamba3_jepa.data.images import MAX_PIXELS, BadSampleError, load_image, normalize, to_pixels


def _gradient(width: int, height: int) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    return Image.fromarray(pixels)


def _png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_load_from_path_bytes_and_file(tmp_path: Path) -> None:
    image = _gradient(13, 7)
    path = tmp_path / "a.png"
    image.save(path)
    with path.open("rb") as file:
        from_file = load_image(file)
    for loaded in (load_image(path), load_image(str(path)), load_image(path.read_bytes()), from_file):
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), np.asarray(image))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = _gradient(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90 degrees clockwise to show it
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert loaded.size == (10, 20)
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([200, 0, 0])
        buffer = io.BytesIO()
        image.save(buffer, "PNG", transparency=0)
        expected = (255, 255, 255)
    else:
        colour = (200, 0, 0, 128) if mode == "RGBA" else (0, 128)
        buffer = io.BytesIO(_png_bytes(Image.new(mode, (4, 4), colour)))
        first = 200 if mode == "RGBA" else 0
        expected = tuple(round(c * 128 / 255 + 127) for c in (first, 0, 0))
    assert np.abs(np.asarray(load_image(buffer)).astype(int) - expected).max() <= 1


def test_other_modes() -> None:
    grey16 = Image.fromarray(np.full((3, 3), 0x8040, np.uint16))
    assert np.asarray(load_image(_png_bytes(grey16)))[0, 0].tolist() == [0x80] * 3
    grey = Image.new("L", (3, 3), 77)
    assert np.asarray(load_image(_png_bytes(grey)))[0, 0].tolist() == [77] * 3
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(buffer, "JPEG")
    assert np.asarray(load_image(buffer.getvalue())).min() >= 253


def _png(depth: int, colour: int, rows: list[bytes], key: tuple[int, ...]) -> bytes:
    """A PNG of 4 x len(rows) pixels with a transparent colour, of any depth, as Pillow cannot write it."""
    header = struct.pack(">IIBBBBB", 4, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(kind, body)
        for kind, body in (
            (b"IHDR", header),
            (b"tRNS", struct.pack(f">{len(key)}H", *key)),
            (b"IDAT", data),
            (b"IEND", b""),
        )
    )


@pytest.mark.parametrize(
    ("data", "expected"),  # of the red samples: 255 everywhere where the colour is the transparent one
    [
        (_png(8, 2, [bytes([1, 2, 3, 9, 9, 9, 1, 2, 4, 1, 2, 3])], (1, 2, 3)), [255, 9, 1, 255]),
        (_png(16, 2, [struct.pack(">12H", *[0x1234, 0, 0x9ABC, 0, 7, 0] * 2)], (0x1234, 0, 0x9ABC)), [255, 0, 255, 0]),
        (_png(1, 0, [b"\x50"], (1,)), [0, 255, 0, 255]),
        (_png(1, 0, [b"\x50"], (0,)), [255, 255, 255, 255]),
        (_png(2, 0, [b"\x1b"], (2,)), [0, 85, 255, 255]),
        (_png(4, 0, [b"\x1b\xf0"], (1,)), [255, 187, 255, 0]),
        (_png(8, 0, [b"\x01\x07\x08\x09"], (7,)), [1, 255, 8, 9]),
        (_png(16, 0, [struct.pack(">4H", 0x1000, 0x1001, 0xFFFF, 3)], (0x1001,)), [16, 255, 255, 0]),
        (_png(8, 2, [bytes(12)], ()), [0, 0, 0, 0]),
    ],
)
def test_a_transparent_colour_is_laid_over_white(data: bytes, expected: list[int]) -> None:
    """The key is in the range of the file's own depth."""
    assert np.asarray(load_image(data))[0, :, 0].tolist() == expected


def _bomb_png(width: int, height: int) -> bytes:
    """A PNG whose header promises `width` x `height` pixels and whose data is a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (MAX_PIXELS + 1, 1)])
def test_decompression_bomb(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(_bomb_png(width, height))
    with pytest.raises(BadSampleError, match=r"bomb\.png: too large"):
        load_image(path)


def test_unreadable_files_name_the_path(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    _gradient(200, 200).save(jpeg, "JPEG")
    bad = {
        "truncated.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "truncated.png": _png_bytes(_gradient(64, 64))[:-60],
        "header_only.png": _png_bytes(_gradient(64, 64))[:20],
        "text.jpg": b"this is not an image",
        "empty.png": b"",
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadSampleError, match=name.replace(".", r"\.")):
            load_image(tmp_path / name)
    with pytest.raises(BadSampleError, match=r"gone\.jpg"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(BadSampleError, match="cannot be read: Is a directory"):
        load_image(tmp_path)
    with pytest.raises(BadSampleError, match=r"shard\.tar: key 7"):
        load_image(b"junk", name="shard.tar: key 7")


def test_to_pixels_keeps_a_square_image_of_the_right_size() -> None:
    image = _gradient(32, 32)
    pixels = to_pixels(image, 32)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.numpy(), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(90, 40), (40, 90), (41, 40), (40, 40)])
def test_to_pixels_takes_the_centre_square(width: int, height: int) -> None:
    """Halving a piecewise linear image is almost exact, so the expected ramp is known."""
    image = _gradient(width, height)
    pixels = to_pixels(image, 20).float()
    assert pixels.shape == (3, 20, 20)
    centre = lambda n: (n - 40) / 2 + 2 * np.arange(20) + 0.5  # noqa: E731
    expected_x = torch.tensor(centre(width) * 255 / (width - 1))
    expected_y = torch.tensor(centre(height) * 255 / (height - 1))
    assert (pixels[0] - expected_x[None, :]).abs().max() < 4
    assert (pixels[1] - expected_y[:, None]).abs().max() < 4
    assert pixels[2].abs().max() == 0


def _resample_rows(image: np.ndarray, start: float, side: int, size: int) -> np.ndarray:
    """Bicubic along the last axis, `side` pixels from `start` to `size`, in float64, one output at a time."""
    scale = side / size
    width = max(scale, 1.0)
    outputs = []
    for i in range(size):
        centre = start + (i + 0.5) * scale
        taps = np.arange(max(0, int(centre - 2 * width + 0.5)), min(image.shape[-1], int(centre + 2 * width + 0.5)))
        x = np.abs((taps + 0.5 - centre) / width)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        outputs.append((image[..., taps] * (weights / weights.sum())).sum(-1))
    return np.clip(np.floor(np.stack(outputs, -1) + 0.5), 0, 255)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (33, 20), (20, 33), (17, 300), (301, 40), (64, 65)])
@pytest.mark.parametrize("size", [1, 17, 32])
def test_to_pixels_is_a_bicubic_filter_over_rows_then_columns(shape: tuple[int, int], size: int) -> None:
    width, height = shape
    side = min(shape)
    image_hwc = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = _resample_rows(image_hwc.transpose(2, 0, 1).astype(float), (width - side) / 2, side, size)
    columns = _resample_rows(rows.transpose(0, 2, 1), (height - side) / 2, side, size)
    expected = columns.transpose(0, 2, 1)
    difference = np.abs(to_pixels(Image.fromarray(image_hwc), size).numpy() - expected)
    assert difference.max() <= 1  # fixed-point weights may round a half the other way
    assert (difference > 0).mean() <= 0.01


def test_to_pixels_of_a_very_long_image_is_cheap() -> None:
    pixels = to_pixels(Image.new("RGB", (80_000, 1), (9, 8, 7)), 256)
    assert pixels.shape == (3, 256, 256)
    assert pixels[:, 100, 100].tolist() == [9, 8, 7]


def test_normalize() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    result = normalize(pixels)
    assert result.dtype == torch.float32
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        expected = (pixels[:, c].double() / 255 - mean) / std
        assert torch.allclose(result[:, c].double(), expected, atol=1e-6)
