"""Confused samples: what is made of the data, and that it contradicts nothing there."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamba3_jepa.data.confusion import ConfusionSource
from mamba3_jepa.data.confusion_plan import CONFUSION_KINDS, MADE_KINDS
from mamba3_jepa.data.corruption import CORRUPTIONS, corrupt, degrade
from mamba3_jepa.data.files import FolderSource, ManifestSource
from mamba3_jepa.data.sample import FileBacked, Sample
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.errors import UserError


@pytest.fixture(scope="module")
def scenes() -> SceneSource:
    return SceneSource("train", n_scenes=60, image_size=32)


def kinds_of(source: ConfusionSource) -> list[str]:
    return [CONFUSION_KINDS[kind] for kind in source.kinds.tolist()]


def test_scenes_give_as_many_clear_as_confused_and_each_kind_alike(scenes: SceneSource) -> None:
    source = ConfusionSource(scenes, range(len(scenes)))
    # 120 questions and 60 captions: every question twice, every caption once
    shares = Counter(kinds_of(source))
    assert shares.pop("clear") == 150
    assert shares.keys() == set(MADE_KINDS)
    assert shares.pop("degraded") == 15 + 17  # captions, and as many questions as of every kind
    assert set(shares.values()) == {16, 17}
    for i, kind in enumerate(kinds_of(source)):
        sample = source.sample(i)
        assert sample.meta["kind"] == kind
        assert sample.confused == bool(source.confused[i]) == (kind not in ("clear", "degraded", "shuffled"))
        assert (sample.target is None) == (kind in ("unanswerable", "foreign"))
        assert (sample.image is None) == (kind == "imageless") or kind == "tool"
        remembered = kind in ("mismatched", "unanswerable", "imageless")
        assert (sample.tool_used == "memory") == remembered
        assert (sample.tool_used in ("calculator", "dictionary")) == (kind == "tool")
    assert source.tools == ["calculator", "dictionary", "memory"]
    assert ConfusionSource(scenes, range(30), made_kinds=["tool"]).tools == ["calculator", "dictionary"]
    assert ConfusionSource(scenes, range(30), made_kinds=["foreign"]).tools == []
    corrupted = [source.sample(i) for i, kind in enumerate(kinds_of(source)) if kind == "corrupted"]
    assert {sample.question is None for sample in corrupted} == {True, False}
    assert {sample.meta["corruption"] for sample in corrupted} == set(CORRUPTIONS)


@pytest.mark.parametrize("kind", ["corrupted", "degraded"])
def test_a_spoilt_sample_keeps_its_answer_but_not_its_picture(scenes: SceneSource, kind: str) -> None:
    source = ConfusionSource(scenes, range(len(scenes)))
    originals = {(s.question, s.target, s.meta["scene"]) for s in (scenes.sample(i) for i in range(len(scenes)))}
    for i in np.flatnonzero(source.kinds == CONFUSION_KINDS.index(kind)):
        sample = source.sample(int(i))
        assert (sample.question, sample.target, sample.meta["scene"]) in originals


def test_a_shuffled_question_keeps_its_words_picture_and_answer(scenes: SceneSource) -> None:
    source = ConfusionSource(scenes, range(len(scenes)))
    originals = {(s.meta["scene"], s.target): set() for s in (scenes.sample(i) for i in range(len(scenes)))}
    for sample in map(scenes.sample, range(len(scenes))):
        originals[sample.meta["scene"], sample.target].add(" ".join(sorted((sample.question or "").split())))
    rows = np.flatnonzero(source.kinds == CONFUSION_KINDS.index("shuffled")).tolist()
    changed = 0
    for sample in map(source.sample, rows):
        assert " ".join(sorted(sample.question.split())) in originals[sample.meta["scene"], sample.target]
        changed += sample.question not in {scenes.sample(i).question for i in range(len(scenes))}
    assert changed > 0.8 * len(rows) > 0


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
        assert (None if a.image is None else a.image().tobytes()) == (None if b.image is None else b.image().tobytes())
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
    # 20 questions and one labelled as not confused are made confusing; 5 of 10 captions are spoilt
    assert {kind: len(samples) for kind, samples in by_kind.items()} == {
        "clear": 25, "given": 4, "mismatched": 4, "unanswerable": 0, "corrupted": 4, "imageless": 4, "foreign": 4,
        "degraded": 6, "shuffled": 4, "tool": 0,
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
    for sample in by_kind["imageless"]:
        assert sample.image is None
        assert sample.target is not None
    for sample in by_kind["foreign"]:
        assert sample.question not in answers
        assert sample.target is None
    certain = ("mismatched", "corrupted", "imageless", "foreign")
    assert all(sample.confused for kind in certain for sample in by_kind[kind])
    assert not any(sample.confused for kind in ("clear", "degraded", "shuffled") for sample in by_kind[kind])


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
    counts = Counter(kinds_of(ConfusionSource(manifest, range(30), made_kinds=["imageless"])))
    assert counts == {"clear": 30, "imageless": 20}
    counts = Counter(kinds_of(ConfusionSource(manifest, range(30), made_kinds=["corrupted", "mismatched"])))
    assert set(counts) == {"clear", "corrupted", "mismatched"}
    assert Counter(kinds_of(ConfusionSource(manifest, range(30), made_kinds=[]))) == {"clear": 30}
    alone = Counter(kinds_of(ConfusionSource(manifest, range(3))))  # one image: no other one to show instead
    assert "mismatched" not in alone
    assert alone.total() - alone["clear"] == 2


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
        if kind in ("mismatched", "imageless"):
            shown = None if sample.image is None else sample.image().getpixel((0, 0))[0]
            if (plain(sample.question), shown) in answered:
                found.append(f"{kind}: {sample.question} {shown}")
    return found


def images_with_questions(n: int) -> list[dict]:
    return [{"image": f"images/{i}.png", "question": f"Is this number {i}?", "answer": "yes"} for i in range(n)]


@pytest.mark.parametrize("made", [["mismatched", "imageless", "corrupted"], ["imageless"], ["mismatched"]])
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
    if made == ["imageless"]:  # all but those that the data answers without an image
        assert counts["imageless"] == n_questions - 12 * 3


def test_an_answer_without_image_that_is_labelled_as_confused_is_none(tmp_path: Path) -> None:
    """Nor is a request of which the data says nothing."""
    lines = images_with_questions(4)
    lines += [{"image": None, "query": "is this number 0?", "answer": "yes", "confused": True}]
    lines += [{"image": None, "query": "is this number 1?"}]
    view = ConfusionSource(write_lines(tmp_path / "data", lines), range(len(lines)), made_kinds=["imageless"])
    assert Counter(kinds_of(view)) == {"clear": 4, "imageless": 4, "given": 1}


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
        view = ConfusionSource(source, range(4), seed, ["mismatched", "imageless"], beside=[other, source])
        assert contradictions(view, lines + other_lines) == []
        assert {view.sample(i).meta["origin"].split()[-1] for i in range(len(view))} <= {"1", "2", "3", "4"}
        beside += sum(view.kinds > 1)
        view = ConfusionSource(source, range(4), seed, ["mismatched", "imageless"])
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


def test_captions_alone_are_clear_or_spoilt(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    source = FolderSource(tmp_path)
    assert Counter(kinds_of(ConfusionSource(source, range(6)))) == {"clear": 3, "corrupted": 2, "degraded": 1}
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


def test_an_image_is_degraded_step_by_step(scenes: SceneSource) -> None:
    load = scenes.sample(0).image
    assert load is not None
    original = np.asarray(load(), dtype=float)
    for seed in range(10):
        changes = [
            np.abs(np.asarray(degrade(load(), level, seed), float) - original).mean() for level in (0.02, 0.4, 1)
        ]
        assert changes == sorted(changes)
        assert changes[0] < 6
        assert changes[2] > 4
        assert degrade(load(), 0.4, seed).tobytes() == degrade(load(), 0.4, seed).tobytes()
    assert max(degrade(Image.new("RGB", (1300, 40)), 0.5, 1).size) <= 512
    assert all(degrade(Image.new("L", (1, 1)), level, seed).size == (1, 1) for level in (0, 1) for seed in range(20))
