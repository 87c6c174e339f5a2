"""The known answers of a checkpoint with their embeddings, computed once and kept beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.models.vljepa import Mamba3Jepa

logger = logging.getLogger(__name__)


def known_answers(model: Mamba3Jepa, checkpoint: Path, texts: Sequence[str]) -> KnowledgeMemory | None:
    """The answers that `checkpoint`, which `model` was read from, knows; None if it knows none.

    Their embeddings are read from CHECKPOINT.answers.safetensors, a saved memory, if that is there and of these weights
    and texts. Otherwise they are computed, and left there for the next time where the folder may be written.

    Raises:
        UserError: an answer is empty, or its embedding is not finite.
    """
    texts = list(dict.fromkeys(texts))
    if not texts:
        return None
    path = checkpoint.with_suffix(".answers.safetensors")
    if path.is_file():
        try:
            kept = KnowledgeMemory.load(path, model)
            if kept.texts == texts:
                return kept
        except UserError as error:
            logger.info("%s; its embeddings are computed again", error)
    answers = KnowledgeMemory.build(model, texts)
    if path.exists() and not path.is_file():
        return answers
    try:
        answers.save(path)
    except UserError as error:
        logger.info("the embeddings of the known answers are not kept: %s", error)
    return answers
