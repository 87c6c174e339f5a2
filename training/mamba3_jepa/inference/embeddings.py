"""Embeddings of image files and texts, with their names.

Shape letters: N images or texts, D width of the pooled state, E embedding width.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mamba3_jepa.data.images import IMAGE_SUFFIXES, BadSampleError, load_image
from mamba3_jepa.data.sample import OnBadSample
from mamba3_jepa.data.survey import Survey, described, nameless_data, suffix_of, walk_visible
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.files.safetensors_file import write_safetensors
from mamba3_jepa.files.special import is_special
from mamba3_jepa.files.whole_file import whole_file
from mamba3_jepa.models.finite import demand_finite
from mamba3_jepa.models.vljepa import Mamba3Jepa

logger = logging.getLogger(__name__)

FORMAT = "mamba3-jepa embeddings"


@dataclass(frozen=True, kw_only=True)
class NamedEmbeddings:
    """names: N texts, or file names as Python opens them; embeddings: (N, E) float32 of unit length, on the CPU."""

    names: list[str]
    embeddings: Tensor


@dataclass(frozen=True, kw_only=True)
class ImageEmbeddings(NamedEmbeddings):
    """pooled: the states (N, D) float32, on the CPU, that the images' embeddings are read from, for the confusion
    monitor."""

    pooled: Tensor


def find_images(images: Sequence[Path], image_dir: Path | None) -> list[Path]:
    """The given files, then every image under the folder that is not hidden, sorted by path.

    What looks like an image and is not read is said, with its number.

    Raises:
        UserError: no image at all, or no such folder, or one that cannot be read.
    """
    found = list(images)
    if image_dir is not None:
        if not image_dir.is_dir():
            found_file = ": it is a file; give it as `images`" if image_dir.exists() else ""
            raise UserError(f"`image_dir` {image_dir}: there is no such folder{found_file}")
        survey = Survey.of(image_dir)
        walked = (image_dir / folder / name for folder, names in walk_visible(image_dir) for name in names)
        inside = sorted((path for path in walked if suffix_of(path.name) in IMAGE_SUFFIXES), key=_bytes)
        special = {path for path in inside if is_special(path)}
        inside = [path for path in inside if path not in special]
        unread = "; ".join(filter(None, [survey.unread(tables=False), _of_no_use_here(survey, len(special))]))
        if not inside:
            unread = unread or nameless_data(image_dir)
            seen = f", but {unread}" if unread else ""
            raise UserError(f"`image_dir` {image_dir}: no image in it ({', '.join(IMAGE_SUFFIXES)}){seen}")
        if unread:
            logger.warning("%s: not read: %s", path_text(image_dir), unread)
        found += inside
    if not found:
        raise UserError("no images: give `images` or `image_dir`")
    return found


def _of_no_use_here(survey: Survey, n_special: int) -> str:
    parts = [described({".tar": survey.n_shards})] if survey.n_shards else []
    parts += [f"{n_special} pipes, sockets or devices"] if n_special else []
    return "; ".join(parts)


def _bytes(path: Path) -> list[bytes]:
    """What paths are sorted by: a name that is not UTF-8 has its place too."""
    return [os.fsencode(part) for part in path.parts]


def embed_images(
    model: Mamba3Jepa,
    paths: Sequence[Path],
    question: str | None = None,
    *,
    batch_size: int = 32,
    on_bad_sample: OnBadSample = "error",
) -> ImageEmbeddings:
    """Predicted embeddings of images, all asked the same question (None: the prompt for describing them).

    Raises:
        UserError: an image cannot be read, or, with "skip", none of them can; an embedding is not finite.
    """
    names: list[str] = []
    embeddings: list[Tensor] = []
    pooled: list[Tensor] = []
    bad: list[str] = []
    for start in range(0, len(paths), batch_size):
        images: list[Image.Image] = []
        for path in paths[start : start + batch_size]:
            try:
                images.append(load_image(path))
                names.append(str(path))
            except BadSampleError as error:
                if on_bad_sample == "error":
                    raise
                bad.append(str(error))
        if images:
            observed = model.observe(images, [question] * len(images), batch_size)
            embedded = observed.embedding.cpu()
            embeddings.append(demand_finite(embedded, model, "the embedding of", names[-len(images) :]))
            pooled.append(observed.pooled.cpu())
    if bad:
        logger.warning("%d of %d images left out, the first: %s", len(bad), len(paths), bad[0])
    if not embeddings:
        raise UserError("none of the images can be read")
    return ImageEmbeddings(names=names, embeddings=torch.cat(embeddings), pooled=torch.cat(pooled))


def embed_texts(model: Mamba3Jepa, texts: Sequence[str], batch_size: int = 64) -> NamedEmbeddings:
    """Target embeddings of texts, as the Y-Encoder gives them to answers and captions.

    Raises:
        UserError: no text, or an empty one; an embedding is not finite.
    """
    embedded = model.embed_text(texts, batch_size).cpu()
    demand_finite(embedded, model, "the embedding of the text", texts)
    return NamedEmbeddings(names=list(texts), embeddings=embedded)


def write_embeddings(path: Path, groups: Mapping[str, NamedEmbeddings]) -> list[Path]:
    """Write embeddings, each file whole or not at all; returns the files written.

    `.safetensors`: a tensor (N, E) for each group by its name, and its names as a JSON list in the metadata.
    `.npy`: the array (N, E) of the only group, with the names in a `.json` file beside it. File names are written as
    `path_text` gives them.

    Raises:
        UserError: a file cannot be written.
    """
    names = {name: [path_text(item) for item in group.names] for name, group in groups.items()}
    if path.suffix == ".safetensors":
        metadata = {name: json.dumps(items, ensure_ascii=False) for name, items in names.items()}
        write_safetensors(
            path, {name: group.embeddings for name, group in groups.items()}, {"format": FORMAT} | metadata
        )
        return [path]
    (group,) = groups.values()
    names_path = path.with_suffix(".json")
    if names_path.is_dir():
        raise UserError(f"{names_path} is a folder where the names are to go; choose another `output`")
    _write_npy(path, group.embeddings.numpy())
    write_json(names_path, names)
    return [path, names_path]


def _write_npy(path: Path, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array)
    with whole_file(path) as file:  # not np.save, which cannot write to a pipe
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
