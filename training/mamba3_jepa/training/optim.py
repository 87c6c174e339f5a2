"""The optimizer."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`.

    Weight decay touches matrices only: not biases, norms, gates, temperatures, embeddings, nor the per-head
    parameters of Mamba-3 (dt_bias, D, B_bias, C_bias, mimo_*), whose size carries meaning.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    matrices = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decayed if id(parameter) in matrices else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    has_fused = all(parameter.device.type in ("cpu", "cuda") for parameter in decayed + free)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=has_fused)
