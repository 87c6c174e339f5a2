"""COCO captions, five of each image: `captions_*.json`, and the files of Karpathy's splits (`dataset_coco.json`)."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mamba3_jepa.data.published.fields import Fields
from mamba3_jepa.data.published.manifest import LeftOut, Line
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_stream import json_members

_REPEATED = "images whose number an earlier one has"
_SPLIT = re.compile(r"(train|val|test)20\d\d")


def coco_lines(captions: Path, splits: Collection[str], left_out: LeftOut) -> Iterator[Line]:
    """A line for each image, with all its captions.

    Images and captions are in no order in COCO's own files: names and texts are held in memory, about 150 bytes each.
    Files of Karpathy's splits, of COCO or Flickr30k, have the captions in the images and are read image by image.

    Args:
        splits: of these only, where the file says which each image belongs to; empty for all.

    Raises:
        UserError: the file is not in one of these layouts.
    """
    held, there, divided = _Held(captions), set[str](), set[int | str]()
    for entry in json_members(captions):
        if entry.key == "annotations":
            held.add_caption(Fields(entry.value, entry.where))
        elif entry.key == "images":
            image = Fields(entry.value, entry.where)
            if "sentences" not in image:
                held.add_image(image)
                continue
            there.add(image.text("split"))
            number = _number(image)
            if number in divided:
                left_out.add(_REPEATED, image.where)
            elif not splits or image.text("split") in splits:
                yield from _divided(image, left_out)
            divided.add(number)
    if unknown := set(splits) - there:
        known = f"there are {', '.join(sorted(there))}" if there else "the file has no splits: leave that out"
        raise UserError(f"{captions}: no image is of the `splits` {', '.join(sorted(unknown))}; {known}")
    if not there:
        yield from held.lines(left_out)


def _divided(image: Fields, left_out: LeftOut) -> Iterator[Line]:
    """An image of a file with Karpathy's splits."""
    name = image.text("filename")
    names = (f"{image.text('filepath')}/{name}", name) if "filepath" in image else (name,)
    meta = {**image.kept("cocoid", "imgid"), "split": image.text("split"), **image.kept("sentids")}
    texts = [each.text("raw") for each in image.objects("sentences")]
    yield from _line(image.where, names, texts, _number(image), meta, left_out)


def _number(image: Fields) -> int | str:
    """What tells an image of a file with Karpathy's splits from the others."""
    return next((image.identity(name) for name in ("cocoid", "imgid") if name in image), image.text("filename"))


class _Held:
    """What COCO's own file says: (n,) images and (m,) captions in their order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._images, self._names = array("q"), list[str]()
        self._shown, self._numbers, self._texts = array("q"), array("q"), list[str]()

    def add_image(self, image: Fields) -> None:
        self._images.append(image.integer("id"))
        self._names.append(image.text("file_name"))

    def add_caption(self, caption: Fields) -> None:
        self._shown.append(caption.integer("image_id"))
        self._numbers.append(caption.integer("id"))
        self._texts.append(caption.text("caption"))

    def lines(self, left_out: LeftOut) -> Iterator[Line]:
        if not self._images or not self._texts:
            raise UserError(f'{self._path}: no "images" or no "annotations"; expected COCO\'s captions_*.json')
        shown = np.array(self._shown)
        order = np.argsort(shown, kind="stable")
        unknown = np.setdiff1d(shown, np.array(self._images))
        if len(unknown):
            raise UserError(f'{self._path}: "annotations": "image_id" {unknown[0]} is not among the "images"')
        starts, ends = (np.searchsorted(shown[order], self._images, side=side) for side in ("left", "right"))
        known = set[int]()
        for image, name, start, end in zip(self._images, self._names, starts, ends, strict=True):
            if image in known:
                left_out.add(_REPEATED, f"{self._path}: image {image}")
                continue
            known.add(image)
            rows = order[start:end].tolist()
            found = _SPLIT.search(name) or _SPLIT.search(self._path.name)
            names = (f"{found[0]}/{name}", name) if found else (name,)
            meta: dict[str, Any] = {"caption_ids": [self._numbers[row] for row in rows]}
            meta |= {"split": found[0]} if found else {}
            texts = [self._texts[row] for row in rows]
            yield from _line(f"{self._path}: image {image}", names, texts, image, meta, left_out)


def _line(
    where: str, names: tuple[str, ...], captions: list[str], number: int | str, meta: dict[str, Any], left_out: LeftOut
) -> Iterator[Line]:
    """The line of one image; none where it has no caption."""
    for _ in range(captions.count("")):
        left_out.add("empty captions", where)
    if any(captions):
        fields = {"captions": [caption for caption in captions if caption], "id": number, "meta": meta}
        yield Line(where, names, fields)
    else:
        left_out.add("images without caption", where)
