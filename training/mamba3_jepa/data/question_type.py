"""The kind of a question, told by how it begins."""

from __future__ import annotations

import string

CAPTION = "caption"
_MARKS = string.punctuation + "¿¡。，？！、…“”„‘’«»"


def question_type(question: str | None) -> str:
    """The first two words in lower case ("what color", "is there", "how many"); "caption" for no question.

    Marks around a word do not count; a question without words is "other".
    """
    if question is None:
        return CAPTION
    words = [word for word in (part.strip(_MARKS) for part in question.lower().split()) if word]
    return " ".join(words[:2]) or "other"
