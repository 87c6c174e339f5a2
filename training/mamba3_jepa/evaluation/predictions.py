"""Every answer in a file, to look at, or for another program to score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba3_jepa.evaluation.annotations import Annotation
from mamba3_jepa.evaluation.answers import Answers
from mamba3_jepa.files.json_file import json_line
from mamba3_jepa.files.whole_file import whole_file


def write_predictions(answers: Answers, found: Sequence[Annotation], path: Path) -> None:
    """A JSON object a line for each of N samples: `id` as the data has it, `question` (null for a caption), `right`, a
    list of all right texts, `nearest`, and, where there are any, `generated`.

    Raises:
        UserError: the file cannot be written.
    """
    with whole_file(path) as file:
        for row, each in enumerate(found):
            right = each.captions if each.question is None else each.question.answers
            values: dict[str, Any] = {"id": each.id, "question": answers.questions[row], "right": right}
            values["nearest"] = answers.nearest[row]
            if answers.generated:
                values["generated"] = answers.generated[row]
            file.write(json_line(values))
