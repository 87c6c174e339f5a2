"""Confusion: what is made of the data, how it is measured, and what injection is compared with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from mamba3_jepa.data.confusion import CONFUSION_KINDS, ConfusionSource
from mamba3_jepa.data.corruption import CORRUPTIONS, corrupt
from mamba3_jepa.data.files import FolderSource, ManifestSource
from mamba3_jepa.data.sample import FileBacked, Sample
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.confusion import (
    auroc,
    calibrate,
    choose_threshold,
    evaluate_confusion,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from mamba3_jepa.evaluation.confusion_plots import plot_confusion, plot_injection
from mamba3_jepa.evaluation.injection import InjectionSamples, InjectionTrial, gallery, other_knowledge
from mamba3_jepa.models.vljepa import Mamba3Jepa

# --- the samples ---


@pytest.fixture(scope="module")
def scenes() -> SceneSource:
    return SceneSource("train", n_scenes=60, image_size=32)


def kinds_of(source: ConfusionSource) -> list[str]:
    return [CONFUSION_KINDS[kind] for kind in source.kinds.tolist()]


def test_scenes_give_as_many_clear_as_confused_and_each_kind_alike(scenes: SceneSource) -> None:
    source = ConfusionSource(scenes, range(len(scenes)))
    # 120 questions and 60 captions: every question twice, every caption once
    assert Counter(kinds_of(source)) == {"clear": 150, "mismatched": 50, "unanswerable": 50, "corrupted": 50}
    for i, kind in enumerate(kinds_of(source)):
        sample = source.sample(i)
        assert sample.meta["kind"] == kind
        assert sample.confused == bool(source.confused[i]) == (kind != "clear")
        assert (sample.target is None) == (kind == "unanswerable")
        assert sample.image is not None
    corrupted = [source.sample(i) for i, kind in enumerate(kinds_of(source)) if kind == "corrupted"]
    assert {sample.question is None for sample in corrupted} == {True, False}
    assert {sample.meta["corruption"] for sample in corrupted} == set(CORRUPTIONS)


def test_a_corrupted_sample_keeps_its_answer_but_not_its_picture(scenes: SceneSource) -> None:
    source = ConfusionSource(scenes, range(len(scenes)))
    originals = {(s.question, s.target, s.meta["scene"]) for s in (scenes.sample(i) for i in range(len(scenes)))}
    for i in np.flatnonzero(source.kinds == CONFUSION_KINDS.index("corrupted")):
        sample = source.sample(int(i))
        assert (sample.question, sample.target, sample.meta["scene"]) in originals


def test_everything_follows_from_seed_and_index(scenes: SceneSource) -> None:
    source = ConfusionSource(scenes, range(len(scenes)), seed=3)
    copy = pickle.loads(pickle.dumps(source))
    again = ConfusionSource(scenes, np.arange(len(scenes))[::-1], seed=3)
    other = ConfusionSource(scenes, range(len(scenes)), seed=4)
    assert copy.fingerprint == again.fingerprint == source.fingerprint != other.fingerprint
    assert ConfusionSource(scenes, range(90), seed=3).fingerprint != source.fingerprint
    for i in range(0, len(source), 7):
        a, b = source.sample(i), copy.sample(i)
        assert (a.question, a.target, a.confused, a.meta) == (b.question, b.target, b.confused, b.meta)
        assert a.image is not None
        assert b.image is not None
        assert a.image().tobytes() == b.image().tobytes()
    assert kinds_of(other) != kinds_of(source)


@pytest.fixture
def manifest(tmp_path: Path) -> ManifestSource:
    """Ten images with a question that all share, one of their own, and a caption; and labelled requests."""
    (tmp_path / "images").mkdir()
    lines: list[dict] = []
    for i in range(10):
        image = f"images/{i}.png"
        Image.new("RGB", (20, 16), (25 * i, 100, 255 - 25 * i)).save(tmp_path / image)
        lines.append({"image": image, "question": "what is shown?", "answer": f"picture {i}"})
        lines.append({"image": image, "question": f"is this number {i}?", "answer": "yes", "knowledge": "it is"})
        lines.append({"image": image, "text": f"the picture {i}"})
    lines.append({"image": None, "query": "hello", "confused": False, "tool_used": None})
    lines.append({"image": None, "query": "what is the weather?", "confused": True, "answer": "sunny"})
    lines.append({"image": "images/0.png", "question": "what is behind it?", "confused": True})
    lines.append({"image": "images/1.png", "question": "which number?", "answer": "one", "confused": False})
    lines.append({"image": None, "query": "thanks"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ManifestSource(tmp_path)


def test_a_manifest_gives_every_kind(manifest: ManifestSource) -> None:
    source = ConfusionSource(manifest, range(len(manifest)))
    by_kind: dict[str, list] = {kind: [] for kind in CONFUSION_KINDS}
    for i, kind in enumerate(kinds_of(source)):
        by_kind[kind].append(source.sample(i))
    # 20 questions and one labelled as not confused are made confusing; 5 of 10 captions are corrupted
    assert {kind: len(samples) for kind, samples in by_kind.items()} == {
        "clear": 25, "given": 4, "mismatched": 9, "unanswerable": 8, "corrupted": 9
    }  # fmt: skip
    given = {sample.question: (sample.confused, sample.target) for sample in by_kind["given"]}
    assert given == {
        "hello": (False, None), "what is the weather?": (True, "sunny"), "what is behind it?": (True, None),
        "which number?": (False, "one"),
    }  # fmt: skip
    answers = {manifest.sample(i).question: manifest.sample(i).target for i in range(len(manifest))}
    asked = {(sample.question, sample.meta["image"]) for sample in (manifest.sample(i) for i in range(30))}
    for sample in by_kind["mismatched"]:
        assert sample.question != "what is shown?"  # every image is asked that: none is the wrong one
        assert sample.target == answers[sample.question]
        assert sample.image is not None
        shown = round(sample.image().getpixel((0, 0))[0] / 25)
        assert (sample.question, f"images/{shown}.png") not in asked
    for sample in by_kind["unanswerable"]:
        assert sample.image is None
        assert sample.target is not None
    assert all(sample.confused for kind in ("mismatched", "unanswerable", "corrupted") for sample in by_kind[kind])
    assert not any(sample.confused for sample in by_kind["clear"])


def test_indices_by_kind_agree_with_the_samples(manifest: ManifestSource) -> None:
    def labelled(sample: Sample) -> bool:
        return sample.meta["kind"] == "given" and bool(sample.confused)

    for source in (
        ConfusionSource(manifest, range(len(manifest))),
        ConfusionSource(SceneSource("val", n_scenes=6), range(18)),
    ):
        samples = [source.sample(i) for i in range(len(source))]
        expected = {
            "all": [True] * len(samples),
            "target": [s.target is not None and not labelled(s) for s in samples],
            "caption": [s.question is None for s in samples],
            "question": [s.question is not None and s.target is not None and not labelled(s) for s in samples],
            "confused": [s.confused is not None for s in samples],
            "confusing": [s.confused for s in samples],
            "knowledge": [s.knowledge is not None for s in samples],
        }
        for kind, chosen in expected.items():
            assert source.indices(kind).tolist() == np.flatnonzero(chosen).tolist(), kind  # type: ignore[arg-type]
        assert len(source.group_hashes()) == len(source)


def test_one_side_of_a_split_sees_nothing_of_the_other(manifest: ManifestSource) -> None:
    source = ConfusionSource(manifest, range(12))
    assert {source.group(i) for i in range(len(source))} == {f"images/{i}.png" for i in range(4)}
    for i, kind in enumerate(kinds_of(source)):
        image = source.sample(i).image
        if kind == "mismatched":
            assert image is not None
            assert image().getpixel((0, 0))[0] <= 75


def test_a_replaced_image_is_noticed_where_it_was_borrowed_too(manifest: ManifestSource, tmp_path: Path) -> None:
    source = ConfusionSource(manifest, range(len(manifest)))
    assert isinstance(source, FileBacked)
    (row, *_) = np.flatnonzero(source.kinds == CONFUSION_KINDS.index("mismatched"))
    borrowed = tmp_path / manifest.group(int(source._donor[row]))
    assert borrowed.name not in source.group(int(row))
    before, everything = source.file_state(np.array([row])), source.file_state(np.arange(len(source)))
    os.utime(borrowed, ns=(1, 1))
    assert source.file_state(np.array([row])) != before
    assert source.file_state(np.arange(len(source))) != everything


def test_only_the_kinds_asked_for_are_made(manifest: ManifestSource) -> None:
    counts = Counter(kinds_of(ConfusionSource(manifest, range(30), made_kinds=["unanswerable"])))
    assert counts == {"clear": 30, "unanswerable": 20}
    counts = Counter(kinds_of(ConfusionSource(manifest, range(30), made_kinds=["corrupted", "mismatched"])))
    assert set(counts) == {"clear", "corrupted", "mismatched"}
    assert Counter(kinds_of(ConfusionSource(manifest, range(30), made_kinds=[]))) == {"clear": 30}
    alone = Counter(kinds_of(ConfusionSource(manifest, range(3))))  # one image: no other one to show instead
    assert "mismatched" not in alone
    assert alone["unanswerable"] + alone["corrupted"] == 2


def write_lines(folder: Path, lines: list[dict], name: str = "manifest.jsonl") -> ManifestSource:
    """Lines about images whose number is the red of their pixels."""
    folder.mkdir(exist_ok=True)
    for line in lines:
        if line["image"] is not None:
            number = int(Path(line["image"]).stem)
            path = folder / line["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), (number, 9, 9)).save(path)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ManifestSource(folder, name)


def contradictions(made: ConfusionSource, lines: list[dict]) -> list[str]:
    """Made samples that call confused what a line of the data asks of the same image, or answers without one."""

    def plain(question: str | None) -> str:
        return " ".join((question or "Describe the image.").split()).lower()

    answered = {
        (
            plain(line.get("question", line.get("query"))),
            None if line["image"] is None else int(Path(line["image"]).stem),
        )
        for line in lines
        if line["image"] is not None or (line.get("confused") is not True and len(line) > 2)
    }
    found = []
    for i, kind in enumerate(kinds_of(made)):
        sample = made.sample(i)
        if kind in ("mismatched", "unanswerable"):
            shown = None if sample.image is None else sample.image().getpixel((0, 0))[0]
            if (plain(sample.question), shown) in answered:
                found.append(f"{kind}: {sample.question} {shown}")
    return found


def images_with_questions(n: int) -> list[dict]:
    return [{"image": f"images/{i}.png", "question": f"Is this number {i}?", "answer": "yes"} for i in range(n)]


@pytest.mark.parametrize("made", [["mismatched", "unanswerable", "corrupted"], ["unanswerable"], ["mismatched"]])
def test_nothing_made_contradicts_the_data(tmp_path: Path, made: list) -> None:
    """Questions in other letters, images asked the prompt by a caption, paths written in two ways, duplicates."""
    lines = images_with_questions(8)
    lines += [{"image": f"images/{i}.png", "question": "How many corners has a square?", "answer": "4"} for i in (0, 1)]
    lines += [{"image": None, "query": "  how many corners has  a SQUARE?", "answer": "four"}]
    lines += [{"image": "images/2.png", "question": "Who are you?", "answer": "a model"}]
    lines += [{"image": None, "query": "who are you?", "confused": False}]
    lines += [{"image": f"images/./{i}.png", "question": "IS THIS NUMBER 0?", "answer": "no"} for i in range(1, 6)]
    lines += [{"image": "images/6.png", "question": "describe the  image.", "answer": "six"}]
    lines += [{"image": f"images/{i}.png", "text": f"the number {i}"} for i in (0, 1, 2, 3, 7)]
    lines += lines[:3]
    source = write_lines(tmp_path / "data", lines)
    counts: Counter[str] = Counter()
    for seed in range(12):
        view = ConfusionSource(source, range(len(source)), seed, made)
        assert contradictions(view, lines) == []
        counts.update(kinds_of(view))
    assert all(counts[kind] for kind in made)
    n_questions = 12 * sum("question" in line for line in lines)
    if made == ["unanswerable"]:  # all but those that the data answers without an image
        assert counts["unanswerable"] == n_questions - 12 * 3


def test_an_answer_without_image_that_is_labelled_as_confused_is_none(tmp_path: Path) -> None:
    """Nor is a request of which the data says nothing."""
    lines = images_with_questions(4)
    lines += [{"image": None, "query": "is this number 0?", "answer": "yes", "confused": True}]
    lines += [{"image": None, "query": "is this number 1?"}]
    view = ConfusionSource(write_lines(tmp_path / "data", lines), range(len(lines)), made_kinds=["unanswerable"])
    assert Counter(kinds_of(view)) == {"clear": 4, "unanswerable": 4, "given": 1}


def test_nothing_made_contradicts_what_is_not_used_itself(tmp_path: Path) -> None:
    """The rest of the same images, the other side of the split, and the other file of a val.jsonl."""
    lines = images_with_questions(4)
    lines += [{"image": f"images/{i}.png", "question": "Is this number 0?", "answer": "no"} for i in (1, 2)]
    lines += [{"image": None, "query": "is this number 1?", "answer": "no"}]
    source = write_lines(tmp_path / "data", lines)
    other_lines = [
        {"image": None, "query": "IS THIS NUMBER 2?", "answer": "no"},
        {"image": "images/3.png", "question": "is this number 0?", "answer": "no"},
        {"image": "images/0.png", "question": "is this number 3?", "answer": "no"},
    ]
    other = write_lines(tmp_path / "data", other_lines, "val.jsonl")
    beside, alone = 0, 0
    for seed in range(20):
        view = ConfusionSource(source, range(4), seed, ["mismatched", "unanswerable"], beside=[other, source])
        assert contradictions(view, lines + other_lines) == []
        assert {view.sample(i).meta["origin"].split()[-1] for i in range(len(view))} <= {"1", "2", "3", "4"}
        beside += sum(view.kinds > 1)
        view = ConfusionSource(source, range(4), seed, ["mismatched", "unanswerable"])
        assert contradictions(view, lines) == []
        alone += len(contradictions(view, other_lines))
    assert beside > 40
    assert alone > 0, "the other file is not known of unless it is given"


def test_the_query_prompt_of_a_model_is_what_its_captions_ask(tmp_path: Path) -> None:
    lines = [{"image": "images/0.png", "question": "What is it?", "answer": "0"}]
    lines += [{"image": f"images/{i}.png", "text": f"number {i}"} for i in range(1, 4)]
    source = write_lines(tmp_path / "data", lines)
    for prompt, n_mismatched in (("Describe the image.", 1), ("what is it?", 0)):
        view = ConfusionSource(source, range(4), made_kinds=["mismatched"], query_prompt=prompt)
        assert kinds_of(view).count("mismatched") == n_mismatched


def test_captions_alone_are_clear_or_corrupted(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    source = FolderSource(tmp_path)
    assert Counter(kinds_of(ConfusionSource(source, range(6)))) == {"clear": 3, "corrupted": 3}
    with pytest.raises(UserError, match="no sample has"):
        ConfusionSource(source, [])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_nothing_is_left_to_recognise(kind: str, scenes: SceneSource) -> None:
    similar = []
    for seed in range(12):
        image = SceneSource("train", n_scenes=12, image_size=64).sample(3 * seed).image
        assert image is not None
        original = image()
        broken = corrupt(original, kind, seed)
        assert broken.size == original.size
        assert broken.tobytes() == corrupt(original, kind, seed).tobytes()
        a, b = (np.asarray(each, dtype=float).ravel() for each in (original, broken))
        similar.append(0.0 if b.std() == 0 else abs(np.corrcoef(a - a.mean(), b - b.mean())[0, 1]))
    assert np.mean(similar) < 0.5
    assert corrupt(Image.new("L", (1, 1)), kind, 0).mode == "RGB"
    assert max(corrupt(Image.new("RGB", (1300, 40)), kind, 0).size) <= 512


# --- the numbers ---


@pytest.fixture
def scored() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits twice as far out as they should be, and labels."""
    dice = np.random.default_rng(0)
    true = dice.normal(0, 2, 3000)
    labels = dice.random(3000) < 1 / (1 + np.exp(-true))
    return torch.tensor(2 * true, dtype=torch.float32), torch.tensor(labels)


