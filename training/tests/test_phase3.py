"""Phase 3: its loss against an independent formula, and the command from checkpoint to checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from short import changed
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import NO_FLOOR, SHUT
from mamba3_jepa.data.confusion import ConfusionSource
from mamba3_jepa.data.confusion_plan import MADE_KINDS
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.sources import source_texts
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation import phase3_data as phase3_data_module
from mamba3_jepa.evaluation.lessons import Findable, Lessons
from mamba3_jepa.evaluation.memory_floor import MEMORY_TEXTS
from mamba3_jepa.evaluation.phase3_data import check_knowledge
from mamba3_jepa.evaluation.spoken import is_right
from mamba3_jepa.files.checkpoint import DataRecord, load_checkpoint, save_checkpoint
from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.models.generation import GenerationConfig, mean_log_probability
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.common import ConfusionKind
from mamba3_jepa.settings.training import Phase3Settings
from mamba3_jepa.training import frozen
from mamba3_jepa.training.phase3 import Phase3Task
from mamba3_jepa.training.phase3_data import phase3_data
from mamba3_jepa.training.phase3_objective import Phase3Batch, Phase3Objective

SHORT = ["--tiny", "--cpu", "--synthetic-scenes", "24", "--val-samples", "60", "--batch-size", "30", "--epochs", "30",
         "--lr", "1e-2", "--log-every", "1", "--eval-every", "1000"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _answers_are_right() -> Iterator[None]:
    """The models here are untrained: without this, nothing they say would be clear."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase3_data_module, "is_right", lambda said, sample: True)
        yield


