"""What is said about scenes, read back from the words alone."""

from __future__ import annotations

import functools
import re

import pytest

from mamba3_jepa.data.lesson import Lesson
from mamba3_jepa.data.sample import Sample
from mamba3_jepa.data.scene_world import COLORS, HELD_OUT_PAIRS, NUMBERS, POSITIONS, SHAPES, SIZES
from mamba3_jepa.data.scenes import SceneSource, SceneSplit

VALUES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "number": NUMBERS, "position": POSITIONS}


@functools.cache  # each is read beside many
def read(text: str) -> set[tuple[str, str]]:
    """The attributes that a text speaks of."""
    text = text.lower().replace("colour", "color").replace("upper", "top").replace("lower", "bottom")
    return {(name, value) for name, values in VALUES.items() for value in values if re.search(rf"\b{value}s?\b", text)}


def tells(text: str, sample: Sample) -> bool:
    """Whether a sentence says what the sample's question asks for."""
    said, asked = read(text), sample.meta["asked"]
    described = {(name, value) for name, value in read(sample.meta["plain"]) if name != asked}
    if asked == "size":  # the question itself may say "large or small"
        described = {(name, value) for name, value in described if name in ("color", "shape")}
    return described <= said and (asked == "existence" or any(name == asked for name, _ in said))


def asked_samples(split: SceneSplit) -> list[tuple[Sample, list[Lesson]]]:
    source = SceneSource(split, n_scenes=150, seed=3)
    found = []
    for i in source.indices("question").tolist():
        for sample in (source.sample(i), source.confusing(i, "unanswerable"), source.confusing(i, "mismatched")):
            assert sample.lessons is not None
            found.append((sample, sample.lessons()))
    return found


@pytest.fixture(scope="module")
def fresh() -> list[tuple[Sample, list[Lesson]]]:
    return asked_samples("fresh")


def test_sentences_say_the_answer_and_others_do_not(fresh: list[tuple[Sample, list[Lesson]]]) -> None:
    for sample, lessons in fresh:
        told = {lesson.form: lesson for lesson in lessons}
        assert {"answer", "sentence", "passage", "false", "irrelevant"} <= set(told)
        assert ("caption" in told) == (sample.meta["kind"] == "question"), "of the same picture"
        right = told["answer"].answer
        assert sample.target in (right, None)
        for form in ("sentence", "passage"):
            assert told[form].answer == right
            assert tells(str(told[form].knowledge), sample), (sample.question, told[form])
        assert told["false"].answer not in (right, None)
        assert tells(str(told["false"].knowledge), sample)
        assert told["irrelevant"].answer is None
        assert not tells(str(told["irrelevant"].knowledge), sample), (sample.question, told["irrelevant"])
        if right in ("yes", "no"):
            assert (" no " in f" {told['sentence'].knowledge} ") == (right == "no")
            assert (" no " in f" {told['false'].knowledge} ") == (right == "yes")
        else:
            assert (sample.meta["asked"], right) in read(str(told["sentence"].knowledge))


def test_what_a_sentence_answers_beside_is_all_that_it_tells(fresh: list[tuple[Sample, list[Lesson]]]) -> None:
    asking = {sample.meta["plain"]: sample for sample, _ in fresh}
    n = 0
    for _, lessons in fresh:
        for lesson in lessons:
            text = str(lesson.knowledge)
            if lesson.form not in ("sentence", "false") or " no " in f" {text} ":
                assert lesson.answers == ()
                continue
            told = {plain for plain, sample in asking.items() if tells(text, sample)}
            assert told == set(lesson.answers) & asking.keys(), text
            n += len(told)
    assert n > 1000


def test_sentences_vary(fresh: list[tuple[Sample, list[Lesson]]]) -> None:
    words = {re.sub("|".join(map(str, sum(VALUES.values(), ()))), "*", str(lesson.knowledge))
             for _, lessons in fresh for lesson in lessons if lesson.form == "sentence"}  # fmt: skip
    assert len(words) > 30


def test_pairs_that_are_held_out_are_not_spoken_of(fresh: list[tuple[Sample, list[Lesson]]]) -> None:
    def spoken_of(lessons: list[tuple[Sample, list[Lesson]]]) -> int:
        found = 0
        for _, each in lessons:
            for lesson in each:
                for sentence in re.split(r"[.,]| and ", str(lesson.knowledge)):
                    said = read(sentence)
                    found += any(("color", c) in said and ("shape", s) in said for c, s in HELD_OUT_PAIRS)
        return found

    assert spoken_of(fresh) == 0
    assert spoken_of(asked_samples("compositional")) > 50


def test_what_is_told_follows_from_the_sample_alone() -> None:
    one, other = (SceneSource("val", n_scenes=n) for n in (20, 30))
    for i in one.indices("question").tolist():
        first, second = one.sample(i).lessons, other.sample(i).lessons
        assert first is not None
        assert second is not None
        assert first() == second()
