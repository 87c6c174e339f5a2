"""What knowledge does to an answer, and what that is compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from mamba3_jepa.evaluation.confusion_plots import plot_injection
from mamba3_jepa.evaluation.decoding import generate_texts
from mamba3_jepa.evaluation.injection import InjectionSamples, InjectionTrial, SteadinessTrial, gallery
from mamba3_jepa.models.vljepa import Mamba3Jepa


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    texts = ["red blue green large small a star a circle yes no"] * 3
    return tiny_model(3, texts, moved=False, max_answer_tokens=6)


@pytest.mark.usefixtures("real_figures")
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
            wrong=embeddings[[1, 0, 3, 2, 5, 4]], has_wrong=torch.ones(6, dtype=torch.bool),
            forms=["answer"] * 2 + ["sentence"] * 4,
            kinds=["mismatched"] * 3 + ["corrupted"] * 3, texts=shown[0], text_embeddings=shown[1],
            text_is_answer=shown[2],
        )
    )  # fmt: skip
    assert model.recursion is not None
    injector, head = model.recursion.injector, model.predictor.pred_head
    untrained = trial.run(model, "cpu", torch.zeros(6, dtype=torch.bool))
    assert untrained.judged == {}
    predicted = model.predictor.embed(pooled).detach()
    nearest = [int((predicted[i] @ embeddings[:4].T).argmax()) for i in range(4)]
    nearest += [4 + int((predicted[i] @ embeddings[4:].T).argmax()) for i in (4, 5)]
    before = sum(i == j for i, j in enumerate(nearest)) / 6
    assert untrained.retrieved.before == untrained.retrieved.after == untrained.retrieved.wrong
    assert untrained.retrieved.before == pytest.approx(before)
    with torch.no_grad():
        injector.projection.weight.copy_(1e4 * torch.linalg.pinv(head.weight))
    report = trial.run(model, "cpu", torch.ones(6, dtype=torch.bool))
    assert report.judged == {"all": report.generated} | report.by_form
    assert report.retrieved.after == 1.0
    assert report.retrieved.wrong == 0.0
    assert report.retrieved.before == pytest.approx(before)
    assert set(report.by_kind) == {"mismatched", "corrupted"}
    assert report.generated is not None
    assert report.metrics()["val/retrieved_after"] == 1.0
    assert plot_injection(report, tmp_path).stat().st_size > 5000


def test_samples_without_wrong_knowledge_do_not_count_there(model: Mamba3Jepa, tmp_path: Path) -> None:
    """The state is overruled: what is retrieved tells which knowledge was given."""
    texts = ["red", "blue", "green", "large"]
    embeddings = model.embed_text(texts).clone()
    assert model.recursion is not None
    with torch.no_grad():
        model.recursion.injector.projection.weight.copy_(1e4 * torch.linalg.pinv(model.predictor.pred_head.weight))
    # one passage for "red" and "blue", which leads to "red" whatever is asked; what is wrong for "green" is right
    samples = InjectionSamples(
        pooled=torch.randn(3, 64), knowledge=embeddings[[0, 0, 2]], wrong=embeddings[[1, 0, 2]],
        has_wrong=torch.tensor([True, False, True]), expected=["red", "blue", "green"], questions=["q", "q", "q"],
        kinds=["given"] * 3, forms=["given", "given", "sentence"], texts=texts, text_embeddings=embeddings,
        text_is_answer=[True] * 4,
    )  # fmt: skip
    judged = torch.tensor([True, False, False])
    report = InjectionTrial(samples).run(model, "cpu", judged)
    assert set(report.judged) == {"all", "given"}
    assert report.judged["all"] == report.judged["given"]
    assert report.retrieved.after == pytest.approx(2 / 3)
    assert report.retrieved.wrong == 0.5
    assert report.n_without_wrong == 1
    assert set(report.by_form) == {"given", "sentence"}
    only = dataclasses.replace(samples, has_wrong=torch.zeros(3, dtype=torch.bool))
    report = InjectionTrial(only).run(model, "cpu", judged)
    assert (report.n_without_wrong, report.retrieved.wrong) == (3, None)
    assert "val/retrieved_wrong" not in report.metrics()
    assert report.metrics()["val/injected_without_wrong"] == 3
    plot_injection(report, tmp_path)


def test_answers_that_are_turned_are_counted_always_and_in_use(model: Mamba3Jepa) -> None:
    assert model.recursion is not None
    assert model.y_decoder is not None
    with torch.no_grad():
        for parameter in model.recursion.injector.parameters():
            parameter.zero_()
    pooled, nothing = torch.randn(4, 64), torch.zeros(4, 32)
    said = [text for text, _ in generate_texts(model, model.predictor.embed(pooled).detach())]
    steady = SteadinessTrial(pooled, nothing, said).run(model, "cpu", torch.ones(4, dtype=torch.bool))
    assert (steady.n_samples, steady.always, steady.in_use) == (4, 0.0, 0.0)
    # two of four expected something that nobody says; one of those would be told in use
    turned = SteadinessTrial(pooled, nothing, [said[0], "never", "never", said[3]])
    report = turned.run(model, "cpu", torch.tensor([True, True, False, False]))
    assert (report.always, report.in_use) == (0.5, 0.25)
    assert report.metrics() == {"val/turned_samples": 4, "val/turned": 0.25, "val/turned_always": 0.5}
