"""How near an episode of a memory, a picture and a question seen before, is to what is asked now.

Letters: B lookups, P episodes, N visual tokens, V vision width, S length of the key, E embedding width.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from mamba3_jepa.config import PICTURE_CELLS


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each of (B, X) with each of (P, X) -> (B, P), in float32."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def picture_keys(tokens: Tensor, has_image: Tensor) -> Tensor:
    """What pictures look like, be they dark or pale: the mean token of each quarter, less the mean of the four.

    Args:
        tokens: (B, N, V) visual tokens of square pictures, row by row. Of an odd number of rows the middle one is in
            both halves, and so with columns.
        has_image: (B,) bool.

    Returns:
        (B, 4 V) float32, a quarter after the other, row by row; zeros where there is no picture.
    """
    side = math.isqrt(tokens.shape[1])
    if not side:
        return tokens.new_zeros(len(tokens), PICTURE_CELLS * tokens.shape[2]).float()
    grid = tokens.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    cells = F.adaptive_avg_pool2d(grid, math.isqrt(PICTURE_CELLS)).flatten(2).transpose(1, 2)
    keys = (cells - cells.mean(dim=1, keepdim=True)).flatten(1)
    return keys * has_image.unsqueeze(1)


def episode_scores(
    seen: Tensor, asked: Tensor, keys: Tensor, questions: Tensor, *, mean: Tensor, blend: Tensor | float
) -> Tensor:
    """blend * cos(seen - mean, keys - mean) + (1 - blend) * cos(asked, questions), in float32.

    The mean is taken away because all pictures, and all pooled states, have much in common.

    Args:
        seen: (B, S) pooled states, or what `picture_keys` gives.
        asked: (B, E) the questions by the Y-Encoder.
        keys: (P, S) the same of the episodes.
        questions: (P, E) their questions by the Y-Encoder.
        mean: (S,).
        blend: in [0, 1].

    Returns:
        (B, P).
    """
    alike = cosines(seen.float() - mean, keys.float() - mean)
    return blend * alike + (1 - blend) * cosines(asked, questions)
