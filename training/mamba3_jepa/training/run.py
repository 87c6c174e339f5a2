"""A run's folder: config.json, metrics.jsonl, checkpoints, plots; and whether it is new or continued."""

from __future__ import annotations

import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import mamba3_jepa
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.plots import plot_training
from mamba3_jepa.files.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.files.folder_lock import keep_lock
from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.files.metrics_log import MetricsLog
from mamba3_jepa.files.whole_file import followed
from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.beginning import Beginning
from mamba3_jepa.training.checkpoint_writer import CheckpointWriter
from mamba3_jepa.training.distributed import from_rank_0
from mamba3_jepa.training.schedule import Position
from mamba3_jepa.training.shared_checkpoint import read_from_rank_0
from mamba3_jepa.training.task import Task, Validation

logger = logging.getLogger(__name__)


class Run:
    """The output directory of one training run. Only the main process writes into it.

    Opening it writes nothing. The run begins with its first step done (`begin`): whatever is refused, fails or is
    interrupted before leaves the folder, and an earlier run in it, as they were.

    Attributes:
        writer: writes its checkpoints while training goes on.
    """

    def __init__(self, settings: TrainSettings, phase: int, accelerator: Accelerator) -> None:
        """Find out what there is to continue, with `resume`.

        Raises:
            UserError: the folder cannot be written, or the run there was made with other settings.
        """
        self.folder = followed(settings.output_dir)  # a link to a folder is neither moved aside nor replaced
        self.is_main = accelerator.is_main_process
        self.last_path = self.folder / f"phase{phase}_last.pt"
        self.best_path = self.folder / f"phase{phase}_best.pt"
        self.resumed: Checkpoint | None = None
        self.beginning: Beginning | None = None
        self._settings, self._accelerator = settings, accelerator
        self._metrics = MetricsLog(self.folder / "metrics.jsonl")
        self.begun = False
        self.writer = CheckpointWriter()
        if settings.resume:
            self._open_earlier(phase)
        from_rank_0(lambda: _demand_writable(self.folder, is_moved=self._is_moved()))

    def _open_earlier(self, phase: int) -> None:
        """What is continued: the last checkpoint, or a run that was left before its first save: its config.json."""
        exists = self.last_path.exists
        checkpoint = read_from_rank_0(
            self.last_path, lambda: load_checkpoint(self.last_path, phase=phase) if exists() else None
        )
        if checkpoint is None:
            self.beginning = from_rank_0(lambda: Beginning.of_config_file(self.folder / "config.json", phase))
            logger.info("nothing to resume: no %s; starting from the beginning", self.last_path)
        elif checkpoint.trainer is None:
            raise UserError(f"{self.last_path} holds weights only and cannot be continued")
        else:
            self.beginning = Beginning.of_checkpoint(self.last_path, checkpoint)
        if self.beginning is None:
            return
        self.beginning.demand_same_settings(self._settings, self._accelerator.num_processes)
        theirs, ours = self.beginning.settings, self._settings.to_dict()
        stretched = [name for name in ("epochs", "max_steps") if theirs.get(name) != ours[name]]
        if stretched and checkpoint is not None:
            logger.warning("%s changed: the learning-rate schedule changes with it", " and ".join(stretched))
        self.resumed = checkpoint

    def begin(self, task: Task) -> None:
        """Make the folder, write config.json and start the trackers.

        An earlier run in the folder that is not continued is moved aside, never overwritten.

        Raises:
            UserError: the folder cannot be written, or the earlier run not be moved.
        """
        self.begun = True
        from_rank_0(lambda: self._open(task))
        _start_trackers(self._accelerator, self._settings, task.phase)

    def _open(self, task: Task) -> None:
        if self._is_moved():
            _move_aside(self.folder)
        self._make_folder()
        if self.resumed is None:
            self.forget_metrics_after(0)  # of a beginning that was not saved
        self._write_config(task)

    def _is_moved(self) -> bool:
        """Whether the folder holds what this run would overwrite: all of a run that it does not continue, or the best
        weights of one that it begins again."""
        if self.beginning is None:
            return any(self.folder.glob("phase*.pt")) or (self.folder / "metrics.jsonl").exists()
        return self.resumed is None and self.best_path.exists()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".phase*.tmp"):  # of a save that was killed
                leftover.unlink()
        except OSError as error:
            raise UserError(f"cannot write into `output_dir` {self.folder}: {error.strerror}") from error

    def _write_config(self, task: Task) -> None:
        """config.json: everything that decides the run, resolved, and the versions it ran on."""
        values = {
            "phase": task.phase,
            "settings": self._settings.to_dict(),
            "model": task.config.to_dict(),
            "data": task.checkpoint_fields()["data"].without_answers().in_short().to_dict(),
            "processes": self._accelerator.num_processes,
            "device": str(self._accelerator.device),
            "versions": {
                "mamba3_jepa": mamba3_jepa.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        write_json(self.folder / "config.json", values)

    def log(self, position: Position, metrics: dict[str, float]) -> None:
        """Append to metrics.jsonl and to the trackers that were asked for."""
        if self.is_main:
            self._metrics.append(step=position.step, epoch=position.epoch + 1, metrics=metrics)
        if self._accelerator.trackers:
            self._accelerator.log(metrics, step=position.step)

    def forget_metrics_after(self, step: int) -> None:
        """Drop logged lines that a continuation will write again."""
        if self.is_main:
            self._metrics.truncate_after(step)

    def report(self, validation: Validation, position: Position, better: bool) -> None:
        """Say the validation result in one line, and its warnings in theirs."""
        shown = "  ".join(
            f"{name.removeprefix('val/')} {value:.4g}"
            for name, value in validation.metrics.items()
            if not name.startswith("val/gate_activity")
        )
        logger.info("validation at step %d: %s%s", position.step, shown, "  (best so far)" if better else "")
        for warning in validation.warnings:
            logger.warning(warning)

    def save(self, *, best: dict[str, Any] | None, last: dict[str, Any] | None) -> None:
        """Write phaseN_best.pt (weights only, ready for the next phase and for export) and phaseN_last.pt, each where
        its fields are given, by `writer`: what they hold may change when this returns.

        Raises:
            UserError: what was to be written before was not.
        """
        wanted = {self.best_path: best, self.last_path: last}
        settings = self._settings.to_dict()
        self.writer.write({
            path: Checkpoint(run=settings, **fields) for path, fields in wanted.items() if fields is not None
        })  # fmt: skip

    def describe_last(self) -> str:
        """The last checkpoint's path, or that there is none of this run."""
        ours = self.begun or self.resumed is not None
        return str(self.last_path) if ours and self.last_path.exists() else "none yet"

    def plot(self) -> None:
        """Draw the run's curves from metrics.jsonl."""
        plot_training(self.folder)


def _start_trackers(accelerator: Accelerator, settings: TrainSettings, phase: int) -> None:
    """Start Weights & Biases and TensorBoard where they were asked for."""
    if not accelerator.log_with:
        return
    flat = {
        name: " ".join(value) if isinstance(value, tuple) else value  # TensorBoard takes no lists
        for name, value in settings.to_dict().items()
        if value is not None
    }
    accelerator.init_trackers(
        "mamba3-jepa",
        config=flat,
        init_kwargs={"wandb": {"dir": str(settings.output_dir), "name": f"phase{phase}-{settings.output_dir.name}"}},
    )


def _demand_writable(folder: Path, is_moved: bool) -> None:
    """Say at once, before anything dear is computed, that the folder cannot be made, written into or moved aside."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    for needed in (place, place.parent) if is_moved else (place,):
        if not needed.is_dir():
            raise UserError(f"cannot write into `output_dir` {folder}: {needed} is not a directory")
        if not os.access(needed, os.W_OK | os.X_OK):
            raise UserError(f"cannot write into `output_dir` {folder}: no permission to write into {needed}")


def _move_aside(folder: Path) -> None:
    """Rename a folder that holds an earlier run, so that a new one never overwrites it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = folder.with_name(f"{folder.name}.{stamp}")
    count = 1
    while aside.exists():
        aside, count = folder.with_name(f"{folder.name}.{stamp}-{count}"), count + 1
    try:
        folder.rename(aside)
        folder.mkdir()
        keep_lock(aside, folder)
    except OSError as error:
        raise UserError(f"{folder} holds an earlier run and cannot be moved aside: {error.strerror}") from error
    logger.info("%s held an earlier run: moved to %s", folder, aside)
