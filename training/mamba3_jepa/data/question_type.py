"""The kind of a question: what the data says is asked, or else how it begins."""

from __future__ import annotations

import string

from mamba3_jepa.data.sample import Sample

_MARKS = string.punctuation + "¿¡。，？！、…“”„‘’«»"


def asked_type(sample: Sample) -> str | None:
    """What is asked, where the source tells it ("color", as of scenes, which ask in many words), or else
    `question_type`; None for a sample without question."""
    if sample.question is None:
        return None
    return str(sample.meta.get("asked") or question_type(sample.question))


def question_type(question: str) -> str:
    """The first two words in lower case ("what color", "is there", "how many").

    Marks around a word do not count; a question without words is "other".
    """
    words = [word for word in (part.strip(_MARKS) for part in question.lower().split()) if word]
    return " ".join(words[:2]) or "other"
