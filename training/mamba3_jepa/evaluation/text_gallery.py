"""The texts that a prediction is compared with.

Shapes: N samples, G texts, E embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba3_jepa.evaluation.retrieval import distinct
from mamba3_jepa.models.finite import demand_finite
from mamba3_jepa.models.vljepa import Mamba3Jepa


@dataclass(frozen=True, kw_only=True)
class TextGallery:
    """G different texts and their (G, E) embeddings, on the CPU."""

    texts: list[str]
    embeddings: Tensor

    @staticmethod
    def embedded(model: Mamba3Jepa, texts: Sequence[str]) -> TextGallery:
        """Of one text or more, each once.

        Raises:
            UserError: no text, or an empty one; an embedding is not finite.
        """
        texts = list(dict.fromkeys(texts))
        embeddings = demand_finite(model.embed_text(texts).cpu(), model, "the embedding of", texts)
        return TextGallery(texts=texts, embeddings=embeddings)

    @staticmethod
    def of_rows(texts: Sequence[str], embeddings: Tensor, rows: Sequence[int]) -> TextGallery:
        """The texts of some of N samples, each once, with the embeddings (N, E) that they have there."""
        _, first = distinct([texts[i] for i in rows])
        chosen = [rows[i] for i in first]
        return TextGallery(texts=[texts[i] for i in chosen], embeddings=embeddings[chosen].cpu())

    def with_texts(self, model: Mamba3Jepa, texts: Sequence[str]) -> TextGallery:
        """These, and behind them those of some texts that are not among them."""
        own = set(self.texts)
        further = [text for text in texts if text not in own]
        if not further:
            return self
        added = TextGallery.embedded(model, further)
        return TextGallery(texts=self.texts + added.texts, embeddings=torch.cat([self.embeddings, added.embeddings]))


def validation_answers(
    model: Mamba3Jepa, texts: Sequence[str], embeddings: Tensor, questions: Sequence[str | None], known: Sequence[str]
) -> TextGallery | None:
    """What the questions among N validation samples may be answered with during training; None without questions.

    These are the right answers to all of them, so that each can be answered and the best checkpoint can be told also
    where hardly an answer repeats, and `known`, what the training data answers most, which the trained model will
    choose from: `evaluate` offers those alone.

    Args:
        texts, embeddings: the N right texts and their (N, E) embeddings.
    """
    rows = asked_rows(questions)
    return TextGallery.of_rows(texts, embeddings, rows).with_texts(model, known) if rows else None


def asked_rows(questions: Sequence[str | None]) -> list[int]:
    """Which samples have a question."""
    return [i for i, question in enumerate(questions) if question is not None]


def caption_rows(questions: Sequence[str | None]) -> list[int]:
    """Which samples have none."""
    return [i for i, question in enumerate(questions) if question is None]
