"""What one could be told about a synthetic scene in words: sentences with the answer to a question, and without it."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from mamba3_jepa.data.scene_wording import in_other_words
from mamba3_jepa.data.scene_world import (
    COLORS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    SIZES,
    Asked,
    Dice,
    Question,
)

FactForm = Literal["answer", "sentence", "caption", "passage"]
FACT_FORMS: tuple[FactForm, ...] = get_args(FactForm)

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
_VALUES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "number": NUMBERS, "existence": ("yes", "no")}


def fact(question: Question, dice: Dice) -> str:
    """A sentence that answers `question`, which has an answer: "the circle is red"."""
    assert question.answer is not None
    if question.asked == "existence":
        sentence = dice.pick(_EXISTENCE[question.answer])
    else:
        sentence = dice.pick(_SENTENCES[question.asked, tuple(question.description)])
    return in_other_words(_filled(sentence, question), dice)


def with_another_answer(question: Question, dice: Dice) -> Question:
    """The same question with an answer that differs."""
    others = [value for value in _VALUES[question.asked] if value != question.answer]
    return dataclasses.replace(question, answer=dice.pick(others))


def about_something_else(question: Question, dice: Dice) -> Question:
    """A question with an answer about another object, or about another thing: it tells nothing about `question`."""
    while True:
        asked, given = dice.pick(list(_SENTENCES))
        description = {name: dice.pick(POSITIONS if name == "position" else _VALUES[name]) for name in given}
        if asked != question.asked or all(description[name] != question.description.get(name) for name in given):
            if asked == "number":  # tells how many there are of what may be asked for too
                continue
            answer = dice.pick(_VALUES[asked])
            other = Question(asked=asked, description=description, answer=answer, presupposes=True)
            if not _tells(other, question):
                return other


def passage(question: Question, dice: Dice) -> str:
    """The fact and one about something else, in either order: "the star is blue. the circle is red."."""
    sentences = [fact(question, dice), fact(about_something_else(question, dice), dice)]
    return ". ".join(dice.shuffled(sentences)) + "."


def _tells(other: Question, question: Question) -> bool:
    """Whether the answer to `other` could tell something about what `question` asks for: they speak of one object."""
    said = other.description | {other.asked: other.answer or ""}
    return any(said.get(name) == value for name, value in question.description.items())


def _filled(sentence: str, question: Question) -> str:
    answer = question.answer or ""
    article = _article(question.description.get("color", ""))
    objects = "object" if answer == "one" else "objects"
    return sentence.format(answer=answer, a=_article(answer), b=article, objects=objects, **question.description)


def _article(word: str) -> str:
    return "an" if word[:1] in set("aeiou") else "a"
