"""VQA v2: a file of questions and one of annotations with ten answers each (visualqa.org; Goyal et al. 2017)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mamba3_jepa.data.published.fields import Fields
from mamba3_jepa.data.published.manifest import LeftOut, Line
from mamba3_jepa.data.strings import Strings
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_stream import json_members

_KEPT = ("image_id", "question_type", "answer_type")


def vqav2_lines(questions: Path, annotations: Path, left_out: LeftOut) -> Iterator[Line]:
    """A line for each annotated question, in the order of the annotations.

    The questions are held in memory, about 80 bytes each; the annotations, ten times as much, are not.

    Raises:
        UserError: the files are not in this layout, or not of one split.
    """
    asked = _Questions(questions)
    answered = np.zeros(len(asked.texts), dtype=bool)
    for entry in json_members(annotations):
        if entry.key != "annotations":
            continue
        note = Fields(entry.value, entry.where)
        number, image = note.integer("question_id"), note.integer("image_id")
        row = asked.row(number)
        if row is None:
            raise UserError(f'{note.where}: "question_id" {number} is not in {questions}: give two files of one split')
        if asked.images[row] != image:
            raise UserError(f'{note.where}: "image_id" {image} is {asked.images[row]} in {questions}')
        if answered[row]:
            left_out.add("annotations of a question that has one already", note.where)
            continue
        answered[row] = True
        fields: dict[str, Any] = {"question": asked.texts[row], "id": number}
        fields |= _answers(note)
        if "answers" not in fields:
            left_out.add("questions with empty answers only", note.where)
            continue
        yield Line(note.where, asked.image_names(image), fields | {"meta": note.kept(*_KEPT) | {"split": asked.split}})
    if not answered.any():
        raise UserError(f'{annotations}: no "annotations"; expected an annotations file of VQA v2')
    for row in np.flatnonzero(~answered).tolist():
        left_out.add("questions without annotation", f'{questions}: "question_id" {asked.ids[row]}')


def _answers(note: Fields) -> dict[str, Any]:
    """What is trained on, and all that were given, empty ones too: of how many the accuracy is depends on it."""
    fields: dict[str, Any] = {}
    if "multiple_choice_answer" in note and note.text("multiple_choice_answer"):
        fields["answer"] = note.text("multiple_choice_answer")
    given = [each.text("answer") for each in note.objects("answers")]
    if any(given):
        fields["answers"] = given
    return fields


class _Questions:
    """The questions of one file, in its order. ids, images: (n,) int64; split: such as "train2014"."""

    def __init__(self, path: Path) -> None:
        ids, images = array("q"), array("q")
        self.split, self._kind = "", "mscoco"

        def texts() -> Iterator[str]:
            for entry in json_members(path):
                if entry.key == "questions":
                    question = Fields(entry.value, entry.where)
                    ids.append(question.integer("question_id"))
                    images.append(question.integer("image_id"))
                    yield question.text("question")
                elif entry.key == "data_subtype":
                    self.split = Fields({entry.key: entry.value}, str(path)).text(entry.key)
                elif entry.key == "data_type":
                    self._kind = Fields({entry.key: entry.value}, str(path)).text(entry.key)

        self.texts = Strings(texts())
        self.ids, self.images = np.array(ids, dtype=np.int64), np.array(images, dtype=np.int64)
        if not len(self.ids):
            raise UserError(f'{path}: no "questions"; expected a questions file of VQA v2')
        if not self.split:
            raise UserError(f'{path}: field "data_subtype" is missing: expected the split, such as "train2014"')
        self._order = np.argsort(self.ids, kind="stable")
        self._sorted = self.ids[self._order]
        twice = self._sorted[:-1][np.diff(self._sorted) == 0]
        if len(twice):
            raise UserError(f'{path}: two questions have the "question_id" {twice[0]}')

    def row(self, number: int) -> int | None:
        """Where the question with this "question_id" is; None where there is none."""
        place = int(np.searchsorted(self._sorted, number))
        return int(self._order[place]) if place < len(self._sorted) and self._sorted[place] == number else None

    def image_names(self, image: int) -> tuple[str, str]:
        """As COCO and the abstract scenes name their files, in a folder of the split, or not."""
        folder = self.split.replace("test-dev", "test")  # a part of the test images
        prefix, suffix = ("COCO", "jpg") if self._kind == "mscoco" else (self._kind, "png")
        name = f"{prefix}_{folder}_{image:012}.{suffix}"
        return f"{folder}/{name}", name
