"""From token states to an embedding on the unit sphere. Letters: B batch, L length, D width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def masked_mean(h: Tensor, mask: Tensor) -> Tensor:
    """Mean of h (B, L, D) over the positions where mask (B, L) is True: (B, D); zeros where there is none."""
    weight = mask.unsqueeze(-1).to(h.dtype)
    return (h * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def l2_normalize(x: Tensor) -> Tensor:
    """x (..., D) divided by its length; zero stays zero, and the gradient there is finite."""
    return F.normalize(x, dim=-1, eps=1e-6)
