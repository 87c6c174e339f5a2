"""The share of samples for which the right tool is chosen, by hand."""

from __future__ import annotations

import pytest
import torch

from mamba3_jepa.evaluation.tool_choice import tool_accuracy

NAMES = ["search", "calculator", "zoom"]


def test_shares_of_all_and_of_each_tool() -> None:
    logits = torch.tensor(
        [[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 5.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [9.0, 0.0, 0.0]]
    )
    report = tool_accuracy(logits, NAMES, ["search", "calculator", "search", "calculator", "zoom", "camera"])
    assert report is not None
    assert report.accuracy == 3 / 6  # of equal logits the first is chosen
    assert list(report.by_tool.items()) == [
        ("search", (0.5, 2)), ("calculator", (0.5, 2)), ("zoom", (1.0, 1)), ("camera", (0.0, 1))
    ]  # fmt: skip
    assert (report.n_samples, report.n_unknown) == (6, 1)
    assert report.as_json() == {
        "samples": 6,
        "unknown": 1,
        "accuracy": 0.5,
        "tools": {
            "search": {"samples": 2, "accuracy": 0.5},
            "calculator": {"samples": 2, "accuracy": 0.5},
            "zoom": {"samples": 1, "accuracy": 1.0},
            "camera": {"samples": 1, "accuracy": 0.0},
        },
    }


def test_nothing_to_choose_and_what_does_not_fit() -> None:
    assert tool_accuracy(torch.empty(0, 3), NAMES, []) is None
    with pytest.raises(ValueError, match="2 samples and 3 tools"):
        tool_accuracy(torch.zeros(1, 3), NAMES, ["zoom", "zoom"])
    with pytest.raises(ValueError, match="not a number"):
        tool_accuracy(torch.tensor([[0.0, float("nan"), 0.0]]), NAMES, ["zoom"])
