"""Episodes: pictures and questions seen before, with the answers that were right.

Letters: P episodes, B turns, S length of the key, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.digests import observer_digest
from mamba3_jepa.inference.embeddings import embed_texts
from mamba3_jepa.models.finite import demand_finite
from mamba3_jepa.models.vljepa import Mamba3Jepa, Observation

_SAME = 1e-4  # of its length: what two machines, or two batches, make of one picture and question differs less


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What was asked (None: the model's prompt), the right answer, and the image file's name (None: no image)."""

    question: str | None
    answer: str
    image: str | None

    @property
    def text(self) -> str:
        """As it is listed: "question answer"."""
        return self.answer if self.question is None else f"{self.question} {self.answer}"

    def to_dict(self) -> dict[str, str | None]:
        """As a file of a memory holds it."""
        return {"question": self.question, "answer": self.answer, "image": self.image}

    @staticmethod
    def from_dict(values: Any) -> Episode:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(values, dict) or set(values) != {"question", "answer", "image"}:
            raise ValueError("expected question, answer and image")
        question, answer, image = values["question"], values["answer"], values["image"]
        if not isinstance(answer, str) or not all(each is None or isinstance(each, str) for each in (question, image)):
            raise ValueError("expected texts")
        return Episode(question=question, answer=answer, image=image)


@dataclass(frozen=True, kw_only=True, eq=False)
class Episodes:
    """P episodes by what they are found and answered with.

    seen: (P, S) keys, what the pictures look like or the pooled states (`RecursionConfig.episode_key`); questions,
    answers: (P, E) unit embeddings by the Y-Encoder; all float32 on the CPU. observer: digest of what made the keys,
    see `digests.observer_digest`.
    """

    entries: tuple[Episode, ...]
    seen: Tensor
    questions: Tensor
    answers: Tensor
    observer: str

    def __len__(self) -> int:
        return len(self.entries)

    def only(self, rows: Sequence[int]) -> Episodes | None:
        """Some of them, in this order; None where that is none."""
        if not rows:
            return None
        return Episodes(
            entries=tuple(self.entries[row] for row in rows),
            seen=self.seen[list(rows)],
            questions=self.questions[list(rows)],
            answers=self.answers[list(rows)],
            observer=self.observer,
        )

    def joined(self, others: Episodes) -> tuple[Episodes, int, int]:
        """With `others` behind them, how many were added, and how many have a new answer.

        One with the key and the question of another takes its place, so that nothing is remembered twice.

        Raises:
            ValueError: another observer saw them.
        """
        if others.observer != self.observer:
            raise ValueError("the episodes are of two observers")
        entries, added, changed = list(self.entries), 0, 0
        seen, questions, answers = list(self.seen), list(self.questions), list(self.answers)
        for i, entry in enumerate(others.entries):
            place = next((at for at, old in enumerate(entries) if _is_same(old, entry, seen[at], others.seen[i])), -1)
            if place < 0:
                entries.append(entry)
                seen.append(others.seen[i])
                questions.append(others.questions[i])
                answers.append(others.answers[i])
                added += 1
            elif entries[place].answer != entry.answer:
                entries[place], answers[place] = entry, others.answers[i]
                changed += 1
        joined = Episodes(
            entries=tuple(entries),
            seen=torch.stack(seen),
            questions=torch.stack(questions),
            answers=torch.stack(answers),
            observer=self.observer,
        )
        return joined, added, changed


def _is_same(a: Episode, b: Episode, seen_a: Tensor, seen_b: Tensor) -> bool:
    return a.question == b.question and bool((seen_a - seen_b).norm() <= _SAME * seen_a.norm())


def demand_episodes(model: Mamba3Jepa) -> None:
    """See to it that a model can recall what it is to remember.

    Raises:
        UserError: it has no recursion, was trained without episodes, or learned nothing about them.
    """
    if model.recursion is None:
        raise UserError(f"{model.source}: it cannot remember what it sees: phase 3 (train_agent.py) trains that")
    if not model.config.recursion.episodes:
        raise UserError(
            f"{model.source}: it was trained without episodes, so it would never recall one: train phase 3 with "
            "`model` recursion.episodes=true, or remember a sentence instead (memory add FILE TEXT)"
        )
    if not model.recursion.recalls_episodes:
        raise UserError(
            f"{model.source}: its validation had too little to learn when to recall an episode, so it would never "
            "recall one: train phase 3 with more validation samples, or remember a sentence instead (memory add FILE "
            "TEXT)"
        )


def made_episodes(
    model: Mamba3Jepa,
    observed: Observation,
    questions: Sequence[str | None],
    answers: Sequence[str],
    images: Sequence[str | None],
) -> Episodes:
    """Episodes of B turns that `model` observed without being told anything.

    Args:
        questions: per turn a text, or None for the model's prompt.
        answers: per turn the right answer.
        images: per turn the name of the image file, or None.

    Raises:
        UserError: a question or an answer is empty, or not finite by the Y-Encoder; see also `demand_episodes`.
    """
    demand_episodes(model)
    asked = [model.config.query_prompt if question is None else question for question in questions]
    demand_finite(observed.pooled, model, "the state at", asked)
    assert model.recursion is not None
    seen = model.recursion.episode_key(observed.pooled, observed.picture)
    return Episodes(
        entries=tuple(
            Episode(question=question, answer=answer, image=image)
            for question, answer, image in zip(questions, answers, images, strict=True)
        ),
        seen=seen.float().cpu().clone(),
        questions=embed_texts(model, asked).embeddings,
        answers=embed_texts(model, answers).embeddings,
        observer=observer_digest(model),
    )
