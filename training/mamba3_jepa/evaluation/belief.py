"""Whether what confused samples are told is taken for an answer.

Letters: N samples, L lessons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba3_jepa.data.lesson import LESSON_FORMS
from mamba3_jepa.evaluation.confusion import Calibration, auroc
from mamba3_jepa.evaluation.phase3_data import Phase3Data
from mamba3_jepa.models.recursion import Recursion

_TOGETHER = 4096  # lessons judged at once


@dataclass(frozen=True, kw_only=True)
class BeliefReport:
    """auroc: of the probability that what is told answers, over what does and what does not; None where there is only
    one of them. forms: of each form how many things were told to samples judged confused, and the share of them after
    which the model is sure."""

    auroc: float | None
    forms: Mapping[str, tuple[int, float]]

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        values = {f"{prefix}/believed_{form}": share for form, (_, share) in self.forms.items()}
        return values if self.auroc is None else {f"{prefix}/auroc_knowledge": self.auroc} | values

    def as_json(self) -> dict[str, Any]:
        """`auroc` and `forms`, of each `told` and `sure`."""
        forms = {form: {"told": told, "sure": share} for form, (told, share) in self.forms.items()}
        return {"auroc": self.auroc, "forms": forms}


@torch.no_grad()
def belief(
    data: Phase3Data, recursion: Recursion, logits: Tensor, calibration: Calibration, device: torch.device | str
) -> BeliefReport | None:
    """None of a model that does not weigh what it is told, or where confused samples are told nothing.

    Args:
        logits: (N,) the confusion monitor's, judged as `calibration` says.
    """
    lessons, probe = data.lessons, recursion.knowledge_probe
    numbers, about = lessons.of(torch.arange(len(data)))
    numbers, about = (each[data.confused[about]] for each in (numbers, about))
    if probe is None or not len(numbers):
        return None
    answers_it = torch.cat([
        probe(data.frozen.pooled[about[some]].to(device), lessons.vectors[lessons.knowledge[numbers[some]]].to(device))
        for some in torch.arange(len(numbers)).split(_TOGETHER)
    ]).float().cpu()  # fmt: skip
    answers = lessons.answer[numbers] >= 0
    judged = calibration.notices(logits[about])
    sure = calibration.confusion(logits[about]) * (1 - torch.sigmoid(answers_it)) <= calibration.threshold
    forms: dict[str, tuple[int, float]] = {}
    for place, form in enumerate(LESSON_FORMS):
        told = sure[judged & (lessons.form[numbers] == place)]
        if len(told):
            forms[form] = (len(told), float(told.float().mean()))
    has_both = bool(answers.any()) and not bool(answers.all())
    return BeliefReport(auroc=auroc(answers_it, answers) if has_both else None, forms=forms)
