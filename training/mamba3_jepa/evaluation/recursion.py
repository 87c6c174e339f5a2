"""What phase 3 is for, measured with a finished checkpoint on any data: nothing is fitted to what is measured.

Letters: N samples, M of them that are tried, E embedding width.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.data.confusion import ConfusionSource
from mamba3_jepa.data.confusion_plan import MADE_KINDS
from mamba3_jepa.data.question_type import question_type
from mamba3_jepa.data.sample import OnBadSample, Source
from mamba3_jepa.data.splits import spread
from mamba3_jepa.evaluation.confusion import WRONG_ANSWER
from mamba3_jepa.evaluation.episode_recall import EpisodeFloor
from mamba3_jepa.evaluation.injection import Rates
from mamba3_jepa.evaluation.memory_trial import MemoryQuestions, MemoryReport, try_memory
from mamba3_jepa.evaluation.observed import observe
from mamba3_jepa.evaluation.phase3_data import Phase3Data, check_knowledge
from mamba3_jepa.evaluation.phase3_trials import Beside, Phase3Report, Phase3Trials, lookup_vectors
from mamba3_jepa.evaluation.selective import COVERAGES, SelectiveReport
from mamba3_jepa.evaluation.spoken import Spoken
from mamba3_jepa.models.recursion import ConfusionMonitor
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.common import ConfusionKind

logger = logging.getLogger(__name__)

LISTED = "listed"  # the kind of the questions of a list that is given
PICTURES_EACH = 5  # that each question of the list is asked about
_ORDER = ("clear", "given_clear", WRONG_ANSWER, "given", *MADE_KINDS, LISTED)
_ANSWERING = ("sentence", "given")  # forms of what a memory should find


@dataclass(frozen=True, kw_only=True)
class RecursionReport:
    """trials: confusion, what knowledge does, tools; samples: how many there are of each kind; memory: None where there
    is nothing to try."""

    trials: Phase3Report
    samples: dict[str, int]
    memory: MemoryReport | None

    @property
    def episodes(self) -> EpisodeFloor | None:
        """None where the model has none, or there is nothing to look up."""
        report = self.trials.episode_floor
        return report if report is not None and report.lookups else None

    def as_json(self) -> dict[str, Any]:
        """`confusion`, `wrong_answers`, `knowledge`, `belief`, `kept`, `memory`, `episodes` and `tools`; None where
        there is nothing to measure."""
        knowledge, kept, tools = self.trials.injection, self.trials.steadiness, self.trials.tools
        return {
            "confusion": self._confusion(),
            "wrong_answers": self._wrong_answers(),
            "knowledge": None if knowledge is None else {
                "samples": knowledge.n_samples,
                "without_wrong": knowledge.n_without_wrong,
                "forms": {form: asdict(rates) for form, rates in self.by_form().items()},
                "judged": {form: asdict(rates) for form, rates in knowledge.judged.items()},
            },
            "belief": None if self.trials.belief is None else self.trials.belief.as_json(),
            "kept": None if kept is None else {
                "answers": kept.n_samples,
                "turned_always": kept.always,
                "turned_in_use": kept.in_use,
            },
            "memory": None if self.memory is None else self.memory.as_json(),
            "episodes": None if self.episodes is None else self.episodes.as_json(),
            "tools": None if tools is None else tools.as_json(),
        }  # fmt: skip

    def by_kind(self) -> dict[str, dict[str, float | None]]:
        """For each kind: `samples`, `judged_confused`, and where it has confused samples `auroc` and `auroc_alike`."""
        report = self.trials.confusion
        judged = report.judged_confused()
        return {
            kind: {
                "samples": self.samples[kind],
                "judged_confused": judged[kind],
                "auroc": report.rocs[kind].auroc if kind in report.rocs else None,
                "auroc_alike": report.auroc_alike.get(kind),
            }
            for kind in sorted(judged, key=_ORDER.index)
        }

    def by_form(self) -> dict[str, Rates]:
        """The shares right before, after and with wrong knowledge, of all forms and of each."""
        report = self.trials.injection
        if report is None:
            return {}
        return {"all": report.retrieved if report.generated is None else report.generated} | report.by_form

    def _confusion(self) -> dict[str, Any]:
        report = self.trials.confusion
        return {
            "threshold": report.calibration.threshold,
            "temperature": report.calibration.temperature,
            "auroc": report.auroc,
            "balanced_accuracy": report.balanced_accuracy,
            "calibration_error": report.ece,
            "kinds": self.by_kind(),
        }

    def _wrong_answers(self) -> dict[str, Any] | None:
        all_answers, as_it_is = _answers(self.trials.selective), _answers(self.trials.as_it_is)
        return None if all_answers is None else {**all_answers, "as_it_is": as_it_is}


def measure_recursion(
    model: Mamba3Jepa,
    source: Source,
    indices: NDArray[np.int64],
    *,
    seed: int,
    kinds: Sequence[ConfusionKind],
    samples: int,
    listed: Sequence[str] = (),
    pictures: NDArray[np.int64] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
) -> RecursionReport:
    """Confusion, knowledge and memory on some samples of `source`, and on what confuses that is made of them.

    Args:
        indices: those with a target or a `confused` label count.
        kinds: the kinds of confusion to make.
        samples: so many at most.
        listed: questions that all count as confused; pictures: the samples about whose pictures they are asked, by
            default those of `indices`.

    Raises:
        UserError: knowledge that does not fit the model, a sample is unreadable, or an output is not finite.
    """
    if model.recursion is None or model.y_decoder is None:
        raise ValueError("the model has no recursion, or no Y-Decoder")
    confusion = ConfusionSource(source, indices, seed, kinds, query_prompt=model.config.query_prompt)
    rows = spread(np.arange(len(confusion)), samples)
    check_knowledge(model, confusion, rows, on_bad_sample=on_bad_sample, demand_vectors=False, finished=True)
    observed = observe(model, confusion, rows, batch_size=batch_size, workers=workers, on_bad_sample=on_bad_sample)
    data = Phase3Data.of(model, confusion, observed, Spoken.of(model, observed.embedding))
    logits = _logits(model.recursion.confusion_probe, observed.pooled.to(model.device), data.spoken.doubt)
    shown = indices if pictures is None else pictures
    beside = _listed(model, source, shown, listed, batch_size) if listed else None
    trials = Phase3Trials(model, data, generated=sys.maxsize)
    if trials.warning is not None:
        logger.warning(trials.warning)
    report = trials.run(model, logits, model.device, stored=True, beside=beside)
    notices = report.confusion.calibration.notices(logits)
    counts = {kind: len(scores) for kind, scores in report.confusion.scores.items()}
    return RecursionReport(trials=report, samples=counts, memory=_memory(model, data, notices))


def _logits(probe: ConfusionMonitor, pooled: Tensor, doubt: Tensor) -> Tensor:
    """(N,) float32 on the CPU."""
    with torch.no_grad():
        return probe(pooled, doubt.to(pooled.device) if probe.hears_answer else None).float().cpu()


def _listed(
    model: Mamba3Jepa, source: Source, indices: NDArray[np.int64], questions: Sequence[str], batch_size: int
) -> Beside:
    """Each question about some of the pictures, in turn; without picture where the data has none."""
    if model.recursion is None:
        raise ValueError("the model has no recursion")
    pictured = np.setdiff1d(indices, source.indices("imageless"))
    asked = [question for _ in range(PICTURES_EACH) for question in questions]
    chosen = np.resize(spread(pictured, len(asked)), len(asked)).tolist() if len(pictured) else [None] * len(asked)
    logits = []
    for start in range(0, len(asked), batch_size):
        texts = asked[start : start + batch_size]
        images = [None if i is None else source.sample(i).image for i in chosen[start : start + batch_size]]
        outputs = model.observe([None if load is None else load() for load in images], texts, batch_size)
        said = Spoken.of(model, outputs.embedding)
        logits.append(_logits(model.recursion.confusion_probe, outputs.pooled, said.doubt))
    return Beside(torch.cat(logits), [LISTED] * len(asked), [question_type(question) for question in asked])


def _memory(model: Mamba3Jepa, data: Phase3Data, notices: Tensor) -> MemoryReport | None:
    """Of the confused questions that a sentence answers; None where there is none. `notices`: (N,) bool, what the model
    takes itself to be confused by."""
    if model.recursion is None:
        return None
    lessons, findable = data.lessons, data.findable
    numbers, about = lessons.of(torch.arange(len(data)))
    fits = lessons.are(_ANSWERING, numbers) & data.confused[about] & (lessons.question[about] >= 0)
    fits &= torch.isin(lessons.knowledge[numbers], findable.pool)
    numbers, about = numbers[fits], about[fits]
    first = torch.cat([torch.ones(min(1, len(about)), dtype=torch.bool), about[1:] != about[:-1]])
    numbers, rows = numbers[first], about[first]
    if not len(rows):
        return None
    with torch.no_grad():
        asked, keys = lookup_vectors(data, model.recursion, rows, model.device)
    return try_memory(
        model,
        MemoryQuestions(
            asked=asked,
            keys=keys,
            right=torch.searchsorted(findable.pool, lessons.knowledge[numbers]),
            knowledge=lessons.vectors[findable.pool],
            pooled=data.frozen.pooled[rows],
            judged=notices[rows],
            before=[data.spoken.texts[i] for i in rows.tolist()],
            expected=[lessons.answer_texts[i] for i in lessons.answer[numbers].tolist()],
            answers=lambda some, drawn: findable.answering(rows[some], drawn),
        ),
    )


def scores(selective: Mapping[str, SelectiveReport]) -> dict[str, dict[str, float | None]]:
    """Each score of how sure an answer is, chance among them: `auroc`, `aurc`, `accuracy_at_{80,95}`; empty without
    answers."""
    names = {"": "confusion", "_confidence": "plain confidence"}
    rows = {names[name]: _measures(report) for name, report in selective.items()}
    if selective:
        accuracy = selective[""].accuracy
        chance: dict[str, float | None] = {"auroc": 0.5, "aurc": 1 - accuracy}
        rows["chance"] = chance | {f"accuracy_at_{coverage}": accuracy for coverage in COVERAGES}
    return rows


def _answers(selective: Mapping[str, SelectiveReport]) -> dict[str, Any] | None:
    if not selective:
        return None
    report = selective[""]
    return {"answers": len(report.risk), "accuracy": report.accuracy, "scores": scores(selective)}


def _measures(report: SelectiveReport) -> dict[str, float | None]:
    values: dict[str, float | None] = {"auroc": report.auroc, "aurc": report.aurc}
    return values | {f"accuracy_at_{coverage}": report.accuracy_at(coverage) for coverage in COVERAGES}
