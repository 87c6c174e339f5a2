"""Questions that have nothing to do with the data."""

from __future__ import annotations

import re

import pytest

from mamba3_jepa.data.foreign import _LISTS, foreign_question, foreign_text, shuffled
from mamba3_jepa.data.plain_text import plain_text

QUESTION = "what color is the star?"


def test_no_way_gives_the_question_itself() -> None:
    for question in (QUESTION, "why?", "a", "?", "是什么颜色", "aa aa aa"):
        for seed in range(300):
            made = foreign_question(question, seed)
            assert made.strip()
            assert plain_text(made) != plain_text(question)
            assert made == foreign_question(question, seed)


def test_every_way_occurs() -> None:
    made = [foreign_question(QUESTION, seed) for seed in range(500)]
    known = {word for words in _LISTS for word in words}
    languages = [{word.rstrip("?") for word in text.split()} <= known for text in made]
    same_letters = [sorted(text) == sorted(QUESTION) for text in made]
    shares = [sum(each) / len(made) for each in (languages, same_letters)]
    assert shares == pytest.approx([0.25, 0.25], abs=0.06)


def test_where_the_things_are_known_others_are_asked_about() -> None:
    made = [foreign_question("Is there a red star, or stars?", seed, ("star", "circle")) for seed in range(600)]
    others = [text for text in made if re.fullmatch(r"Is there a red (\w+), or (\w+)\?", text)]
    assert 0.14 < len(others) / len(made) < 0.26
    for text in others:
        assert {"star", "stars", "circle"}.isdisjoint(re.findall(r"\w+", text))
    for seed in range(300):
        assert plain_text(foreign_question("how many are there?", seed, ("star",))) != "how many are there?"


def test_shuffled_words_are_the_same_words() -> None:
    made = {shuffled(QUESTION, seed) for seed in range(100)}
    assert len(made) > 50
    assert all(sorted(text.split()) == sorted(QUESTION.split()) for text in made)
    assert shuffled(QUESTION, 1) == shuffled(QUESTION, 1)
    assert shuffled(" why? ", 1) == "why?"


def test_texts_that_have_nothing_to_do_with_the_data_are_of_every_form() -> None:
    made = [foreign_text(seed) for seed in range(700)]
    assert made == [foreign_text(seed) for seed in range(700)]
    assert len(set(made)) > 500
    assert all(text.strip() for text in made)
    forms = (r"-?\d+(\.\d+)?", r"\W+", r"error \d+: .*", r"<p>.*</p>", r"The \w+ is a \w+\.", "four|hundred", r"\{.*\}")
    assert all(any(re.fullmatch(form, text) for text in made) for form in forms)
    asked = [text for seed in range(700) if "France " in (text := foreign_text(seed, "who is the king of France?"))]
    assert 0.1 < len(asked) / len(made) < 0.2
    assert all(re.match(r"(((((who )?is )?the )?king )?of )?France \w", text) for text in asked)
