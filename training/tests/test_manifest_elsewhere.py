"""A manifest that does not lie in the data directory: its files do all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.sources import open_source, open_splits
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import load_checkpoint

SHORT = ["--tiny", "--cpu", "--workers", "0", "--batch-size", "4", "--val-fraction", "0.3"]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(i: int) -> dict[str, Any]:
    return {"image": f"in/{i}.png", "question": f"which {i % 3}?", "answer": f"the {i}"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images alone."""
    root = tmp_path / "images"
    (root / "in").mkdir(parents=True)
    for i in range(16):
        Image.new("RGB", (20, 16), (i * 15, 255 - i * 9, 30)).save(root / f"in/{i}.png")
    return root


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    return write(tmp_path / "lists/train.jsonl", *map(record, range(16))).parent


def test_its_files_are_those_of_the_data_directory(
    images: Path, lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for data_dir, manifest in ((images, lists / "train.jsonl"), (Path("images"), Path("lists/train.jsonl"))):
        source = open_source(data_dir, manifest=manifest)
        assert isinstance(source, ManifestSource)
        sample = source.sample(3)
        assert sample.image is not None
        assert sample.image().getpixel((2, 2)) == (45, 228, 30)
        assert sample.meta["origin"] == f"{lists / 'train.jsonl'} line 4"


def test_one_of_that_name_in_the_data_directory_comes_first(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(images / "some.jsonl", record(1))
    write(tmp_path / "some.jsonl", record(2))
    monkeypatch.chdir(tmp_path)
    source = open_source("images", manifest="some.jsonl")
    assert source is not None
    assert source.sample(0).target == "the 1"
    assert source.name == "images/some.jsonl"


def test_files_beside_it_are_out_of_reach(images: Path, lists: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(lists / "own.png")
    (images / "link.png").symlink_to(lists / "own.png")
    for name, message in (("own.png", "there is no file"), ("../lists/own.png", "leaves the data directory")):
        write(lists / "bad.jsonl", {"image": name, "text": "x"})
        with pytest.raises(UserError, match=f"bad.jsonl line 1: .*{message}"):
            open_source(images, manifest=lists / "bad.jsonl")
    source = open_source(images, manifest=write(lists / "bad.jsonl", {"image": "link.png", "text": "x"}))
    assert source is not None
    load = source.sample(0).image
    assert load is not None
    with pytest.raises(BadSampleError, match="leads out of the data directory"):
        load()


def test_val_jsonl_beside_it_holds_out(images: Path, lists: Path) -> None:
    write(images / "val.jsonl", record(0))
    splits = open_splits(images, manifest=lists / "train.jsonl", image_size=32, val_fraction=0.3)
    assert splits.val is splits.train
    write(lists / "val.jsonl", record(4), record(5))
    splits = open_splits(images, manifest=lists / "train.jsonl", image_size=32)
    assert [splits.val.sample(i).target for i in splits.val_indices.tolist()] == ["the 4", "the 5"]
    assert len(splits.train_indices) == 16
    splits = open_splits(images, manifest=lists / "val.jsonl", image_size=32, val_fraction=0.5)
    assert splits.val is splits.train, "it does not hold out itself"


def test_a_run_trains_on_it_goes_on_when_it_has_moved_and_is_measured(
    images: Path, lists: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    write(images / "manifest.jsonl", *({"image": None, "query": f"not this {i}", "answer": "no"} for i in range(16)))
    command = ["train-jepa", *SHORT, "--output-dir", str(tmp_path / "run")]
    here = ["--data-dir", str(images), "--manifest", str(lists / "train.jsonl")]
    assert main([*command, *here, "--max-steps", "1"]) == 0
    assert load_checkpoint(tmp_path / "run/phase1_last.pt").data.source == str(lists / "train.jsonl")
    lists.rename(tmp_path / "moved")
    there = ["--data-dir", str(images), "--manifest", str(tmp_path / "moved/train.jsonl")]
    assert main([*command, *there, "--max-steps", "2", "--resume"]) == 0
    assert main([*command, "--data-dir", str(images), "--max-steps", "3", "--resume"]) == 2
    assert "cannot resume" in capfd.readouterr().err
    later = [*SHORT, *there, "--max-steps", "1"]
    first, second = (str(tmp_path / name) for name in ("run/phase1_last.pt", "two/phase2_last.pt"))
    assert main(["train-decoder", *later, "--phase1-checkpoint", first, "--output-dir", str(tmp_path / "two")]) == 0
    assert main(["train-agent", *later, "--phase2-checkpoint", second, "--output-dir", str(tmp_path / "three")]) == 0
    output = tmp_path / "numbers.json"
    assert main(["evaluate", "--checkpoint", second, *there, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["test/samples"] == 16
    assert torch.load(tmp_path / "three/phase3_last.pt", weights_only=True)["phase"] == 3


@pytest.mark.parametrize("command", ["train-jepa", "train-decoder", "train-agent", "evaluate"])
def test_it_needs_the_data_directory_and_must_be_there(
    images: Path, command: str, capfd: pytest.CaptureFixture
) -> None:
    needed = ["--checkpoint", "x.pt"] if command == "evaluate" else []
    assert main([command, *needed, "--manifest", "some.jsonl"]) == 2
    assert "--manifest some.jsonl: its images lie in --data-dir; give that too" in capfd.readouterr().err
    if command == "train-jepa":
        assert main([command, "--tiny", "--data-dir", str(images), "--manifest", "some.jsonl"]) == 2
        assert f"--manifest: there is no file {images}/some.jsonl nor some.jsonl" in capfd.readouterr().err
