"""A picture of what a model says: a card for each sample with its image, question, and both answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mamba3_jepa.evaluation.answer_metrics import same_text
from mamba3_jepa.evaluation.cards import Row, draw_cards, heading, marked_rows, text_rows

_NOTHING = "(nothing)"


def answer_sheet(
    images: Sequence[Image.Image | None],
    questions: Sequence[str | None],
    expected: Sequence[str],
    generated: Sequence[str],
    path: str | Path,
) -> Path:
    """Write the PNG `path` with one card for each of the N samples, at most four in a row.

    Args:
        images: N pictures of any size and mode; None is drawn as a grey box that says so.
        questions: N questions; None leaves the line out.
        expected: N texts that would be right.
        generated: N texts the model generated, marked right or wrong by `same_text`.

    Raises:
        ValueError: no samples, or lengths that differ.
        UserError: the file cannot be written.
    """
    if not images or len({len(images), len(questions), len(expected), len(generated)}) != 1:
        raise ValueError("an answer sheet needs equally many images, questions, expected and generated texts")
    cards = [_rows(*texts) for texts in zip(questions, expected, generated, strict=True)]
    return draw_cards(images, cards, Path(path))


def _rows(question: str | None, expected: str, generated: str) -> list[Row]:
    rows = [] if question is None else text_rows(question, bold=True)
    rows.append(heading("expected", space_above=10 if rows else 0))
    rows += text_rows(expected)
    rows.append(heading("generated"))
    return rows + marked_rows(generated if generated.split() else _NOTHING, same_text(expected, generated))
