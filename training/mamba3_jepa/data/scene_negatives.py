"""What would be wrong to say of a synthetic scene: captions of which one thing is not so, and wrong answers.

A caption names all objects with all they are, one at a place: it is wrong of every scene but its own. Its objects stand
in reading order here too, so that the order gives nothing away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, islice
from typing import Any

from mamba3_jepa.data.hard_negatives import Negative
from mamba3_jepa.data.scene_world import (
    COLORS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    SIZES,
    Dice,
    Pair,
    Question,
    Scene,
    SceneObject,
)

# What two objects exchange, and the name of the kind. In place of places all the rest is exchanged.
_EXCHANGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("colors", ("color",)),
    ("shapes", ("shape",)),
    ("sizes", ("size",)),
    ("places", ("color", "shape", "size")),
)
_Change = dict[int, dict[str, Any]]  # new attributes of objects by their number; of one more than there are: another
_MAX_OBJECTS = len(NUMBERS)  # of a scene; more would be known by the length of the caption


def wrong_captions(
    scene: Scene, dice: Dice, pairs: Sequence[Pair], is_allowed: Callable[[Scene], bool]
) -> list[Negative]:
    """At most one caption of each kind: `colors`, `shapes`, `sizes` or `places` of two objects exchanged, `number` (one
    object too many), `absent_color` (an object in a colour that nothing has).

    Args:
        pairs: colours and shapes that may occur together in what is said.
        is_allowed: whether the caption of such a scene may be said.
    """
    found: list[Negative] = []
    may_occur = frozenset(pairs)
    for kind, changes in _changes(scene, dice, pairs):
        others = (_changed(scene, change) for change in dice.shuffled(changes))
        possible = (other for other in others if other.pairs <= may_occur and is_allowed(other))
        found += [Negative(other.caption, kind) for other in islice(possible, 1)]
    return found


def wrong_answers(scene: Scene, question: Question, dice: Dice) -> list[Negative]:
    """One wrong answer of kind `answer`: what another object is, if there is one that differs, else any other word; the
    opposite of yes and no, a number beside the right one."""
    options = _confusable(scene, question.answer or "")
    return [Negative(dice.pick(options), "answer")]


def _confusable(scene: Scene, answer: str) -> Sequence[str]:
    if answer in ("yes", "no"):
        return ["no" if answer == "yes" else "yes"]
    if answer in NUMBERS:
        at = NUMBERS.index(answer)
        return [NUMBERS[i] for i in (at - 1, at + 1) if 0 <= i < len(NUMBERS)]
    for attribute, words in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
        if answer in words:
            there = [word for word in words if word != answer and scene.matching({attribute: word})]
            return there or [word for word in words if word != answer]
    raise ValueError(f"no answer about scenes: {answer!r}")


def _changes(scene: Scene, dice: Dice, pairs: Sequence[Pair]) -> Iterator[tuple[str, list[_Change]]]:
    """For each kind what can be changed; all of it makes another scene."""
    numbers = range(len(scene.objects))
    for kind, attributes in _EXCHANGES:
        have = [{name: getattr(each, name) for name in attributes} for each in scene.objects]
        yield kind, [{i: have[j], j: have[i]} for i, j in combinations(numbers, 2) if have[i] != have[j]]
    if len(scene.objects) < _MAX_OBJECTS:
        color, shape = dice.pick(pairs)
        another = {"color": color, "shape": shape, "size": dice.pick(SIZES)}
        free = [place for place in POSITIONS if not scene.matching({"position": place})]
        yield "number", [{len(scene.objects): another | {"position": place}} for place in free]
    absent = [color for color in COLORS if not scene.matching({"color": color})]
    yield "absent_color", [{i: {"color": color}} for i in numbers for color in absent]


def _changed(scene: Scene, change: _Change) -> Scene:
    objects = [dataclasses.replace(each, **change.get(i, {})) for i, each in enumerate(scene.objects)]
    objects += [SceneObject(**new, offset=(0.0, 0.0)) for i, new in change.items() if i == len(scene.objects)]
    objects.sort(key=lambda each: POSITIONS.index(each.position))
    return Scene(objects=tuple(objects), background=scene.background)
