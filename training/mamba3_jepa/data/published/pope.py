"""POPE: yes-or-no questions about objects that are there or not, one JSON object a line (Li et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mamba3_jepa.data.published.fields import Fields
from mamba3_jepa.data.published.manifest import Line
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_stream import json_entries

_CATEGORY = re.compile(r"random|popular|adversarial")
_FOLDER = re.compile(r"COCO_(\w+20\d\d)_")


def pope_lines(questions: Sequence[Path]) -> Iterator[Line]:
    """A line for each question; how the absent objects were chosen is told by the file's name.

    Raises:
        UserError: a file is not in this layout, or a label is neither yes nor no.
    """
    for path in questions:
        category = _CATEGORY.search(path.name)
        for entry in json_entries(path):
            question = Fields(entry.value, entry.where)
            image, label = question.text("image"), question.text("label")
            if label not in ("yes", "no"):
                raise UserError(f'{entry.where}: field "label": expected yes or no, found {label!r}')
            folder = _FOLDER.match(image)
            fields = {
                "question": question.text("text"),
                "answer": label,
                "id": question.identity("question_id"),
                "meta": {"category": category[0] if category else None, "file": path.name},
            }
            yield Line(entry.where, (f"{folder[1]}/{image}", image) if folder else (image, f"images/{image}"), fields)
