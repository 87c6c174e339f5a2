"""The golden pictures and token ids, against readers written from WEIGHT_MAPPING.md."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy_pictures import _over_white, centre_square, to_rgb
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_export import build, export, save
from tokenizers import Tokenizer

from mamba3_jepa.export.golden_images import golden_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    export(save(build(max_query_tokens=9), folder / "phase1.pt", 1), folder / "weights", golden=True, phase=1)
    return folder / "weights"


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return dict(file.metadata())


def test_every_picture(folder: Path) -> None:
    """The pixels are those of a reader in numpy that takes only the decoding from Pillow."""
    path = folder / "golden" / "images.safetensors"
    tensors, pictures = load_file(path), json.loads(_metadata(path)["images"])
    assert {f"image.{name}.{kind}" for name in pictures for kind in ("file", "pixels")} == set(tensors)
    for name, picture in pictures.items():
        content, expected = tensors[f"image.{name}.file"], tensors[f"image.{name}.pixels"]
        assert (content.dtype, expected.dtype, expected.shape) == (np.uint8, np.uint8, (3, 32, 32))
        with Image.open(io.BytesIO(content.tobytes())) as image:
            assert image.format == picture["format"]
            image.load()
            depth = int(content[24]) if image.format == "PNG" else 8
            found = re.search(r"orientation (\d)", picture["what"])
            orientation = 1 if found is None else int(found[1])
            pixels = to_rgb(image.convert("RGB") if image.mode == "CMYK" else image, depth, orientation)
        assert np.array_equal(centre_square(pixels, 32), expected), name
        if name == "png-1-trns":  # black that lets white through
            assert expected.min() == 255
        else:
            assert expected.std() > 10, name
    assert path.stat().st_size < 300_000


def test_the_pictures_cover_what_they_should(folder: Path) -> None:
    pictures = golden_pictures(64)
    assert len({picture.name for picture in pictures}) == len(pictures)
    found = {"orientation": set(), "mode": set(), "size": set()}  # type: dict[str, set]
    for picture in pictures:
        if "damaged" in picture.name:  # of which Pillow warns
            continue
        with Image.open(io.BytesIO(picture.content)) as image:
            found["orientation"].add((picture.format, image.getexif().get(0x0112)))
            found["mode"].add((picture.format, image.mode, "transparency" in image.info))
            found["size"].add(image.size)
    assert {number for _, number in found["orientation"]} == {None, 2, 3, 4, 5, 6, 7, 8}
    assert {kind for kind, number in found["orientation"] if number} == {"JPEG", "PNG", "WEBP"}
    png = {(mode, keyed) for kind, mode, keyed in found["mode"] if kind == "PNG"}
    assert png == {
        ("1", False), ("L", False), ("L", True), ("LA", False), ("P", False), ("P", True), ("RGB", False),
        ("RGB", True), ("RGBA", False), ("I;16", False), ("I;16", True), ("1", True),
    }  # fmt: skip
    assert {(kind, mode) for kind, mode, _ in found["mode"] if kind == "JPEG"} == {
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"),
    }  # fmt: skip
    assert {(width > height, min(width, height) < 64) for width, height in found["size"]} == {
        (True, True), (True, False), (False, True), (False, False),
    }  # fmt: skip


def test_white_shows_through_as_pillow_has_it() -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colour, colour, colour, alpha], axis=-1).astype(np.uint8)
    flat = Image.alpha_composite(Image.new("RGBA", (256, 256), "white"), Image.fromarray(rgba)).convert("RGB")
    assert np.array_equal(_over_white(colour, alpha), np.asarray(flat)[..., 0])


def test_every_text(folder: Path) -> None:
    path = folder / "golden" / "tokens.safetensors"
    tensors, texts = load_file(path), json.loads(_metadata(path)["texts"])
    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.encode_special_tokens = True
    assert set(tensors) == {f"{kind}.{i}" for i in range(len(texts)) for kind in ("ids", "query_ids", "all_ids")}
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert not {0, 1, 2} & set(ids)  # a typed <eos> is ordinary text
        for kind, limit in (("ids", 32), ("query_ids", 9), ("all_ids", len(ids) + 2)):
            assert tensors[f"{kind}.{i}"].dtype == np.int64
            assert tensors[f"{kind}.{i}"].tolist() == [1, *ids[: limit - 2], 2]
    assert max(len(text.encode()) for text in texts) > 4000
    assert {"", "   ", "<eos>"} < set(texts)
    assert any("\x00" in text for text in texts)
