"""Validation samples answered by generation: their numbers and their pictures.

Shapes: N samples, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mamba3_jepa.data.sample import Source, image_to_show
from mamba3_jepa.evaluation.answer_metrics import AnswerMetrics, answer_metrics
from mamba3_jepa.evaluation.answer_plots import plot_answers_by_type
from mamba3_jepa.evaluation.answer_sheet import answer_sheet
from mamba3_jepa.evaluation.retrieval import nearest_answer
from mamba3_jepa.evaluation.text_gallery import TextGallery, asked_rows, caption_rows

_CARDS = 12


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Validation samples answered by generation.

    index: their numbers in the source; questions: None for captions; types: what is asked,
    None for captions; nearest: for questions, the answer whose
    embedding is nearest to the predicted one, which is what the decoder is given; also_right: for each sample the
    further texts that are right, such as other captions of its image; None where there are none.
    """

    index: list[int]
    questions: list[str | None]
    types: list[str | None]
    expected: list[str]
    generated: list[str]
    nearest: list[str]
    also_right: list[tuple[str, ...]] | None = None

    def metrics(self) -> AnswerMetrics:
        """Of the generated texts."""
        return answer_metrics(self.expected, self.generated, self.types, self.also_right)

    def nearest_metrics(self) -> AnswerMetrics:
        """Of the nearest answers, for comparison."""
        return answer_metrics(self.expected, self.nearest, self.types, self.also_right)


def nearest_texts(
    predicted: Tensor,
    target: Tensor,
    expected: Sequence[str],
    questions: Sequence[str | None],
    answers: TextGallery | None = None,
) -> list[str]:
    """For each of N samples the nearest answer, or, for a caption, the nearest of all captions.

    Args:
        predicted, target: (N, E), the targets those of the N texts `expected`.
        answers: what questions may be answered with; unless given, all answers that are right for one.
    """
    nearest = [""] * len(expected)
    for rows, gallery in ((asked_rows(questions), answers), (caption_rows(questions), None)):
        if not rows:
            continue
        gallery = gallery or TextGallery.of_rows(expected, target, rows)
        found = nearest_answer(predicted[rows], gallery.embeddings, gallery.texts)
        for i, text in zip(rows, found, strict=True):
            nearest[i] = text
    return nearest


def write_answer_pictures(answers: Answers, source: Source, folder: Path) -> list[Path]:
    """answer_sheet.png, with more questions than captions on it, and plots/answers_by_type.png if there are questions.

    Raises:
        UserError: a picture cannot be written.
    """
    written = [write_answer_sheet(answers, source, folder / "answer_sheet.png")]
    by_type = answers.metrics().by_type
    if by_type:
        path, nearest = folder / "plots" / "answers_by_type.png", answers.nearest_metrics().by_type
        written.append(plot_answers_by_type(path, generated=by_type, nearest=nearest))
    return written


def write_answer_sheet(answers: Answers, source: Source, path: Path) -> Path:
    """A few of the samples as cards, more questions than captions.

    Raises:
        UserError: the picture cannot be written.
    """
    asked, captions = asked_rows(answers.questions), caption_rows(answers.questions)
    chosen = captions[: max(_CARDS // 3, _CARDS - len(asked))]
    chosen += asked[: _CARDS - len(chosen)]
    return answer_sheet(
        images=[image_to_show(source, answers.index[i]) for i in chosen],
        questions=[answers.questions[i] for i in chosen],
        expected=[answers.expected[i] for i in chosen],
        generated=[answers.generated[i] for i in chosen],
        path=path,
    )
