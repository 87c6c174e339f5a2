"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math

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


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, final: float = 0.05) -> float:
    """The rate for optimizer step `step` (0-based): linear warm-up to `peak`, then a cosine down to `final * peak`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
