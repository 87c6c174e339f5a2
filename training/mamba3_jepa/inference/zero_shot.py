"""What needs no training for its task: find an image by a text, and tell classes apart by their names.

Shape letters: B images, L labels, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mamba3_jepa.contract import CLASS_TEMPLATE
from mamba3_jepa.data.images import load_image
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.cards import draw_cards, text_rows
from mamba3_jepa.evaluation.retrieval import top_texts
from mamba3_jepa.evaluation.zero_shot import class_embeddings
from mamba3_jepa.files.path_text import path_text
from mamba3_jepa.inference.embeddings import NamedEmbeddings, embed_texts
from mamba3_jepa.models.vljepa import Mamba3Jepa

MAX_CARDS = 24


def search_images(model: Mamba3Jepa, text: str, images: NamedEmbeddings, k: int) -> list[tuple[str, float]]:
    """The k images whose predicted embeddings are nearest to a text's, with their cosines, nearest first."""
    return top_texts(embed_texts(model, [text]).embeddings, images.embeddings, images.names, k)[0]


def class_probabilities(embeddings: Tensor, label_embeddings: Tensor, temperature: float) -> Tensor:
    """(B, E) and (L, E) -> (B, L): softmax over the labels of cosine / temperature, in float32.

    The greatest cosine is subtracted before the division, which a tiny temperature makes infinite.
    """
    cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(label_embeddings.float(), dim=-1).T
    return ((cosines - cosines.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)


def classify(
    model: Mamba3Jepa,
    images: NamedEmbeddings,
    labels: Sequence[str],
    *,
    templates: Sequence[str] = (CLASS_TEMPLATE,),
    temperature: float,
) -> list[list[tuple[str, float]]]:
    """For each image every label with its probability, most probable first.

    A label stands where the mean of its texts does, one for each template (`class_embeddings`).

    Raises:
        UserError: fewer than two different labels, or an empty one.
    """
    labels = list(dict.fromkeys(label.strip() for label in labels))
    if len(labels) < 2 or "" in labels:
        raise UserError(f"expected at least two different labels, none of them empty, found {labels}")
    embedded = class_embeddings(model, labels, templates)
    probabilities = class_probabilities(images.embeddings, embedded, temperature)
    probabilities, order = probabilities.sort(descending=True, stable=True)
    return [
        [(labels[i], probability) for i, probability in zip(row_order, row, strict=True)]
        for row_order, row in zip(order.tolist(), probabilities.tolist(), strict=True)
    ]


def search_sheet(text: str, found: Sequence[tuple[str, float]], path: Path) -> Path:
    """A PNG with the images found, best first (at most `MAX_CARDS`), each with its file name and cosine.

    Raises:
        UserError: it cannot be written.
    """
    cards: list[Image.Image | None] = []
    rows = []
    for number, (name, cosine) in enumerate(found[:MAX_CARDS], start=1):
        cards.append(load_image(name))
        rows.append(
            text_rows(f"{number}. {text}", bold=True, max_lines=2)
            + text_rows(path_text(Path(name).name), score=cosine, max_lines=2, space_above=6)
        )
    return draw_cards(cards, rows, path)
