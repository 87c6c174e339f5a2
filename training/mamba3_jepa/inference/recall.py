"""What a confused model recalls from a memory: its best fact, or its best episode.

Letters: B turns, M facts, P episodes, S length of an episode's key, E embedding width, R width of the retriever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba3_jepa.inference.memory import KnowledgeMemory, MemoryKind
from mamba3_jepa.models.episodes import cosines
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.vljepa import Mamba3Jepa, Observation


@dataclass(frozen=True, kw_only=True, eq=False)
class Recalled:
    """kind, text: as the memory lists it; embedding: (E,) what is injected; margin: how far it is above its floor."""

    kind: MemoryKind
    text: str
    embedding: Tensor
    margin: float


class Recall:
    """Looks things up in a memory, for one model.

    A fact is found by the retriever with the question, or without one by the predicted embedding; an episode by the
    question and by what is seen (`models.episodes`), if the model has learned to recall any. Each has its floor; of a
    fact and an episode that reach theirs, the one further above it is recalled, the fact if neither is. All in float32.
    """

    def __init__(self, model: Mamba3Jepa, recursion: Recursion, memory: KnowledgeMemory) -> None:
        self.model, self.recursion, self.memory = model, recursion, memory
        self._keys: Tensor | None = None  # (M, R) the facts, as the retriever sees them
        self.episodes = memory.episodes if recursion.recalls_episodes else None

    def can_look_up(self, question: str | None) -> bool:
        """Whether anything there may be found: facts by a retriever need a question."""
        finds_facts = bool(self.memory.texts) and (self.recursion.retriever is None or question is not None)
        return finds_facts or self.episodes is not None

    def look_up(self, observed: Observation, questions: Sequence[str | None]) -> list[Recalled | None]:
        """What is recalled in each of B turns."""
        prompt = self.model.config.query_prompt
        asked = self.model.embed_text([prompt if question is None else question for question in questions])
        facts = self._facts(observed.embedding, asked, questions)
        episodes = self._episodes(self.recursion.episode_key(observed.pooled, observed.picture), asked)
        return [
            max((each for each in pair if each is not None), key=lambda each: each.margin, default=None)
            for pair in zip(facts, episodes, strict=True)
        ]

    def _facts(self, embedding: Tensor, asked: Tensor, questions: Sequence[str | None]) -> list[Recalled | None]:
        memory, retriever = self.memory, self.recursion.retriever
        found: list[Recalled | None] = [None] * len(questions)
        if not memory.texts:
            return found
        if retriever is None:
            scores = cosines(embedding.cpu(), memory.embeddings)
        else:
            if self._keys is None:
                self._keys = retriever.text(memory.embeddings.to(self.model.device)).cpu()
            scores = cosines(retriever.question(asked).cpu(), self._keys)
        for i, (margin, row) in enumerate(_best(scores, self.recursion.memory_floor)):
            if margin >= 0 and (retriever is None or questions[i] is not None):
                found[i] = Recalled(
                    kind="fact", text=memory.texts[row], embedding=memory.embeddings[row], margin=margin
                )
        return found

    def _episodes(self, seen: Tensor, asked: Tensor) -> list[Recalled | None]:
        episodes, recursion = self.episodes, self.recursion
        if episodes is None:
            return [None] * len(seen)
        scores = recursion.episode_scores(seen.cpu(), asked.cpu(), episodes.seen, episodes.questions)
        return [
            Recalled(kind="episode", text=episodes.entries[row].text, embedding=episodes.answers[row], margin=margin)
            if margin >= 0
            else None
            for margin, row in _best(scores, recursion.episode_floor)
        ]


def _best(scores: Tensor, floor: Tensor) -> list[tuple[float, int]]:
    """Of each row of scores (B, G), how far its best is above the floor, and the first place of it."""
    best, place = scores.max(dim=1)
    # max may name any of equal ones
    first = (scores == best.unsqueeze(1)).int().argmax(dim=1)
    place = torch.where(best.isnan(), place, first)
    return list(zip((best - floor.to(best)).tolist(), place.tolist(), strict=True))