@pytest.fixture(scope="module")
def phase2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as phase 2 leaves it. Nothing was trained: the frozen model is what it is."""
    scenes = SceneSource("train", n_scenes=24, image_size=32)
    tokenizer = TextTokenizer.train(source_texts(scenes, range(len(scenes))), 400)
    data = DataRecord(source="scenes", synthetic=True, answers=["red", "blue"])
    path = tmp_path_factory.mktemp("phase2") / "phase2_best.pt"
    model = tiny_model(2, tokenizer, moved=False, seed=1)  # one that finds the right text for some of the questions
    return write_checkpoint(path, model, 2, data=data, run={})


def train(phase2: Path, output_dir: Path, *arguments: str) -> int:
    command = ["train-agent", "--phase2-checkpoint", str(phase2), "--output-dir", str(output_dir)]
    return main([*command, *changed(SHORT, arguments)])


@pytest.fixture(scope="module")
def finished(phase2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phase3") / "run"
    assert train(phase2, folder) == 0
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).model


# --- the objective ---


def model_with_recursion(phase2: Path, **recursion: object) -> Mamba3Jepa:
    checkpoint = load_checkpoint(phase2)
    config = checkpoint.config.replace(recursion=replace(checkpoint.config.recursion, **recursion))
    model = Mamba3Jepa.from_loaded(replace(checkpoint, config=config), "test")
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.add_recursion()
    return model


def random_batch(lessons: list[int], asks: list[bool]) -> Phase3Batch:
    """A sample for each number of lessons, 32 wide embeddings, 3 other texts of which one counts."""
    torch.manual_seed(2)
    n, about = len(lessons), torch.repeat_interleave(torch.arange(len(lessons)), torch.tensor(lessons))
    unit = torch.nn.functional.normalize(torch.randn(2, max(1, len(about)), 32), dim=-1)
    share = 1 / torch.tensor(lessons)[about].float()
    if not len(about):
        about, share = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    texts = torch.nn.functional.normalize(torch.randn(n, 5, 32), dim=-1)
    return Phase3Batch(
        pooled=torch.randn(n, 64),
        doubt=torch.randn(n, 2),
        confused=torch.arange(n) % 2 == 0,
        about=about,
        knowledge=unit[0],
        goal=unit[1],
        share=share,
        question=texts[:, 0],
        right=texts[:, 1],
        asks=torch.tensor(asks),
        others=texts[:, 2:],
        is_other=torch.tensor([[True, False, False]]).expand(n, 3),
        answers=torch.arange(max(1, int(sum(lessons)))) % 3 > 0,
        tool=torch.arange(n) % 4 - 1,
    )  # fmt: skip


def tower(layers: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    hidden, output = layers.hidden, layers.output
    z = hidden.weight @ (x / x.square().mean().sqrt()) + hidden.bias
    z = output.weight @ (z * torch.sigmoid(z)) + output.bias
    return z / z.norm()


def logit_of(layers: torch.nn.Module, state: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
    """linear(silu(hidden([layernorm(state); told / rms(told)])))."""
    known = torch.nn.functional.layer_norm(state, (64,), layers.norm.weight, layers.norm.bias)
    if told is not None:
        known = torch.cat([known, told / told.square().mean().sqrt()])
    z = layers.hidden.weight @ known + layers.hidden.bias
    return (layers.linear.weight @ (z * torch.sigmoid(z)) + layers.linear.bias).detach().double()


def test_the_loss_is_the_sum_of_its_parts(phase2: Path) -> None:
    model = model_with_recursion(phase2, tools=["abacus", "memory", "oracle"])
    recursion, head = model.recursion, model.predictor.pred_head
    assert recursion is not None
    assert recursion.retriever is not None
    injector = recursion.injector
    with torch.no_grad():
        injector.projection.weight.normal_()
        injector.output.weight.normal_()
    lessons, asks = [2, 0, 1, 3, 0], [True, True, False, True, False]
    batch = random_batch(lessons, asks)
    output = Phase3Objective(recursion, model.predictor, 0.7)(batch)
    confusion, injection, lookup, knowledge, choice = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(5):
        logit = recursion.confusion_probe(batch.pooled[i : i + 1], batch.doubt[i : i + 1])
        p = float(torch.sigmoid(logit.double()).detach())
        confusion -= np.log(p if batch.confused[i] else 1 - p) / 5
        if batch.tool[i] >= 0:
            choice -= float(logit_of(recursion.tool_selector, batch.pooled[i]).log_softmax(0)[batch.tool[i]])
        # of three other texts, which count a quarter each, one is none that answers
        knowledge += float(logit_of(recursion.knowledge_probe, batch.pooled[i], batch.others[i, 0]).exp().log1p()) / 4
        if asks[i]:
            asked = tower(recursion.retriever.question, batch.question[i])
            right, other = (
                20 * (float((asked @ tower(recursion.retriever.text, text)).detach()) - 0.5)
                for text in (batch.right[i], batch.others[i, 0])
            )
            lookup += np.log1p(np.exp(other - right)) + np.log1p(np.exp(-right)) + np.log1p(np.exp(other))
    for j, i in enumerate(batch.about.tolist()):
        state, told = batch.pooled[i], batch.knowledge[j]
        normed = torch.nn.functional.layer_norm(state, (64,), injector.norm.weight, injector.norm.bias)
        z = injector.hidden.weight @ torch.cat([normed, told / told.square().mean().sqrt()]) + injector.hidden.bias
        state = state + injector.projection.weight @ told + injector.output.weight @ (z * torch.sigmoid(z))
        embedding = head.weight @ state + head.bias
        embedding = embedding / embedding.norm()
        p = float(torch.sigmoid(logit_of(recursion.knowledge_probe, batch.pooled[i], told)))
        knowledge -= np.log(p if batch.answers[j] else 1 - p) / lessons[i]
        injection += float(((embedding - batch.goal[j]) ** 2).detach().mean()) / lessons[i]
    expected = confusion + 0.7 * injection / 5 + (lookup + knowledge + choice) / 5
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(output.logged["confusion_loss"]) == pytest.approx(confusion, rel=1e-5)
    assert float(output.logged["injection_loss"]) == pytest.approx(injection / 3, rel=1e-5)
    assert float(output.logged["lookup_loss"]) == pytest.approx(lookup / 3, rel=1e-5)
    assert float(output.logged["knowledge_loss"]) == pytest.approx(knowledge / 3, rel=1e-5)
    assert float(output.logged["tool_loss"]) == pytest.approx(choice / 3, rel=1e-5)


@pytest.mark.parametrize("lessons", [[1] * 8, [0] * 8, [2, 0] * 4, [0] * 4 + [3] * 4])
def test_halves_of_a_batch_average_to_the_whole(phase2: Path, lessons: list[int]) -> None:
    """Whatever the halves hold; and every weight always has a gradient, as data parallelism expects."""
    model = model_with_recursion(phase2, tools=["abacus", "memory", "oracle"])
    assert model.recursion is not None
    objective = Phase3Objective(model.recursion, model.predictor, 1.0).double()
    whole = random_batch(lessons, [number > 0 for number in lessons])
    parameters = list(model.recursion.parameters())

    def gradients(rows: slice) -> list[torch.Tensor]:
        first, last = rows.start, rows.stop
        values = {name: value[rows] for name, value in vars(whole).items()}
        mine = ((whole.about >= first) & (whole.about < last)).nonzero().squeeze(1)
        for name in ("about", "knowledge", "goal", "share", "answers"):
            values[name] = getattr(whole, name)[mine]
        values["about"] = values["about"] - first
        if not len(mine):
            values |= {"about": torch.zeros(1, dtype=torch.int64), "share": torch.zeros(1)}
            values |= {"knowledge": torch.zeros(1, 32), "goal": torch.zeros(1, 32)}
            values |= {"answers": torch.zeros(1, dtype=torch.bool)}
        batch = Phase3Batch(**{k: v.double() if v.is_floating_point() else v for k, v in values.items()})
        return list(torch.autograd.grad(objective(batch).loss, parameters, allow_unused=False))

    for full, first, second in zip(*map(gradients, (slice(0, 8), slice(0, 4), slice(4, 8))), strict=True):
        torch.testing.assert_close(full, (first + second) / 2)


def test_training_mode_does_not_reach_the_frozen_predictor(phase2: Path) -> None:
    model = model_with_recursion(phase2)
    assert model.recursion is not None
    objective = Phase3Objective(model.recursion, model.predictor, 1.0)
    objective.train()
    assert model.recursion.training
    assert not any(module.training for module in model.predictor.modules())
    trainable = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trainable} == {"recursion"}


def test_the_states_are_those_of_the_frozen_model(phase2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase3_data_module, "is_right", is_right)
    model = model_with_recursion(phase2)
    source = ConfusionSource(SceneSource("train", n_scenes=4, image_size=32), range(12))
    data = phase3_data(model, source, np.arange(len(source)), cache_dir=None)
    samples = [source.sample(i) for i in range(len(source))]
    for i, sample in enumerate(samples):
        predicted = model.embed([None if sample.image is None else sample.image()], [sample.question])
        embedding = model.predictor.embed(data.frozen.pooled[torch.tensor([i])])
        torch.testing.assert_close(embedding, predicted, atol=1e-5, rtol=1e-4)
    said = Answerer(model, generation=GenerationConfig()).ask_many(
        [None if sample.image is None else sample.image() for sample in samples],
        [sample.question for sample in samples],
    )
    assert data.spoken.texts == [answer.text for answer in said]
    torch.testing.assert_close(
        mean_log_probability(data.spoken.doubt).exp(), torch.tensor([answer.confidence for answer in said])
    )
    answered = [sample.meta["kind"] in ("clear", "degraded", "shuffled") for sample in samples]
    assert data.answered.tolist() == answered
    assert any(answered)
    assert data.confused.tolist() == [
        answer.text != sample.target if is_answered else sample.confused
        for answer, sample, is_answered in zip(said, samples, answered, strict=True)
    ]
    lessons = data.lessons
    numbers, about = lessons.of(torch.arange(len(source)))
    told = [lesson for i in range(len(source)) for lesson in source.lessons(i)]
    assert about.tolist() == [i for i in range(len(source)) for _ in source.lessons(i)]
    assert [lessons.texts[i] for i in lessons.knowledge[numbers].tolist()] == [lesson.knowledge for lesson in told]
    torch.testing.assert_close(
        lessons.vectors[lessons.knowledge[numbers]],
        model.embed_text([str(lesson.knowledge) for lesson in told]), atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    goals = data.goals(numbers, about)
    for goal, lesson, i in zip(goals, told, about.tolist(), strict=True):
        stays = lesson.answer is None or (lesson.form == "false" and not data.confused[i])
        expected = data.frozen.embedding[i] if stays else model.embed_text([lesson.answer])[0]
        torch.testing.assert_close(goal, expected, atol=1e-5, rtol=1e-4)


def test_lessons_of_some_samples_are_those_of_each(phase2: Path) -> None:
    model = model_with_recursion(phase2)
    source = ConfusionSource(SceneSource("train", n_scenes=6, image_size=32), range(18))
    lessons = Lessons.about(model, source, range(len(source)))
    rows = torch.tensor([7, 0, 7, 3, len(source) - 1])
    numbers, about = lessons.of(rows)
    for place, row in enumerate(rows.tolist()):
        mine = numbers[about == place].tolist()
        assert mine == list(range(int(lessons.start[row]), int(lessons.start[row + 1])))
    assert [len(part) for part in lessons.of(rows[:0])] == [0, 0]


def test_what_a_question_finds_answers_it_and_the_others_do_not(phase2: Path) -> None:
    model = model_with_recursion(phase2)
    source = ConfusionSource(SceneSource("fresh", n_scenes=40, image_size=32), range(120))
    lessons = Lessons.about(model, source, range(len(source)))
    findable, rows = Findable(lessons), torch.arange(len(source))
    told: dict[str, set[str]] = {}  # by what is asked, in whatever words, the sentences that answer it
    n_beside = 0
    for i in rows.tolist():
        sample = source.sample(i)
        sentences = {
            str(each.knowledge) for each in source.lessons(i)
            if each.form in ("sentence", "false") and each.knowledge != each.answer
        }  # fmt: skip
        if sample.question is not None and sentences:
            told.setdefault(sample.meta["plain"], set()).update(sentences)
        for each in source.lessons(i):
            for asked in each.answers:
                told.setdefault(asked, set()).add(str(each.knowledge))
                n_beside += asked != sample.meta["plain"]
    assert n_beside > 20
    seen: dict[int, set[int]] = {i: set() for i in rows.tolist()}
    for epoch in range(3):
        right, others = findable.right(rows, epoch), findable.others(rows, epoch, 20)
        assert torch.equal(right, findable.right(rows, epoch))
        assert torch.equal(others[5:9], findable.others(rows[5:9], epoch, 20)), "whatever else is in the batch"
        for i in rows.tolist():
            topic = source.sample(i).meta.get("plain")
            is_foreign = source.sample(i).meta["kind"] == "foreign"  # nothing answers it
            topic = topic if topic in told and source.lessons(i) and not is_foreign else None
            assert (right[i] >= 0) == (topic is not None)
            if topic is None:
                continue
            assert lessons.texts[right[i]] in told[topic]
            seen[i].add(int(right[i]))
            assert not {lessons.texts[k] for k in others[i].tolist() if k >= 0} & told[topic]
    assert int((others >= 0).sum()) > 0.9 * others.numel()
    assert any(len(texts) > 1 for texts in seen.values()), "another one in another epoch"
    assert not torch.equal(findable.others(rows, 0, 20), findable.others(rows, 1, 20))


# --- knowledge from a manifest ---


def write_manifest(folder: Path, knowledge: list, n: int = 12) -> Path:
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(n):
        Image.new("RGB", (32, 32), (20 * i % 256, 80, 200)).save(folder / "images" / f"{i}.png")
        lines.append({"image": f"images/{i}.png", "question": f"what is number {i}?", "answer": f"thing {i % 3}",
                      "knowledge": knowledge[i % len(knowledge)], "confused": i % 2 == 0})  # fmt: skip
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_manifests_tell_their_knowledge_the_answer_captions_and_what_is_false(phase2: Path, tmp_path: Path) -> None:
    vector = [0.5] * 32
    folder = write_manifest(tmp_path / "data", ["a red thing", vector, None])
    with (folder / "manifest.jsonl").open("a") as file:
        file.write(json.dumps({"image": "images/0.png", "text": "Here is Thing 0, and more."}) + "\n")
        file.write(json.dumps({"image": "images/1.png", "text": "something 1"}) + "\n")
    source = ConfusionSource(ManifestSource(folder), range(14), made_kinds=[])
    for i in range(12):
        sample = source.sample(i)
        by_form = {lesson.form: lesson for lesson in source.lessons(i)}
        assert by_form["answer"][:2] == (sample.target, sample.target)
        assert ("given" in by_form) == (sample.knowledge is not None)
        if sample.knowledge is not None:
            assert by_form["given"][:2] == (sample.knowledge, sample.target)
        # a caption with the answer in it, as words
        assert ("caption" in by_form) == (i == 0)
        told = by_form.get("false") or by_form["irrelevant"]
        assert told.knowledge not in (sample.knowledge, sample.target)
        if told.form == "irrelevant":
            assert told.answer is None
            assert told.knowledge in {"a red thing", "thing 0", "thing 1", "thing 2"}, "known of another question"
        else:
            assert told.answer != sample.target


def test_what_is_right_is_not_told_as_false(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 80, 200)).save(folder / f"{i}.png")
    lines = [{"image": f"{i}.png", "question": "what is it?", "answer": answer, "answers": ["couch", "sofa"]}
             for i, answer in enumerate(["couch", "Couch", "sofa"])]  # fmt: skip
    lines += [{"image": "3.png", "text": "one caption"}, {"image": "3.png", "text": "another caption"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = ConfusionSource(ManifestSource(folder), range(5), made_kinds=[])
    assert {lesson.form for i in range(5) for lesson in source.lessons(i)} == {"answer", "foreign"}


def test_without_knowledge_nothing_is_found_and_other_answers_tell_nothing(phase2: Path, tmp_path: Path) -> None:
    model = model_with_recursion(phase2)
    source = ConfusionSource(ManifestSource(write_manifest(tmp_path / "data", [None])), range(12), made_kinds=[])
    assert {lesson.form for i in range(12) for lesson in source.lessons(i)} == {"answer", "irrelevant", "foreign"}
    data = phase3_data(model, source, np.arange(12), cache_dir=None)
    task = Phase3Task(model, data, data, Phase3Settings(batch_size=4), DataRecord())
    assert task.validate(torch.device("cpu")).metrics["val/memory_floor"] == SHUT


def test_a_question_that_all_ask_teaches_no_floor(phase2: Path, tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "data", [f"it is number {i}" for i in range(12)])
    manifest = (folder / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_text(re.sub("what is number [0-9]+", "what is it", manifest))
    model = model_with_recursion(phase2)
    source = ConfusionSource(ManifestSource(folder), range(12), made_kinds=[])
    data = phase3_data(model, source, np.arange(12), cache_dir=None)
    metrics = Phase3Task(model, data, data, Phase3Settings(batch_size=4), DataRecord()).validate(torch.device("cpu"))
    assert metrics.metrics["val/memory_right_lookups"] > 0
    assert metrics.metrics["val/memory_floor"] == SHUT


@pytest.mark.parametrize(
    ("knowledge", "given", "scale"),
    [
        ([None], None, 1 / 0.177),  # 32 elements of a vector of unit length
        ([[0.5] * 5, [-0.5] * 5], None, 2.0),
        ([[0.0] * 5], None, 1.0),
        ([None], 3.0, 3.0),
    ],
)
def test_the_injector_learns_as_fast_as_knowledge_is_small(
    phase2: Path, tmp_path: Path, knowledge: list, given: float | None, scale: float
) -> None:
    folder = write_manifest(tmp_path / "data", knowledge)
    length = 32 if knowledge[0] is None else 5
    model = model_with_recursion(phase2, knowledge_dim=length)
    source = ConfusionSource(ManifestSource(folder), range(12), made_kinds=[])
    data = phase3_data(model, source, np.arange(12), cache_dir=None)
    settings = Phase3Settings(batch_size=4, injector_lr_scale=given)
    task = Phase3Task(model, data, data, settings, DataRecord())
    assert model.recursion is not None
    expected = [] if scale == 1 else [(model.recursion.injector.projection, pytest.approx(scale, rel=1e-6))]
    assert list(task.lr_scales) == expected


@pytest.mark.parametrize(
    ("knowledge", "knowledge_dim", "message"),
    [
        ([[1.0] * 32, [1.0] * 5], None, r'manifest.jsonl line 2: field "knowledge": .*length 5, .* takes 32'),
        ([[1.0] * 5, "a text"], 5, r'manifest.jsonl line 2: field "knowledge".* is a text, .* 32 numbers.* is 5'),
        ([[1.0] * 5, [1.0] * 4], 5, r'manifest.jsonl line 2: field "knowledge": .*length 4, .* takes 5'),
        ([None], 5, r"`knowledge_dim` 5: .* has no knowledge vectors"),
    ],
)
def test_knowledge_that_does_not_fit_names_its_line(
    phase2: Path, tmp_path: Path, knowledge: list, knowledge_dim: int | None, message: str
) -> None:
    folder = write_manifest(tmp_path / "data", knowledge)
    changes = {} if knowledge_dim is None else {"knowledge_dim": knowledge_dim}
    model = model_with_recursion(phase2, **changes)
    source = ConfusionSource(ManifestSource(folder), range(12))
    with pytest.raises(UserError, match=message.replace('knowledge":', 'knowledge" is a vector of')):
        check_knowledge(model, source, np.arange(len(source)))


def test_knowledge_of_samples_that_are_not_used_is_checked_too(phase2: Path, tmp_path: Path) -> None:
    """Others may be told of it."""
    model = model_with_recursion(phase2, knowledge_dim=5)
    folder = write_manifest(tmp_path / "data", [[1.0] * 2, *[[1.0] * 5] * 11])
    source = ConfusionSource(ManifestSource(folder), range(12), made_kinds=[])
    with pytest.raises(UserError, match=r"manifest.jsonl line 1: .* vector of length 2"):
        phase3_data(model, source, np.arange(4, 8), cache_dir=None)


def test_vectors_of_another_length_train(phase2: Path, tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "data", [[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0], None])
    arguments = ["--data-dir", str(folder), "--knowledge-dim", "5", "--epochs", "2", "--batch-size", "4"]
    assert train(phase2, tmp_path / "run", *arguments, "--val-fraction", "0.4") == 0
    model = Mamba3Jepa.from_checkpoint(tmp_path / "run" / "phase3_best.pt")
    assert model.recursion is not None
    assert model.recursion.injector.projection.weight.shape == (64, 5)
    assert model.recursion.injector.projection.weight.any()


def test_one_passage_for_all_is_said_and_not_measured_as_wrong_knowledge(
    phase2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_manifest(tmp_path / "data", ["all there is to know"], n=24)
    arguments = ["--data-dir", str(folder), "--epochs", "1", "--batch-size", "4", "--val-fraction", "0.4"]
    assert train(phase2, tmp_path / "run", *arguments) == 0
    last = {key: value for line in read_metrics(tmp_path / "run" / "metrics.jsonl") for key, value in line.items()}
    n = last["val/injected_samples"]
    assert n == last["val/injected_without_wrong"] > 2
    assert "val/retrieved_after" in last
    assert "val/retrieved_wrong" not in last
    assert f"{n} of {n} things told to confused validation samples cannot be tried with wrong" in caplog.text


# --- the command ---


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "phase3_best.pt", "phase3_last.pt", "recursion.safetensors", "config.json", "metrics.jsonl", "plots"
    }  # fmt: skip
    plots = {path.stem for path in (finished / "plots").iterdir()}
    assert {"confusion_histograms", "confusion_roc", "confusion_reliability", "injection", "memory_floor"} <= plots
    assert "loss" in plots
    last = {key: value for line in read_metrics(finished / "metrics.jsonl") for key, value in line.items()}
    wanted = {"train/loss", "train/confusion_loss", "train/injection_loss", "val/loss", "val/auroc", "val/ece",
              "val/auroc_mismatched", "val/auroc_unanswerable", "val/auroc_corrupted", "val/auroc_unanswerable_alike",
              "val/retrieved_before", "val/retrieved_after", "val/retrieved_wrong", "val/generated_before",
              "val/generated_after", "val/generated_wrong", "val/confusion_threshold", "train/knowledge_loss",
              "train/tool_loss", "val/tool_loss", "val/tool_accuracy", "val/tool_accuracy_memory",
              "val/auroc_knowledge"}  # fmt: skip
    assert wanted <= set(last)
    config = json.loads((finished / "config.json").read_text())
    assert config["data"]["synthetic"] is True
    counts = config["data"]["confusion"]
    assert counts.pop("clear") == 60
    assert counts.keys() == set(MADE_KINDS)
    assert sum(counts.values()) == 60
    assert counts.pop("degraded") == 6 + 7  # captions and questions
    assert set(counts.values()) == {6, 7}
    assert config["model"]["recursion"]["tools"] == ["calculator", "dictionary", "memory"]
    checkpoint = load_checkpoint(finished / "phase3_best.pt", phase=3)
    assert checkpoint.data.answers == ["red", "blue"]
    assert checkpoint.data.earlier is not None
    assert checkpoint.data.earlier.source == "scenes"


def test_it_learns_on_real_states(finished: Path) -> None:
    """Even an untrained model is in another state without an image, and its head can be steered."""
    last = {key: value for line in read_metrics(finished / "metrics.jsonl") for key, value in line.items()}
    assert last["val/auroc_imageless"] > 0.9
    assert last["val/retrieved_after"] > last["val/retrieved_before"] + 0.25
    assert last["val/retrieved_wrong"] < last["val/retrieved_after"] - 0.1
    assert last["val/memory_found"] > 0.3  # of about 40 texts


def test_only_the_recursion_has_moved(phase2: Path, finished: Path) -> None:
    before, after = weights(phase2), weights(finished / "phase3_last.pt")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = {name for name in after if name not in before}
    assert {name.split(".")[0] for name in new} == {"recursion"}
    torch.manual_seed(0)
    assert after["recursion.injector.projection.weight"].any()


def test_threshold_and_temperature_are_in_the_checkpoint_and_in_the_export(finished: Path) -> None:
    checkpoint = load_checkpoint(finished / "phase3_best.pt", phase=3)
    probe = {name.rpartition(".")[2]: value for name, value in checkpoint.model.items() if "confusion_probe" in name}
    assert float(probe["threshold"]) == pytest.approx(checkpoint.metrics["val/confusion_threshold"])
    assert float(probe["temperature"]) == pytest.approx(checkpoint.metrics["val/confusion_temperature"])
    assert float(probe["temperature"]) != 1
    with safe_open(finished / "recursion.safetensors", framework="pt") as file:
        assert file.metadata()["component"] == "recursion"
        assert file.metadata()["phase"] == "3"
        exported = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    recursion = {name: value for name, value in checkpoint.model.items() if name.startswith("recursion.")}
    assert len(exported) == len(recursion)
    for name in ("recursion.confusion_probe.linear.weight", "recursion.injector.projection.weight"):
        assert torch.equal(exported[name], recursion[name])


def test_the_memory_floor_separates_right_lookups_from_wrong_ones(finished: Path) -> None:
    """By a memory that is looked up text by text, of the samples as the model sees them; and it travels."""
    checkpoint = load_checkpoint(finished / "phase3_best.pt", phase=3)
    model = Mamba3Jepa.from_loaded(checkpoint, "test")
    assert model.recursion is not None
    retriever = model.recursion.retriever
    assert retriever is not None
    scenes = SceneSource("val", n_scenes=12, image_size=32)
    source = ConfusionSource(scenes, range(len(scenes)), query_prompt=model.config.query_prompt)
    samples = [source.sample(i) for i in range(len(source))]
    lessons = Lessons.about(model, source, range(len(source)))
    told = [{str(each.knowledge) for each in source.lessons(i)
             if each.form in ("sentence", "false") and each.knowledge != each.answer}
            if sample.question is not None else set() for i, sample in enumerate(samples)]  # fmt: skip
    memory = KnowledgeMemory.build(model, sorted(set().union(*told)))
    tells = {str(each.knowledge): each.answers for i in range(len(samples)) for each in source.lessons(i)}
    assert len(memory) < MEMORY_TEXTS
    keys = dict(zip(memory.texts, retriever.text(memory.embeddings), strict=True))
    own = Findable(lessons).right(torch.arange(len(samples)), 0)
    right, wrong = [], []
    for i, sample in enumerate(samples):
        if not sample.confused or not told[i]:
            continue
        same = [k for k, other in enumerate(samples) if other.meta.get("plain") == sample.meta.get("plain")]
        answers = set().union(*(told[k] for k in same if samples[k].question is not None))
        answers |= {text for text in memory.texts if sample.meta.get("plain") in tells.get(text, ())}
        asked = retriever.question(model.embed_text([str(sample.question)]))[0]
        mine = float((asked @ keys[lessons.texts[own[i]]]).detach())
        others = [float((asked @ key).detach()) for text, key in keys.items() if text not in answers]
        if mine > max(others):
            right.append(mine)
        wrong.append(max(others))
    assert checkpoint.metrics["val/memory_right_lookups"] == len(right) > 0
    assert checkpoint.metrics["val/memory_wrong_lookups"] == len(wrong)
    assert checkpoint.metrics["val/memory_found"] == len(right) / len(wrong)
    floor = checkpoint.metrics["val/memory_floor"]
    assert floor == float(checkpoint.model["recursion.memory_floor"])
    passed, stopped = (np.array(right) >= floor).mean(), (np.array(wrong) < floor).mean()
    assert checkpoint.metrics["val/memory_right_passed"] == pytest.approx(passed, abs=0.02)
    assert checkpoint.metrics["val/memory_wrong_stopped"] == pytest.approx(stopped, abs=0.02)
    best = max((np.array(right) >= f).mean() + (np.array(wrong) < f).mean() for f in (-1, *right, *wrong))
    assert passed + stopped == pytest.approx(best, abs=0.04)
    with safe_open(finished / "recursion.safetensors", framework="pt") as file:
        assert float(file.get_tensor("recursion.memory_floor")) == floor


@pytest.mark.parametrize("retriever_dim", [0, 8])
def test_knowledge_texts_make_the_memory_and_vectors_do_not(phase2: Path, tmp_path: Path, retriever_dim: int) -> None:
    model = model_with_recursion(phase2, retriever_dim=retriever_dim)
    for name, knowledge, n_lookups in (
        ("texts", ["a red thing", "a blue thing", None], 4),
        ("one text", ["all there is to know"], 0),
        ("vectors", [[0.5] * 32, [0.25] * 32], 0),
    ):
        source = ConfusionSource(ManifestSource(write_manifest(tmp_path / name, knowledge)), range(12), made_kinds=[])
        data = phase3_data(model, source, np.arange(12), cache_dir=None)
        task = Phase3Task(model, data, data, Phase3Settings(batch_size=4), DataRecord())
        metrics = task.validate(torch.device("cpu")).metrics
        assert metrics["val/memory_wrong_lookups"] == n_lookups, name
        assert model.recursion is not None
        assert float(model.recursion.memory_floor) == metrics["val/memory_floor"]
        if name == "vectors":  # nothing was learned about looking up texts
            assert metrics["val/memory_floor"] == (SHUT if retriever_dim else NO_FLOOR)


def test_stopped_and_resumed_gives_the_same_bits(
    phase2: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Stopped in the middle of an epoch. The frozen outputs are there already, and the phase 2 checkpoint is not needed
    any more."""
    own = Path(shutil.copy(phase2, tmp_path / "phase2_best.pt"))
    settings = ["--cache-dir", str(finished.parent / "frozen_outputs"), "--phase2-checkpoint"]
    make, made = Phase3Task.batch, []

    def stopping(data, rows, epoch):  # type: ignore[no-untyped-def]
        made.append(rows)
        if len(made) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(data, rows, epoch)

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(frozen._Pass, "_compute", never)
    with monkeypatch.context() as patch:
        patch.setattr(Phase3Task, "batch", staticmethod(stopping))
        assert train_again(tmp_path / "run", *settings, str(own)) == 128 + signal.SIGTERM
    stopped = load_checkpoint(tmp_path / "run" / "phase3_last.pt").trainer
    assert stopped is not None
    assert (stopped["position"]["step"], stopped["position"]["batch"]) == (5, 1)
    own.unlink()
    # the flag names another model than before: that is another run; a copy elsewhere is not
    checkpoint = load_checkpoint(phase2)
    checkpoint.model["predictor.pred_head.bias"] += 1
    other = tmp_path / "other.pt"
    save_checkpoint(other, checkpoint)
    assert train_again(tmp_path / "run", *settings, str(other), "--resume") == 2
    assert "--phase2-checkpoint" in capfd.readouterr().err
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert train_again(tmp_path / "copy", *settings, str(phase2), "--resume") == 0
    assert train_again(tmp_path / "run", *settings, str(own), "--resume") == 0
    expected = weights(finished / "phase3_last.pt")
    for folder in ("run", "copy"):
        found = weights(tmp_path / folder / "phase3_last.pt")
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def train_again(output_dir: Path, *arguments: str) -> int:
    return main(["train-agent", "--output-dir", str(output_dir), *changed(SHORT, arguments)])


