"""How well embeddings use their space: alignment, uniformity, effective rank, and warnings of collapse.

Shapes: N embeddings, E their size. All of it is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Uniformity looks at every pair of at most this many embeddings, taken evenly over all of them.
MAX_UNIFORMITY_SAMPLES = 4096

# Below this mean squared distance from their mean, unit vectors have an average pairwise cosine above 0.99.
POINT_COLLAPSE_SPREAD = 0.01
# Below this share of the attainable rank, few directions carry everything. Captions made of a few attributes
# rightly have a rank near the number of attribute values, so the share is small.
RANK_COLLAPSE_SHARE = 0.02
# Below this effective rank the embeddings lie on a line, whatever N and E are.
LINE_RANK = 1.5
# A few embeddings cannot tell: their rank is small anyway.
MIN_ATTAINABLE_RANK = 4
# Above this cosine two texts are one to whoever asks for the nearest.
SAME_POINT_COSINE = 0.999


def alignment(predicted: Tensor, target: Tensor) -> float:
    """Mean squared distance of positive pairs, in [0, 4] for unit vectors (Wang & Isola 2020, alpha = 2).

    Args:
        predicted, target: (N, E), N > 0.
    """
    if predicted.shape != target.shape or not len(predicted):
        raise ValueError(f"expected two (N, E) with N > 0, found {tuple(predicted.shape)}, {tuple(target.shape)}")
    return (predicted.double() - target.double()).square().sum(dim=-1).mean().item()


def uniformity(embeddings: Tensor) -> float:
    """log of the mean over pairs of exp(-2 d^2): 0 when all are one point, about -4 when spread evenly.

    Wang & Isola 2020 (arXiv 2005.10242), t = 2, over all pairs i < j. With more than `MAX_UNIFORMITY_SAMPLES`
    embeddings an evenly spaced choice of that many is used. NaN for fewer than two.

    Args:
        embeddings: (N, E) unit vectors.
    """
    n = len(embeddings)
    if n < 2:
        return math.nan
    if n > MAX_UNIFORMITY_SAMPLES:
        embeddings = embeddings[torch.linspace(0, n - 1, MAX_UNIFORMITY_SAMPLES).round().long()]
    squared_distances = torch.pdist(embeddings.double()).square()
    return (torch.logsumexp(-2 * squared_distances, dim=0) - math.log(len(squared_distances))).item()


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred embeddings (Roy & Vetterli 2007).

    Between 1 and min(N - 1, E); 0 when all embeddings are equal, NaN when one is not finite.

    Args:
        embeddings: (N, E), N > 0.
    """
    centred = _centred(embeddings)
    if not centred.isfinite().all():
        return math.nan
    # Eigenvalues of the smaller Gram matrix are the squared singular values: cheap for 100,000 embeddings.
    gram = centred.T @ centred if centred.shape[0] > centred.shape[1] else centred @ centred.T
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular_values.sum()
    if total <= 1e-12 * embeddings.double().norm():
        return 0.0
    return torch.special.entr(singular_values / total).sum().exp().item()


def spread(embeddings: Tensor) -> float:
    """Mean squared distance from the mean: 1 - |mean|^2 for unit vectors, 0 for one point."""
    return _centred(embeddings).square().sum(dim=-1).mean().item()


def collapse_warning(embeddings: Tensor, name: str, n_distinct: int | None = None) -> str | None:
    """A sentence that says aloud that the embeddings have collapsed, or None.

    Collapsed means: not finite; one point (`spread` under `POINT_COLLAPSE_SPREAD`); or few directions, that
    is an effective rank under `RANK_COLLAPSE_SHARE` of the attainable rank min(n_distinct - 1, E), and under
    `LINE_RANK` in any case. The rank is not judged when the attainable one is under `MIN_ATTAINABLE_RANK`.

    Args:
        embeddings: (N, E) unit vectors.
        name: what they are, for the sentence, such as "predicted".
        n_distinct: how many different things they stand for; N unless given. Thirteen possible answers cannot
            span more than twelve directions, however many samples there are.
    """
    if not embeddings.isfinite().all():
        return f"the {name} embeddings are not finite"
    n_distinct = len(embeddings) if n_distinct is None else n_distinct
    attainable = min(n_distinct - 1, embeddings.shape[1])
    if attainable < 1:
        return None
    spread_now = spread(embeddings)
    if spread_now < POINT_COLLAPSE_SPREAD:
        return (
            f"the {name} embeddings have collapsed to one point: their mean squared distance from their "
            f"mean is {spread_now:.2g}, healthy ones are near 1"
        )
    rank = effective_rank(embeddings)
    if attainable >= MIN_ATTAINABLE_RANK and rank < max(LINE_RANK, RANK_COLLAPSE_SHARE * attainable):
        return (
            f"the {name} embeddings have collapsed to few directions: their effective rank is {rank:.1f} "
            f"of at most {attainable}"
        )
    return None


def _centred(embeddings: Tensor) -> Tensor:
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(f"expected (N, E) with N > 0, found {tuple(embeddings.shape)}")
    embeddings = embeddings.double()
    return embeddings - embeddings.mean(dim=0)


def same_point_warning(embeddings: Tensor, texts: Sequence[str]) -> str | None:
    """A sentence that names texts whose embeddings have fallen on one point, so that none is nearer than the other; or
    None.

    Args:
        embeddings: (N, E) unit vectors of different texts, of which the first is named first.
        texts: the N texts.
    """
    cosine = (embeddings.double() @ embeddings.double().T).triu(diagonal=1)
    pairs = (cosine > SAME_POINT_COSINE).nonzero().tolist()
    if not pairs:
        return None
    i, j = max(pairs, key=lambda pair: cosine[pair[0], pair[1]].item())
    others = f", and {len(pairs) - 1} more pairs of frequent answers" if len(pairs) > 1 else ""
    return (
        f"the answers {texts[i]!r} and {texts[j]!r} lie on one point (cosine {cosine[i, j]:.5f}){others}: which of "
        "them is nearest says nothing"
    )