def test_auroc_counts_pairs(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = (each[:200] for each in scored)
    logits = (logits * 2).round() / 2  # with ties
    pairs = [(a, b) for a in logits[labels].tolist() for b in logits[~labels].tolist()]
    expected = sum(a > b for a, b in pairs) + 0.5 * sum(a == b for a, b in pairs)
    assert auroc(logits, labels) == pytest.approx(expected / len(pairs))
    assert auroc(logits + 200, labels) == pytest.approx(expected / len(pairs))  # far where sigmoid is 1


def test_temperature_minimises_the_nll(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = scored

    def nll(temperature: float) -> float:
        p = torch.sigmoid(logits.double() / temperature)
        return float(-torch.where(labels, p, 1 - p).log().mean())

    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(2, rel=0.1)
    assert nll(fitted) <= min(nll(float(t)) for t in np.linspace(0.5, 5, 500)) + 1e-9
    assert fit_temperature(torch.tensor([-1.0, 1.0]), torch.tensor([False, True])) == pytest.approx(0.05)
    assert fit_temperature(torch.tensor([-1.0, 1.0]), torch.tensor([True, False])) == pytest.approx(20)


def test_the_threshold_has_the_best_balanced_accuracy(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = scored
    scores = torch.sigmoid(logits)[:300]
    labels = labels[:300]

    def balanced(threshold: float) -> float:
        noticed = scores > threshold
        return float(noticed[labels].double().mean() + (~noticed[~labels]).double().mean()) / 2

    chosen = choose_threshold(scores, labels)
    values = sorted(scores.tolist())
    best = max(balanced((a + b) / 2) for a, b in itertools.pairwise(values))
    assert balanced(chosen) == pytest.approx(best)
    separable = choose_threshold(torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([False, False, True, True]))
    assert separable == pytest.approx(0.5)
    assert choose_threshold(torch.tensor([0.3, 0.3]), torch.tensor([False, True])) == 0.5


def test_calibration_error_is_the_gap_of_the_bins(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = scored
    scores = torch.sigmoid(logits)
    bins = reliability_bins(scores, labels)
    assert sum(each.count for each in bins) == len(labels)
    gap = sum(each.count * abs(each.score - each.confused) for each in bins) / len(labels)
    assert expected_calibration_error(scores, labels) == pytest.approx(gap, abs=1e-5)
    for edge, each in zip(range(15), bins, strict=True):
        inside = (scores >= edge / 15) & (scores < (edge + 1) / 15)
        assert each.count == int(inside.sum())
        assert each.confused == pytest.approx(float(labels[inside].double().mean()))


def test_calibration_is_measured_where_it_was_not_fitted(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = scored
    kinds = ["mismatched" if label else "clear" for label in labels.tolist()]
    report = evaluate_confusion(logits, labels, kinds, ["what is it"] * len(kinds))
    assert report.calibration.temperature == pytest.approx(2, rel=0.2)
    assert report.ece is not None
    assert report.ece_uncalibrated is not None
    assert report.ece < 0.5 * report.ece_uncalibrated
    assert sum(each.count for each in report.reliability) == len(labels) // 2
    fitted = calibrate(logits, labels)
    assert report.calibration != fitted  # that is everything's


def test_each_kind_is_compared_with_what_is_like_it() -> None:
    rows = [
        # logit, confused, kind, question
        (0.0, False, "clear", None),
        (4.0, False, "clear", "is there a star?"),
        (1.0, False, "clear", "what color is it?"),
        (2.0, True, "mismatched", "what color is that?"),
        (0.5, True, "corrupted", None),
        (3.0, True, "corrupted", "is there a circle?"),
        (2.5, False, "given", "hello"),
        (9.0, True, "given", "who are you"),
    ]
    logits, confused, kinds, questions = zip(*rows, strict=True)
    report = evaluate_confusion(torch.tensor(logits), torch.tensor(confused), kinds, questions)
    aurocs = {kind: curve.auroc for kind, curve in report.rocs.items()}
    assert aurocs["mismatched"] == pytest.approx(1 / 3)  # against 4.0, 1.0 and 2.5, the questions
    assert report.auroc_alike["mismatched"] == 1.0  # against 1.0 alone
    assert aurocs["corrupted"] == pytest.approx((1 + 3) / 8)  # captions too
    assert aurocs["given"] == 1.0
    pairs = [(a, b) for a, ca, *_ in rows if ca for b, cb, *_ in rows if not cb]
    assert report.auroc == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    assert {name: len(scores) for name, scores in report.scores.items()} == {
        "clear": 3, "mismatched": 1, "corrupted": 2, "given_clear": 1, "given": 1
    }  # fmt: skip


def test_without_both_classes_nothing_is_claimed(tmp_path: Path) -> None:
    report = evaluate_confusion(torch.tensor([1.0, -1.0]), torch.tensor([False, False]), ["clear"] * 2, [None] * 2)
    assert report.metrics() == {"val/confusion_threshold": 0.5, "val/confusion_temperature": 1.0}
    assert [path.name for path in plot_confusion(report, tmp_path)] == ["confusion_histograms.png"]
    with pytest.raises(ValueError, match="logits"):
        evaluate_confusion(torch.empty(0), torch.empty(0, dtype=torch.bool), [], [])


# --- injection ---


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
