"""A picture of what a model retrieves: a card for each sample with its image, question and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mamba3_jepa.evaluation.answer_metrics import same_text
from mamba3_jepa.evaluation.cards import Row, draw_cards, heading, marked_rows, text_rows


def contact_sheet(
    images: Sequence[Image.Image | None],
    questions: Sequence[str | None],
    expected: Sequence[str],
    retrieved: Sequence[Sequence[tuple[str, float]]],
    path: str | Path,
) -> Path:
    """Write the PNG `path` with one card for each of the N samples, at most four in a row.

    Args:
        images: N pictures of any size and mode; None is drawn as a grey box that says so.
        questions: N questions; None leaves the line out.
        expected: N texts that would be right.
        retrieved: for each sample its top texts with their cosines, best first.

    Raises:
        ValueError: no samples, or lengths that differ.
        UserError: the file cannot be written.
    """
    if not images or len({len(images), len(questions), len(expected), len(retrieved)}) != 1:
        raise ValueError("a contact sheet needs equally many images, questions, expected and retrieved texts")
    cards = [_rows(*texts) for texts in zip(questions, expected, retrieved, strict=True)]
    return draw_cards(images, cards, Path(path))


def _rows(question: str | None, expected: str, retrieved: Sequence[tuple[str, float]]) -> list[Row]:
    """A card's text from top to bottom, already wrapped."""
    rows = [] if question is None else text_rows(question, bold=True)
    rows.append(heading("expected", space_above=10 if rows else 0))
    rows += text_rows(expected)
    rows.append(heading("retrieved"))
    for text, score in retrieved:
        rows += marked_rows(text, same_text(expected, text), score=score, max_lines=3)
    return rows
