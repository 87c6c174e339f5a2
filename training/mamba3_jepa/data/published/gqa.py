"""GQA: a file of questions by their numbers (Hudson and Manning 2019, visualreasoning.net)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mamba3_jepa.data.published.fields import Fields
from mamba3_jepa.data.published.manifest import Line
from mamba3_jepa.files.json_stream import json_members

# What the official evaluation reads beside the answer, for its accuracy by type, consistency and distribution.
_KEPT = ("imageId", "types", "groups", "isBalanced", "fullAnswer", "entailed", "equivalent")


def gqa_lines(questions: Sequence[Path]) -> Iterator[Line]:
    """A line for each question that has an answer; one of them is in memory at a time.

    Raises:
        UserError: a file is not in this layout, or has no answers, as those of the test splits.
    """
    for path in questions:
        for entry in json_members(path):
            question = Fields(entry.value, entry.where)
            image = question.text("imageId")
            fields = {
                "question": question.text("question"),
                "answer": question.text("answer"),
                "id": entry.key,
                "meta": {**question.kept(*_KEPT), "split": path.name.partition("_")[0].removesuffix(".json")},
            }
            yield Line(entry.where, (f"images/{image}.jpg", f"{image}.jpg"), fields)
