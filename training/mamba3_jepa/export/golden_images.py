"""Picture files of many formats, modes and shapes, for readers in other languages to decode and resize.

They are made here, from rendered scenes; the pixels a model sees of each come from the project's own `load_image` and
`to_pixels`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamba3_jepa.data.draw import draw_scene
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.export.png_encoder import encode_png

_SMALLEST_SCENE = 16
_N_SCENES = 4  # the last of them has three objects
_ORIENTATION = 0x0112  # the EXIF tag
_KEY = (200, 30, 90)  # the colour that a tRNS chunk makes transparent


@dataclass(frozen=True, kw_only=True)
class GoldenPicture:
    """An encoded picture.

    Attributes:
        name: unique, of letters, digits and hyphens.
        content: the file.
        format: PNG, JPEG, WEBP, GIF or BMP.
        lossy: whether decoders may differ by a little.
        what: for people.
    """

    name: str
    content: bytes
    format: str
    lossy: bool
    what: str


def golden_pictures(size: int) -> list[GoldenPicture]:
    """Pictures around the side of `size` pixels that the model wants: larger and smaller, wide, tall and square."""
    return [*_shapes(size), *_png_modes(size), *_oriented(size), *_other_formats(size)]


def _shapes(size: int) -> Iterator[GoldenPicture]:
    for name, width, height, what in (
        ("square", size, size, "the model's size: nothing is resized"),
        ("wide", 3 * size + 1, size + 3, "the box starts between two pixels"),
        ("tall", size - 3, 2 * size, "narrower than the model's size: enlarged"),
        ("odd", 2 * size - 7, size + size // 4 + 3, "odd sides, reduced by a fraction"),
        ("high", size, size + 7, "as wide as the model's size: only the vertical pass"),
        ("flat", size + 8, size, "as high as the model's size, a whole box: only the horizontal pass"),
        ("large", 4 * size + 2, 3 * size + 1, "reduced to a third, with many taps"),
        ("small", size // 3, size // 3 - 1, "enlarged three times"),
        ("line", 9, 1, "one pixel high"),
    ):
        yield _picture(f"shape-{name}", _fine(_scene(width, height)), "PNG", f"{width} x {height}: {what}")


def _png_modes(size: int) -> Iterator[GoldenPicture]:
    rgb = _scene(size + size // 2 - 3, size + 5)
    grey, alpha = rgb.convert("L"), _alpha(rgb.size)
    palette, keyed = rgb.quantize(16), rgb.copy()
    keyed.paste(_KEY, (rgb.width // 3, rgb.height // 4, rgb.width - 5, rgb.height // 2))
    rgba, grey_alpha = Image.merge("RGBA", (*rgb.split(), alpha)), Image.merge("LA", (grey, alpha))
    for name, image, options, what in (
        ("1", rgb.convert("1"), {}, "1 bit"),
        ("l", grey, {}, "8-bit grey"),
        ("la", grey_alpha, {}, "8-bit grey with partial transparency"),
        ("p", palette, {}, "palette, 4 bits"),
        ("p-2", rgb.quantize(4), {}, "palette, 2 bits"),
        ("p-trns", palette, {"transparency": bytes(range(0, 256, 17))}, "palette with an alpha for each colour"),
        ("rgba", rgba, {}, "RGB with partial transparency"),
        ("l-trns", keyed.getchannel(0), {"transparency": _KEY[0]}, "grey, one value of which is transparent"),
        ("rgb-trns", keyed, {"transparency": _KEY}, "RGB, one colour of which is transparent"),
    ):
        yield _picture(f"png-{name}", image, "PNG", what, **options)
    yield from _png_depths(rgb, grey, alpha, keyed)


def _png_depths(rgb: Image.Image, grey: Image.Image, alpha: Image.Image, keyed: Image.Image) -> Iterator[GoldenPicture]:
    """Samples of other than 8 bits, and interlaced ones."""
    grey_hw1 = np.asarray(grey)[..., None]
    wide, wide_keyed, wide_key = _wide(rgb), _wide(keyed), tuple(_wide(Image.new("RGB", (1, 1), _KEY))[0, 0].tolist())
    wide_alpha = np.asarray(alpha).astype(np.int64)[..., None] * 257
    for name, samples, bits, options, what in (
        ("1-trns", grey_hw1 >> 7, 1, {"transparent": (0,)}, "1 bit, black is transparent"),
        ("l-2", grey_hw1 >> 6, 2, {}, "grey, 2 bits"),
        ("l-2-trns", grey_hw1 >> 6, 2, {"transparent": (2,)}, "grey, 2 bits, one value of which is transparent"),
        ("l-4", grey_hw1 >> 4, 4, {}, "grey, 4 bits"),
        ("i16", wide[..., :1], 16, {}, "grey, 16 bits"),
        ("i16-trns", wide_keyed[..., :1], 16, {"transparent": wide_key[:1]}, "grey, 16 bits, one transparent value"),
        ("la-16", np.concatenate([wide[..., :1], wide_alpha], -1), 16, {}, "grey with alpha, 16 bits each"),
        ("rgb-16", wide, 16, {}, "RGB, 16 bits each"),
        ("rgb-16-trns", wide_keyed, 16, {"transparent": wide_key}, "RGB, 16 bits each, one transparent colour"),
        ("rgba-16", np.concatenate([wide, wide_alpha], -1), 16, {}, "RGB with alpha, 16 bits each"),
        ("interlaced", np.asarray(rgb), 8, {"interlaced": True}, "RGB, interlaced"),
    ):
        content = encode_png(samples, bits, **options)
        yield GoldenPicture(name=f"png-{name}", content=content, format="PNG", lossy=False, what=what)


def _oriented(size: int) -> Iterator[GoldenPicture]:
    image = _scene(size + size // 2 - 3, size + 5)
    for orientation, image_format, options in (
        (2, "JPEG", {"quality": 90}), (3, "PNG", {}), (4, "PNG", {}), (5, "JPEG", {"quality": 90}),
        (6, "JPEG", {"quality": 90}), (6, "WEBP", {"lossless": True}), (7, "PNG", {}), (8, "PNG", {}),
    ):  # fmt: skip
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        name = f"exif-{image_format.lower()}-{orientation}"
        yield _picture(name, image, image_format, f"EXIF orientation {orientation}", exif=exif, **options)
    damaged = b"Exif\0\0II*\0" + b"\xff" * 8
    yield _picture("exif-jpeg-damaged", image, "JPEG", "EXIF that cannot be read", exif=damaged, quality=90)
    yield _with_xmp(_picture("xmp-jpeg-8", image, "JPEG", "orientation 8, in XMP", quality=90))


def _other_formats(size: int) -> Iterator[GoldenPicture]:
    rgb = _scene(size + size // 2 - 3, size + 5)
    rgba = Image.merge("RGBA", (*rgb.split(), _alpha(rgb.size)))
    palette = rgb.quantize(32)
    second = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, image, image_format, options, what in (
        ("webp-lossless", rgb, "WEBP", {"lossless": True}, "lossless"),
        ("webp-lossless-alpha", rgba, "WEBP", {"lossless": True}, "lossless with alpha"),
        ("webp-lossy", rgb, "WEBP", {"quality": 85}, "lossy"),
        ("webp-lossy-alpha", rgba, "WEBP", {"quality": 85}, "lossy with alpha"),
        ("jpeg-420", rgb, "JPEG", {"quality": 90, "subsampling": "4:2:0"}, "colours at half the resolution"),
        ("jpeg-444", rgb, "JPEG", {"quality": 90, "subsampling": "4:4:4"}, "colours at full resolution"),
        ("jpeg-progressive", rgb, "JPEG", {"quality": 90, "progressive": True}, "progressive"),
        ("jpeg-grey", rgb.convert("L"), "JPEG", {"quality": 90}, "grey"),
        ("jpeg-cmyk", rgb.convert("CMYK"), "JPEG", {"quality": 90}, "CMYK"),
        ("gif", palette, "GIF", {}, "palette"),
        ("gif-transparent", palette, "GIF", {"transparency": 3}, "palette with a transparent colour"),
        ("gif-animated", rgb, "GIF", {"save_all": True, "append_images": [second]}, "two frames: the first counts"),
        ("bmp", rgb, "BMP", {}, "24 bits"),
        ("bmp-p", palette.convert("RGB").quantize(8), "BMP", {}, "palette"),
    ):
        yield _picture(name, image, image_format, what, **options)


def _picture(name: str, image: Image.Image, image_format: str, what: str, **options: Any) -> GoldenPicture:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    lossy = image_format == "JPEG" or (image_format == "WEBP" and not options.get("lossless"))
    return GoldenPicture(name=name, content=buffer.getvalue(), format=image_format, lossy=lossy, what=what)


def _with_xmp(jpeg: GoldenPicture) -> GoldenPicture:
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    segment = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
    return replace(jpeg, content=jpeg.content[:2] + segment + jpeg.content[2:])


def _scene(width: int, height: int) -> Image.Image:
    """The middle of a rendered scene under slow colour ramps, so that every row and column is different."""
    side = max(width, height, _SMALLEST_SCENE)
    drawn = draw_scene(SceneSource("val", n_scenes=_N_SCENES).scene(_N_SCENES - 1), side)
    left, top = (side - width) // 2, (side - height) // 2
    scene = np.asarray(drawn.crop((left, top, left + width, top + height))).astype(np.int64)
    x, y = np.arange(width) * 255 // width, np.arange(height)[:, None] * 255 // height
    ramps = np.stack([x + 0 * y, y + 0 * x, (x + y) // 2], axis=-1)
    return Image.fromarray(((3 * scene + ramps) // 4).astype(np.uint8))


def _fine(image: Image.Image) -> Image.Image:
    """With rings that grow finer from the corner, whose sharp edges overshoot when they are resized."""
    x, y = np.arange(image.width), np.arange(image.height)[:, None]
    rings = np.stack([x * x + y * y, 3 * x * x + y, 2 * y * y + x], axis=-1) * 4 // max(image.size)
    return Image.fromarray(np.where(rings % 5 == 0, 255 * (rings % 2), np.asarray(image)).astype(np.uint8))


def _alpha(size: tuple[int, int]) -> Image.Image:
    """Every transparency from none to all."""
    width, height = size
    x, y = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray((255 * (x + y) // (width + height - 2)).astype(np.uint8))


def _wide(image: Image.Image) -> NDArray[np.int64]:
    """Samples of 16 bits whose low bytes are not all alike."""
    high = np.asarray(image).astype(np.int64)
    return high * 256 + 255 - high
