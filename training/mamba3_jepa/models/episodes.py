"""How near an episode of a memory, a picture and a question seen before, is to what is asked now.

Letters: B lookups, P episodes, D width of the pooled state, E embedding width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each of (B, X) with each of (P, X) -> (B, P), in float32."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def episode_scores(
    pooled: Tensor, asked: Tensor, states: Tensor, questions: Tensor, *, mean: Tensor, blend: Tensor | float
) -> Tensor:
    """blend * cos(pooled - mean, states - mean) + (1 - blend) * cos(asked, questions), in float32.

    The mean is taken away because all pooled states have much in common, whatever is seen and asked.

    Args:
        pooled: (B, D) pooled states.
        asked: (B, E) the questions by the Y-Encoder.
        states: (P, D) pooled states of the episodes.
        questions: (P, E) their questions by the Y-Encoder.
        mean: (D,) mean pooled state.
        blend: in [0, 1].

    Returns:
        (B, P).
    """
    seen = cosines(pooled.float() - mean, states.float() - mean)
    return blend * seen + (1 - blend) * cosines(asked, questions)
