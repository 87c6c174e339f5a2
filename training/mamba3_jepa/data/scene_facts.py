"""What one could be told about a synthetic scene in words: sentences with the answer to a question, and without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mamba3_jepa.data.lesson import Lesson
from mamba3_jepa.data.scene_wording import article, in_other_words, plain
from mamba3_jepa.data.scene_world import (
    COLORS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    SIZES,
    Asked,
    Dice,
    Pair,
    Question,
    Scene,
)

# {answer} is the answer, {a} its article, {b} that of the colour, {objects} one or several.
_SENTENCES: dict[tuple[Asked, tuple[str, ...]], tuple[str, ...]] = {
    ("color", ("shape",)): (
        "the {shape} is {answer}",
        "the color of the {shape} is {answer}",
        "there is {a} {answer} {shape}",
        "the {shape} has the color {answer}",
    ),
    ("shape", ("position",)): (
        "the shape at the {position} is {a} {answer}",
        "there is {a} {answer} at the {position}",
        "at the {position} is {a} {answer}",
        "the {answer} is at the {position}",
    ),
    ("shape", ("color",)): (
        "the {color} object is {a} {answer}",
        "there is {b} {color} {answer}",
        "the {answer} is {color}",
        "what is {color} is the {answer}",
    ),
    ("size", ("color", "shape")): (
        "the {color} {shape} is {answer}",
        "there is {a} {answer} {color} {shape}",
        "the size of the {color} {shape} is {answer}",
    ),
    ("number", ()): (
        "the number of objects is {answer}",
        "the picture shows {answer} {objects}",
        "I count {answer} {objects}",
    ),
}
_EXISTENCE = {
    "yes": ("there is {b} {color} {shape}", "the picture shows {b} {color} {shape}", "{b} {color} {shape} is there"),
    "no": ("there is no {color} {shape}", "the picture shows no {color} {shape}", "no {color} {shape} is there"),
}
_VALUES: dict[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "size": SIZES,
    "number": NUMBERS,
    "existence": ("yes", "no"),
}


def lessons_about(question: Question, scene: Scene | None, dice: Dice, pairs: Sequence[Pair]) -> list[Lesson]:
    """What somebody could say to whoever is asked `question`; without an answer, as they imagine it.

    Args:
        scene: whose caption tells the answer too; None where that tells nothing of it.
        pairs: colours and shapes that may occur together in what is said.
    """
    told = _with_answer(question, dice, pairs) if question.answer is None else question
    other = _with_answer(told, dice, pairs)
    beside = _about_something_else(question, dice, pairs)
    assert told.answer is not None
    lessons = [
        Lesson(told.answer, told.answer, "answer"),
        Lesson(fact(told, dice), told.answer, "sentence", answered_too(told)),
        Lesson(fact(other, dice), other.answer, "false", answered_too(other)),
        Lesson(fact(beside, dice), None, "irrelevant"),
        Lesson(". ".join(dice.shuffled([fact(told, dice), fact(beside, dice)])) + ".", told.answer, "passage"),
    ]
    if scene is not None:
        lessons.append(Lesson(scene.caption, told.answer, "caption"))
    return lessons


def fact(question: Question, dice: Dice) -> str:
    """A sentence that answers `question`, which has an answer: "the circle is red"."""
    assert question.answer is not None
    if question.asked == "existence":
        sentence = dice.pick(_EXISTENCE[question.answer])
    else:
        sentence = dice.pick(_SENTENCES[question.asked, tuple(question.description)])
    return in_other_words(_filled(sentence, question), dice)


def answered_too(told: Question) -> tuple[str, ...]:
    """All that whoever knows the answer to `told` can answer, in the plainest words: "the circle is red" says what
    shape the red object has, and that there is a red circle."""
    if told.answer == "no":
        return ()
    said = told.description | ({} if told.asked == "existence" else _said(told))
    asked = [*_SENTENCES, ("existence", ("color", "shape"))]
    questions = [
        Question(asked=about, description={name: said[name] for name in given}, answer=None, presupposes=True)
        for about, given in asked
        if all(name in said for name in given) and (about in said or about == "existence")
    ]
    return tuple(plain(each) for each in questions)


def _with_answer(question: Question, dice: Dice, pairs: Sequence[Pair]) -> Question:
    """The same question with an answer that differs from its own."""
    others = [
        dataclasses.replace(question, answer=value) for value in _VALUES[question.asked] if value != question.answer
    ]
    return dice.pick([each for each in others if _may_be_said(each, pairs)])


def _about_something_else(question: Question, dice: Dice, pairs: Sequence[Pair]) -> Question:
    """A question with an answer that tells nothing about `question`."""
    while True:
        asked, given = dice.pick([each for each in _SENTENCES if each[0] != "number"])
        description = {name: dice.pick(POSITIONS if name == "position" else _VALUES[name]) for name in given}
        other = Question(asked=asked, description=description, answer=dice.pick(_VALUES[asked]), presupposes=True)
        if not _tells(other, question) and _may_be_said(other, pairs):
            return other


def _said(question: Question) -> dict[str, str]:
    """What question and answer say of an object."""
    return question.description | {question.asked: question.answer or ""}


def _tells(other: Question, question: Question) -> bool:
    """Whether who knows the answer to `other` knows that to `question`, or part of it: they speak of one object."""
    said = _said(other)
    is_of_it = all(said.get(name, value) == value for name, value in question.description.items())
    return is_of_it and (question.asked in said or question.asked == "existence")


def _may_be_said(question: Question, pairs: Sequence[Pair]) -> bool:
    said = _said(question)
    return "color" not in said or "shape" not in said or (said["color"], said["shape"]) in pairs


def _filled(sentence: str, question: Question) -> str:
    answer = question.answer or ""
    of_color = article(question.description.get("color", ""))
    objects = "object" if answer == "one" else "objects"
    return sentence.format(answer=answer, a=article(answer), b=of_color, objects=objects, **question.description)
