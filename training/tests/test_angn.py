"""The gates: their formula, their record over valid positions, and the context reset signal."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from mamba3_jepa.config import AngnConfig
from mamba3_jepa.models.angn import Angn

N_LAYERS, D = 3, 5


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gates(**config: float) -> Angn:
    return Angn(N_LAYERS, D, AngnConfig(enabled=True, **config))


def run(angn: Angn, h: Tensor, mask: Tensor | None = None) -> Tensor:
    for layer in range(N_LAYERS):
        h = angn(layer, h, mask)
    return h


def constant(angn: Angn, bias: float) -> None:
    """Make every gate sigmoid(bias), whatever the input."""
    with torch.no_grad():
        for gate in angn.gates:
            gate.bias.fill_(bias)


def test_starts_at_sigmoid_of_one_and_a_half() -> None:
    angn = gates()
    h = torch.randn(2, 4, D)
    torch.testing.assert_close(angn(1, h), h * sigmoid(1.5))
    assert set(angn.state_dict()) == {f"gates.{i}.{kind}" for i in range(N_LAYERS) for kind in ("weight", "bias")}
    assert all(parameter.shape == (D,) for parameter in angn.parameters())


def test_formula_is_elementwise() -> None:
    angn = gates()
    with torch.no_grad():
        for parameter in angn.parameters():
            parameter.normal_()
    h = torch.randn(2, 4, D)
    out = angn(2, h)
    weight, bias = angn.gates[2].weight, angn.gates[2].bias
    for b, position, d in [(0, 0, 0), (1, 3, 4), (0, 2, 1)]:
        x = h[b, position, d].item()
        expected = x * sigmoid(weight[d].item() * x + bias[d].item())
        assert out[b, position, d].item() == pytest.approx(expected, rel=1e-5)


def test_sparsity_penalty_is_the_mean_gate_at_zero_input() -> None:
    angn = gates()
    with torch.no_grad():
        for i, gate in enumerate(angn.gates):
            gate.bias.copy_(torch.arange(D) - i)
    expected = sum(sigmoid(d - i) for i in range(N_LAYERS) for d in range(D)) / (N_LAYERS * D)
    penalty = angn.sparsity_penalty()
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    penalty.backward()
    assert all((gate.bias.grad > 0).all() for gate in angn.gates)


def test_activity_counts_valid_positions_only() -> None:
    angn = gates()
    assert angn.activity().isnan().all()
    with torch.no_grad():
        angn.gates[0].weight.fill_(1.0)
    h = torch.zeros(2, 3, D)
    h[0, 1:], h[1, 2:] = 50.0, -50.0  # behind the padding
    mask = torch.tensor([[True, False, False], [True, True, False]])
    run(angn, h, mask)
    torch.testing.assert_close(angn.activity(), torch.full((N_LAYERS,), sigmoid(1.5)))
    angn(0, h)
    everywhere = (3 * sigmoid(1.5) + 2 * 1.0 + 0.0) / 6
    assert angn.activity()[0].item() == pytest.approx(everywhere, rel=1e-5)
    assert not angn.activity().requires_grad


def test_moving_average_belongs_to_inference() -> None:
    angn = gates(ema_decay=0.75)
    h = torch.randn(1, 2, D)
    run(angn, h)
    assert angn.activity_ema().isnan().all()  # training leaves no trace
    angn.eval()
    run(angn, h)
    torch.testing.assert_close(angn.activity_ema(), torch.full((N_LAYERS,), sigmoid(1.5)))
    constant(angn, -1.0)
    run(angn, h)
    expected = 0.75 * sigmoid(1.5) + 0.25 * sigmoid(-1.0)
    torch.testing.assert_close(angn.activity_ema(), torch.full((N_LAYERS,), expected))
    angn.reset_context()
    assert angn.activity_ema().isnan().all()


def test_says_once_when_activity_falls_under_the_threshold(caplog: pytest.LogCaptureFixture) -> None:
    angn = gates(ema_decay=0.5, context_reset_threshold=0.3).eval()
    h = torch.randn(1, 2, D)
    states = []
    with caplog.at_level(logging.WARNING, logger="mamba3_jepa"), torch.inference_mode():
        for bias in (1.5, -3.0, -3.0, -3.0, -3.0, 4.0, 4.0):
            constant(angn, bias)
            run(angn, h)
            states.append(angn.context_reset_due())
    averages = [sigmoid(1.5)]
    for bias in (-3.0, -3.0, -3.0, -3.0, 4.0, 4.0):
        averages.append((averages[-1] + sigmoid(bias)) / 2)
    assert states == [average < 0.3 for average in averages]
    assert True in states
    assert states[-1] is False
    assert len(caplog.records) == 1
    assert "context reset threshold 0.300" in caplog.text
    run(angn.train(), h)  # what inference mode left behind can still be written to
