"""easy-VQA becomes a data directory: counts as published, content as in the package, all or nothing."""

from __future__ import annotations

import filecmp
import importlib.util
from pathlib import Path

import pytest

from mamba3_jepa.data import easy_vqa as prepare_module
from mamba3_jepa.data.easy_vqa import prepare_easy_vqa
from mamba3_jepa.data.sources import open_source, open_splits
from mamba3_jepa.errors import UserError

easy_vqa = pytest.importorskip("easy_vqa")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("data") / "deep" / "easy-vqa"
    summary = prepare_easy_vqa(output)
    assert summary.output_dir == output
    assert (summary.train_images, summary.train_questions) == (4000, 38575)
    assert (summary.test_images, summary.test_questions) == (1000, 9673)
    assert summary.answers == 13
    return output


def test_both_splits_are_those_of_the_package(prepared: Path) -> None:
    for name, questions, paths in (
        ("manifest.jsonl", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        ("test.jsonl", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    ):
        source = open_source(prepared, manifest=name)
        assert source is not None
        assert len(source) == len(questions[0])
        split = "test" if name.startswith("test") else "train"
        for i in (0, 7, len(source) - 1):
            sample = source.sample(i)
            assert (sample.question, sample.target) == (questions[0][i], questions[1][i])
            assert source.group(i) == f"images/{split}/{questions[2][i]}.png"
            assert filecmp.cmp(prepared / source.group(i), paths[questions[2][i]], shallow=False)
            assert sample.image is not None
            assert sample.image().size == (64, 64)


def test_it_trains_as_it_is(prepared: Path) -> None:
    splits = open_splits(prepared, image_size=64, val_fraction=0.05)
    train = {splits.train.group(int(i)) for i in splits.train_indices[::50]}
    val = {splits.val.group(int(i)) for i in splits.val_indices}
    assert train.isdisjoint(val), "all questions about one image are on one side"
    assert 0.03 < len(val) / 4000 < 0.07


def test_nothing_is_overwritten(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare_easy_vqa(prepared)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare_easy_vqa(tmp_path / "file")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "_write_manifest", fail)
    with pytest.raises(UserError, match="No space left"):
        prepare_easy_vqa(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install easy-vqa"):
        prepare_easy_vqa(tmp_path / "out")
