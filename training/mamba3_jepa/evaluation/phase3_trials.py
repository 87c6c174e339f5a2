"""What phase 3 is for, measured: whether confusion is noticed, what knowledge does, what a memory finds.

Letters: N samples, M of them that are tried, L lessons.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mamba3_jepa.config import SHUT
from mamba3_jepa.data.confusion_plan import CONFUSION_KINDS
from mamba3_jepa.data.lesson import HELPFUL, LESSON_FORMS
from mamba3_jepa.data.splits import spread
from mamba3_jepa.evaluation.belief import BeliefReport, belief
from mamba3_jepa.evaluation.confusion import Calibration, ConfusionReport, evaluate_confusion
from mamba3_jepa.evaluation.confusion_plots import (
    plot_confusion,
    plot_episode_floor,
    plot_injection,
    plot_memory_floor,
    plot_risk_coverage,
)
from mamba3_jepa.evaluation.episode_recall import EpisodeFloor, EpisodeTrial
from mamba3_jepa.evaluation.injection import (
    GENERATED_SAMPLES,
    InjectionReport,
    InjectionSamples,
    InjectionTrial,
    SteadinessReport,
    SteadinessTrial,
    gallery,
)
from mamba3_jepa.evaluation.lessons import NOTHING
from mamba3_jepa.evaluation.memory_floor import MemoryFloor, choose_memory_floor
from mamba3_jepa.evaluation.phase3_data import Phase3Data
from mamba3_jepa.evaluation.selective import SelectiveReport, selective_reports
from mamba3_jepa.evaluation.tool_choice import ToolReport, tool_accuracy
from mamba3_jepa.models.generation import mean_log_probability
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.vljepa import Mamba3Jepa

_AS_IT_IS = [CONFUSION_KINDS.index(kind) for kind in ("clear", "given")]


@dataclass(frozen=True, kw_only=True)
class Phase3Report:
    """The numbers of one evaluation.

    selective: of the monitor ("") and of the plain confidence ("_confidence"); empty without answers. as_it_is: the
    same of samples about which nothing was spoilt. injection, steadiness: None where there is nothing to try.
    episode_floor: None where the model has no episodes. tools: None where no tool is needed or none is known.
    belief: None where nothing that is told is weighed.
    """

    confusion: ConfusionReport
    selective: dict[str, SelectiveReport]
    as_it_is: dict[str, SelectiveReport]
    injection: InjectionReport | None
    steadiness: SteadinessReport | None
    memory_floor: MemoryFloor
    episode_floor: EpisodeFloor | None
    tools: ToolReport | None
    belief: BeliefReport | None

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """Those of all the parts, as flat numbers."""
        values = self.confusion.metrics(prefix) | self.memory_floor.metrics(prefix)
        for name, each in self.selective.items():
            values |= each.metrics(prefix, name)
        for report in (self.injection, self.steadiness, self.belief, self.episode_floor, self.tools):
            values |= {} if report is None else report.metrics(prefix)
        return values

    def plot(self, folder: Path) -> None:
        """confusion_*.png, injection.png, memory_floor.png and episode_floor.png, as far as there is data for them.

        Raises:
            UserError: a picture cannot be written.
        """
        plot_confusion(self.confusion, folder)
        if len(self.memory_floor.right):
            plot_memory_floor(self.memory_floor, folder)
        if self.episode_floor is not None and len(self.episode_floor.right):
            plot_episode_floor(self.episode_floor, folder)
        if self.selective:
            plot_risk_coverage(self.selective, folder)
        if self.injection is not None:
            plot_injection(self.injection, folder)


class Beside(NamedTuple):
    """More confused samples: (n,) logits of the confusion monitor, n kinds and n types of what is asked."""

    logits: Tensor
    kinds: list[str]
    types: list[str]


class Phase3Trials:
    """Measures a model's recursion on the same samples again and again while it learns.

    Attributes:
        episodes: None where the model has none.
        warning: a sentence to be said aloud; None if there is none.
    """

    def __init__(self, model: Mamba3Jepa, data: Phase3Data, generated: int = GENERATED_SAMPLES) -> None:
        """
        Args:
            generated: so many samples at most are told something and answered by generation.
        """
        self._data = data
        self.episodes = EpisodeTrial(model, data) if model.config.recursion.episodes else None
        self._kinds = data.kinds()
        self._injection, self._told_rows = _injection_trial(data, data.lessons.asked(), self._kinds, generated)
        self._steadiness, self._steady_rows = _steadiness_trial(data, generated)
        self.warning: str | None = None
        if self._injection is not None and self._injection.n_without_wrong:
            self.warning = (
                f"{self._injection.n_without_wrong} of {len(self._injection.samples)} things told to confused "
                "validation samples cannot be tried with wrong knowledge: no other sample was found that has both "
                "another knowledge and another answer"
            )

    @torch.no_grad()
    def run(
        self,
        model: Mamba3Jepa,
        logits: Tensor,
        device: torch.device | str,
        *,
        stored: bool = False,
        beside: Beside | None = None,
    ) -> Phase3Report:
        """The numbers with the model's recursion as it is now.

        Args:
            logits: (N,) the confusion monitor's.
            stored: measure with the model's own threshold, temperature and floors, instead of choosing them anew.
            beside: more samples, for the confusion alone.
        """
        if model.recursion is None:
            raise ValueError("the model has no recursion to measure")
        data, answered, probe = self._data, self._data.answered, model.recursion.confusion_probe
        is_clear = torch.from_numpy(np.isin(data.source.kinds[data.frozen.index.numpy()], _AS_IT_IS))
        beside = beside or Beside(torch.empty(0), [], [])
        report = evaluate_confusion(
            torch.cat([logits, beside.logits]),
            torch.cat([data.confused, torch.ones(len(beside.kinds), dtype=torch.bool)]),
            [*self._kinds, *beside.kinds],
            [*data.lessons.type, *beside.types],
            Calibration(temperature=float(probe.temperature), threshold=float(probe.threshold)) if stored else None,
        )
        floor = _memory_floor(data, model.recursion, device)
        if stored:
            floor = dataclasses.replace(floor, floor=float(model.recursion.memory_floor))
        injection = steadiness = None
        notices = report.calibration.notices(logits)
        if self._injection is not None:
            injection = self._injection.run(model, device, notices[self._told_rows])
        if self._steadiness is not None:
            steadiness = self._steadiness.run(model, device, notices[self._steady_rows])
        return Phase3Report(
            confusion=report,
            selective=_selective(data, logits, answered),
            as_it_is=_selective(data, logits, answered & is_clear),
            injection=injection,
            steadiness=steadiness,
            memory_floor=floor,
            episode_floor=(
                None if self.episodes is None else self.episodes.run(model.recursion, notices, stored=stored)
            ),
            tools=_tools(data, model.recursion, device),
            belief=belief(data, model.recursion, logits, report.calibration, device),
        )


def _selective(data: Phase3Data, logits: Tensor, rows: Tensor) -> dict[str, SelectiveReport]:
    scores = {"": logits[rows], "_confidence": -mean_log_probability(data.spoken.doubt[rows])}
    return selective_reports(scores, data.wrong[rows])


def _injection_trial(
    data: Phase3Data, questions: list[str | None], kinds: list[str], generated: int
) -> tuple[InjectionTrial | None, Tensor]:
    """The confused samples with each lesson that should make them right, and whose samples (M,) they are."""
    lessons = data.lessons
    numbers, about = lessons.of(torch.arange(len(data)))
    tells = lessons.answer[numbers] >= 0
    texts, embeddings, is_answer = gallery(
        [lessons.answer_texts[i] for i in lessons.answer[numbers[tells]].tolist()],
        lessons.answers[lessons.answer[numbers[tells]]],
        [questions[i] for i in about[tells].tolist()],
    )
    chosen = tells & data.confused[about] & lessons.are(HELPFUL, numbers)
    if not bool(chosen.any()):
        return None, about[chosen]
    wrong = _wrong_lesson(data)[about[chosen]]
    numbers, about = numbers[chosen], about[chosen]
    trial = InjectionTrial(
        InjectionSamples(
            pooled=data.frozen.pooled[about],
            knowledge=lessons.vectors[lessons.knowledge[numbers]],
            wrong=lessons.vectors[lessons.knowledge[wrong.clamp(min=0)]],
            has_wrong=wrong >= 0,
            expected=[lessons.answer_texts[i] for i in lessons.answer[numbers].tolist()],
            questions=[questions[i] for i in about.tolist()],
            kinds=[kinds[i] for i in about.tolist()],
            forms=[LESSON_FORMS[form] for form in lessons.form[numbers].tolist()],
            texts=texts,
            text_embeddings=embeddings,
            text_is_answer=is_answer,
        ),
        generated,
    )
    return trial, about


def _tools(data: Phase3Data, recursion: Recursion, device: torch.device | str) -> ToolReport | None:
    """Of the samples that need a tool."""
    rows = [row for row, tool in enumerate(data.tools) if tool is not None]
    if recursion.tool_selector is None or not rows:
        return None
    logits = recursion.tool_selector(data.frozen.pooled[torch.tensor(rows)].to(device)).cpu()
    return tool_accuracy(logits, recursion.config.tools, [str(data.tools[row]) for row in rows])


def _wrong_lesson(data: Phase3Data) -> Tensor:
    """(N,) for each sample a lesson that is false of it, or else an irrelevant one; or `NOTHING`."""
    numbers, about = data.lessons.of(torch.arange(len(data)))
    wrong = torch.full((len(data),), NOTHING)
    for form in ("irrelevant", "false"):
        is_form = data.lessons.are([form], numbers)
        wrong[about[is_form]] = numbers[is_form]
    return wrong


def _steadiness_trial(data: Phase3Data, generated: int) -> tuple[SteadinessTrial | None, Tensor]:
    """Right answers with lessons that are false or irrelevant, and whose samples (M,) they are."""
    lessons = data.lessons
    numbers, about = lessons.of(torch.arange(len(data)))
    is_kept = (data.answered & ~data.wrong)[about]
    chosen = (is_kept & lessons.are(["false", "irrelevant", "foreign"], numbers)).nonzero()
    chosen = chosen.squeeze(1)[spread(np.arange(len(chosen)), generated)] if len(chosen) else chosen[:, 0]
    if not len(chosen):
        return None, chosen
    numbers, about = numbers[chosen], about[chosen]
    return SteadinessTrial(
        data.frozen.pooled[about],
        lessons.vectors[lessons.knowledge[numbers]],
        [data.spoken.texts[i] for i in about.tolist()],
    ), about


def _memory_floor(data: Phase3Data, recursion: Recursion, device: torch.device | str) -> MemoryFloor:
    """Chosen on lookups for the confused questions that have a text which answers them."""
    findable, retriever = data.findable, recursion.retriever
    rows = torch.arange(len(data))
    right = findable.right(rows, epoch=0)
    rows = rows[(right >= 0) & data.confused]
    if not len(rows):
        # a retriever that has learned nothing finds nothing
        return MemoryFloor.none() if retriever is None else dataclasses.replace(MemoryFloor.none(), floor=SHUT)
    asked, keys = lookup_vectors(data, recursion, rows, device)
    places = torch.searchsorted(findable.pool, right[rows])
    floor = choose_memory_floor(asked, places, keys, lambda some, drawn: findable.answering(rows[some], drawn))
    has_learned = retriever is None or len(floor.wrong)  # who never saw what does not answer lets everything pass
    return floor if has_learned else dataclasses.replace(floor, floor=SHUT)


def lookup_vectors(
    data: Phase3Data, recursion: Recursion, rows: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """What samples (M,) with a question look up with (M, R), and the T findable texts that are looked up (T, R): unit
    vectors by the retriever, or without one the predicted embeddings and those of the texts."""
    lessons, retriever = data.lessons, recursion.retriever
    texts = lessons.vectors[data.findable.pool].to(device)
    if retriever is None:
        return data.frozen.embedding[rows], texts.cpu()
    asked = retriever.question(lessons.questions[lessons.question[rows]].to(device))
    return asked.cpu(), retriever.text(texts).cpu()
