"""Question types, exact match by type, BLEU."""

from __future__ import annotations

import math

import pytest

from mamba3_jepa.data.question_type import asked_type, question_type
from mamba3_jepa.data.sample import Sample
from mamba3_jepa.evaluation.answer_metrics import MAX_LOGGED_TYPES, answer_metrics, bleu, same_text


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What color is the circle?", "what color"),
        ("  Is   there a cat?", "is there"),
        ("How many?", "how many"),
        ("Why?", "why"),
        ("“What's” — up?", "what's —"),
        ("", "other"),
        ("?!", "other"),
        ("क्या यह नीला है?", "क्या यह"),
    ],
)
def test_question_type(question: str, expected: str) -> None:
    assert question_type(question) == expected


def test_what_the_source_says_is_asked_comes_before_the_words() -> None:
    asked = Sample(image=None, question="Which hue has it?", meta={"asked": "color"})
    assert asked_type(asked) == "color"
    assert asked_type(Sample(image=None, question="Which hue has it?")) == "which hue"
    assert asked_type(Sample(image=None, target="a caption", meta={"asked": "color"})) is None


def test_same_text_ignores_case_and_white_space_only() -> None:
    assert same_text(" A  red\tCircle\n", "a red circle")
    assert same_text("Straße", "STRASSE")
    assert not same_text("a red circle", "a red circle.")
    assert not same_text("two", "")


def test_shares_over_everything_questions_captions_and_types() -> None:
    samples = [  # expected, generated, question type
        ("red", "Red ", "what color"),
        ("blue", "red", "what color"),
        ("green", "green", "what color"),
        ("yes", "no", "is there"),
        ("a red circle on the left", "a red circle on the left", None),
        ("a blue square on the left", "a blue star on the left", None),
    ]
    report = answer_metrics(*map(list, zip(*samples, strict=True)))
    assert report.exact_match == pytest.approx(3 / 6)
    assert report.question_exact_match == pytest.approx(2 / 4)
    assert report.caption_exact_match == pytest.approx(1 / 2)
    assert list(report.by_type.items()) == [("what color", (pytest.approx(2 / 3), 3)), ("is there", (0.0, 1))]
    assert (report.n_samples, report.n_questions) == (6, 4)
    assert report.metrics("test") == {
        "test/exact_match": pytest.approx(0.5),
        "test/all_exact_match": pytest.approx(0.5),
        "test/caption_exact_match": 0.5,
        "test/exact_match_what_color": pytest.approx(2 / 3),
        "test/exact_match_is_there": 0.0,
        "test/bleu": report.bleu,
    }


def test_only_captions_or_only_questions() -> None:
    captions = answer_metrics(["a", "b"], ["a", "c"], [None, None])
    assert captions.question_exact_match is None
    assert captions.metrics()["val/exact_match"] == 0.5
    assert captions.by_type == {}
    questions = answer_metrics(["a"], ["a"], ["why"])
    assert questions.caption_exact_match is None
    assert "val/caption_exact_match" not in questions.metrics()


def test_the_log_gets_the_frequent_types_only() -> None:
    types = [f"kind {number}" for number in range(50) for _ in range(1 + (number == 49))]
    report = answer_metrics(["a"] * 51, ["a"] * 51, types)
    assert len(report.by_type) == 50
    logged = [name for name in report.metrics() if name.startswith("val/exact_match_")]
    assert len(logged) == MAX_LOGGED_TYPES
    assert logged[0] == "val/exact_match_kind_49"


def test_bleu_is_sacrebleu_from_0_to_100() -> None:
    assert bleu([["red"], ["blue"]], ["red", "blue"]) == pytest.approx(100)
    assert bleu([["a red circle on the left"]], ["a red circle on the left"]) == pytest.approx(100)
    assert bleu([["red"]], [""]) == 0
    # By hand: precisions 5/6, 3/5, 1/4 and 0/3, the last smoothed to half of 1/3; no brevity penalty.
    found = bleu([["a red circle on the left"]], ["a red star on the left"])
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / (2 * 3)) ** 0.25, rel=1e-6)
    short = bleu([["the red circle is large"]], ["the red circle is"])
    assert short == pytest.approx(100 * math.exp(1 - 5 / 4), rel=1e-6)


def test_any_of_several_right_texts_counts() -> None:
    report = answer_metrics(["a dog", "a cat", "two"], ["the  Hound", "a hound", "2"], [None, None, "how many"],
                            [("a hound", "the hound"), (), ("2",)])  # fmt: skip
    assert (report.caption_exact_match, report.question_exact_match) == (0.5, 1)
    references = [["x y", "the red dog sat"], ["a red cat sat"]]
    assert bleu(references, ["the red dog sat", "a red cat sat"]) == pytest.approx(100)
    # By hand: two of three words are right, and the only pair; no brevity penalty.
    unequal = bleu([["a", "b c"], ["d"]], ["b c", "e"])
    assert unequal == pytest.approx(100 * math.sqrt(2 / 3 * 1), rel=1e-6)


def test_lengths_that_differ() -> None:
    for texts in (([], [], []), (["a"], ["a", "b"], [None])):
        with pytest.raises(ValueError, match="generated texts"):
            answer_metrics(*texts)
