"""The words of the scenes' questions: in all their ways they ask the same, and all occur about equally often."""

from __future__ import annotations

import re

import pytest

from mamba3_jepa.data.scene_wording import _WORDINGS
from mamba3_jepa.data.scene_world import COLORS, POSITIONS, SHAPES
from mamba3_jepa.data.scenes import SceneSource

_KINDS = ("question", "unanswerable", "mismatched")
_OTHER_WORDS = {
    "colour": "color",
    "upper": "top",
    "lower": "bottom",
    "image": "picture",
    "thing": "object",
    "item": "object",
}


def _in_plain_words(question: str) -> str:
    text = question.lower().rstrip("?")
    for word, plain in _OTHER_WORDS.items():
        text = re.sub(rf"\b{word}(s?)\b", rf"{plain}\1", text)
    return text


def _pattern(words: str) -> str:
    words = words.rstrip("?").replace("{thing}", "object").replace("{a}", "an?")
    return re.sub(r"\{\w+\}", "[a-z ]+", words)


def _read(question: str) -> tuple[str, dict[str, str]]:
    """What is asked for, and what is said of the object, told from the words alone."""
    text = _in_plain_words(question)
    said = {}
    for name, words in (("color", COLORS), ("position", POSITIONS), ("shape", SHAPES)):
        found = [word for word in words if re.search(rf"\b{word}\b", text)]
        assert len(found) <= 1, question
        if found:
            said[name] = found[0]
    if re.search(r"\bobjects\b", text):
        return "number", said
    if re.search(r"\bsize\b|\bbig\b|large or small", text):
        return "size", said
    if re.search(r"\bshape\b", text):
        return "shape", said
    if re.search(r"\bcolor\b", text):
        return "color", said
    assert re.search(rf" {'an' if said['color'][0] in 'aeiou' else 'a'} {said['color']} {said['shape']}$", text), (
        question
    )
    return "existence", said


@pytest.fixture(scope="module")
def source() -> SceneSource:
    return SceneSource("train", n_scenes=1500, kinds=_KINDS, questions_per_scene=3)


def test_all_wordings_ask_the_same(source: SceneSource) -> None:
    for i in range(len(source)):
        sample = source.sample(i)
        assert sample.question is not None
        asked, said = _read(sample.question)
        assert (asked, said) == _read(str(sample.meta["plain"]))
        assert asked == sample.meta["asked"]


def test_all_wordings_occur(source: SceneSource) -> None:
    texts = [source.sample(i).question or "" for i in range(len(source))]
    for way, other in (
        ("colou?r", "colour"),
        ("(top|upper)", "upper"),
        ("(bottom|lower)", "lower"),
        ("[A-Za-z]", "^[A-Z]"),
    ):
        of_this = [text for text in texts if re.search(way, text)]
        share = sum(re.search(other, text) is not None for text in of_this) / len(of_this)
        assert 0.45 < share < 0.55, way
    assert 0.7 < sum(text.endswith("?") for text in texts) / len(texts) < 0.8
    plain = [_in_plain_words(text) for text in texts]
    for ways in _WORDINGS.values():
        for same in ways.values():
            counts = [sum(re.fullmatch(_pattern(words), text) is not None for text in plain) for words in same]
            assert min(counts) > 0.15 * sum(counts), dict(zip(same, counts, strict=True))


def test_the_words_depend_on_the_sample_alone(source: SceneSource) -> None:
    again = SceneSource("train", n_scenes=1500, kinds=_KINDS, questions_per_scene=3)
    assert [again.sample(i).question for i in range(300)] == [source.sample(i).question for i in range(300)]
    asked = [again.confusing(i, "mismatched").question for i in range(100)]
    assert len(set(asked)) > 60
    assert asked == [source.confusing(i, "mismatched").question for i in range(100)]


def test_no_scene_is_told_its_own_caption_as_false() -> None:
    for n_scenes in (1, 2, 40):
        source = SceneSource("fresh", n_scenes=n_scenes)
        for i in source.indices("caption").tolist():
            sample = source.sample(i)
            assert sample.lessons is not None
            told = {lesson.form: lesson.knowledge for lesson in sample.lessons()}
            assert told["caption"] == sample.target != told.get("false")
            assert ("false" in told) or n_scenes < 3
