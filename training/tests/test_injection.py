"""What knowledge does to an answer, and what that is compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from mamba3_jepa.evaluation.confusion_plots import plot_injection
from mamba3_jepa.evaluation.injection import InjectionSamples, InjectionTrial, gallery, other_knowledge
from mamba3_jepa.models.vljepa import Mamba3Jepa


def test_wrong_knowledge_is_another_knowledge_for_another_answer() -> None:
    """Passages 0 to 3: one serves several questions with different answers, two tell the same."""
    expected = ["red", "blue", "red", "green", "green", "a star", "a circle", "a square"]
    passages = [0, 0, 1, 1, 2, 3, 3, 2]
    questions = ["q", "q", "q", "q", "q", None, None, None]
    vectors = torch.randn(4, 6)
    right = {0: {3, 4}, 1: {2, 3, 4}, 2: {1, 4}, 3: {0, 1}, 4: {0, 1, 2}, 5: {7}, 6: {7}, 7: {5, 6}}
    drawn: dict[int, set[int]] = {i: set() for i in range(8)}
    for seed in range(60):
        for i, j in enumerate(other_knowledge(vectors[passages], expected, questions, seed)):
            drawn[i].add(j)
    assert drawn == right


def test_without_another_knowledge_or_another_answer_there_is_no_wrong_one() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert other_knowledge(vectors[:2], ["red", "blue"], ["q", "q"]) == [0, 1], "one passage for all"
    assert other_knowledge(vectors[1:], ["red", "red"], ["q", "q"]) == [0, 1], "one answer for all"
    assert other_knowledge(vectors[1:], ["red", "a star"], ["q", None]) == [0, 1], "one question and one caption"
    assert other_knowledge(vectors, ["red", "blue", "blue"], ["q", "q", "q"]) == [2, 1, 0]


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    texts = ["red blue green large small a star a circle yes no"] * 3
    return tiny_model(3, texts, moved=False, max_answer_tokens=6)


def test_injection_is_measured_against_before_and_wrong(model: Mamba3Jepa, tmp_path: Path) -> None:
    """With an injector that overrules the state, the knowledge alone decides what is retrieved."""
    texts = ["red", "blue", "green", "large", "a star", "a circle"]
    questions = ["q", "q", "q", "q", None, None]
    embeddings = model.embed_text(texts).clone()
    torch.manual_seed(2)
    pooled = torch.randn(6, 64)
    shown = gallery([*texts, "red"], torch.cat([embeddings, embeddings[:1]]), [*questions, "q"])
    assert shown[0] == texts
    assert shown[2] == [True, True, True, True, False, False]
    trial = InjectionTrial(
        InjectionSamples(
            pooled=pooled, knowledge=embeddings, expected=texts, questions=questions,  # type: ignore[arg-type]
            kinds=["mismatched"] * 3 + ["corrupted"] * 3, texts=shown[0], text_embeddings=shown[1],
            text_is_answer=shown[2],
        )
    )  # fmt: skip
    assert model.recursion is not None
    injector, head = model.recursion.injector, model.predictor.pred_head
    untrained = trial.run(model, "cpu")
    predicted = model.predictor.embed(pooled).detach()
    nearest = [int((predicted[i] @ embeddings[:4].T).argmax()) for i in range(4)]
    nearest += [4 + int((predicted[i] @ embeddings[4:].T).argmax()) for i in (4, 5)]
    before = sum(i == j for i, j in enumerate(nearest)) / 6
    assert untrained.retrieved.before == untrained.retrieved.after == untrained.retrieved.wrong
    assert untrained.retrieved.before == pytest.approx(before)
    with torch.no_grad():
        injector.projection.weight.copy_(1e4 * torch.linalg.pinv(head.weight))
    report = trial.run(model, "cpu")
    assert report.retrieved.after == 1.0
    assert report.retrieved.wrong == 0.0
    assert report.retrieved.before == pytest.approx(before)
    assert set(report.by_kind) == {"mismatched", "corrupted"}
    assert report.generated is not None
    assert report.metrics()["val/retrieved_after"] == 1.0
    assert plot_injection(report, tmp_path).stat().st_size > 5000


def test_a_passage_that_serves_many_questions_is_not_its_own_control(model: Mamba3Jepa, tmp_path: Path) -> None:
    """The state is overruled: what is retrieved tells which knowledge was given."""
    texts = ["red", "blue", "green", "large"]
    embeddings = model.embed_text(texts).clone()
    assert model.recursion is not None
    with torch.no_grad():
        model.recursion.injector.projection.weight.copy_(1e4 * torch.linalg.pinv(model.predictor.pred_head.weight))
    # one passage for "red" and "blue", which leads to "red" whatever is asked
    samples = InjectionSamples(
        pooled=torch.randn(3, 64), knowledge=embeddings[[0, 0, 2]], expected=["red", "blue", "green"],
        questions=["q", "q", "q"], kinds=["given"] * 3, texts=texts, text_embeddings=embeddings,
        text_is_answer=[True] * 4,
    )  # fmt: skip
    report = InjectionTrial(samples).run(model, "cpu")
    assert report.retrieved.after == pytest.approx(2 / 3)
    assert report.retrieved.wrong == 0.0
    assert report.n_without_wrong == 0
    only = dataclasses.replace(
        samples, pooled=samples.pooled[:2], knowledge=samples.knowledge[:2], expected=["red", "blue"],
        questions=["q", "q"], kinds=["given"] * 2,
    )  # fmt: skip
    report = InjectionTrial(only).run(model, "cpu")
    assert (report.n_without_wrong, report.retrieved.wrong) == (2, None)
    plot_injection(report, tmp_path)


def test_one_answer_for_all_has_no_wrong_one(model: Mamba3Jepa, tmp_path: Path) -> None:
    embeddings = model.embed_text(["red", "red"]).clone()
    samples = InjectionSamples(
        pooled=torch.randn(2, 64), knowledge=embeddings, expected=["red", "red"], questions=["q", "q"],
        kinds=["given", "given"], texts=["red"], text_embeddings=embeddings[:1], text_is_answer=[True],
    )  # fmt: skip
    report = InjectionTrial(samples).run(model, "cpu")
    assert report.retrieved.wrong is None
    assert "val/retrieved_wrong" not in report.metrics()
    assert report.metrics()["val/injected_without_wrong"] == 2
    plot_injection(report, tmp_path)
