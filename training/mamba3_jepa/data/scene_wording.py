"""How people put the questions about synthetic scenes: in several ways each, in American and British spelling, with and
without capitals and question mark. What is asked, and the answer, stay the same."""

from __future__ import annotations

from mamba3_jepa.data.scene_world import SHAPES, Asked, Dice, Question

# The first of each is the plain one. {thing} is an object in general, {a} the article of what follows.
_WORDINGS: dict[Asked, dict[tuple[str, ...], tuple[str, ...]]] = {
    "color": {
        ("shape",): (
            "what color is the {shape}?",
            "what is the color of the {shape}?",
            "which color does the {shape} have?",
            "the {shape} is of what color?",
        ),
    },
    "shape": {
        ("position",): (
            "what shape is at the {position}?",
            "which shape is in the {position} corner?",
            "what is the shape of the {thing} at the {position}?",
            "which shape do you see at the {position}?",
        ),
        ("color",): (
            "what shape is the {color} {thing}?",
            "what is the shape of the {color} {thing}?",
            "which shape does the {color} {thing} have?",
            "which shape is {color}?",
        ),
    },
    "size": {
        ("color", "shape"): (
            "what size is the {color} {shape}?",
            "how big is the {color} {shape}?",
            "is the {color} {shape} large or small?",
            "what is the size of the {color} {shape}?",
        ),
    },
    "existence": {
        ("color", "shape"): (
            "is there {a} {color} {shape}?",
            "do you see {a} {color} {shape}?",
            "can you see {a} {color} {shape}?",
            "does the picture show {a} {color} {shape}?",
        ),
    },
    "number": {
        (): (
            "how many {thing}s are there?",
            "how many {thing}s do you see?",
            "what is the number of {thing}s?",
            "how many {thing}s does the picture show?",
        ),
    },
}
_THINGS = ("object", "thing", "item")
SHOWN = frozenset({*SHAPES, *_THINGS})  # what questions call what the pictures show
_SYNONYMS = {"color": "colour", "top": "upper", "bottom": "lower", "picture": "image"}  # each as often as not


def worded(question: Question, dice: Dice) -> str:
    """`question` in one of its wordings, all equally likely."""
    words = dice.pick(_wordings(question))
    thing = dice.pick(_THINGS)
    return as_typed(in_other_words(_filled(question, words, thing), dice), dice)


def as_typed(text: str, dice: Dice) -> str:
    """With a capital or without, with question mark or without."""
    if dice.pick((True, False)):
        text = text[0].upper() + text[1:]
    return text if dice.pick((True, True, True, False)) else text.rstrip("?")


def in_other_words(text: str, dice: Dice) -> str:
    """Some of the words in another spelling, or replaced by their like."""
    for usual, other in _SYNONYMS.items():
        if dice.pick((True, False)):
            text = text.replace(usual, other)
    return text


def plain(question: Question) -> str:
    """`question` in its first wording: "what color is the star?"."""
    return _filled(question, _wordings(question)[0], _THINGS[0])


def _wordings(question: Question) -> tuple[str, ...]:
    return _WORDINGS[question.asked][tuple(question.description)]


def _filled(question: Question, words: str, thing: str) -> str:
    return words.format(thing=thing, a=article(question.description.get("color", "")), **question.description)


def article(word: str) -> str:
    """The one that stands before a word."""
    return "an" if word[:1] in set("aeiou") else "a"
