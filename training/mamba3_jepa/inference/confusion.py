"""How confused a model is by what it is asked: the one place where that is judged.

Shape letters: B turns, D width of the pooled state, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mamba3_jepa.models.finite import demand_finite
from mamba3_jepa.models.generation import DOUBT_FLOOR, Generated, doubt
from mamba3_jepa.models.vljepa import Mamba3Jepa

Signal = Literal["state", "answer", "before"]
"""What confuses a model: the pooled state; the decoder's doubt in its own answer; or, where the turns with a question
are judged together, only the turns before."""


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How confused a model is in one turn.

    score: P(confused); a float32, as the threshold is.
    threshold: the one that travels with the model.
    cause: what confuses it, if it is: "answer" if the pooled state alone would leave the score at the threshold or
        under it, so that it is the decoder's doubt in its own answer, else "state".
    """

    score: float
    threshold: float
    cause: Literal["state", "answer"]

    @property
    def confused(self) -> bool:
        """Whether the score is over the threshold."""
        return self.score > self.threshold

    @property
    def signal(self) -> Signal | None:
        """The cause, where the model is confused."""
        return self.cause if self.confused else None


class Judged(NamedTuple):
    """What `judge` finds of B turns.

    confusions: None without recursion.
    said: the decoder's greedy answers, where the monitor hears them; else None.
    """

    confusions: list[Confusion | None]
    said: list[Generated] | None


@torch.no_grad()
def judge(model: Mamba3Jepa, embedding: Tensor, pooled: Tensor, names: Sequence[str], batch_size: int) -> Judged:
    """What the confusion monitor makes of B turns.

    Args:
        embedding, pooled: what the model predicts, (B, E), and the states that it is read from, (B, D).
        names: of the turns, for messages.
        batch_size: answers spoken at once, where the monitor hears them.

    Raises:
        UserError: a score is not finite, or what the decoder gives.
    """
    if model.recursion is None:
        return Judged([None] * len(pooled), None)
    probe = model.recursion.confusion_probe
    pooled, said, doubts, surest = pooled.to(model.device), None, None, None
    if probe.hears_answer:
        said = model.say(embedding, batch_size=batch_size)
        doubts = doubt(said).to(model.device)
        surest = torch.full_like(doubts, math.log(DOUBT_FLOOR))
    scores = demand_finite(probe.score(pooled, doubts), model, "the confusion for", names)
    by_state = (probe.score(pooled, surest) > probe.threshold).tolist()
    threshold = float(probe.threshold)
    confusions: list[Confusion | None] = [
        Confusion(score=score, threshold=threshold, cause="state" if alone or said is None else "answer")
        for score, alone in zip(scores.tolist(), by_state, strict=True)
    ]
    return Judged(confusions, said)
