"""Confusion monitor and state injector: values against their formulas, and what may be given to them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_model

from mamba3_jepa.config import RecursionConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.recursion import ConfusionMonitor, Recursion, StateInjector


@pytest.fixture
def monitor() -> ConfusionMonitor:
    torch.manual_seed(0)
    return ConfusionMonitor(6, 5, ema_decay=0.75).double()


def test_the_logit_is_that_of_a_perceptron_on_the_normalised_state(monitor: ConfusionMonitor) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        monitor.norm.weight.uniform_(0.5, 1.5)
        monitor.norm.bias.normal_()
    pooled = 3 * torch.randn(4, 6, dtype=torch.float64) + 1
    logits = monitor(pooled)
    assert logits.shape == (4,)
    for row, logit in zip(pooled, logits, strict=True):
        x = (row - row.mean()) / math.sqrt(float(row.var(unbiased=False)) + 1e-5) * monitor.norm.weight
        hidden = monitor.hidden.weight @ (x + monitor.norm.bias) + monitor.hidden.bias
        hidden = hidden / (1 + (-hidden).exp())
        expected = float((monitor.linear.weight @ hidden + monitor.linear.bias).detach())
        assert float(logit.detach()) == pytest.approx(expected)


def test_the_score_divides_by_the_temperature(monitor: ConfusionMonitor) -> None:
    pooled = torch.randn(3, 6, dtype=torch.float64)
    monitor.temperature.fill_(2.5)
    expected = [1 / (1 + math.exp(-float(logit) / 2.5)) for logit in monitor(pooled).detach()]
    score = monitor.score(pooled).detach()
    assert score.dtype == torch.float32
    assert score.tolist() == pytest.approx(expected)


def test_smoothing_is_a_moving_average_of_each_conversation(monitor: ConfusionMonitor) -> None:
    turns = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.4]])
    smoothed = None
    for turn in turns:
        smoothed = monitor.smooth(turn, smoothed)
    expected = [0.75 * (0.75 * a + 0.25 * b) + 0.25 * c for a, b, c in turns.T.tolist()]
    assert smoothed is not None
    assert smoothed.tolist() == pytest.approx(expected)


def test_threshold_and_temperature_travel_with_the_weights(monitor: ConfusionMonitor) -> None:
    monitor.threshold.fill_(0.3)
    monitor.temperature.fill_(1.7)
    other = ConfusionMonitor(6, 5, ema_decay=0.75)
    assert float(other.threshold) == 0.5
    other.load_state_dict(monitor.state_dict())
    assert (float(other.threshold), float(other.temperature)) == pytest.approx((0.3, 1.7))


def test_the_injector_adds_a_linear_map_of_the_knowledge() -> None:
    injector = StateInjector(3, 4)
    pooled, knowledge = torch.randn(2, 4), torch.randn(2, 3)
    assert torch.equal(injector(pooled, knowledge), pooled)  # untrained, knowledge changes nothing
    with torch.no_grad():
        injector.projection.weight.normal_()
    weight = injector.projection.weight.detach()
    expected = [[float(pooled[b, i] + sum(weight[i, j] * knowledge[b, j] for j in range(3))) for i in range(4)]
                for b in range(2)]  # fmt: skip
    torch.testing.assert_close(injector(pooled, knowledge), torch.tensor(expected))


def test_knowledge_of_the_wrong_length_names_both_lengths() -> None:
    with pytest.raises(UserError, match=r"length 5, but this model takes 3"):
        StateInjector(3, 4)(torch.zeros(1, 4), torch.zeros(1, 5))


@pytest.mark.parametrize("knowledge_dim", [None, 7])
def test_a_model_gets_a_recursion_of_its_sizes(knowledge_dim: int | None) -> None:
    model = tiny_model(recursion=RecursionConfig(hidden_dim=9, knowledge_dim=knowledge_dim))
    assert model.recursion is None
    recursion = model.add_recursion()
    assert isinstance(recursion, Recursion)
    assert recursion is model.recursion
    assert recursion.injector.projection.weight.shape == (64, knowledge_dim or 32)
    assert recursion.confusion_probe.hidden.weight.shape == (9, 64)
