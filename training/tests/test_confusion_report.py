"""How well confusion is noticed: each number against its definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba3_jepa.evaluation.confusion import (
    auroc,
    calibrate,
    choose_threshold,
    evaluate_confusion,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from mamba3_jepa.evaluation.confusion_plots import plot_confusion

pytestmark = pytest.mark.usefixtures("real_figures")


@pytest.fixture
def scored() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits twice as far out as they should be, and labels."""
    dice = np.random.default_rng(0)
    true = dice.normal(0, 2, 3000)
    labels = dice.random(3000) < 1 / (1 + np.exp(-true))
    return torch.tensor(2 * true, dtype=torch.float32), torch.tensor(labels)


def test_auroc_counts_pairs(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = (each[:200] for each in scored)
    logits = (logits * 2).round() / 2  # with ties
    pairs = [(a, b) for a in logits[labels].tolist() for b in logits[~labels].tolist()]
    expected = sum(a > b for a, b in pairs) + 0.5 * sum(a == b for a, b in pairs)
    assert auroc(logits, labels) == pytest.approx(expected / len(pairs))
    assert auroc(logits + 200, labels) == pytest.approx(expected / len(pairs))  # far where sigmoid is 1


def test_temperature_minimises_the_nll(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = scored

    def nll(temperature: float) -> float:
        p = torch.sigmoid(logits.double() / temperature)
        return float(-torch.where(labels, p, 1 - p).log().mean())

    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(2, rel=0.1)
    assert nll(fitted) <= min(nll(float(t)) for t in np.linspace(0.5, 5, 500)) + 1e-9
    assert fit_temperature(torch.tensor([-1.0, 1.0]), torch.tensor([False, True])) == pytest.approx(0.05)
    assert fit_temperature(torch.tensor([-1.0, 1.0]), torch.tensor([True, False])) == pytest.approx(20)


def test_the_threshold_is_within_one_standard_error_of_the_best(
    scored: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, labels = scored
    scores = torch.sigmoid(logits)[:300]
    labels = labels[:300]

    def balanced(threshold: float) -> float:
        noticed = scores > threshold
        return float(noticed[labels].double().mean() + (~noticed[~labels]).double().mean()) / 2

    chosen = choose_threshold(scores, labels)
    values = sorted(scores.tolist())
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    best = max(middles, key=balanced)
    shares = [(scores > best)[labels].double(), (scores > best)[~labels].double()]
    error = sum(float(each.var(unbiased=False)) / len(each) for each in shares) ** 0.5 / 2
    as_good = [middle for middle in middles if balanced(middle) >= balanced(best) - error]
    assert 1 < len(as_good) < len(middles) / 2
    assert chosen == pytest.approx(min(as_good, key=lambda middle: abs(middle - 0.5)))
    separable = choose_threshold(torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([False, False, True, True]))
    assert separable == pytest.approx(0.5)
    assert choose_threshold(torch.tensor([0.3, 0.3]), torch.tensor([False, True])) == 0.5


def test_calibration_error_is_the_gap_of_the_bins(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = scored
    scores = torch.sigmoid(logits)
    bins = reliability_bins(scores, labels)
    assert sum(each.count for each in bins) == len(labels)
    gap = sum(each.count * abs(each.score - each.confused) for each in bins) / len(labels)
    assert expected_calibration_error(scores, labels) == pytest.approx(gap, abs=1e-5)
    for edge, each in zip(range(15), bins, strict=True):
        inside = (scores >= edge / 15) & (scores < (edge + 1) / 15)
        assert each.count == int(inside.sum())
        assert each.confused == pytest.approx(float(labels[inside].double().mean()))


def test_calibration_is_measured_where_it_was_not_fitted(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = scored
    kinds = ["mismatched" if label else "clear" for label in labels.tolist()]
    report = evaluate_confusion(logits, labels, kinds, ["what is"] * len(kinds))
    assert report.calibration.temperature == pytest.approx(2, rel=0.2)
    assert report.ece is not None
    assert report.ece_uncalibrated is not None
    assert report.ece < 0.5 * report.ece_uncalibrated
    assert sum(each.count for each in report.reliability) == len(labels) // 2
    fitted = calibrate(logits, labels)
    assert report.calibration != fitted  # that is everything's


def test_each_kind_is_compared_with_what_is_like_it() -> None:
    rows = [
        # logit, confused, kind, question type
        (0.0, False, "clear", None),
        (4.0, False, "clear", "is there"),
        (1.0, False, "clear", "what color"),
        (2.0, True, "mismatched", "what color"),
        (0.5, True, "corrupted", None),
        (3.0, True, "corrupted", "is there"),
        (2.5, False, "given", "hello"),
        (9.0, True, "given", "who are you"),
    ]
    logits, confused, kinds, types = zip(*rows, strict=True)
    report = evaluate_confusion(torch.tensor(logits), torch.tensor(confused), kinds, types)
    aurocs = {kind: curve.auroc for kind, curve in report.rocs.items()}
    assert aurocs["mismatched"] == pytest.approx(1 / 3)  # against 4.0, 1.0 and 2.5, the questions
    assert report.auroc_alike["mismatched"] == 1.0  # against 1.0 alone
    assert aurocs["corrupted"] == pytest.approx((1 + 3) / 8)  # captions too
    assert aurocs["given"] == 1.0
    pairs = [(a, b) for a, ca, *_ in rows if ca for b, cb, *_ in rows if not cb]
    assert report.auroc == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    assert {name: len(scores) for name, scores in report.scores.items()} == {
        "clear": 3, "mismatched": 1, "corrupted": 2, "given_clear": 1, "given": 1
    }  # fmt: skip


def test_without_both_classes_nothing_is_claimed(tmp_path: Path) -> None:
    report = evaluate_confusion(torch.tensor([1.0, -1.0]), torch.tensor([False, False]), ["clear"] * 2, [None] * 2)
    assert report.metrics() == {"val/confusion_threshold": 0.5, "val/confusion_temperature": 1.0}
    assert [path.name for path in plot_confusion(report, tmp_path)] == ["confusion_histograms.png"]
    with pytest.raises(ValueError, match="logits"):
        evaluate_confusion(torch.empty(0), torch.empty(0, dtype=torch.bool), [], [])
