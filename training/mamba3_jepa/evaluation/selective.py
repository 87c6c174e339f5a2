"""Answering only where one is sure: risk and coverage (El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017, arXiv
1705.08500).

Letters: N answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mamba3_jepa.evaluation.confusion import auroc

COVERAGES = (80, 95)  # per cent of the answers that are given


@dataclass(frozen=True, kw_only=True)
class SelectiveReport:
    """What one score of unsureness is worth for telling wrong answers from right ones.

    accuracy: of all N answers. auroc: probability that a wrong answer has the higher score, ties half; None where all
    are right, or all wrong. risk: (N,) the share of wrong ones among the 1, 2, .., N surest answers. aurc: the mean of
    those; without any score it is 1 - accuracy.
    """

    accuracy: float
    auroc: float | None
    aurc: float
    risk: Tensor = field(repr=False)

    def accuracy_at(self, coverage: int) -> float:
        """Accuracy of the surest answers, `coverage` per cent of all, rounded up."""
        return 1 - float(self.risk[-(-len(self.risk) * coverage // 100) - 1])

    def metrics(self, prefix: str, suffix: str = "") -> dict[str, float]:
        """Flat numbers for `metrics.jsonl`. With the prefix `val`: `val/accuracy`, which depends on no score, and with
        the suffix behind `val/auroc_wrong_answer_any`, `val/aurc`, `val/accuracy_at_80` and `val/accuracy_at_95`."""
        values = {f"accuracy_at_{coverage}{suffix}": self.accuracy_at(coverage) for coverage in COVERAGES}
        values |= {"accuracy": self.accuracy, f"aurc{suffix}": self.aurc}
        if self.auroc is not None:
            values[f"auroc_wrong_answer_any{suffix}"] = self.auroc
        return {f"{prefix}/{name}": value for name, value in values.items()}


def selective_reports(scores: Mapping[str, Tensor], wrong: Tensor) -> dict[str, SelectiveReport]:
    """A report for each of several scores (N,), higher where the answer is less sure; nothing without answers.

    Args:
        wrong: (N,) bool, the answers that are wrong.
    """
    if not len(wrong):
        return {}
    both = bool(wrong.any()) and not bool(wrong.all())
    reports = {}
    for name, score in scores.items():
        risk = _risk(score, wrong)
        reports[name] = SelectiveReport(
            accuracy=1 - float(wrong.double().mean()),
            auroc=auroc(score, wrong) if both else None,
            aurc=float(risk.mean()),
            risk=risk,
        )
    return reports


def _risk(score: Tensor, wrong: Tensor) -> Tensor:
    """(N,) float64 shares of wrong answers among the surest; among equal scores any order is as likely, so each of them
    counts with the mean of all."""
    values, place, count = score.unique(return_inverse=True, return_counts=True)
    of_value = torch.zeros(len(values), dtype=torch.float64).scatter_add_(0, place, wrong.double()) / count
    ascending = place.sort().values
    return of_value[ascending].cumsum(0) / torch.arange(1, len(wrong) + 1)
