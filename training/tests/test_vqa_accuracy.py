"""VQA accuracy by hand, and the texts that its normalisation makes equal."""

from __future__ import annotations

from itertools import combinations

import pytest

from mamba3_jepa.evaluation.vqa_accuracy import normalised_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("The Dog", "dog"),
        ("a", ""),
        ("an apple and the pear", "apple and pear"),
        ("Three", "3"),
        ("none", "0"),
        ("ten of ten", "10 of 10"),
        ("eleven", "eleven"),  # number words go up to ten
        ("no", "no"),
        ("dont", "don't"),
        ("DIDNT", "didn't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # both apostrophes missing is no contraction
        ("its", "its"),
        ("im", "im"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),  # the mark stands beside a blank elsewhere
        ("100,978", "100978"),
        ("1,000-2,000 m/s", "10002000 ms"),  # with a comma between digits no mark leaves a blank
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("p!q!- r", "p q r"),
        ("  many\u00a0  blanks ", "many blanks"),
    ],
)
def test_normalised_answer(text: str, expected: str) -> None:
    assert normalised_answer(text) == expected


def by_definition(given: str, answers: list[str]) -> float:
    """The mean over all sets of nine of min(those who say the same / 3, 1)."""
    sets = list(combinations(answers, len(answers) - 1))
    return sum(min(chosen.count(given) / 3, 1) for chosen in sets) / len(sets)


@pytest.mark.parametrize("same", range(11))
def test_ten_answers_by_the_definition(same: int) -> None:
    answers = ["red"] * same + ["blue"] * (10 - same)
    assert vqa_accuracy("red", answers) == pytest.approx(by_definition("red", answers))
    by_hand = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9}
    assert vqa_accuracy("red", answers) == pytest.approx(by_hand.get(same, 1))


def test_the_example_of_the_authors() -> None:
    """8 say yes and 2 no: "no" has 1/10 (8 * 2/3 + 2 * 1/3)."""
    answers = ["yes"] * 8 + ["no"] * 2
    assert vqa_accuracy("no", answers) == pytest.approx(0.6)
    assert vqa_accuracy("yes", answers) == 1


def test_both_sides_are_normalised_where_people_disagree() -> None:
    answers = ["Two dogs"] * 3 + ["the 2 dogs."] * 3 + ["cats"] * 4
    assert vqa_accuracy("2 dogs", answers) == 1
    assert vqa_accuracy("a two dogs\n", answers) == 1
    assert vqa_accuracy("dogs", answers) == 0


def test_where_all_agree_only_case_is_forgiven() -> None:
    assert vqa_accuracy("The Stop", ["the stop"] * 10) == 1
    assert vqa_accuracy(" the\tstop ", ["the stop"] * 10) == 1
    assert vqa_accuracy("stop", ["the stop"] * 10) == 0
    assert vqa_accuracy("yes!", ["yes"] * 10) == 0


def test_an_empty_answer_is_wrong() -> None:
    assert vqa_accuracy("", ["yes"] * 10) == 0
    assert vqa_accuracy(" ", ["yes"] * 9 + ["no"]) == 0


def test_other_numbers_of_answers() -> None:
    assert vqa_accuracy("Red", ["red"]) == 1
    assert vqa_accuracy("blue", ["red"]) == 0
    assert vqa_accuracy("red", ["red", "red"]) == 1
    assert vqa_accuracy("red", ["red", "blue"]) == pytest.approx(1 / 2)
    assert vqa_accuracy("red", ["red", "red", "blue"]) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    five = ["red", "red", "blue", "blue", "blue"]
    assert vqa_accuracy("red", five) == pytest.approx(by_definition("red", five))
    with pytest.raises(ValueError, match="at least one"):
        vqa_accuracy("red", [])
