"""The measures of GQA, TallyQA and POPE by hand and by torchmetrics, and which questions are measured by what."""

from __future__ import annotations

import random
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_f1_score,
    binary_precision,
    binary_recall,
)

from mamba3_jepa.evaluation.benchmarks import BENCHMARKS, SEVERAL_ANSWERS, Question, benchmark_reports
from mamba3_jepa.evaluation.yes_no import YesNoScores, says_yes
from mamba3_jepa.settings.inference import EvaluateSettings


def question(answer: str, *more: str, **meta: Any) -> Question:
    return Question(answers=(answer, *more), meta=meta)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("yes", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog. Yes.", False),
        ("Yes. No.", True),  # the first sentence counts
        ("nothing", True),  # POPE knows no other word
        ("", True),
        ("NO", False),
    ],
)
def test_what_is_read_as_yes(answer: str, yes: bool) -> None:
    assert says_yes(answer) == yes


def test_yes_no_scores_by_hand() -> None:
    said = [True, True, True, False, False]
    right = [True, False, True, True, False]
    scores = YesNoScores.of(said, right)
    assert (scores.accuracy, scores.yes) == (pytest.approx(3 / 5), pytest.approx(3 / 5))
    assert (scores.precision, scores.recall, scores.f1) == (pytest.approx(2 / 3),) * 3
    with pytest.raises(ValueError, match="1 answers for 0"):
        YesNoScores.of([True], [])


@pytest.mark.parametrize("likely", [0.0, 0.3, 0.9, 1.0])
def test_yes_no_scores_are_those_of_torchmetrics(likely: float) -> None:
    rng = random.Random(1)
    said = [rng.random() < likely for _ in range(77)]
    right = [rng.random() < 0.4 for _ in range(77)]
    scores, tensors = YesNoScores.of(said, right), (torch.tensor(said), torch.tensor(right))
    for name, measure in (
        ("accuracy", binary_accuracy),
        ("precision", binary_precision),
        ("recall", binary_recall),
        ("f1", binary_f1_score),
    ):
        assert getattr(scores, name) == pytest.approx(float(measure(*tensors))), name


def test_vqa_by_answer_type_and_question_type() -> None:
    asked = [
        question(*["yes"] * 10, dataset="vqav2", answer_type="yes/no", question_type="is the"),
        question(*["2"] * 8, "3", "3", dataset="vqav2", answer_type="number", question_type="how many"),
        question(*["yes"] * 9, "no", dataset="vqav2", answer_type="yes/no", question_type="is this"),
        question(*["red"] * 5, dataset="vqav2", answer_type="other", question_type="what color is the"),
    ]
    (report,) = benchmark_reports(asked, {"nearest": ["yes", "three", "no", "red"], "generated": ["no", "", "yes", ""]})
    assert report.benchmark == "vqav2"
    assert report.odd_counts == 1
    assert report.scores.questions == 4
    assert report.scores.by_way["nearest"] == {"accuracy": pytest.approx((1 + 0.6 + 0.3 + 1) / 4)}
    assert report.scores.by_way["generated"] == {"accuracy": pytest.approx(1 / 4)}
    kinds = report.groups["answer type"]
    assert list(kinds) == ["yes/no", "number", "other"]  # the largest first
    assert kinds["yes/no"].questions == 2
    assert kinds["yes/no"].by_way["nearest"]["accuracy"] == pytest.approx(1.3 / 2)
    assert report.groups["question type"]["how many"].by_way["nearest"]["accuracy"] == pytest.approx(0.6)
    assert report.metrics()["vqav2_accuracy_nearest"] == pytest.approx(2.9 / 4)
    assert report.as_json()["groups"]["answer type"]["number"]["by_way"]["generated"]["accuracy"] == 0


