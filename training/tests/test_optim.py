"""What the optimizer decays."""

import torch

from mamba3_jepa.training.optim import build_optimizer


def test_weight_decay_touches_matrices_only() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    decayed, free = build_optimizer(module, lr=1e-3, weight_decay=0.1).param_groups
    assert [p.shape for p in decayed["params"]] == [torch.Size([2, 3])]
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert len(free["params"]) == 4
