"""Image files to pixels: decoded with care, cropped square, normalised on the device that uses them.

Shapes: B images, H and W pixels, S the side of a square image.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mamba3_jepa.errors import UserError

MAX_PIXELS = 89_478_485  # a decoded RGB image stays under 256 MiB
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Decoders that only decode: Pillow's EPS, for instance, starts an external program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class BadSampleError(UserError):
    """One sample cannot be read. `--on-bad-sample skip` leaves such samples out and counts them."""


def load_image(source: str | Path | bytes | BinaryIO, name: str | None = None) -> Image.Image:
    """Decodes one image completely, as RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits.

    Args:
        source: a path, the bytes of a file, or a file open for binary reading.
        name: what to call the image in messages; the path by default.

    Raises:
        BadSampleError: missing, not an image, truncated, or more than `MAX_PIXELS` pixels.
    """
    if name is None:
        name = str(source) if isinstance(source, str | Path) else getattr(source, "name", "image")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            image = Image.open(file, formats=_FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except FileNotFoundError as error:
        raise BadSampleError(f"{name}: there is no such image file") from error
    except Image.DecompressionBombError as error:
        raise BadSampleError(
            f"{name}: too large to decode safely: {error}; at most {MAX_PIXELS:,} pixels are accepted, scale it down"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files make decoders raise almost anything (struct.error, SyntaxError, ...)
        raise BadSampleError(
            f"{name}: not a readable image ({type(error).__name__}: {error}); "
            f"expected a complete {', '.join(_FORMATS)} file"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image that does not depend on `image`'s file."""
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        grey_hw = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey_hw).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Shorter side resized to `size` (bicubic, antialiased), then the centre square.

    Only the centre square is resampled, so that a very long image costs no more than a square one.

    Returns:
        (3, size, size) uint8.
    """
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels_hwc = torch.from_numpy(np.array(image))
    return pixels_hwc.permute(2, 0, 1).contiguous()


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float32 of the same shape with ImageNet mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
