"""A run's folder: config.json, metrics.jsonl, checkpoints, plots; and whether it is new or continued."""

from __future__ import annotations

import logging
import platform
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import mamba3_jepa
from mamba3_jepa.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.plots import plot_training
from mamba3_jepa.jsonfile import write_json
from mamba3_jepa.training.metrics_log import MetricsLog
from mamba3_jepa.training.settings import TrainSettings
from mamba3_jepa.training.task import Validation

logger = logging.getLogger(__name__)


class Run:
    """The output directory of one training run. Only the main process writes into it."""

    def __init__(self, settings: TrainSettings, phase: int, accelerator: Accelerator) -> None:
        """Open the folder.

        With `--resume` an earlier run there is continued. Without it an earlier run is moved aside, never
        overwritten.

        Raises:
            UserError: the folder cannot be written, or the run there was made with other settings.
        """
        self.folder = settings.output_dir
        self.is_main = accelerator.is_main_process
        self.last_path = self.folder / f"phase{phase}_last.pt"
        self.best_path = self.folder / f"phase{phase}_best.pt"
        self.resumed: Checkpoint | None = None
        self._settings, self._accelerator = settings, accelerator
        if settings.resume:
            self.resumed = self._open_earlier(phase)
        elif self.is_main:
            _move_aside(self.folder)
        accelerator.wait_for_everyone()
        if self.is_main:
            self._make_folder()
            self._metrics = MetricsLog(self.folder / "metrics.jsonl")

    def _open_earlier(self, phase: int) -> Checkpoint | None:
        if not self.last_path.exists():
            if self.is_main:
                logger.info("nothing to resume: no %s yet; starting from the beginning", self.last_path)
            return None
        checkpoint = load_checkpoint(self.last_path, phase=phase)
        if checkpoint.trainer is None:
            raise UserError(f"{self.last_path} holds weights only and cannot be continued")
        ours, theirs = self._settings.to_dict(), checkpoint.run
        changed = [
            f"--{name.replace('_', '-')} {theirs.get(name)} -> {value}"
            for name, value in ours.items()
            if name not in TrainSettings.FREE_ON_RESUME and theirs.get(name) != value
        ]
        if changed:
            raise UserError(
                f"cannot resume {self.last_path}: the settings differ ({'; '.join(changed)}). "
                "Resume with the settings of the first run, or choose another --output-dir."
            )
        stretched = [name for name in ("epochs", "max_steps") if theirs.get(name) != ours[name]]
        if stretched and self.is_main:
            logger.warning("%s changed: the learning-rate schedule changes with it", " and ".join(stretched))
        return checkpoint

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".phase*.tmp"):  # of a save that was killed
                leftover.unlink()
        except OSError as error:
            raise UserError(f"cannot write into --output-dir {self.folder}: {error.strerror}") from error

    def write_config(self, model_config: dict[str, Any], data: dict[str, Any]) -> None:
        """config.json: everything that decides the run, resolved, and the versions it ran on."""
        if not self.is_main:
            return
        values = {
            "settings": self._settings.to_dict(),
            "model": model_config,
            "data": data,
            "processes": self._accelerator.num_processes,
            "device": str(self._accelerator.device),
            "versions": {
                "mamba3_jepa": mamba3_jepa.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        write_json(self.folder / "config.json", values)

    def log(self, position: Any, metrics: dict[str, float]) -> None:
        """Append to metrics.jsonl and to the trackers that were asked for."""
        if self.is_main:
            self._metrics.append(step=position.step, epoch=position.epoch + 1, metrics=metrics)
        if self._accelerator.trackers:
            self._accelerator.log(metrics, step=position.step)

    def forget_metrics_after(self, step: int) -> None:
        """Drop logged lines that a continuation will write again."""
        if self.is_main:
            self._metrics.truncate_after(step)

    def report(self, validation: Validation, position: Any, better: bool) -> None:
        """Say the validation result in one line, and its warnings in theirs."""
        shown = "  ".join(
            f"{name.removeprefix('val/')} {value:.4g}"
            for name, value in validation.metrics.items()
            if not name.startswith("val/gate_activity")
        )
        logger.info("validation at step %d: %s%s", position.step, shown, "  (best so far)" if better else "")
        for warning in validation.warnings:
            logger.warning(warning)

    def save_last(self, fields: dict[str, Any]) -> None:
        """Write phaseN_last.pt."""
        save_checkpoint(self.last_path, Checkpoint(run=self._settings.to_dict(), **fields))

    def save_best(self, fields: dict[str, Any]) -> None:
        """Write phaseN_best.pt: weights only, ready for the next phase and for export."""
        save_checkpoint(self.best_path, Checkpoint(run=self._settings.to_dict(), **fields))

    def describe_last(self) -> str:
        """The last checkpoint's path, or that there is none."""
        return str(self.last_path) if self.last_path.exists() else "none yet"

    def plot(self) -> None:
        """Draw the run's curves from metrics.jsonl."""
        plot_training(self.folder)


def start_trackers(accelerator: Accelerator, settings: TrainSettings, phase: int) -> None:
    """Start Weights & Biases and TensorBoard where they were asked for."""
    if not accelerator.log_with:
        return
    flat = {name: value for name, value in settings.to_dict().items() if value is not None}
    accelerator.init_trackers(
        "mamba3-jepa",
        config=flat,
        init_kwargs={"wandb": {"dir": str(settings.output_dir), "name": f"phase{phase}-{settings.output_dir.name}"}},
    )


def _move_aside(folder: Path) -> None:
    """Rename a folder that holds an earlier run, so that a new one never overwrites it."""
    if not any(folder.glob("phase*.pt")) and not (folder / "metrics.jsonl").exists():
        return
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = folder.with_name(f"{folder.name}.{stamp}")
    count = 1
    while aside.exists():
        aside, count = folder.with_name(f"{folder.name}.{stamp}-{count}"), count + 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder} holds an earlier run and cannot be moved aside: {error.strerror}") from error
    logger.info("%s held an earlier run: moved to %s", folder, aside)
