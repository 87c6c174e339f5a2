"""Synthetic scenes: captions, questions and pictures agree, and the splits keep their promises."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from mamba3_jepa.data.draw import _RGB, draw_scene
from mamba3_jepa.data.sample import Sample
from mamba3_jepa.data.scene_world import (
    ALL_PAIRS,
    COLORS,
    HELD_OUT_PAIRS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
)
from mamba3_jepa.data.scenes import SceneSource, SceneSplit, may_have_validated_on_test
from mamba3_jepa.errors import UserError

N = 400


@pytest.fixture(scope="module")
def train() -> SceneSource:
    return SceneSource(
        "train",
        n_scenes=N,
        kinds=("caption", "question", "unanswerable", "mismatched"),
        questions_per_scene=3,
    )


def _read_caption(caption: str) -> list[tuple[str, str, str, str]]:
    """(size, colour, shape, position) of each object, read from the caption's words alone."""
    objects = []
    for part in caption.replace(" and a ", ", a ").split(", "):
        words = part.split()
        assert words[0] == "a"
        assert words[4:6] == ["at", "the"]
        objects.append((words[1], words[2], words[3], " ".join(words[6:])))
    return objects


def _answer(question: str, objects: list[tuple[str, str, str, str]]) -> str | None:
    """Answers a question from a caption's objects; None if what it is about is not there exactly once."""
    words = question.rstrip("?").split()
    if question == "how many objects are there?":
        return {1: "one", 2: "two", 3: "three"}[len(objects)]
    if words[:2] == ["is", "there"]:
        assert words[2] == ("an" if words[3][0] in "aeiou" else "a")
        return "yes" if any(o[1:3] == tuple(words[3:5]) for o in objects) else "no"
    if question.startswith("what shape is at the "):
        found = [o[2] for o in objects if o[3] == " ".join(words[5:])]
    elif question.startswith("what color is the "):
        found = [o[1] for o in objects if o[2] == words[4]]
    elif question.startswith("what shape is the "):
        assert words[5] == "object"
        found = [o[2] for o in objects if o[1] == words[4]]
    else:
        assert question.startswith("what size is the ")
        found = [o[0] for o in objects if o[1:3] == tuple(words[4:6])]
    return found[0] if len(found) == 1 else None


def _plain(sample: Sample) -> str:
    """The sample's question in its first wording; test_scene_wording.py holds the others against it."""
    return str(sample.meta["plain"])


def test_questions_agree_with_the_caption(train: SceneSource) -> None:
    for index in range(N):
        samples = [train.sample(6 * index + slot) for slot in range(6)]
        caption = samples[0].target
        assert caption is not None
        objects = _read_caption(caption)
        assert [POSITIONS.index(o[3]) for o in objects] == sorted({POSITIONS.index(o[3]) for o in objects})
        assert samples[0].question is None
        assert len({_plain(s) for s in samples[1:4]}) == 3
        for sample in samples[1:4]:
            assert sample.target == _answer(_plain(sample), objects) is not None
            assert sample.confused is False
        for sample in samples[4:]:
            assert _answer(_plain(sample), objects) is None
            assert not _plain(sample).startswith(("how", "is there"))
            assert sample.confused is True
        assert samples[4].target is None


def test_answers_are_balanced(train: SceneSource) -> None:
    samples = [train.sample(int(i)) for i in train.indices("question")]
    answers = Counter(s.target for s in samples)
    assert 0.8 < answers["yes"] / answers["no"] < 1.25
    assert 0.8 < answers["large"] / answers["small"] < 1.25
    counts = Counter(len(_read_caption(train.scene(i).caption)) for i in range(N))
    assert counts[2] > counts[1] > 0
    assert counts[2] > counts[3] > 0
    assert {s for a in answers for s in (a,) if s in COLORS} == set(COLORS)
    assert {s for a in answers for s in (a,) if s in SHAPES} == set(SHAPES)


def test_mismatched_questions_belong_to_other_scenes(train: SceneSource) -> None:
    questions = {train.sample(6 * i + 4).question for i in range(N)}
    mismatched = {train.sample(6 * i + 5).question for i in range(N)}
    assert len(mismatched) > 30
    assert mismatched != questions


