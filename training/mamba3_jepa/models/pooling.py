"""From token states to an embedding on the unit sphere. Letters: B batch, L length, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3_jepa.errors import UserError

NORMALIZE_EPS = 1e-6


def masked_mean(h: Tensor, mask: Tensor) -> Tensor:
    """Mean of h (B, L, D) over the positions where mask (B, L) is True: (B, D); zeros where there is none."""
    weight = mask.unsqueeze(-1).to(h.dtype)
    return (h * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def attention_mean(h: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Mean of h (B, L, D) where mask (B, L) is True, weighted by the softmax of scores (B, L, 1) over these: (B, D).

    Attention pooling (Ilse et al. 2018, arXiv 1802.04712), its scores linear in h.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    weight = scores.to(wide).masked_fill(~mask.unsqueeze(-1), float("-inf")).softmax(dim=1)
    return (h * weight.to(h.dtype)).sum(dim=1)


def grid_mean(tokens: Tensor, grid: tuple[int, int, int], side: int) -> Tensor:
    """The mean of every `side` x `side` neighbouring tokens of each frame.

    Args:
        tokens: (B, N, D), frame by frame, row by row.
        grid: their times, rows and columns.

    Returns:
        (B, N / side^2, D), in the same order.

    Raises:
        UserError: rows or columns are no multiple of `side`.
    """
    times, rows, columns = grid
    if rows % side or columns % side:
        raise UserError(f"{rows} x {columns} visual tokens cannot be pooled {side} x {side} (predictor.visual_pool)")
    cells = tokens.unflatten(1, (times, rows // side, side, columns // side, side))
    return cells.mean(dim=(3, 5)).flatten(1, 3)


def l2_normalize(x: Tensor) -> Tensor:
    """x (..., D) divided by its length (by `NORMALIZE_EPS` if that is longer), in float32 at least: zero stays zero."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=NORMALIZE_EPS)
