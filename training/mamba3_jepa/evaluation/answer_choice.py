"""What a checkpoint's answers by nearest embedding are chosen from, and how many questions that cannot answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.evaluation.annotations import Annotation
from mamba3_jepa.evaluation.text_gallery import TextGallery, asked_rows
from mamba3_jepa.evaluation.validate import Collected
from mamba3_jepa.files.lines import read_lines
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.inference import EvaluateSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AnswerChoice:
    """What questions may be answered with by nearest embedding.

    origin: what the checkpoint knows (`data.answers`), the lines of a file, or what is right for a measured question.
    n_unknown: the questions of which no right answer is among them.
    """

    gallery: TextGallery
    origin: Literal["checkpoint", "file", "measured questions"]
    n_unknown: int


def answer_choice(
    model: Mamba3Jepa,
    collected: Collected,
    found: Sequence[Annotation],
    known: Sequence[str],
    settings: EvaluateSettings,
) -> AnswerChoice | None:
    """The lines of the file that was named, or else what the model was trained to answer; says of how many questions
    that has no right answer. None without questions."""
    rows = asked_rows(collected.questions)
    if not rows:
        return None
    path = settings.answers
    if path is None and not known:
        logger.warning(
            "%s keeps no answers that it was trained on: questions are answered with what is right for one of the %d "
            "questions measured, which is easier; `answers` names others",
            settings.checkpoint, len(rows),
        )  # fmt: skip
        gallery = TextGallery.of_rows(collected.texts, collected.target, rows)
        return AnswerChoice(gallery=gallery, origin="measured questions", n_unknown=0)
    gallery = TextGallery.embedded(model, known if path is None else read_lines(path, "answer"))
    n_unknown = _count_unknown(found, gallery.texts)
    if n_unknown:
        logger.warning(
            "of %d of %d questions no right answer is among the %d of %s: the nearest of them counts as wrong%s",
            n_unknown, len(rows), len(gallery.texts), path or "the training data that the checkpoint keeps",
            "" if path else "; `answers` names others",
        )  # fmt: skip
    return AnswerChoice(gallery=gallery, origin="file" if path else "checkpoint", n_unknown=n_unknown)


def _count_unknown(found: Sequence[Annotation], texts: Sequence[str]) -> int:
    """The questions of which no right answer is among the texts."""
    known = {plain_text(text) for text in texts}
    asked = (each.question for each in found if each.question is not None)
    return sum(known.isdisjoint(map(plain_text, question.answers)) for question in asked)
