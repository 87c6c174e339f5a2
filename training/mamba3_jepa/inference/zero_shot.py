"""What needs no training for its task: find an image by a text, and tell classes apart by their names.

Shape letters: B images, L labels, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mamba3_jepa.contract import CLASS_TEMPLATE
from mamba3_jepa.data.images import load_image
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.cards import draw_cards, heading, text_rows
from mamba3_jepa.evaluation.retrieval import top_texts
from mamba3_jepa.evaluation.zero_shot import class_embeddings
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.inference.confusion import Confusion, judge
from mamba3_jepa.inference.embeddings import ImageEmbeddings, embed_texts
from mamba3_jepa.models.vljepa import Mamba3Jepa

MAX_CARDS = 24


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that a search found: its name, its cosine with the text, and how confused the model is by what it was
    asked about the image (None without recursion)."""

    name: str
    cosine: float
    confusion: Confusion | None


@dataclass(frozen=True, kw_only=True)
class Classified:
    """An image: its name, labels with their probabilities, most probable first, and how confused the model is by what
    it was asked about the image (None without recursion)."""

    name: str
    labels: list[tuple[str, float]]
    confusion: Confusion | None


def search_images(
    model: Mamba3Jepa, text: str, images: ImageEmbeddings, k: int, *, batch_size: int = 32
) -> list[Found]:
    """The k images whose predicted embeddings are nearest to a text's, nearest first.

    Confusion moves no image, so that it is judged of these k only, with answers spoken `batch_size` at once where the
    monitor hears them.

    Raises:
        UserError: an empty text; an embedding or a score is not finite.
    """
    query = embed_texts(model, [text]).embeddings
    best = top_texts(query, images.embeddings, range(len(images.names)), k)[0]
    confusions = _confusions(model, images, [row for row, _ in best], batch_size)
    return [
        Found(name=images.names[row], cosine=cosine, confusion=confusion)
        for (row, cosine), confusion in zip(best, confusions, strict=True)
    ]


def _confusions(
    model: Mamba3Jepa, images: ImageEmbeddings, rows: Sequence[int], batch_size: int
) -> list[Confusion | None]:
    """How confused the model is by what it was asked about these images."""
    names = [images.names[row] for row in rows]
    return judge(model, images.embeddings[rows], images.pooled[rows], names, batch_size).confusions


def class_probabilities(embeddings: Tensor, label_embeddings: Tensor, temperature: float) -> Tensor:
    """(B, E) and (L, E) -> (B, L): softmax over the labels of cosine / temperature, in float32.

    The greatest cosine is subtracted before the division, which a tiny temperature makes infinite.
    """
    cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(label_embeddings.float(), dim=-1).T
    return ((cosines - cosines.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)


def classify(
    model: Mamba3Jepa,
    images: ImageEmbeddings,
    labels: Sequence[str],
    *,
    templates: Sequence[str] = (CLASS_TEMPLATE,),
    temperature: float,
    batch_size: int = 32,
) -> list[Classified]:
    """Each image with every label.

    A label stands where the mean of its texts does, one for each template (`class_embeddings`). Confusion is judged
    with answers spoken `batch_size` at once where the monitor hears them.

    Raises:
        UserError: fewer than two different labels, or an empty one; a score of confusion is not finite.
    """
    labels = list(dict.fromkeys(label.strip() for label in labels))
    if len(labels) < 2 or "" in labels:
        raise UserError(f"expected at least two different labels, none of them empty, found {labels}")
    embedded = class_embeddings(model, labels, templates)
    probabilities = class_probabilities(images.embeddings, embedded, temperature)
    probabilities, order = probabilities.sort(descending=True, stable=True)
    ranked = [
        [(labels[i], probability) for i, probability in zip(row_order, row, strict=True)]
        for row_order, row in zip(order.tolist(), probabilities.tolist(), strict=True)
    ]
    confusions = _confusions(model, images, range(len(images.names)), batch_size)
    return [
        Classified(name=name, labels=best, confusion=confusion)
        for name, best, confusion in zip(images.names, ranked, confusions, strict=True)
    ]


def search_sheet(text: str, found: Sequence[Found], path: Path) -> Path:
    """A PNG with the images found, best first (at most `MAX_CARDS`), each with its file name and cosine, and where the
    model is confused with that.

    Raises:
        UserError: it cannot be written.
    """
    cards: list[Image.Image | None] = []
    rows = []
    for number, each in enumerate(found[:MAX_CARDS], start=1):
        cards.append(load_image(each.name))
        is_confused = each.confusion is not None and each.confusion.confused
        rows.append(
            text_rows(f"{number}. {text}", bold=True, max_lines=2)
            + text_rows(path_text(Path(each.name).name), score=each.cosine, max_lines=2, space_above=6)
            + ([heading("not sure", space_above=6)] if is_confused else [])
        )
    return draw_cards(cards, rows, path)
