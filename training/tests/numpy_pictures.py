"""From a decoded picture to the pixels a model sees, in numpy, as WEIGHT_MAPPING.md describes it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

_BITS = 22


def to_rgb(image: Image.Image, depth: int = 8, orientation: int = 1) -> np.ndarray:
    """A decoded file of any mode, of `depth` bits a sample -> (H, W, 3) uint8, upright, transparency over white."""
    colour, alpha = _colour_and_alpha(image, depth)
    if colour.ndim == 2:
        colour = np.repeat(colour[..., None], 3, axis=2)
    if alpha is not None:
        colour = _over_white(colour, alpha[..., None])
    return _upright(colour, orientation).astype(np.uint8)


def _colour_and_alpha(image: Image.Image, depth: int) -> tuple[np.ndarray, np.ndarray | None]:
    samples, key = np.asarray(image).astype(np.int64), image.info.get("transparency")
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        alphas = np.full(len(palette), 255)
        if isinstance(key, bytes):
            alphas[: len(key)] = list(key[: len(palette)])
        elif key is not None:
            alphas[key] = 0
        return palette[samples], None if key is None else alphas[samples]
    if image.mode in ("LA", "RGBA"):
        return samples[..., :-1].squeeze(-1) if image.mode == "LA" else samples[..., :3], samples[..., -1]
    if image.mode == "1":
        samples = 255 * samples
    alpha = None
    if key is not None and image.mode == "RGB":  # 16 bits a sample were cut to 8 by the decoder
        alpha = np.where((samples == np.array(key) >> max(depth - 8, 0)).all(axis=-1), 0, 255)
    elif key is not None:
        alpha = np.where(samples == (key * 255 // (2**depth - 1) if depth < 8 else key), 0, 255)
    return samples >> 8 if image.mode.startswith("I;16") else samples, alpha


def _over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(colour alpha + 255 (255 - alpha)) / 255, rounded to nearest with shifts."""
    t = (colour * alpha + 255 * (255 - alpha) + 128) * 128
    return ((t >> 8) + t) >> 15


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rows and columns as EXIF's orientation says: 5 to 8 change places first, then either may be reversed."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def centre_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, size, size) uint8."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    pixels = _pass(pixels, (width - side) / 2, side, size)
    pixels = _pass(pixels.swapaxes(0, 1), (height - side) / 2, side, size).swapaxes(0, 1)
    return pixels.transpose(2, 0, 1)


def _pass(pixels: np.ndarray, start: float, side: int, size: int) -> np.ndarray:
    """(rows, columns, 3) -> (rows, size, 3): `side` columns from `start` resampled; nothing if they are all of them."""
    if pixels.shape[1] == side == size:
        return pixels
    out = np.empty((len(pixels), size, 3), np.uint8)
    for i in range(size):
        first, taps = _taps(i, start, side, size, pixels.shape[1])
        window = pixels[:, first : first + len(taps)].astype(np.int64)
        total = (1 << (_BITS - 1)) + (window * np.array(taps)[:, None]).sum(axis=1)
        out[:, i] = np.clip(total >> _BITS, 0, 255)
    return out


def _taps(i: int, start: float, side: int, size: int, available: int) -> tuple[int, list[int]]:
    """First column and fixed-point weights that make output column i."""
    scale = side / size
    stretch = max(scale, 1.0)
    centre = start + (i + 0.5) * scale
    first = max(int(centre - 2 * stretch + 0.5), 0)
    after = min(int(centre + 2 * stretch + 0.5), available)
    weights = [_bicubic((x - centre + 0.5) * (1 / stretch)) for x in range(first, after)]
    total = sum(weights)
    return first, [int(math.copysign(0.5, w) + w / total * (1 << _BITS)) for w in weights]


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0
