"""What one could be told about a sample, and what the right answer is then."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

LessonForm = Literal["given", "result", "answer", "sentence", "caption", "passage", "false", "irrelevant", "foreign"]
LESSON_FORMS: tuple[LessonForm, ...] = get_args(LessonForm)
HELPFUL: tuple[LessonForm, ...] = ("given", "result", "answer", "sentence", "caption", "passage")
FINDABLE: tuple[LessonForm, ...] = ("given", "sentence", "false")  # what a question should find in a memory


class Lesson(NamedTuple):
    """A text, or a vector of the data's, that one could be told.

    form: "given" by the data; the "result" of a tool, which is not looked up; the bare "answer"; a "sentence" with it;
    a "caption" of the image; a "passage" of the sentence and another; a sentence of another answer, which is "false"
    where the right one can be seen; "irrelevant"; "foreign", which has nothing to do with the data.
    answer: what is right for those who believe it; None where it tells nothing of what was asked.
    answers: questions that it answers, whatever the sample asks, in their plainest words.
    """

    knowledge: str | list[float]
    answer: str | None
    form: LessonForm
    answers: tuple[str, ...] = ()
