"""A memory: texts with their Y-Encoder embeddings, and episodes, looked up when a model is confused.

Shape letters: M texts, P episodes, B queries, E embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.retrieval import top_texts
from mamba3_jepa.files.lines import read_lines
from mamba3_jepa.inference.digests import encoder_digest, observer_digest
from mamba3_jepa.inference.embeddings import embed_texts
from mamba3_jepa.inference.episodes import Episodes
from mamba3_jepa.inference.memory_file import SUFFIX, Contents, read_contents, write_contents
from mamba3_jepa.models.vljepa import Mamba3Jepa

logger = logging.getLogger(__name__)

MemoryKind = Literal["fact", "episode"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that is remembered: its number from 1 on, facts first, and of an episode the image file's name."""

    number: int
    kind: MemoryKind
    text: str
    image: str | None


class KnowledgeMemory:
    """M different texts (facts) and their embeddings (M, E) of unit length, and P episodes.

    encoder: digest of the text encoder that made the embeddings, see `digests.encoder_digest`.
    """

    def __init__(
        self, texts: Sequence[str], embeddings: Tensor, encoder: str, episodes: Episodes | None = None
    ) -> None:
        if embeddings.ndim != 2 or len(texts) != len(embeddings):
            raise ValueError(f"expected M texts and (M, E), found {len(texts)} and {tuple(embeddings.shape)}")
        self.texts, self.embeddings, self.encoder = list(texts), embeddings.float().cpu(), encoder
        self.episodes = episodes

    def __len__(self) -> int:
        """Facts and episodes."""
        return len(self.texts) + (0 if self.episodes is None else len(self.episodes))

    @property
    def entries(self) -> list[Entry]:
        """All that is remembered, in order."""
        episodes = () if self.episodes is None else self.episodes.entries
        facts: list[tuple[MemoryKind, str, str | None]] = [("fact", text, None) for text in self.texts]
        rest: list[tuple[MemoryKind, str, str | None]] = [("episode", each.text, each.image) for each in episodes]
        return [
            Entry(number=number, kind=kind, text=text, image=image)
            for number, (kind, text, image) in enumerate(facts + rest, start=1)
        ]

    @classmethod
    def build(cls, model: Mamba3Jepa, texts: Sequence[str], episodes: Episodes | None = None) -> KnowledgeMemory:
        """Embed texts; of equal ones the first is kept.

        Raises:
            UserError: no text and no episodes, or an empty text; an embedding is not finite.
        """
        texts = list(dict.fromkeys(texts))
        if not texts and episodes is not None:
            return cls([], torch.empty(0, model.config.embed_dim), encoder_digest(model), episodes)
        return cls(texts, embed_texts(model, texts).embeddings, encoder_digest(model), episodes)

    @classmethod
    def open(cls, path: str | Path, model: Mamba3Jepa) -> KnowledgeMemory:
        """A saved memory (`.safetensors`), or a text file with one text a line, which is embedded now.

        What cannot be of use, an empty memory or episodes that the model does not recall, is said.

        Raises:
            UserError: see `load`; or the text file is missing, empty or not UTF-8.
        """
        if Path(path).suffix != SUFFIX:
            return cls.build(model, read_lines(path, "text to remember"))
        memory = cls.load(path, model)
        if not len(memory):
            logger.warning("%s: this memory is empty: there is nothing to look up", path)
        elif memory.episodes is not None and (model.recursion is None or not model.recursion.recalls_episodes):
            logger.warning("%s: its episodes are not looked up: this model has not learned to recall any", path)
        return memory

    def search(self, embedding: Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each of B embeddings (B, E) the k nearest texts with their cosines, nearest first."""
        return top_texts(embedding.float().cpu(), self.embeddings, self.texts, k)

    def joined(self, others: KnowledgeMemory) -> tuple[KnowledgeMemory, int, int]:
        """With what `others` holds behind it, how much was added, and how many episodes have a new answer.

        A text that is there already is not added.

        Raises:
            ValueError: another encoder, or observer, made it.
        """
        if others.encoder != self.encoder:
            raise ValueError("the memories are of two encoders")
        known = set(self.texts)
        new = [row for row, text in enumerate(others.texts) if text not in known]
        embeddings = self.embeddings.new_empty(len(self.texts) + len(new), self.embeddings.shape[1])
        embeddings[: len(self.texts)] = self.embeddings
        embeddings[len(self.texts) :] = others.embeddings[new]
        episodes, added, changed = self.episodes, 0, 0
        if others.episodes is not None:
            if episodes is None:
                episodes = others.episodes.only([0])
                assert episodes is not None
                added = 1
            episodes, more, changed = episodes.joined(others.episodes)
            added += more
        texts = [*self.texts, *(others.texts[row] for row in new)]
        return KnowledgeMemory(texts, embeddings, self.encoder, episodes), len(new) + added, changed

    def without(self, numbers: Collection[int]) -> KnowledgeMemory:
        """What is left without the entries of these numbers."""
        kept = [row for row in range(len(self)) if row + 1 not in numbers]
        facts = [row for row in kept if row < len(self.texts)]
        rest = [row - len(self.texts) for row in kept if row >= len(self.texts)]
        episodes = None if self.episodes is None else self.episodes.only(rest)
        return KnowledgeMemory([self.texts[row] for row in facts], self.embeddings[facts], self.encoder, episodes)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        write_contents(
            Path(path),
            Contents(texts=self.texts, embeddings=self.embeddings, encoder=self.encoder, episodes=self.episodes),
        )

    @classmethod
    def read(cls, path: str | Path) -> KnowledgeMemory:
        """A saved memory of whatever model.

        Raises:
            UserError: the file is missing, damaged, or no memory that this version reads.
        """
        contents = read_contents(path)
        return cls(contents.texts, contents.embeddings, contents.encoder, contents.episodes)

    @classmethod
    def load(cls, path: str | Path, model: Mamba3Jepa) -> KnowledgeMemory:
        """Read a saved memory that this model's Y-Encoder made, and its predictor, where there are episodes.

        Raises:
            UserError: see `read`; or it was made with other weights.
        """
        memory = cls.read(path)
        if memory.encoder != encoder_digest(model):
            raise UserError(
                f"{path}: made with another Y-Encoder or tokenizer, so its embeddings mean nothing to this model; "
                "make it again from its texts"
            )
        shape = (len(memory.texts), model.config.embed_dim)
        if memory.embeddings.shape != shape:
            raise UserError(f"{path}: damaged: expected {shape[0]} texts and finite F32 embeddings of shape {shape}")
        episodes = memory.episodes
        if episodes is None:
            return memory
        if episodes.observer != observer_digest(model):
            raise UserError(
                f"{path}: its episodes were seen by another predictor, so what was seen means nothing to this model; "
                "remember them again with it, or remove them (memory list FILE gives their numbers)"
            )
        if episodes.seen.shape[1] != model.config.episode_dim:
            raise UserError(
                f"{path}: its episode_states have width {episodes.seen.shape[1]}, this model finds episodes by "
                f"{model.config.episode_dim} numbers; remember them again with it"
            )
        return memory
