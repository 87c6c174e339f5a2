"""What injected knowledge does: to samples the model is confused by before, after, and with the wrong knowledge, and to
samples it answers rightly with knowledge that is false or tells nothing.

Shapes: M samples with a right answer and something they are told, D width of the pooled state, E embedding width, K
length of a knowledge vector, G distinct texts to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mamba3_jepa.data.splits import spread
from mamba3_jepa.evaluation.answer_metrics import same_text
from mamba3_jepa.evaluation.decoding import generate_texts
from mamba3_jepa.evaluation.retrieval import distinct, nearest_answer
from mamba3_jepa.models.vljepa import Mamba3Jepa

GENERATED_SAMPLES = 512  # while training, of the M samples so many are also answered by generation
_TOGETHER = 1024


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of right answers in [0, 1] without knowledge, with the right one, and with the wrong one.

    wrong is of the samples that there is a wrong knowledge for, and None where there are none.
    """

    before: float
    after: float
    wrong: float | None


@dataclass(frozen=True, kw_only=True)
class InjectionReport:
    """retrieved: the right answer's embedding is the nearest; generated: the Y-Decoder says it (None without one).

    n_samples: things told; a sample that is told in several forms counts for each. by_kind: retrieved, for each kind of
    confusion. by_form: generated, or without Y-Decoder retrieved, for each form of knowledge: the bare answer, a
    sentence, and so on. judged: the same of the samples that the model takes itself to be confused by, so that in use
    it would be told, and "all" of them; empty without any. n_without_wrong: for how many things told there is no wrong
    knowledge.
    """

    n_samples: int
    n_without_wrong: int
    retrieved: Rates
    generated: Rates | None
    by_kind: dict[str, Rates]
    by_form: dict[str, Rates]
    judged: dict[str, Rates]

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """Flat numbers: `{prefix}/retrieved_{before,after,wrong}`, the same for `generated`; `{prefix}/told_{form}`,
        the share right after knowledge of that form; the samples, `{prefix}/injected_samples`, and those of them
        without wrong knowledge, `{prefix}/injected_without_wrong`."""
        values: dict[str, float] = {
            f"{prefix}/injected_samples": self.n_samples,
            f"{prefix}/injected_without_wrong": self.n_without_wrong,
        }
        for name, rates in (("retrieved", self.retrieved), ("generated", self.generated)):
            for when, rate in ({} if rates is None else vars(rates)).items():
                if rate is not None:
                    values[f"{prefix}/{name}_{when}"] = rate
        return values | {f"{prefix}/told_{form}": rates.after for form, rates in self.by_form.items()}


@dataclass(frozen=True, kw_only=True)
class InjectionSamples:
    """M times a confused sample, the answer that is right, and the knowledge that should give it.

    pooled (M, D), knowledge (M, K); wrong: (M, K), something that is false of it or tells nothing, where `has_wrong`
    (M,) bool; expected: M right answers; kinds: M kinds of confusion; forms: M forms of
    knowledge; questions: M, None for
    captions. texts: G distinct texts to choose from, with their embeddings (G, E); text_is_answer: G, whether to choose
    it for questions or for captions.
    """

    pooled: Tensor
    knowledge: Tensor
    wrong: Tensor
    has_wrong: Tensor
    expected: list[str]
    questions: list[str | None]
    kinds: list[str]
    forms: list[str]
    texts: list[str]
    text_embeddings: Tensor
    text_is_answer: list[bool]

    def __len__(self) -> int:
        return len(self.expected)


def gallery(
    targets: Sequence[str], embeddings: Tensor, questions: Sequence[str | None]
) -> tuple[list[str], Tensor, list[bool]]:
    """`texts`, `text_embeddings` and `text_is_answer` from N samples' targets with their embeddings (N, E)."""
    keyed = [f"{question is not None}{text}" for text, question in zip(targets, questions, strict=True)]
    _, first = distinct(keyed)
    return [targets[i] for i in first], embeddings[first], [questions[i] is not None for i in first]


