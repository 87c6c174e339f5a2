"""The optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def build_optimizer(
    module: nn.Module, lr: float, weight_decay: float, scaled: Sequence[tuple[nn.Module, float]] = ()
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`.

    Weight decay touches matrices only: not biases, norms, gates, temperatures, embeddings, nor the per-head
    parameters of Mamba-3 (dt_bias, D, B_bias, C_bias, mimo_*), whose size carries meaning.

    Args:
        scaled: modules inside `module` that learn with a share of the learning rate, which their parameters' groups
            have as `lr_scale`.
    """
    matrices = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    scales = {id(parameter): scale for part, scale in scaled for parameter in part.parameters()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for scale in dict.fromkeys([1.0, *scales.values()]):
        own = [parameter for parameter in trained if scales.get(id(parameter), 1.0) == scale]
        for decay, inside in ((weight_decay, True), (0.0, False)):
            parameters = [parameter for parameter in own if (id(parameter) in matrices) == inside]
            groups.append({"params": parameters, "weight_decay": decay, "lr": lr * scale, "lr_scale": scale})
    has_fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=has_fused)