def test_the_answer_of_a_mismatched_question_is_right_where_it_comes_from(train: SceneSource) -> None:
    """Some other scene gives that answer to that question; whether any does is looked up in all of them."""
    known = {(q, _answer(q, objects)) for objects in (_read_caption(train.scene(i).caption) for i in range(N))
             for q in {_plain(train.sample(6 * i + 5)) for i in range(40)}}  # fmt: skip
    for i in range(40):
        sample = train.sample(6 * i + 5)
        assert sample.target is not None
        assert (_plain(sample), sample.target) in known


def test_confusing_samples_differ_by_the_sample_they_are_made_of(train: SceneSource) -> None:
    for kind in ("unanswerable", "mismatched"):
        samples = [train.confusing(6 * index + slot, kind) for index in range(60) for slot in (1, 2)]  # type: ignore[arg-type]
        for position, sample in enumerate(samples):
            objects = _read_caption(train.scene(position // 2).caption)
            assert _answer(_plain(sample), objects) is None
            assert (sample.target is None) == (kind == "unanswerable")
            assert sample.confused is True
            assert sample.meta["scene"] == position // 2
        assert sum(a.question != b.question for a, b in zip(samples[::2], samples[1::2], strict=True)) > 40
        again = [train.confusing(6 * index + slot, kind).question for index in range(60) for slot in (1, 2)]  # type: ignore[arg-type]
        assert again == [sample.question for sample in samples]


def test_held_out_pairs_occur_in_the_compositional_split_only() -> None:
    kinds = ("caption", "question", "unanswerable", "mismatched")
    for split in ("train", "val", "test"):
        source = SceneSource(split, n_scenes=300, kinds=kinds, questions_per_scene=3)
        seen = set().union(*(source.scene(i).pairs for i in range(300)))
        assert seen == set(ALL_PAIRS) - set(HELD_OUT_PAIRS)
        for i in range(len(source)):
            question = source.sample(i).question or ""
            assert not any(f"{color} {shape}" in question for color, shape in HELD_OUT_PAIRS)
    compositional = SceneSource("compositional", n_scenes=200)
    pairs = [compositional.scene(i).pairs & set(HELD_OUT_PAIRS) for i in range(200)]
    assert all(pairs)
    assert set().union(*pairs) == set(HELD_OUT_PAIRS)
    assert len(HELD_OUT_PAIRS) == 6
    assert {c for c, _ in set(ALL_PAIRS) - set(HELD_OUT_PAIRS)} == set(COLORS)
    assert {s for _, s in set(ALL_PAIRS) - set(HELD_OUT_PAIRS)} == set(SHAPES)


def _captions(split: SceneSplit, n_scenes: int, seed: int = 0) -> list[str]:
    source = SceneSource(split, n_scenes=n_scenes, seed=seed)
    return [source.scene(i).caption for i in range(n_scenes)]


def test_held_out_captions_are_distinct_and_unseen() -> None:
    """Whatever the seeds: no split has a caption of another one, so what chose a checkpoint is not what measures it."""
    held_out: tuple[SceneSplit, ...] = ("val", "test", "compositional")
    captions: dict[SceneSplit, set[str]] = {"train": set(_captions("train", 5000)) | set(_captions("train", 1000, 1))}
    for split in held_out:
        drawn = [_captions(split, 256, seed) for seed in (0, 1)]
        assert [len(set(each)) for each in drawn] == [256, 256]
        assert drawn[0] != drawn[1]
        captions[split] = {caption for each in drawn for caption in each}
    for one, other in combinations(captions, 2):
        assert captions[one].isdisjoint(captions[other]), (one, other)


def test_test_scenes_are_like_validation_scenes() -> None:
    """Scenes of one object have few captions; both splits get some of them."""
    counts = {
        split: Counter(len(_read_caption(caption)) for caption in _captions(split, 256)) for split in ("val", "test")
    }
    for split in counts:
        assert counts[split][1] >= 10, split
        assert counts[split][2] > counts[split][3] > 30, split


def test_validation_scenes_of_before_are_told() -> None:
    """What is kept of the frozen model's outputs on them must not be taken for that on today's."""
    old = "scenes-1/train/0/64/32/[('caption', 0)]+scenes-1/val/0/32/32/[('caption', 0)]"
    train, val = SceneSource("train", n_scenes=2), SceneSource("val", n_scenes=2)
    assert may_have_validated_on_test(old)
    assert not may_have_validated_on_test(f"{train.fingerprint}+{val.fingerprint}")
    assert not may_have_validated_on_test(None)
    assert train.fingerprint.startswith("scenes-2/train/"), (
        "questions are put in more ways: a run cannot go on with them"
    )


def test_everything_follows_from_seed_and_index(train: SceneSource) -> None:
    copy = pickle.loads(pickle.dumps(train))
    np.random.seed(1)
    for i in (5, 0, 17, 5):
        a, b = train.sample(i), copy.sample(i)
        assert (a.question, a.target) == (b.question, b.target)
        assert a.image is not None
        assert b.image is not None
        assert np.array_equal(np.asarray(a.image()), np.asarray(b.image()))
    larger = SceneSource("train", n_scenes=10 * N)
    assert [larger.scene(i) for i in range(50)] == [train.scene(i) for i in range(50)], "more scenes keep the first"
    other = SceneSource("train", n_scenes=50, seed=1)
    assert sum(other.scene(i) == train.scene(i) for i in range(50)) == 0
    assert other.fingerprint != train.fingerprint
    expected = "a small blue triangle at the bottom left and a small blue star at the bottom right"
    assert train.scene(0).caption == expected, "must never change: checkpoints name their data by seed"


def test_kinds_select_samples() -> None:
    source = SceneSource("val", n_scenes=4, kinds=("caption", "question", "unanswerable"))
    assert len(source) == 16
    assert source.indices("caption").tolist() == [0, 4, 8, 12]
    assert source.indices("question").tolist() == [1, 2, 5, 6, 9, 10, 13, 14]
    assert source.indices("target").tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]
    assert source.indices("confused").tolist() == list(range(16))
    assert source.indices("knowledge").tolist() == []
    assert source.group(4) == source.group(7) != source.group(8)
    assert len(set(source.group_hashes().tolist())) == 4


@pytest.mark.parametrize("image_size", [32, 64, 100, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_show_what_the_scene_says(image_size: int, shape: str) -> None:
    """Colour at the object's place, background elsewhere, and an area that tells large from small."""
    areas = {}
    for size in SIZES:
        for position in POSITIONS:
            item = SceneObject(color="red", shape=shape, size=size, position=position, offset=(0.9, -0.8))
            image = draw_scene(Scene(objects=(item,), background=220), image_size)
            assert image.size == (image_size, image_size)
            pixels = np.asarray(image).astype(int)
            coloured = np.abs(pixels - 220).sum(axis=2) > 150
            row, column = divmod(POSITIONS.index(position), 2)
            half = image_size // 2
            inside = coloured[row * half : (row + 1) * half, column * half : (column + 1) * half]
            assert inside.sum() == coloured.sum() > 0
            ys, xs = np.nonzero(coloured)
            assert abs(xs.mean() / image_size - (0.25 + 0.5 * column + 0.045)) < 0.045
            assert abs(ys.mean() / image_size - (0.25 + 0.5 * row - 0.04)) < 0.045
            centre = pixels[round(ys.mean()), round(xs.mean())]
            assert np.abs(centre - _RGB["red"]).max() <= 12
            areas[size] = coloured.sum()
            assert pixels[-1, -1].tolist() == [220] * 3
    assert 2 < areas["large"] / areas["small"] < 6


def test_shapes_and_colours_are_told_apart() -> None:
    pictures = []
    for color, shape in ALL_PAIRS:
        item = SceneObject(color=color, shape=shape, size="small", position="top left", offset=(0, 0))
        pictures.append(np.asarray(draw_scene(Scene(objects=(item,), background=220), 32)).astype(int))
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a - b).sum() > 500


def test_impossible_requests() -> None:
    for options in (
        {"n_scenes": 0},
        {"image_size": 8},
        {"kinds": ()},
        {"questions_per_scene": 4},
        {"questions_per_scene": 0},
    ):
        with pytest.raises(UserError, match="synthetic scenes"):
            SceneSource("train", **options)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        SceneSource("train", n_scenes=3).sample(9)
