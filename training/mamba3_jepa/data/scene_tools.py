"""Questions that no synthetic scene answers, but a tool does: demonstrations of tool use.

A calculator knows small sums, a dictionary what things look like; they answer with one word that scenes use too.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from mamba3_jepa.data.lesson import Lesson
from mamba3_jepa.data.scene_wording import article, as_typed, in_other_words
from mamba3_jepa.data.scene_world import COLORS, NUMBERS, SHAPES, Dice
from mamba3_jepa.data.splits import stable_hash

SCENE_TOOLS = ("calculator", "dictionary")

_COUNT = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# the word between two numbers, and what it makes of them
_SUMS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
_SIGNS = {"plus": "+", "minus": "-", "times": "*"}
_SUM_WORDINGS = ("what is {sum}?", "how much is {sum}?", "{sum} is how many?", "what does {sum} make?")

# The last of each are not in what training sees.
_COLOR_OF = {
    "red": ("tomato", "strawberry", "cherry", "fire engine", "ruby", "ladybird"),
    "green": ("cucumber", "frog", "pea", "cactus", "emerald", "lettuce"),
    "blue": ("sapphire", "blueberry", "clear sky", "blue whale", "police lamp", "bluebell"),
    "yellow": ("banana", "lemon", "canary", "sunflower", "chick", "buttercup"),
    "orange": ("carrot", "pumpkin", "tangerine", "basketball", "clownfish", "apricot"),
    "purple": ("plum", "eggplant", "violet", "amethyst", "lavender", "grape"),
    "cyan": ("swimming pool", "turquoise", "tropical lagoon", "glacier", "cyan ink", "aquamarine"),
    "black": ("raven", "piece of coal", "panther", "tyre", "blackbird", "crow"),
}
_SHAPE_OF = {
    "circle": ("coin", "wheel", "plate", "full moon", "ring", "button"),
    "square": ("chessboard", "floor tile", "napkin", "postage stamp", "window pane", "checkerboard"),
    "triangle": ("slice of pizza", "yield sign", "roof gable", "pyramid's side", "guitar pick", "sail"),
    "star": ("starfish", "sheriff's badge", "christmas ornament", "asterisk", "snowflake", "compass rose"),
    "cross": ("plus sign", "crossroads", "ambulance sign", "letter X", "swiss flag's sign", "addition sign"),
}
_HELD_OUT = 2  # of each
_ONSETS = (*"bcdfghjklmnprstvwz", "bl", "br", "ch", "dr", "fl", "gr", "pl", "sh", "st", "th", "tr")
_RHYMES = (*"aeiou", "an", "ar", "en", "er", "ick", "ie", "in", "ip", "ob", "on", "ool", "or", "um", "ush")
_ANSWERS = (COLORS, SHAPES, NUMBERS)
_LOOK_WORDINGS = {
    "color": (
        "what color is {a} {thing}?", "what color does {a} {thing} have?", "which color has {a} {thing}?",
        "what is the usual color of {a} {thing}?",
    ),
    "shape": (
        "what shape is {a} {thing}?", "what shape does {a} {thing} have?", "which shape has {a} {thing}?",
        "what is the usual shape of {a} {thing}?",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ToolQuestion:
    """A question, in some and in the plainest words, the tool that answers it, and the answer, its only word."""

    question: str
    plain: str
    tool: str
    answer: str


def tool_question(dice: Dice, is_seen: bool) -> ToolQuestion:
    """One of the questions, each tool as often.

    Args:
        is_seen: about what training may see, or about the rest.
    """
    return _sum_question(dice, is_seen) if dice.pick(SCENE_TOOLS) == "calculator" else _look_question(dice, is_seen)


def lessons_about_tools(asked: ToolQuestion, dice: Dice, is_seen: bool) -> list[Lesson]:
    """What a tool could say to whoever is asked this: the answer, a false one, one to another kind of question."""
    answers = next(each for each in _ANSWERS if asked.answer in each)
    other = dice.pick([each for each in answers if each != asked.answer])
    lessons = [Lesson(asked.answer, asked.answer, "result"), Lesson(other, other, "false")]
    while True:
        beside = tool_question(dice, is_seen)
        if beside.answer not in answers:
            return [*lessons, Lesson(beside.answer, None, "irrelevant")]


def _sum_question(dice: Dice, is_seen: bool) -> ToolQuestion:
    sums = [
        (a, word, b)
        for word, result in _SUMS.items()
        for a in range(1, len(_COUNT))
        for b in range(1, len(_COUNT))
        if 1 <= result(a, b) <= len(NUMBERS) and (stable_hash(f"{a} {word} {b}") % 4 > 0) == is_seen
    ]
    a, word, b = dice.pick(sums)
    plain = f"what is {_COUNT[a]} {word} {_COUNT[b]}?"
    in_words = f"{_COUNT[a]} {word} {_COUNT[b]}"
    in_signs = f"{a} {_SIGNS[word]} {b}"
    text = dice.pick(_SUM_WORDINGS).format(sum=in_words if dice.pick((True, True, False)) else in_signs)
    answer = _COUNT[_SUMS[word](a, b)]
    return ToolQuestion(question=as_typed(text, dice), plain=plain, tool="calculator", answer=answer)


def _look_question(dice: Dice, is_seen: bool) -> ToolQuestion:
    asked, things = dice.pick((("color", _COLOR_OF), ("shape", _SHAPE_OF)))
    answer = dice.pick(tuple(things))
    thing = dice.pick(things[answer][:-_HELD_OUT] if is_seen else things[answer][-_HELD_OUT:])
    if is_seen and dice.pick((True, True, True, False)):
        thing = _made_up(dice)
    wordings = _LOOK_WORDINGS[asked]
    text = dice.pick(wordings).format(a=article(thing), thing=thing)
    plain = wordings[0].format(a=article(thing), thing=thing)
    return ToolQuestion(
        question=as_typed(in_other_words(text, dice), dice), plain=plain, tool="dictionary", answer=answer
    )


def _made_up(dice: Dice) -> str:
    """A word for a thing that nobody knows: what the dictionary says of one thing it may say of any."""
    return "".join(dice.pick(_ONSETS) + dice.pick(_RHYMES) for _ in range(dice.pick((1, 2, 2, 3))))
