"""Several processes of one run: what one of them meets, all of them know, and none waits for another without end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import hosts, ranks
from short import changed
from test_continue import assert_close, last, stop_after, train_lines, write_data
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.files.metrics_log import read_metrics
from mamba3_jepa.training import phase1
from mamba3_jepa.training.interrupt import PeerLostError

TRAIN = ["train-jepa", "--tiny", "--cpu", "--workers", "0", "--log-every", "1"]


def test_a_batch_of_one_rank_whose_samples_are_all_bad(tmp_path: Path) -> None:
    """The ranks stay in step: what they train is what one process trains, and all bad samples are said."""
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data", 12, 4)
    for i in (2, 3, 7):
        (tmp_path / "data" / f"{i}.png").write_bytes(b"no image")
    arguments = [*TRAIN, *data, "--on-bad-sample", "skip", "--epochs", "2", "--angn-enabled"]
    two, one = tmp_path / "two", tmp_path / "one"
    status, said = ranks(2, *arguments, "--batch-size", "1", "--output-dir", str(two))
    assert status == 0, said
    assert "epoch 1: 3 bad samples skipped" in said
    assert main([*arguments, "--batch-size", "2", "--output-dir", str(one)]) == 0
    assert_close(last(two), last(one))
    losses = [
        [line["val/loss"] for line in read_metrics(folder / "metrics.jsonl") if "val/loss" in line]
        for folder in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for folder in (one, two):
        assert [line["step"] for line in train_lines(folder)] == list(range(1, 13))
        assert sum(line["train/skipped_samples"] for line in train_lines(folder)) == 6, "three in each epoch"
        assert load_checkpoint(folder / "phase1_last.pt").data.train_samples == 9
    longer = changed(arguments, ["--epochs", "3", "--batch-size", "1", "--output-dir", str(two), "--resume"])
    status, said = ranks(2, *longer)
    assert status == 0, said
    assert [line["step"] for line in train_lines(two)] == list(range(1, 19))


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes' batches that was left after its second step, and later copies of it."""
    folder = tmp_path_factory.mktemp("left")
    for step in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(step, patch)
            resume = ["--resume"] if step > 2 else []
            assert main([*_scenes(8), "--output-dir", str(folder / "run"), *resume]) == 143
        shutil.copytree(folder / "run", folder / f"step{step}")
    assert main([*_scenes(8), "--output-dir", str(folder / "run"), "--resume"]) == 0
    return folder


def _scenes(batch_size: int) -> list[str]:
    return [*TRAIN, "--epochs", "2", "--synthetic-scenes", "16", "--val-samples", "12", "--batch-size", str(batch_size)]


@pytest.mark.parametrize("other", [None, "step2"])
def test_hosts_without_a_shared_disk_go_on_from_rank_0(left: Path, tmp_path: Path, other: str | None) -> None:
    """Host 1 has an older checkpoint, or none."""
    folders = [tmp_path / "host0", tmp_path / "host1"]
    shutil.copytree(left / "step4", folders[0] / "run")
    folders[1].mkdir()
    if other is not None:
        shutil.copytree(left / other, folders[1] / "run")
    results = hosts(folders, *_scenes(4), "--output-dir", "run", "--resume")
    assert [status for status, _ in results] == [0, 0], results
    assert "continuing from step 4" in results[0][1]
    assert "not the same on all hosts" in results[0][1]
    assert_close(last(folders[0] / "run"), last(left / "run"))
    assert [line["step"] for line in train_lines(folders[0] / "run")] == list(range(1, 13))


def test_a_checkpoint_that_rank_0_does_not_see_is_refused(left: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "host0", tmp_path / "host1"]
    folders[0].mkdir()
    shutil.copytree(left / "step4", folders[1] / "run")
    results = hosts(folders, *_scenes(4), "--output-dir", "run", "--resume")
    assert [status for status, _ in results] == [2, 2], results
    for _, said in results:
        assert "is there on the host of rank 1, but not on that of rank 0" in " ".join(said.split())
        assert "Traceback" not in said
    assert not (folders[0] / "run").exists()


def test_an_earlier_phase_is_read_from_rank_0(tmp_path: Path) -> None:
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        write_checkpoint(folder / "1.pt", tiny_model(1, seed=number), 1)
    arguments = ["train-decoder", "--tiny", "--cpu", "--workers", "0", "--phase1-checkpoint", "1.pt", "--epochs", "1"]
    scenes = ["--synthetic-scenes", "16", "--val-samples", "12"]
    results = hosts(folders, *arguments, "--batch-size", "4", *scenes, "--output-dir", "run")
    assert [status for status, _ in results] == [0, 0], results
    trained = load_checkpoint(folders[0] / "run" / "phase2_last.pt").model
    first = load_checkpoint(folders[0] / "1.pt").model
    assert all(torch.equal(trained[name], value) for name, value in first.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[0])
        assert main([*arguments, "--batch-size", "8", *scenes, "--output-dir", "alone"]) == 0
    assert_close(last(folders[0] / "run"), last(folders[0] / "alone"))


def test_hosts_with_other_data_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for number, folder in enumerate(folders):
        (folder / "data").mkdir(parents=True)
        write_data(folder / "data", 12 + 4 * number, 4)
    results = hosts(folders, *TRAIN, "--data-dir", "data", "--batch-size", "4", "--output-dir", "run")
    assert [status for status, _ in results] == [2, 2], results
    assert "the host of rank 1 has other data (16 training and 4 validation samples)" in " ".join(results[0][1].split())
    assert not (folders[0] / "run").exists()


def test_an_unreadable_sample_of_one_rank_ends_all(tmp_path: Path) -> None:
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        (folder / "data").mkdir(parents=True)
        write_data(folder / "data", 32, 4)
    for i in range(32):  # as where one host's disk fails; the whitening pass reads only rank 0's
        (folders[1] / "data" / f"{i}.png").write_bytes(b"no image") if i % 2 else None
    arguments = [*TRAIN, "--data-dir", "data", "--batch-size", "4", "--output-dir", "run"]
    results = hosts(folders, *arguments)
    assert results[1][0] == 2, results
    assert "Traceback" not in results[1][1]


def test_the_command_says_who_is_lost_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lose(settings: object) -> None:
        raise PeerLostError("lost rank 1")

    monkeypatch.setattr(phase1, "train_phase1", lose)
    assert main([*TRAIN, "--output-dir", str(tmp_path / "run")]) == 75
    assert caplog.messages == ["lost rank 1"]


def test_the_metrics_of_a_run_have_no_line_twice(left: Path) -> None:
    lines = [(line["step"], "train/loss" in line) for line in read_metrics(left / "run" / "metrics.jsonl")]
    assert len(lines) == len(set(lines))
    assert json.loads((left / "run" / "config.json").read_text())["phase"] == 1
