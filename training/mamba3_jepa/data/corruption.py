"""Images destroyed beyond recognition, or spoilt step by step, to learn from what not knowing looks like.

Shapes: H and W pixels of the image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.float64]  # (H, W, 3), 0 to 255
Damage = Callable[[Image.Image, np.random.Generator], Image.Image]

_MAX_SIDE = 512  # nothing that is left to see needs more, and photographs can be large
_CELLS = 16  # scrambled pieces along each side


def corrupt(image: Image.Image, kind: str, seed: int) -> Image.Image:
    """An RGB image of at most 512 pixels a side in which `image` cannot be recognised.

    Args:
        kind: one of `CORRUPTIONS`.
        seed: not negative; decides everything random.
    """
    small = image.convert("RGB")
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return CORRUPTIONS[kind](small, np.random.default_rng(seed))


def degrade(image: Image.Image, level: float, seed: int) -> Image.Image:
    """An RGB image of at most 512 pixels a side that is spoilt in one of five ways.

    Args:
        level: from 0, as it was, to 1, hardly anything left to see.
        seed: not negative; decides everything random.
    """
    small = image.convert("RGB")
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    dice = np.random.default_rng(seed)
    way = dice.choice(["blurred", "noisy", "dark", "covered", "coarse"])
    if way == "blurred":
        return small.filter(ImageFilter.GaussianBlur(0.2 * level * max(small.size)))
    if way == "coarse":
        cells = [max(2, round(side * (1 - level) ** 2)) for side in small.size]
        return small.resize((cells[0], cells[1])).resize(small.size)
    pixels = _pixels(small)
    if way == "noisy":
        return _image((1 - level) * pixels + level * dice.uniform(0, 255, pixels.shape))
    if way == "dark":
        return _image((1 - 0.98 * level) * pixels)
    height, width = (max(1, round(level * side)) for side in pixels.shape[:2])
    top, left = (dice.integers(side - size + 1) for side, size in zip(pixels.shape, (height, width), strict=False))
    pixels[top : top + height, left : left + width] = dice.uniform(0, 255, 3)
    return _image(pixels)


def _noise(image: Image.Image, dice: np.random.Generator) -> Image.Image:
    """Noise over all of the range, with a tenth of the picture behind it."""
    pixels = _pixels(image)
    return _image(0.1 * pixels + 0.9 * dice.uniform(0, 255, pixels.shape))


def _blur(image: Image.Image, dice: np.random.Generator) -> Image.Image:
    """So blurred that a tint is left."""
    return image.filter(ImageFilter.GaussianBlur(dice.uniform(0.4, 0.6) * max(image.size)))


def _dark(image: Image.Image, dice: np.random.Generator) -> Image.Image:
    """Almost black, under a little sensor noise."""
    pixels = _pixels(image)
    return _image(dice.uniform(0, 0.02) * pixels + dice.normal(4, 3, pixels.shape))


def _bright(image: Image.Image, dice: np.random.Generator) -> Image.Image:
    """Almost white, under a little sensor noise."""
    pixels = _pixels(image)
    return _image(255 - dice.uniform(0, 0.02) * (255 - pixels) + dice.normal(-4, 3, pixels.shape))


def _flat(image: Image.Image, dice: np.random.Generator) -> Image.Image:
    """One colour all over, as with something in front of the lens."""
    pixels = _pixels(image)
    return _image(dice.uniform(0, 255, 3) + dice.normal(0, 3, pixels.shape))


def _scrambled(image: Image.Image, dice: np.random.Generator) -> Image.Image:
    """Cut into small pieces, which change places."""
    width, height = image.size
    side_x, side_y = max(1, width // _CELLS), max(1, height // _CELLS)
    columns, rows = width // side_x, height // side_y
    pixels = np.asarray(image)[: rows * side_y, : columns * side_x]
    cells = pixels.reshape(rows, side_y, columns, side_x, 3).swapaxes(1, 2).reshape(-1, side_y, side_x, 3)
    cells = dice.permutation(cells).reshape(rows, columns, side_y, side_x, 3).swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(cells.reshape(rows * side_y, columns * side_x, 3)))


CORRUPTIONS: dict[str, Damage] = {
    "noise": _noise,
    "blur": _blur,
    "dark": _dark,
    "bright": _bright,
    "flat": _flat,
    "scrambled": _scrambled,
}


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float64)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
