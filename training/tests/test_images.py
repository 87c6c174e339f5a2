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


def _bomb_png(width: int, height: int) -> bytes:
    """A PNG whose header promises `width` x `height` pixels and whose data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
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
    with pytest.raises(BadSampleError, match="not a readable image"):
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
