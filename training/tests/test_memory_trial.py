"""What a memory is worth, on cosines that are known."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from mamba3_jepa.evaluation.decoding import generate_texts
from mamba3_jepa.evaluation.memory_trial import MemoryQuestions, try_memory
from mamba3_jepa.models.vljepa import Mamba3Jepa

# (5, 4) cosines of questions and texts; the right texts are 0, 1, 2, 3, 0
COSINES = torch.tensor(
    [
        [0.9, 0.1, 0.0, 0.2],  # found; without it the nearest is under the floor
        [0.3, 0.2, 0.8, 0.0],  # another one is nearer, and told in both cases
        [0.1, 0.2, 0.3, 0.0],  # nothing comes up to the floor
        [0.0, 0.0, 0.0, 1.0],  # not confused, so nothing is looked up
        [0.6, 0.1, 0.0, 0.7],  # text 3 answers this question too, and is in no memory beside the right one
    ]
)
FLOOR = 0.5


@pytest.fixture
def model() -> Mamba3Jepa:
    model = tiny_model(3)
    assert model.recursion is not None
    model.recursion.memory_floor.fill_(FLOOR)
    return model


def said(model: Mamba3Jepa, pooled: Tensor, knowledge: Tensor) -> str:
    assert model.recursion is not None
    told = model.recursion.injector(pooled[None], knowledge[None])
    return generate_texts(model, model.predictor.embed(told).detach())[0][0]


def questions(model: Mamba3Jepa, n: int = 5) -> MemoryQuestions:
    dice = torch.Generator().manual_seed(0)
    pooled = torch.randn(5, model.config.predictor.d_model, generator=dice)
    knowledge = torch.randn(4, model.config.knowledge_dim, generator=dice)
    expected = [
        said(model, pooled[0], knowledge[0]),
        "never",
        "before 2",
        "never",
        said(model, pooled[4], knowledge[0]),
    ]
    # what question 1 is answered with anyway is what the wrong text leads to
    before = ["before 0", said(model, pooled[1], knowledge[2]), "Before  2", "before 3", "before 4"]
    return MemoryQuestions(
        asked=COSINES[:n],
        keys=torch.eye(4),
        right=torch.tensor([0, 1, 2, 3, 0])[:n],
        knowledge=knowledge,
        pooled=pooled[:n],
        judged=torch.tensor([True, True, True, False, True])[:n],
        before=before[:n],
        expected=expected[:n],
        answers=lambda rows, texts: (rows == 4).unsqueeze(1) & (texts == 3),
    )


def test_shares_by_hand(model: Mamba3Jepa) -> None:
    report = try_memory(model, questions(model))
    assert report.memory_texts == 4
    assert vars(report.all) == {
        "questions": 5, "right_before": 1 / 5, "found": 2 / 5, "right": 3 / 5, "told": 1 / 5, "changed": 0.0
    }  # fmt: skip
    assert report.judged is not None
    assert vars(report.judged) == {
        "questions": 4, "right_before": 1 / 4, "found": 2 / 4, "right": 3 / 4, "told": 1 / 4, "changed": 0.0
    }  # fmt: skip
    assert report.as_json()["judged"]["found"] == 0.5


def test_what_a_wrong_text_changes_is_counted(model: Mamba3Jepa) -> None:
    asked = questions(model)
    asked.before[1] = "something else"
    report = try_memory(model, asked)
    assert report.all.changed == 1 / 5


def test_without_a_floor_the_nearest_is_always_told(model: Mamba3Jepa) -> None:
    assert model.recursion is not None
    model.recursion.memory_floor.fill_(-1)
    report = try_memory(model, questions(model))
    assert (report.all.found, report.all.told) == (3 / 5, 4 / 5)


def test_a_memory_of_the_right_text_alone(model: Mamba3Jepa) -> None:
    report = try_memory(model, questions(model), memory=1)
    assert report.memory_texts == 1
    assert (report.all.found, report.all.told) == (2 / 5, 0.0)  # questions 0 and 4; the others' is under the floor
    none_judged = questions(model, 4)
    none_judged.judged[:] = False
    report = try_memory(model, none_judged)
    assert (report.all.found, report.all.told, report.judged) == (0.0, 0.0, None)
