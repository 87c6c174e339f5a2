"""The world of the synthetic scenes: what they consist of, and what can be said and asked about them.

Everything random comes from a `Dice`, and so from a key of words and numbers alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar

from mamba3_jepa.data.splits import stable_hash

T = TypeVar("T")
Pair = tuple[str, str]  # colour and shape

COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("large", "small")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")  # in reading order
HELD_OUT_PAIRS: tuple[Pair, ...] = (
    ("red", "star"),
    ("green", "triangle"),
    ("blue", "cross"),
    ("yellow", "circle"),
    ("purple", "square"),
    ("cyan", "star"),
)
ALL_PAIRS: tuple[Pair, ...] = tuple(product(COLORS, SHAPES))
SEEN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)
NUMBERS = ("one", "two", "three")

Asked = Literal["color", "shape", "size", "existence", "number"]

# What is asked for, and what the question says of the object. Such a question presupposes that exactly one object fits;
# where none does, it cannot be answered.
_ABOUT_ONE: tuple[tuple[Asked, tuple[str, ...]], ...] = (
    ("color", ("shape",)),
    ("shape", ("position",)),
    ("shape", ("color",)),
    ("size", ("color", "shape")),
)


class Dice:
    """Random choices that depend on the key alone, on every machine and Python version."""

    def __init__(self, *key: object) -> None:
        self._random = random.Random(stable_hash("/".join(map(str, key)))).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        keys = [self._random() for _ in options]
        return [options[i] for i in sorted(range(len(options)), key=keys.__getitem__)]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape. `offset` moves it off the centre of its quadrant, each coordinate from -1 to 1."""

    color: str
    shape: str
    size: str
    position: str
    offset: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One to three objects in reading order, in different quadrants; `background` is a grey, 0 to 255."""

    objects: tuple[SceneObject, ...]
    background: int

    @property
    def caption(self) -> str:
        """All objects in reading order, as "a large red circle at the top left and a small ..."."""
        parts = [f"a {o.size} {o.color} {o.shape} at the {o.position}" for o in self.objects]
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)

    @property
    def pairs(self) -> set[Pair]:
        """The colour-shape pairs that occur."""
        return {(o.color, o.shape) for o in self.objects}

    def matching(self, description: dict[str, str]) -> list[SceneObject]:
        """The objects that have all the attributes described, such as {"shape": "star"}."""
        return [o for o in self.objects if all(getattr(o, k) == v for k, v in description.items())]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of the object described, and the answer (None if there is none); `scene_wording` has the words.

    presupposes: that there is such an object.
    """

    asked: Asked
    description: dict[str, str]
    answer: str | None
    presupposes: bool


def random_scene(dice: Dice, with_held_out_pair: bool) -> Scene:
    """A scene of seen pairs; with `with_held_out_pair` one of its objects is of a held-out pair."""
    n = dice.pick((1, 1, 2, 2, 2, 2, 2, 2, 3, 3))
    places = sorted(dice.shuffled(range(len(POSITIONS)))[:n])
    special = dice.pick(range(n)) if with_held_out_pair else None
    objects = []
    for i, place in enumerate(places):
        color, shape = dice.pick(HELD_OUT_PAIRS if i == special else SEEN_PAIRS)
        objects.append(
            SceneObject(
                color=color,
                shape=shape,
                size=dice.pick(SIZES),
                position=POSITIONS[place],
                offset=(dice.uniform(-1, 1), dice.uniform(-1, 1)),
            )
        )
    return Scene(objects=tuple(objects), background=round(dice.uniform(200, 245)))


def answerable_questions(scene: Scene, dice: Dice, n: int, pairs: Sequence[Pair] = SEEN_PAIRS) -> list[Question]:
    """`n` different questions (at most 3) with their answers; only `pairs` are asked about in vain."""
    questions = _presupposing_questions(scene, dice)
    questions += [_existence_question(scene, dice, pairs), _count_question(scene)]
    return dice.shuffled(questions)[:n]


def unanswerable_question(scene: Scene, dice: Dice, pairs: Sequence[Pair] = SEEN_PAIRS) -> Question:
    """A question about an object that is not there."""
    asked, given = dice.pick(_ABOUT_ONE)
    absent_by_given: dict[tuple[str, ...], list[tuple[str, ...]]] = {
        ("shape",): [(s,) for s in SHAPES if not scene.matching({"shape": s})],
        ("position",): [(p,) for p in POSITIONS if not scene.matching({"position": p})],
        ("color",): [(c,) for c in COLORS if not scene.matching({"color": c})],
        ("color", "shape"): [p for p in pairs if p not in scene.pairs],
    }
    description = dict(zip(given, dice.pick(absent_by_given[given]), strict=True))
    return Question(asked=asked, description=description, answer=None, presupposes=True)


def mismatched_question(scene: Scene, other: Scene, dice: Dice) -> Question | None:
    """A question about `other` that cannot be answered on `scene`: what it is about is not there.

    Its answer is the right one where it comes from, on `other`. None if every question can be answered here too.
    """
    for question in dice.shuffled(_presupposing_questions(other, dice)):
        if not scene.matching(question.description):
            return question
    return None


def _presupposing_questions(scene: Scene, dice: Dice) -> list[Question]:
    """One question for each way to ask about one object of the scene that fits no other."""
    questions = []
    for asked, given in _ABOUT_ONE:
        descriptions = [{k: getattr(o, k) for k in given} for o in scene.objects]
        unique = [d for d in descriptions if len(scene.matching(d)) == 1]
        if unique:
            description = dice.pick(unique)
            answer = getattr(scene.matching(description)[0], asked)
            questions.append(Question(asked=asked, description=description, answer=answer, presupposes=True))
    return questions


def _existence_question(scene: Scene, dice: Dice, pairs: Sequence[Pair]) -> Question:
    """Yes and no equally often. A pair that is not there shares its colour or shape with one that is."""
    if dice.pick((True, False)):
        color, shape = dice.pick(sorted(scene.pairs))
        answer = "yes"
    else:
        near = [p for p in pairs if p not in scene.pairs and any(p[0] == q[0] or p[1] == q[1] for q in scene.pairs)]
        color, shape = dice.pick(near)
        answer = "no"
    return Question(asked="existence", description={"color": color, "shape": shape}, answer=answer, presupposes=False)


def _count_question(scene: Scene) -> Question:
    answer = NUMBERS[len(scene.objects) - 1]
    return Question(asked="number", description={}, answer=answer, presupposes=False)
