"""A command that fails, or is stopped before its first step, leaves an earlier run where it was."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.training import frozen
from mamba3_jepa.training.loop import _State

SHORT = ["--tiny", "--cpu", "--synthetic-scenes", "8", "--val-samples", "12", "--batch-size", "8", "--epochs", "1"]
COMMANDS = {1: "train-jepa", 2: "train-decoder", 3: "train-agent"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {phase: write_checkpoint(folder / f"{phase}.pt", tiny_model(phase), phase) for phase in (1, 2)}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The output directory of a run that somebody wants to keep."""
    folder = tmp_path / "runs" / "run"
    (folder / "plots").mkdir(parents=True)
    for phase in COMMANDS:
        (folder / f"phase{phase}_last.pt").write_bytes(b"weights of days")
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "time": 0.0}\n')
    (folder / "plots" / "loss.png").write_bytes(b"a curve")
    return folder


def run(phase: int, checkpoints: dict[int, Path], output_dir: Path, *arguments: str) -> int:
    start = [] if phase == 1 else [f"--phase{phase - 1}-checkpoint", str(checkpoints[phase - 1])]
    try:
        return main([COMMANDS[phase], *SHORT, *start, "--output-dir", str(output_dir), *arguments])
    except SystemExit as error:  # the command line's own errors
        return int(error.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything beside and in the output directory, but the cache, which belongs to no run."""
    files = (path for path in folder.parent.rglob("*") if path.is_file() and "frozen_outputs" not in path.parts)
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in files}


def write_data(folder: Path, *lines: dict) -> list[str]:
    folder.mkdir()
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        if line["image"] is not None:
            (folder / line["image"]).write_bytes(b"not a picture")
    return ["--data-dir", str(folder), "--val-fraction", "0.4"]


def test_a_run_that_works_moves_it_aside(checkpoints: dict[int, Path], earlier: Path) -> None:
    kept = (earlier / "phase2_last.pt").read_bytes()
    assert run(2, checkpoints, earlier) == 0
    (aside,) = [path for path in earlier.parent.iterdir() if path.name.startswith("run.")]
    assert (aside / "phase2_last.pt").read_bytes() == kept
    assert (earlier / "phase2_last.pt").read_bytes() != kept
    assert json.loads((earlier / "config.json").read_text())["data"]["earlier"] == {"source": "test", "synthetic": True}


REFUSED = {
    "batch": ["--batch-size", "9999"],
    "accumulation": ["--grad-accum", "500"],
    "no such data": ["--data-dir", "/nowhere"],
    "impossible setting": ["--lr", "0"],
    "precision": ["--precision", "fp16"],
}


@pytest.mark.parametrize("phase", COMMANDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(phase: int, name: str, checkpoints: dict[int, Path], earlier: Path) -> None:
    before = contents(earlier)
    assert run(phase, checkpoints, earlier, *REFUSED[name]) == 2
    assert contents(earlier) == before


@pytest.mark.parametrize("phase", COMMANDS)
def test_data_that_cannot_be_used(phase: int, checkpoints: dict[int, Path], earlier: Path, tmp_path: Path) -> None:
    before = contents(earlier)
    useless = write_data(tmp_path / "useless", {"image": None, "query": "no answer"})
    pictures = [{"image": f"{i}.png", "question": f"what is {i}?", "answer": "it"} for i in range(40)]
    texts = [{"image": None, "query": f"say {i}", "answer": "it"} for i in range(20)]
    broken = write_data(tmp_path / "broken", *pictures, *texts)
    too_few_left = [*broken, "--on-bad-sample", "skip", "--batch-size", "30"]
    for arguments in (useless, broken, *([too_few_left] if phase == 2 else [])):
        assert run(phase, checkpoints, earlier, *arguments) == 2
        assert contents(earlier) == before


def test_knowledge_that_does_not_fit(checkpoints: dict[int, Path], earlier: Path, tmp_path: Path) -> None:
    before = contents(earlier)
    lines = [
        {"image": None, "query": f"q{i}", "answer": "a", "confused": i % 2 == 0, "knowledge": [1.0] * (32 if i else 5)}
        for i in range(40)
    ]
    assert run(3, checkpoints, earlier, *write_data(tmp_path / "data", *lines)) == 2
    assert run(3, checkpoints, earlier, "--knowledge-dim", "5") == 2
    assert contents(earlier) == before


def test_a_first_step_that_fails(checkpoints: dict[int, Path], earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the batch is too much for the device's memory."""

    def fails(self: _State, micro_batches: list) -> dict[str, float]:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(_State, "step", fails)
    before = contents(earlier)
    assert run(1, checkpoints, earlier) == 2
    assert contents(earlier) == before


@pytest.mark.parametrize("phase", [2, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stopped_while_frozen_outputs_are_computed(
    phase: int, number: int, checkpoints: dict[int, Path], earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = frozen._Pass._compute

    def stopping(self, batch):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), number)
        return compute(self, batch)

    monkeypatch.setattr(frozen._Pass, "_compute", stopping)
    before = contents(earlier)
    assert run(phase, checkpoints, earlier) == 128 + number
    assert contents(earlier) == before


def test_only_what_is_moved_needs_a_writable_parent(
    checkpoints: dict[int, Path], earlier: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != earlier.parent)
    assert run(1, checkpoints, earlier) == 2
    assert "no permission" in capfd.readouterr().err
    assert run(1, checkpoints, earlier, "--resume") == 2
    error = capfd.readouterr().err
    assert "no permission" not in error
    assert "phase1_last.pt" in error  # which is no checkpoint


def test_a_place_that_cannot_be_written_is_refused_at_once(
    checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("computed for nothing")

    monkeypatch.setattr(frozen._Pass, "_compute", never)
    (tmp_path / "file").write_text("in the way")
    assert run(2, checkpoints, tmp_path / "file" / "run") == 2
    assert "is not a directory" in capfd.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in (tmp_path, tmp_path / "run"))
    assert run(2, checkpoints, tmp_path / "run") == 2
    assert f"no permission to write into {tmp_path}" in " ".join(capfd.readouterr().err.split())