class InjectionTrial:
    """Tries a model's injector on the same samples again and again while it learns; what was before is kept."""

    def __init__(self, samples: InjectionSamples, generated: int = GENERATED_SAMPLES) -> None:
        """
        Args:
            generated: so many of the samples at most are also answered by generation.

        Raises:
            ValueError: there is no sample.
        """
        if not len(samples):
            raise ValueError("injection needs at least one confused sample with a right answer")
        self.samples = samples
        self._spoken = torch.from_numpy(spread(np.arange(len(samples)), generated))
        self._before: tuple[Tensor, Tensor | None] | None = None

    @property
    def n_without_wrong(self) -> int:
        """How many of the samples there is no wrong knowledge for."""
        return int((~self.samples.has_wrong).sum())

    @torch.no_grad()
    def run(self, model: Mamba3Jepa, device: torch.device | str, confused: Tensor) -> InjectionReport:
        """The rates with the model's injector as it is now; `confused`: (M,) bool, whether the model takes itself for
        confused."""
        if self._before is None:
            self._before = self._right(model, self._embed(model, None, device), device)
        before = self._before
        after = self._right(model, self._embed(model, self.samples.knowledge, device), device)
        wrong = self._right(model, self._embed(model, self.samples.wrong, device), device)
        has_wrong = self.samples.has_wrong
        forms, kinds = _rows_of(self.samples.forms), _rows_of(self.samples.kinds)
        retrieved = _Compared(before[0], after[0], wrong[0], has_wrong)
        generated, spoken = None, self._spoken
        if before[1] is not None and after[1] is not None and wrong[1] is not None:
            generated = _Compared(before[1], after[1], wrong[1], has_wrong[spoken])
        rates = retrieved.rates if generated is None else lambda rows: generated.rates(rows[spoken])
        measured = torch.ones_like(confused)
        if generated is not None:
            measured = torch.zeros_like(confused).index_fill(0, spoken, True)
        judged = {"all": confused} | {form: rows & confused for form, rows in forms.items()}
        return InjectionReport(
            n_samples=len(self.samples),
            n_without_wrong=self.n_without_wrong,
            retrieved=retrieved.rates(),
            generated=None if generated is None else generated.rates(),
            by_kind={kind: retrieved.rates(rows) for kind, rows in kinds.items()},
            by_form={form: rates(rows) for form, rows in forms.items() if bool((rows & measured).any())},
            judged={form: rates(rows) for form, rows in judged.items() if bool((rows & measured).any())},
        )

    def _embed(self, model: Mamba3Jepa, knowledge: Tensor | None, device: torch.device | str) -> Tensor:
        """Embeddings (M, E) predicted from the pooled states, with knowledge (M, K) added where it is given."""
        if model.recursion is None:
            raise ValueError("the model has no injector")
        embeddings = []
        for rows in torch.arange(len(self.samples)).split(_TOGETHER):
            pooled = self.samples.pooled[rows].to(device)
            if knowledge is not None:
                pooled = model.recursion.injector(pooled, knowledge[rows].to(device))
            embeddings.append(model.predictor.embed(pooled).float().cpu())
        return torch.cat(embeddings)

    def _right(self, model: Mamba3Jepa, embedding: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """Whether the right answer is retrieved (M,), and generated (of `_spoken`; None without decoder)."""
        samples = self.samples
        retrieved = torch.zeros(len(samples), dtype=torch.bool)
        for is_question in (True, False):
            rows = [i for i, question in enumerate(samples.questions) if (question is not None) == is_question]
            choices = [i for i, is_answer in enumerate(samples.text_is_answer) if is_answer == is_question]
            if rows:
                found = nearest_answer(
                    embedding[rows], samples.text_embeddings[choices], [samples.texts[i] for i in choices]
                )
                for row, text in zip(rows, found, strict=True):
                    retrieved[row] = text == samples.expected[row]
        if model.y_decoder is None:
            return retrieved, None
        said = generate_texts(model, embedding[self._spoken])
        expected = [samples.expected[i] for i in self._spoken.tolist()]
        right = [same_text(text, given) for text, (given, _) in zip(expected, said, strict=True)]
        return retrieved, torch.tensor(right)


@dataclass(frozen=True, kw_only=True)
class SteadinessReport:
    """Shares of M right answers that are wrong after something false or irrelevant was said: of all, if it is injected
    always, and if it is only where the model is confused, as in use."""

    n_samples: int
    always: float
    in_use: float

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """`{prefix}/turned_samples`, `{prefix}/turned` in use and `{prefix}/turned_always`."""
        return {
            f"{prefix}/turned_samples": self.n_samples,
            f"{prefix}/turned": self.in_use,
            f"{prefix}/turned_always": self.always,
        }


class SteadinessTrial:
    """M samples that the model answers rightly, and what is said that should not change that."""

    def __init__(self, pooled: Tensor, knowledge: Tensor, expected: Sequence[str]) -> None:
        """pooled (M, D), knowledge (M, K), expected: M right answers, as the Y-Decoder says them."""
        self.pooled, self.knowledge, self.expected = pooled, knowledge, list(expected)

    @torch.no_grad()
    def run(self, model: Mamba3Jepa, device: torch.device | str, confused: Tensor) -> SteadinessReport:
        """`confused`: (M,) bool, whether the model takes itself for confused, so that in use it would be told."""
        if model.recursion is None or model.y_decoder is None:
            raise ValueError("the model has no injector, or no Y-Decoder")
        told = model.recursion.injector(self.pooled.to(device), self.knowledge.to(device))
        said = generate_texts(model, model.predictor.embed(told).float().cpu())
        turned = torch.tensor(
            [not same_text(text, given) for text, (given, _) in zip(self.expected, said, strict=True)]
        )
        return SteadinessReport(
            n_samples=len(turned),
            always=float(turned.double().mean()),
            in_use=float((turned & confused.cpu()).double().mean()),
        )


class _Compared(NamedTuple):
    """(M,) bool: which samples are right before, after the right and after the wrong knowledge, and which have one."""

    before: Tensor
    after: Tensor
    wrong: Tensor
    has_wrong: Tensor

    def rates(self, rows: Tensor | None = None) -> Rates:
        """Shares over `rows` (M,) bool, by default all; those without wrong knowledge do not count in `wrong`."""
        rows = torch.ones_like(self.has_wrong) if rows is None else rows
        wrong_rows = rows & self.has_wrong
        return Rates(
            before=float(self.before[rows].double().mean()),
            after=float(self.after[rows].double().mean()),
            wrong=float(self.wrong[wrong_rows].double().mean()) if bool(wrong_rows.any()) else None,
        )


def _rows_of(labels: Sequence[str]) -> dict[str, Tensor]:
    """For each of the labels, in the order in which they come, which rows (M,) bool have it."""
    return {label: torch.tensor([each == label for each in labels]) for label in dict.fromkeys(labels)}
