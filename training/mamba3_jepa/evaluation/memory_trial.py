"""What a memory is worth as it is used: looked up only where the model takes itself for confused, injected only from
the floor on, and answered from there.

Letters: M questions, T texts, E embedding width, R width of what is compared, D width of the pooled state, K length of
a knowledge vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mamba3_jepa.evaluation.answer_metrics import same_text
from mamba3_jepa.evaluation.decoding import generate_texts
from mamba3_jepa.evaluation.memory_floor import MEMORY_TEXTS
from mamba3_jepa.models.vljepa import Mamba3Jepa

_TOGETHER = 256


@dataclass(frozen=True, kw_only=True)
class MemoryRates:
    """Shares in [0, 1] of some confused questions.

    right_before: what the model says by itself is right. found: the text that answers is what is injected. right: what
    is said then is right, whatever was injected. The same memory without the text that answers: told, something is
    injected all the same; changed, the model says something else then than by itself.
    """

    questions: int
    right_before: float
    found: float
    right: float
    told: float
    changed: float


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Confused questions, each with a memory of `memory_texts` texts at most, of which one answers it.

    all: of all of them; judged: of those where the model takes itself for confused, and so looks up; None without any.
    """

    memory_texts: int
    all: MemoryRates
    judged: MemoryRates | None

    def as_json(self) -> dict[str, Any]:
        """The fields by their names."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MemoryQuestions:
    """M confused questions, the text that answers each, and T texts to make memories of.

    asked (M, R) and keys (T, R): unit vectors that are compared; right: (M,) int64, which of the T answers it;
    knowledge: (T, K), what is injected; pooled: (M, D); judged: (M,) bool, whether the model takes itself for confused;
    before: M answers without any knowledge; expected: M right answers. answers: tells of some of the M (B,) and of some
    texts (C,) which texts answer which, (B, C) bool: such are in no memory beside the one to find.
    """

    asked: Tensor
    keys: Tensor
    right: Tensor
    knowledge: Tensor
    pooled: Tensor
    judged: Tensor
    before: list[str]
    expected: list[str]
    answers: Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def try_memory(model: Mamba3Jepa, questions: MemoryQuestions, memory: int = MEMORY_TEXTS) -> MemoryReport:
    """The shares with the model's floor; the texts beside the right one are drawn, for each chunk of questions anew.

    Args:
        memory: texts in a memory, the right one included; fewer where there are not so many.

    Raises:
        ValueError: there is no question.
    """
    if model.recursion is None or not len(questions.expected):
        raise ValueError("a memory needs a model with recursion, and at least one question")
    floor = model.recursion.memory_floor.float().cpu()
    with_right, without = [], []
    dice = torch.Generator().manual_seed(0)
    for rows in torch.arange(len(questions.expected)).split(_TOGETHER):
        drawn = torch.randperm(len(questions.keys), generator=dice)[: memory - 1]
        right = questions.right[rows]
        own = (questions.asked[rows].float() * questions.keys[right].float()).sum(dim=1)
        cosines = questions.asked[rows].float() @ questions.keys[drawn].float().T
        excluded = (drawn == right.unsqueeze(1)) | questions.answers(rows, drawn)
        other, place = cosines.masked_fill(excluded, -torch.inf).max(dim=1) if len(drawn) else (own - torch.inf, right)
        nearest = drawn[place] if len(drawn) else place
        judged = questions.judged[rows]
        is_own = own > other
        best = torch.where(is_own, own, other)
        with_right.append(torch.where(judged & (best >= floor), torch.where(is_own, right, nearest), -1))
        without.append(torch.where(judged & (other >= floor), nearest, -1))
    used, used_without = torch.cat(with_right), torch.cat(without)
    said, said_without = _said(model, questions, used), _said(model, questions, used_without)
    measured = {
        "right_before": _same(questions.expected, questions.before),
        "found": used == questions.right,
        "right": _same(questions.expected, said),
        "told": used_without >= 0,
        "changed": ~_same(questions.before, said_without),
    }
    everything = torch.ones(len(said), dtype=torch.bool)
    return MemoryReport(
        memory_texts=min(memory, len(questions.keys)),
        all=_rates(measured, everything),
        judged=_rates(measured, questions.judged) if bool(questions.judged.any()) else None,
    )


def _said(model: Mamba3Jepa, questions: MemoryQuestions, used: Tensor) -> list[str]:
    """M answers with the texts (M,) injected, and those of before where it is none (-1)."""
    said, rows = list(questions.before), (used >= 0).nonzero().squeeze(1)
    if len(rows) and model.recursion is not None:
        knowledge = questions.knowledge[used[rows]].to(model.device)
        told = model.recursion.injector(questions.pooled[rows].to(model.device), knowledge)
        texts = generate_texts(model, model.predictor.embed(told).float())
        for row, (text, _) in zip(rows.tolist(), texts, strict=True):
            said[row] = text
    return said


def _same(expected: Sequence[str], said: Sequence[str]) -> Tensor:
    return torch.tensor([same_text(*pair) for pair in zip(expected, said, strict=True)])


def _rates(measured: Mapping[str, Tensor], rows: Tensor) -> MemoryRates:
    shares = {name: float(values[rows].double().mean()) for name, values in measured.items()}
    return MemoryRates(questions=int(rows.sum()), **shares)
