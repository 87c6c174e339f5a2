"""Checkpoints written beside training: what is written, when the loop waits, and how a failure reaches every rank."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import ranks
from torch import Tensor, nn

from mamba3_jepa.config import preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.files import checkpoint as checkpoint_file
from mamba3_jepa.files.checkpoint import Checkpoint, DataRecord, load_checkpoint, save_checkpoint
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training import checkpoint_writer
from mamba3_jepa.training.checkpoint_writer import CheckpointWriter, copied_to_host
from mamba3_jepa.training.interrupt import Interrupted
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import build_accelerator, end_training
from mamba3_jepa.training.task import StepOutput, Validation


def checkpoint(weight: Tensor, **trainer: Any) -> Checkpoint:
    return Checkpoint(phase=1, config=preset("tiny"), model={"weight": weight}, tokenizer="{}", trainer=trainer or None)


def weight_in(path: Path) -> list[float]:
    return load_checkpoint(path).model["weight"].tolist()


class Gate:
    """Lets `save_checkpoint` through when it is opened; began: one has come to it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.began, self._opened = threading.Event(), threading.Event()
        patch.setattr(checkpoint_writer, "save_checkpoint", self._save)

    def _save(self, *arguments: Any, **options: Any) -> None:
        self.began.set()
        assert self._opened.wait(30)
        save_checkpoint(*arguments, **options)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def full_disk(file: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NO_ROOM = SimpleNamespace(save=lambda values, file: full_disk(file), load=torch.load)


def test_the_copy_has_memory_of_its_own_and_shares_what_was_shared() -> None:
    layer = nn.Linear(2, 2)
    tied = nn.ModuleDict({"a": layer, "b": layer})
    state = tied.state_dict()
    rows = torch.arange(6.0).reshape(3, 2)
    values = {"model": state, "rng": [rows[1], (rows.T, 3)], "none": None, "name": "text"}
    copied = copied_to_host(values)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()
        rows.zero_()
    assert torch.equal(copied["model"]["a.weight"], before)
    assert copied["model"]["a.weight"].data_ptr() == copied["model"]["b.weight"].data_ptr()
    assert type(copied["model"]) is type(state)
    assert copied["model"]._metadata == state._metadata
    row, (columns, number) = copied["rng"]
    assert (row.tolist(), columns.tolist(), number) == ([2, 3], [[0, 2, 4], [1, 3, 5]], 3)
    assert row.untyped_storage().data_ptr() == columns.untyped_storage().data_ptr()
    assert (copied["none"], copied["name"]) == (None, "text")


def test_what_is_written_is_what_there_was_when_it_was_asked_for(tmp_path: Path, gate: Gate) -> None:
    weight, step = torch.ones(3), torch.zeros(1)
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    with CheckpointWriter() as writer:
        writer.write({best: checkpoint(weight), last: checkpoint(weight, optimizer={0: [step]})})
        assert gate.began.wait(30)
        assert not best.exists(), "training went on before it was written"
        weight += 1
        step += 1
        gate.open()
        writer.wait()
        assert weight_in(best) == weight_in(last) == [1, 1, 1]
        assert load_checkpoint(last).trainer == {"optimizer": {0: [torch.zeros(1)]}}
        assert load_checkpoint(best).trainer is None
        writer.write({last: checkpoint(weight)})
    assert weight_in(last) == [2, 2, 2], "the end waits"
    assert weight_in(best) == [1, 1, 1]


def test_the_next_one_waits(tmp_path: Path, gate: Gate) -> None:
    path = tmp_path / "last.pt"
    with CheckpointWriter() as writer:
        writer.write({path: checkpoint(torch.ones(1))})
        later = threading.Thread(target=lambda: writer.write({path: checkpoint(torch.zeros(1))}))
        later.start()
        later.join(0.1)
        assert later.is_alive()
        gate.open()
        later.join(30)
        assert not later.is_alive()
    assert weight_in(path) == [0]


@pytest.mark.parametrize("asked", ["write", "wait", "end"])
def test_a_failure_is_raised_once_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint(torch.ones(1)))
    monkeypatch.setattr(os, "fsync", full_disk)
    message = r"could not write checkpoint .*last\.pt: No space left on device"
    if asked == "end":
        with pytest.raises(UserError, match=message), CheckpointWriter() as writer:
            writer.write({path: checkpoint(torch.zeros(1))})
    else:
        with CheckpointWriter() as writer:
            writer.write({path: checkpoint(torch.zeros(1))})
            with pytest.raises(UserError, match=message):
                writer.wait() if asked == "wait" else writer.write({path: checkpoint(torch.zeros(1))})
            assert writer.failure() is None
    assert weight_in(path) == [1]
    assert [each.name for each in tmp_path.iterdir()] == ["last.pt"]


def test_whatever_goes_wrong_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise KeyError("a slip")

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", broken)
    with pytest.raises(UserError, match=r"last\.pt: KeyError: 'a slip'"), CheckpointWriter() as writer:
        writer.write({tmp_path / "last.pt": checkpoint(torch.zeros(1))})


def leave_by(error: BaseException, path: Path) -> None:
    with CheckpointWriter() as writer:
        writer.write({path: checkpoint(torch.zeros(1))})
        raise error