def test_only_a_phase_2_checkpoint_will_do(
    phase2: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    checkpoint = load_checkpoint(phase2)
    save_checkpoint(tmp_path / "phase1.pt", replace(checkpoint, phase=1))
    mini = replace(checkpoint, config=checkpoint.config.replace(preset="mini"))
    save_checkpoint(tmp_path / "mini.pt", mini)
    for path, message in (
        (tmp_path / "phase1.pt", r"train phase 2 on it first \(train_decoder\.py --phase1-checkpoint\)"),
        (finished / "phase3_best.pt", "phase 3 checkpoint.*--resume"),
        (tmp_path / "nowhere.pt", "train phase 2 first"),
        (tmp_path / "mini.pt", "--tiny: .* is a mini model"),
    ):
        assert train(path, tmp_path / "run") == 2
        error = " ".join(capfd.readouterr().err.split())
        assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--knowledge-dim", "0"], "--knowledge-dim 0"),
        (["--injection-weight", "-1"], "--injection-weight -1"),
        (["--batch-size", "4000"], "larger than the 120 samples"),
        (["--confusion-kinds", "sleepy"], "sleepy"),
        (["--knowledge-dim", "5"], "has no knowledge vectors"),
    ],
)
def test_bad_arguments(
    phase2: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    try:
        code = train(phase2, tmp_path / "run", "--cache-dir", str(finished.parent / "frozen_outputs"), *arguments)
    except SystemExit as error:  # the command line's own errors
        code = int(error.code or 0)
    assert code == 2
    captured = capfd.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
    assert "Traceback" not in captured.err


def test_settings_and_data_name_the_same_kinds() -> None:
    assert set(ConfusionKind.__args__) == set(MADE_KINDS)  # type: ignore[attr-defined]


def test_defaults_follow_the_preset() -> None:
    small = Phase3Settings().resolved("small")
    assert (small.epochs, small.batch_size, small.lr) == (10, 16, 5e-5)
    assert small.cache_dir == Path("checkpoints/frozen_outputs")
    assert Phase3Settings(lr=1.0).resolved("mini").lr == 1.0
