"""TallyQA: lists of counting questions about images of COCO and Visual Genome (Acharya et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mamba3_jepa.data.published.fields import Fields
from mamba3_jepa.data.published.manifest import Line
from mamba3_jepa.files.json_stream import json_entries


def tallyqa_lines(questions: Path) -> Iterator[Line]:
    """A line for each question; one of them is in memory at a time.

    Raises:
        UserError: the file is not in this layout.
    """
    for entry in json_entries(questions):
        question = Fields(entry.value, entry.where)
        fields = {
            "question": question.text("question"),
            "answer": str(question.integer("answer")),
            "id": question.identity("question_id"),
            "meta": {**question.kept("image_id", "data_source", "issimple"), "split": questions.stem},
        }
        yield Line(entry.where, (question.text("image"),), fields)
