"""The gated MLP that the official Mamba-3 language models have after every layer.

Source: SwiGLU (Shazeer 2020, arXiv 2002.05202) as mamba-ssm's `GatedMLP` has it, whose names and shapes these are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """fc2(a * silu(g)), with a the first and g the second half of fc1(x); no biases.

    Args:
        d_model: width D of input and output.
        width: hidden width M; `fc1.weight` is (2 M, D), `fc2.weight` (D, M).
    """

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), each position by itself."""
        a, g = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(a * F.silu(g))
