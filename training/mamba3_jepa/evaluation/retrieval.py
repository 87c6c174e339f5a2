"""Retrieval in both directions, and visual question answering by the nearest answer embedding.

Shapes: N samples, T distinct texts, Q queries, G gallery entries, E embedding size. Embeddings need not be
normalised: every score is a cosine. A query whose right answer is tied with wrong ones counts as if all of
those stood above it, so a collapsed model scores nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3_jepa.data.plain_text import plain_text

T = TypeVar("T")

RECALL_AT = (1, 5, 10)

# Two float32 cosines closer than this differ by rounding only.
_TIE = 1e-6
# Scores held in memory at once: 64 MiB of float32.
_CHUNK_SCORES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Recall at k in [0, 1] for each direction, and the sizes of the two galleries."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    gallery_texts: int
    gallery_images: int


@dataclass(frozen=True, kw_only=True)
class AnswerReport:
    """Share of questions answered right, in [0, 1]: all of them, and of each question type, the most frequent first,
    with its number of questions."""

    accuracy: float
    by_type: dict[str, tuple[float, int]]
    n_questions: int


def retrieval(predicted: Tensor, target: Tensor, texts: Sequence[str]) -> RetrievalReport:
    """Recall at 1, 5 and 10 of predictions against target embeddings; identical texts are the same text.

    Image to text: each of the N predictions ranks the T distinct texts (embedding of the first sample that
    has the text); the hit is its own text. Text to image: each distinct text ranks the N predictions; any
    sample that has the text is a hit. Memory does not grow with N * T: scores are made a block of queries at
    a time.

    Args:
        predicted: (N, E) predicted embeddings, from image and query.
        target: (N, E) embeddings of the samples' texts.
        texts: the N texts.

    Raises:
        ValueError: no samples, or the three do not agree in N and E.
    """
    _check_pairs(predicted, target, texts)
    labels, first = distinct(texts)
    images, gallery, own = _unit(predicted), _unit(target[first]), _pairs(range(len(texts)), labels, predicted)
    return RetrievalReport(
        image_to_text=_recall(_ranks(images, gallery, own)),
        text_to_image=_recall(_ranks(gallery, images, own.flip(0))),
        gallery_texts=len(first),
        gallery_images=len(texts),
    )


def caption_retrieval(
    predicted: Tensor, captions: Tensor, texts: Sequence[str], image_of: Sequence[int]
) -> RetrievalReport:
    """Recall at 1, 5 and 10 where images have several captions each, as COCO and Flickr30K are measured.

    Image to text: each of the N images ranks all T captions; the hit is any of its own. Text to image: each of the T
    captions ranks the N images; the hit is the image it belongs to. A caption that two images have in the same words
    is right for both.

    Args:
        predicted: (N, E) predicted embeddings of the images, N > 0; each has a caption.
        captions: (T, E) embeddings of all captions.
        texts: the T captions.
        image_of: for each of them the number of its image.

    Raises:
        ValueError: lengths differ, an image has no caption, or a caption belongs to none of the images.
    """
    _check_gallery(predicted, captions, texts)
    if len(image_of) != len(texts) or set(image_of) != set(range(len(predicted))):
        raise ValueError(
            f"expected images for {len(texts)} captions and captions for {len(predicted)} images, "
            f"found {len(image_of)} captions of {len(set(image_of))} images"
        )
    labels, first = distinct(texts)
    images, gallery, own = _unit(predicted), _unit(captions[first]), _pairs(image_of, labels, predicted)
    copies = torch.bincount(own.new_tensor(labels)).float()
    return RetrievalReport(
        image_to_text=_recall(_ranks(images, gallery, own, copies)),
        text_to_image=_recall(_ranks(gallery, images, own.flip(0))[labels]),
        gallery_texts=len(texts),
        gallery_images=len(predicted),
    )


def distinct(texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """For each text the number of its distinct text, and for each distinct text where it occurs first."""
    numbers: dict[str, int] = {}
    first: list[int] = []
    labels = []
    for position, text in enumerate(texts):
        if text not in numbers:
            numbers[text] = len(first)
            first.append(position)
        labels.append(numbers[text])
    return labels, first


def top_texts(
    predicted: Tensor, text_embeddings: Tensor, texts: Sequence[T], k: int = 5
) -> list[list[tuple[T, float]]]:
    """The k nearest texts, or whatever has embeddings, of each prediction with their cosines, nearest first (all G when
    G < k).

    Of equal cosines the first text comes first.

    Args:
        predicted: (Q, E).
        text_embeddings: (G, E), one row for each of the G texts, which should be distinct.
    """
    _check_gallery(predicted, text_embeddings, texts)
    queries, gallery = _unit(predicted), _unit(text_embeddings)
    found: list[list[tuple[T, float]]] = []
    for block in _blocks(len(queries), len(gallery)):
        scores = (queries[block] @ gallery.T).cpu()
        for row, least in zip(scores, scores.topk(min(k, len(texts)), dim=1).values[:, -1], strict=True):
            # topk keeps any of equal scores; sorting all of them stably would take long in a large gallery
            columns = (~(row < least)).nonzero().flatten()
            ranked, order = row[columns].sort(descending=True, stable=True)
            best = zip(columns[order].tolist()[:k], ranked.tolist()[:k], strict=True)
            found.append([(texts[column], score) for column, score in best])
    return found


def nearest_answer(predicted: Tensor, answer_embeddings: Tensor, answers: Sequence[str]) -> list[str]:
    """The answer whose embedding (G, E) has the greatest cosine with each prediction (Q, E)."""
    return [row[0][0] for row in top_texts(predicted, answer_embeddings, answers, k=1)]


def label_recall(predicted: Tensor, label_embeddings: Tensor, right: Sequence[int]) -> dict[int, float]:
    """Zero-shot classification: the share of predictions with their right label among the nearest k, k as in RECALL_AT.

    Args:
        predicted: (Q, E), Q > 0.
        label_embeddings: (G, E), one row for each of the G labels.
        right: for each of the Q predictions the number of its label.
    """
    own = _pairs(range(len(right)), right, predicted)
    return _recall(_ranks(_unit(predicted), _unit(label_embeddings), own))


def answer_accuracy(given: Sequence[str], expected: Sequence[str], types: Sequence[str]) -> AnswerReport:
    """Share of answers that are the expected text, but for case and white space, over all and by question type.

    Raises:
        ValueError: no answers, or lengths that differ.
    """
    if not given or len({len(given), len(expected), len(types)}) != 1:
        raise ValueError(f"{len(given)} answers, {len(expected)} right ones, {len(types)} questions")
    right = [plain_text(answer) == plain_text(wanted) for answer, wanted in zip(given, expected, strict=True)]
    groups: dict[str, list[bool]] = defaultdict(list)
    for kind, is_right in zip(types, right, strict=True):
        groups[kind].append(is_right)
    by_frequency = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return AnswerReport(
        accuracy=sum(right) / len(right),
        by_type={kind: (sum(hits) / len(hits), len(hits)) for kind, hits in by_frequency},
        n_questions=len(right),
    )


def _pairs(images: Sequence[int], texts: Sequence[int], like: Tensor) -> Tensor:
    """(2, P) the images with their texts, on the device of `like`."""
    return torch.tensor([list(images), list(texts)], device=like.device)


def _ranks(queries: Tensor, gallery: Tensor, right: Tensor, copies: Tensor | None = None) -> Tensor:
    """(Q,) number of wrong entries of the gallery (G, E) that are not clearly below the best right one.

    Args:
        right: (2, P), the queries with the entries that are right for them; each query has one at least.
        copies: (G,) how many entries each one stands for, in float32; one each unless given.
    """
    ranks = []
    right = right[:, right[0].argsort()]
    query, entry = right[0].contiguous(), right[1]
    for block in _blocks(len(queries), len(gallery)):
        scores = queries[block] @ gallery.T
        first, last = torch.searchsorted(query, query.new_tensor([block.start, block.stop])).tolist()
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[query[first:last] - block.start, entry[first:last]] = True
        best_right = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(_count_not_below(scores.masked_fill_(is_right, -torch.inf), best_right, copies))
    return torch.cat(ranks)


def _count_not_below(scores: Tensor, right: Tensor, copies: Tensor | None) -> Tensor:
    """(Q, G), (Q, 1) -> (Q,). NaN is below nothing; a right score that is NaN is a miss at every k."""
    not_below = ~(scores < right - _TIE)
    count = not_below.sum(dim=1) if copies is None else (not_below.float() @ copies).long()
    return torch.where(right[:, 0].isnan(), torch.iinfo(torch.int64).max, count)


def _recall(ranks: Tensor) -> dict[int, float]:
    return {k: (ranks < k).double().mean().item() for k in RECALL_AT}


def _blocks(n_queries: int, n_gallery: int) -> Iterator[slice]:
    size = max(1, _CHUNK_SCORES // n_gallery)
    for start in range(0, n_queries, size):
        yield slice(start, min(start + size, n_queries))


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1)


def _check_pairs(predicted: Tensor, target: Tensor, texts: Sequence[str]) -> None:
    if predicted.ndim != 2 or predicted.shape != target.shape or len(texts) != len(predicted):
        raise ValueError(
            f"expected (N, E), (N, E) and N texts, found {tuple(predicted.shape)}, {tuple(target.shape)} "
            f"and {len(texts)}"
        )
    if not texts:
        raise ValueError("retrieval needs at least one sample")


def _check_gallery(predicted: Tensor, gallery: Tensor, texts: Sequence[object]) -> None:
    agree = predicted.ndim == gallery.ndim == 2 and predicted.shape[1] == gallery.shape[1]
    if not agree or len(texts) != len(gallery) or not texts:
        raise ValueError(
            f"expected (Q, E), (G, E) and G > 0 texts, found {tuple(predicted.shape)}, {tuple(gallery.shape)}"
            f" and {len(texts)}"
        )
