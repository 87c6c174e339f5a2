"""Image files to pixels: decoded with care, cropped square, normalised on the device that uses them.

Shapes: B images, H and W pixels, S the side of a square image.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from mamba3_jepa.data.metadata import split_metadata
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.path_text import path_text

MAX_PIXELS = 89_478_485  # a decoded RGB image stays under 256 MiB
MAX_SIDE = 2**24  # longer rows are too long for Pillow, however few they are
MAX_BYTES = 2**30  # of a file; more than MAX_PIXELS take in any format
# of files that the decoders below take; the same in rust/src/image/mod.rs
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Decoders that only decode: Pillow's EPS, for instance, starts an external program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# EXIF's orientation says how the camera was held; this undoes it
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Of a PNG: samples a pixel by colour type, and bytes inflated at once
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_STEP = 2**16
# First column and row, distance of columns and rows of each pass of Adam7; what is not interlaced is one pass
_INTERLACED = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PLAIN = ((0, 0, 1, 1),)


class BadSampleError(UserError):
    """One sample cannot be read. `on_bad_sample skip` leaves such samples out and counts them."""


class NotReadNowError(BadSampleError):
    """The system did not give a sample's file; another time it may, so nothing is known about the sample."""


def load_image(source: str | Path | bytes | BinaryIO, name: str | None = None) -> Image.Image:
    """Decodes one image completely, as RGB.

    - Of an animation it is the first frame.
    - The orientation in EXIF or XMP is applied where it can be read; other metadata is not looked at, so that damage in
      it costs nothing (`metadata.py` says where the orientation is looked for).
    - Transparency is laid over white: an alpha channel, a palette's alpha, a PNG's transparent colour (`tRNS`; for
      RGB of 16 bits a sample, only the upper 8 bits are compared, for they are all that Pillow keeps).
    - Samples of 16 bits keep their upper 8.

    Args:
        source: a path, the bytes of a file, or a file open for binary reading.
        name: what to call the image in messages; the path by default.

    Raises:
        BadSampleError: missing, not an image, truncated, more than `MAX_PIXELS` pixels, `MAX_SIDE` pixels a side or
            `MAX_BYTES` bytes; a `NotReadNowError` where the system gives no bytes.
    """
    try:
        pixels, orientation = split_metadata(_read(source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            image = Image.open(io.BytesIO(pixels), formats=_FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            if image.format == "PNG":
                _check_png_rows(pixels)
            image.load()
            return _turned(to_rgb(image), orientation)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make decoders raise almost anything (struct.error, SyntaxError, ...)
        kind = NotReadNowError if isinstance(error, OSError) and error.errno is not None else BadSampleError
        raise kind(f"{_name(source) if name is None else name}: {_why_not(error)}") from error


def _name(source: str | Path | bytes | BinaryIO) -> str:
    return path_text(source) if isinstance(source, str | Path) else getattr(source, "name", "image")


def _why_not(error: Exception) -> str:
    """What keeps an image from being used, and what to do."""
    if isinstance(error, FileNotFoundError):
        return "there is no such image file"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"too large to decode safely: {error}; at most {MAX_PIXELS:,} pixels are accepted, and "
            f"{MAX_SIDE:,} a side: scale it down"
        )
    formats = ", ".join(_FORMATS)
    if isinstance(error, UnidentifiedImageError):
        return f"not a readable image; expected a {formats} file"
    return f"not a readable image ({type(error).__name__}: {error}); expected a complete {formats} file"


def _read(source: str | Path | bytes | BinaryIO) -> bytes:
    if isinstance(source, bytes):
        return source
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(source, "rb")) if isinstance(source, str | Path) else source
        if file.seekable():
            file.seek(0)
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    return data


def _check_png_rows(data: bytes) -> None:
    """Inflates the pixels of a PNG whose header a decoder has read, to see whether all are there, undamaged.

    Pillow takes a file with too few rows for a whole one, and may not look at what follows the last row, the checksum
    of all pixels among it. Up to the last row the rules here are those of the Rust side's `image/png.rs`. More rows
    than the height are accepted, and so is a missing checksum.

    Raises:
        ValueError: the pixels are damaged, or some are missing.
    """
    expected = _png_inflated_size(data)
    limit = 2 * expected + _STEP  # what has no end is not pixels
    inflate = zlib.decompressobj()
    size = 0
    try:
        for body in _png_pixel_chunks(data):
            while body and not inflate.eof and size <= limit:
                size += len(inflate.decompress(body, _STEP))
                body = inflate.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"its pixels are damaged ({error})") from error
    if size < expected:
        raise ValueError(f"its pixels are damaged ({size} bytes of {expected} are there)")


def _png_inflated_size(data: bytes) -> int:
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


def _png_pixel_chunks(data: bytes) -> Iterator[bytes]:
    """What each `IDAT` chunk holds; of one that is cut short, what is there."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            yield data[position + 8 : position + 8 + length]
        position += 12 + length


def upright(image: Image.Image) -> Image.Image:
    """A new RGB image, turned as the EXIF or XMP of `image` says; one that cannot be read is ignored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF makes Pillow raise almost anything
        orientation = 1
    return _turned(to_rgb(image), orientation)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """`image`, which is changed, upright; it no longer says anything of an orientation that could be applied again."""
    method = _TO_UPRIGHT.get(orientation)
    turned = image if method is None else image.transpose(method)
    turned.info = {}
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image that does not depend on `image`'s file: transparency over white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        return _wide_grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    wide_hw = np.asarray(image).astype(np.int64)
    grey_hw = np.clip(wide_hw >> 8, 0, 255).astype(np.uint8)
    if "transparency" in image.info:
        grey_hw[wide_hw == image.info["transparency"]] = 255
    return Image.fromarray(grey_hw).convert("RGB")


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Shorter side resized to `size` (bicubic, antialiased), then the centre square; one of that size stays as it is.

    The square may start at half a pixel. Rows are resampled first, then columns, with 8 bits between: said here step
    by step, because the order in which Pillow does both at once depends on its version and the shape. Only what the
    square needs is resampled, so that a very long image costs no more than a square one.

    Returns:
        (3, size, size) uint8.
    """
    if image.size != (size, size):
        side = min(image.size)
        reach = 2 * math.ceil(side / size) + 1  # how far the filter looks beyond the square
        first_x, left, last_x = _centre(image.width, side, reach)
        first_y, top, last_y = _centre(image.height, side, reach)
        image = image.crop((first_x, first_y, last_x, last_y))
        bicubic = Image.Resampling.BICUBIC
        image = image.resize((size, image.height), bicubic, box=(left, 0, left + side, image.height))
        image = image.resize((size, size), bicubic, box=(0, top, size, top + side))
    pixels_hwc = torch.from_numpy(np.array(image))
    return pixels_hwc.permute(2, 0, 1).contiguous()


def _centre(length: int, side: int, reach: int) -> tuple[int, float, int]:
    """The middle `side` of `length` pixels: first pixel needed, the middle's start after it, end of those needed."""
    start = (length - side) / 2
    first = max(0, math.floor(start) - reach)
    return first, start - first, min(length, math.ceil(start) + side + reach)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float32 of the same shape with ImageNet mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
