"""What the data says of measured samples beside question and target: all captions, all answers, and its notes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mamba3_jepa.data.sample import Source
from mamba3_jepa.evaluation.benchmarks import Question


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Of one sample. captions: all that are right for its image, none for a question; question: None for a caption."""

    captions: tuple[str, ...]
    question: Question | None
    id: Any


def read_annotations(source: Source, index: Iterable[int]) -> list[Annotation]:
    """Of the samples with these numbers, which have targets; decodes no image.

    Raises:
        BadSampleError: one cannot be read any more.
    """
    return [_annotation(source, i) for i in index]


def _annotation(source: Source, i: int) -> Annotation:
    sample = source.sample(i)
    target, meta = sample.target or "", sample.meta.get("meta")
    if sample.question is None:
        return Annotation(captions=sample.captions or (target,), question=None, id=sample.meta.get("id"))
    notes = meta if isinstance(meta, Mapping) else {}
    question = Question(answer=target, answers=sample.answers or (target,), meta=notes)
    return Annotation(captions=(), question=question, id=sample.meta.get("id"))


def repeated_ids(found: Sequence[Annotation]) -> int:
    """How many questions have the id of an earlier one, and the same `meta`: ids of several files may be the same."""
    counts = Counter(
        json.dumps([each.id, dict(each.question.meta)], sort_keys=True)
        for each in found
        if each.question is not None and each.id is not None
    )
    return counts.total() - len(counts)