def test_a_failure_beside_another_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="another"):
        leave_by(UserError("another"), tmp_path / "last.pt")
    assert "No space left on device" in caplog.text


def test_a_second_interrupt_gives_up_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint(torch.ones(1)))
    gate = Gate(monkeypatch)
    threading.Timer(0.2, gate.open).start()
    with pytest.raises(KeyboardInterrupt):
        leave_by(KeyboardInterrupt(), path)
    assert weight_in(path) == [1]
    assert [each.name for each in tmp_path.iterdir()] == ["last.pt"]


# --- in the loop, with a task that costs nothing ---


class LineTask:
    """Learns a line of three points, one in each micro-batch."""

    phase, micro_batches, batches_per_epoch = 1, 1, 3
    counts, lr_scales, measure, shares_weights = (), (), "distance", False

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.config, self.model = preset("tiny"), nn.Linear(1, 1)
        self.objective = LineObjective(self.model)

    def batches(self, epoch: int, skip: int) -> Iterable[Point]:
        return [Point([float(x)]) for x in range(3)][skip:]

    def step(self, read: Callable[[], Any]) -> Iterator[tuple[Any, float]]:
        yield read(), 1.0

    def validate(self, device: torch.device) -> Validation:
        distance = float((self.model.weight.detach() - 2).abs().sum())
        return Validation(metrics={"val/distance": distance}, score=-distance)

    def say_left_out(self) -> str:
        return ""

    def resume(self, checkpoint: Checkpoint) -> None:
        pass

    def after_step(self) -> None:
        pass

    def illustrate(self, folder: Path) -> None:
        pass

    def checkpoint_fields(self) -> dict[str, Any]:
        return {"tokenizer": "{}", "data": DataRecord(), "temperature": None}


class Point(list[float]):
    def to(self, device: torch.device) -> Tensor:
        return torch.tensor([self], device=device)


class LineObjective(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> StepOutput:
        return StepOutput((self.model(x) - 2 * x - 1).square().mean(), {})


def learn(folder: Path, **changes: Any) -> Run:
    given = {"epochs": 4, "batch_size": 1, "lr": 0.1, "warmup_steps": 0, "log_every": 1, "save_every": 1, "cpu": True}
    settings = Phase1Settings(output_dir=folder, **given | changes)
    accelerator = build_accelerator(settings)
    run = Run(settings, phase=1, accelerator=accelerator)
    with no_plots():
        fit(LineTask(), settings, run, accelerator)
    end_training(accelerator)
    return run


@contextmanager
def no_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "plot", lambda self: None)
        yield


def files_of(folder: Path) -> dict[str, Any]:
    found = {path.name: load_checkpoint(path) for path in folder.glob("*.pt")}
    return {name: (each.model["weight"].tolist(), repr(each.trainer)) for name, each in found.items()}


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(tmp_path / "whole")
    assert set(files_of(tmp_path / "whole")) == {"phase1_best.pt", "phase1_last.pt"}
    log = Run.log

    def stopping(self: Run, position: Any, metrics: dict[str, float]) -> None:
        log(self, position, metrics)
        if position.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stopping)
        with pytest.raises(Interrupted, match="after step 5 of 12; saved in"):
            learn(tmp_path / "stopped")
    assert load_checkpoint(tmp_path / "stopped" / "phase1_last.pt").trainer["position"]["step"] == 5
    learn(tmp_path / "stopped", resume=True)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_the_loop_hears_of_a_failure_at_its_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(tmp_path, max_steps=4, eval_every=100)
    before = files_of(tmp_path)
    failed = threading.Event()

    def failing(path: Path, saved: Checkpoint, **options: Any) -> None:
        try:
            checkpoint_file.save_checkpoint(path, saved, **options)
        finally:
            failed.set()

    steps = []
    log = Run.log

    def waiting(self: Run, position: Any, metrics: dict[str, float]) -> None:
        log(self, position, metrics)
        steps.append(position.step)
        if position.step == 8:  # one is being written since step 6
            failed.wait(30)
            self.writer._join()

    monkeypatch.setattr(Run, "log", waiting)
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", failing)
    monkeypatch.setattr(checkpoint_file, "torch", NO_ROOM)
    with pytest.raises(UserError, match=r"could not write checkpoint .*phase1_last\.pt: No space left on device"):
        learn(tmp_path, resume=True, epochs=4, save_every=6, eval_every=100, max_steps=None)
    assert steps[-1] <= 8, "not after the next step"
    assert files_of(tmp_path) == before


def test_a_failure_of_one_rank_is_one_of_all(tmp_path: Path) -> None:
    status, said = ranks(2, str(tmp_path), program=Path(__file__))
    assert status == 0, said
    for number in range(2):
        heard = (tmp_path / f"{number}.txt").read_text()
        assert "could not write checkpoint" in heard
        assert "phase1_last.pt: No space left on device" in heard
        assert "\n" not in heard


def _rank(folder: str) -> None:
    """Of two: the first one's disk is full when the run saves, the other has nothing to write."""
    logging.disable()
    checkpoint_file.torch = NO_ROOM
    try:
        learn(Path(folder) / "run", max_steps=3)
    except UserError as error:
        (Path(folder) / f"{os.environ['RANK']}.txt").write_text(str(error))


if __name__ == "__main__":
    _rank(sys.argv[1])