def test_gqa() -> None:
    asked = [
        question("yes", dataset="gqa", types={"structural": "verify", "semantic": "obj"}),
        question("left", dataset="gqa", types={"structural": "choose", "semantic": "rel"}, isBalanced=True),
        question("traffic light", dataset="gqa", types={"structural": "query", "semantic": "obj", "detailed": "x"}),
    ]
    (report,) = benchmark_reports(asked, {"nearest": ["Yes.", "right", "traffic  light"]})
    assert report.scores.by_way == {"nearest": {"accuracy": pytest.approx(2 / 3)}}
    answers = report.groups["answer"]
    assert {name: scores.by_way["nearest"]["accuracy"] for name, scores in answers.items()} == {
        "binary": 0.5,
        "open": 1,
    }
    assert set(report.groups["structural"]) == {"verify", "choose", "query"}
    assert report.groups["semantic"]["obj"].questions == 2
    assert report.odd_counts == report.left_out == 0


def test_gqa_is_measured_on_its_balanced_questions(caplog: pytest.LogCaptureFixture) -> None:
    asked = [question("yes", dataset="gqa", isBalanced=balanced) for balanced in (True, False, False)]
    (report,) = benchmark_reports(asked, {"nearest": ["yes", "no", "yes"]})
    assert (report.scores.questions, report.left_out) == (1, 2)
    assert report.scores.by_way["nearest"]["accuracy"] == 1
    assert benchmark_reports(asked[1:], {"nearest": ["no", "yes"]}) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"gqa: 2 of {number} questions do not count in its measure" for number in (3, 2)
    ]


def test_tallyqa_counts_in_digits_or_words() -> None:
    asked = [question(answer, dataset="tallyqa", issimple=simple) for answer, simple in
             (("3", True), ("0", False), ("12", False), ("1", True))]  # fmt: skip
    (report,) = benchmark_reports(asked, {"generated": ["three", "none", "11", ""]})
    assert report.scores.by_way["generated"]["accuracy"] == 0.5
    shares = {name: scores.by_way["generated"]["accuracy"] for name, scores in report.groups["complexity"].items()}
    assert shares == {"complex": 0.5, "simple": 0.5}


def test_pope_by_category() -> None:
    asked = [question(answer, dataset="pope", category=kind) for answer, kind in
             (("yes", "random"), ("no", "random"), ("yes", "popular"), ("no", "popular"))]  # fmt: skip
    (report,) = benchmark_reports(asked, {"nearest": ["yes", "no", "yes", "yes"]})
    scores = report.scores.by_way["nearest"]
    assert scores == {"accuracy": 0.75, "precision": pytest.approx(2 / 3), "recall": 1, "f1": 0.8, "yes": 0.75}
    assert report.groups["category"]["random"].by_way["nearest"]["yes"] == 0.5
    assert report.groups["category"]["popular"].by_way["nearest"]["precision"] == 0.5


def test_an_empty_answer_is_never_the_one_right_one() -> None:
    asked = [question("", "yes", dataset=name) for name in ("gqa", "tallyqa", "pope")]
    for report in benchmark_reports(asked, {"generated": ["yes"] * 3}):
        assert report.scores.by_way["generated"]["accuracy"] == 1


def test_the_setting_names_every_benchmark() -> None:
    named = get_args(get_args(get_type_hints(EvaluateSettings)["benchmark"])[0])
    assert set(named) == set(BENCHMARKS) - {SEVERAL_ANSWERS}


def test_which_questions_are_measured_by_what() -> None:
    asked = [
        question("red"),  # one answer of no benchmark: exact match is all there is
        question("red", "red", "crimson"),
        question("no", dataset="pope", category=None),
        question("blue", "navy", dataset="my own"),
        question("4", dataset="tallyqa"),
        question("4", dataset=["tallyqa"]),
    ]
    reports = benchmark_reports(asked, {"nearest": ["red", "red", "no", "x", "4", "4"]})
    assert [(each.benchmark, each.scores.questions) for each in reports] == [
        ("several answers", 2),
        ("pope", 1),
        ("tallyqa", 1),
    ]
    assert reports[0].odd_counts == 2
    assert reports[0].groups == reports[1].groups == reports[2].groups == {}
    (everything,) = benchmark_reports(asked[:4], {"nearest": ["red", "red", "no", "x"]}, "pope")
    assert (everything.benchmark, everything.scores.questions) == ("pope", 4)
    assert benchmark_reports([], {"nearest": []}) == []
    with pytest.raises(ValueError, match="1 questions with"):
        benchmark_reports(asked[:1], {"nearest": []})
