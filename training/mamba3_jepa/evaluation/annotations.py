"""What the data says of measured samples beside question and target: all captions, all answers, and its notes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from mamba3_jepa.data.sample import Source
from mamba3_jepa.evaluation.benchmarks import Question


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Of one sample. captions: all that the data has for its image, none for a question; picture: tells the image from
    others, None where that is not known; question: None for a caption."""

    captions: tuple[str, ...]
    picture: str | None
    question: Question | None
    id: Any


def read_annotations(source: Source, index: Iterable[int]) -> list[Annotation]:
    """Of the samples with these numbers, which have targets; decodes no image.

    Captions of one picture are taken together, in one line or in several.

    Raises:
        BadSampleError: one cannot be read any more.
    """
    found = [_annotation(source, i) for i in index]
    of_picture: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for each in found:
        if each.captions and each.picture is not None:
            of_picture[each.picture].append(each.captions)
    together = {picture: tuple(chain.from_iterable(lines)) for picture, lines in of_picture.items() if len(lines) > 1}
    return [
        replace(each, captions=together[each.picture]) if each.captions and each.picture in together else each
        for each in found
    ]


def _annotation(source: Source, i: int) -> Annotation:
    sample = source.sample(i)
    target, meta = sample.target or "", sample.meta.get("meta")
    if sample.question is None:
        captions = sample.captions or (target,)
        return Annotation(captions=captions, picture=sample.picture, question=None, id=sample.meta.get("id"))
    notes = meta if isinstance(meta, Mapping) else {}
    question = Question(answer=target, answers=sample.answers or (target,), meta=notes)
    return Annotation(captions=(), picture=sample.picture, question=question, id=sample.meta.get("id"))


def repeated_ids(found: Sequence[Annotation]) -> int:
    """How many questions have the id of an earlier one, and the same `meta`: ids of several files may be the same."""
    counts = Counter(
        json.dumps([each.id, dict(each.question.meta)], sort_keys=True)
        for each in found
        if each.question is not None and each.id is not None
    )
    return counts.total() - len(counts)
