"""Retrieval in both directions, and visual question answering by the nearest answer embedding.

Shapes: N samples, T distinct texts, Q queries, G gallery entries, E embedding size. Embeddings need not be
normalised: every score is a cosine. A query whose right answer is tied with wrong ones counts as if all of
those stood above it, so a collapsed model scores nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Share of questions answered right, in [0, 1]: all of them, and by question type where known."""

    accuracy: float
    by_type: dict[str, float]
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
    label_of_sample = torch.tensor(labels, device=predicted.device)
    images, gallery = _unit(predicted), _unit(target[first])
    return RetrievalReport(
        image_to_text=_recall(_image_to_text_ranks(images, gallery, label_of_sample)),
        text_to_image=_recall(_text_to_image_ranks(gallery, images, label_of_sample)),
        gallery_texts=len(first),
        gallery_images=len(texts),
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
    predicted: Tensor, text_embeddings: Tensor, texts: Sequence[str], k: int = 5
) -> list[list[tuple[str, float]]]:
    """The k nearest texts of each prediction with their cosines, nearest first (all G texts when G < k).

    Of equal cosines the first text comes first.

    Args:
        predicted: (Q, E).
        text_embeddings: (G, E), one row for each of the G texts, which should be distinct.
    """
    _check_gallery(predicted, text_embeddings, texts)
    queries, gallery = _unit(predicted), _unit(text_embeddings)
    found: list[list[tuple[str, float]]] = []
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
    labels = torch.tensor(right, device=predicted.device)
    return _recall(_image_to_text_ranks(_unit(predicted), _unit(label_embeddings), labels))


def answer_accuracy(
    given: Sequence[str], expected: Sequence[str], question_types: Sequence[str] | None = None
) -> AnswerReport:
    """Share of answers that are exactly the expected text, over all and per question type.

    Raises:
        ValueError: no answers, or lengths that differ.
    """
    if not given or len(given) != len(expected):
        raise ValueError(f"{len(given)} answers for {len(expected)} questions")
    right = [answer == wanted for answer, wanted in zip(given, expected, strict=True)]
    groups: dict[str, list[bool]] = defaultdict(list)
    if question_types is not None:
        for kind, is_right in zip(question_types, right, strict=True):
            groups[kind].append(is_right)
    return AnswerReport(
        accuracy=sum(right) / len(right),
        by_type={kind: sum(hits) / len(hits) for kind, hits in sorted(groups.items())},
        n_questions=len(right),
    )


def _image_to_text_ranks(images: Tensor, gallery: Tensor, label_of_sample: Tensor) -> Tensor:
    """(N,) number of wrong texts that are not clearly below the right one."""
    ranks = []
    for block in _blocks(len(images), len(gallery)):
        scores = images[block] @ gallery.T
        right = scores.gather(1, label_of_sample[block, None])
        ranks.append(_count_not_below(scores, right) - 1)  # the right text itself
    return torch.cat(ranks)


def _text_to_image_ranks(gallery: Tensor, images: Tensor, label_of_sample: Tensor) -> Tensor:
    """(T,) number of wrong samples that are not clearly below the best right one."""
    ranks = []
    for block in _blocks(len(gallery), len(images)):
        scores = gallery[block] @ images.T
        numbers = torch.arange(block.start, block.stop, device=images.device)
        is_right = label_of_sample[None, :] == numbers[:, None]
        best_right = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(_count_not_below(scores.masked_fill(is_right, -torch.inf), best_right))
    return torch.cat(ranks)


def _count_not_below(scores: Tensor, right: Tensor) -> Tensor:
    """(Q, G), (Q, 1) -> (Q,). NaN is below nothing; a right score that is NaN is a miss at every k."""
    count = (~(scores < right - _TIE)).sum(dim=1)
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


def _check_gallery(predicted: Tensor, gallery: Tensor, texts: Sequence[str]) -> None:
    agree = predicted.ndim == gallery.ndim == 2 and predicted.shape[1] == gallery.shape[1]
    if not agree or len(texts) != len(gallery) or not texts:
        raise ValueError(
            f"expected (Q, E), (G, E) and G > 0 texts, found {tuple(predicted.shape)}, {tuple(gallery.shape)}"
            f" and {len(texts)}"
        )
