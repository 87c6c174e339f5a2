"""The learning rate over a run."""

import math

from mamba3_jepa.training.schedule import learning_rate


def test_learning_rate_warms_up_then_falls() -> None:
    rates = [learning_rate(i, peak=1.0, warmup_steps=10, total_steps=100) for i in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert math.isclose(rates[100], 0.05)
    assert math.isclose(rates[55], 0.05 + 0.95 / 2)
