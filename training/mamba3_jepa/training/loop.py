"""The training loop, one for all phases: fetch, accumulate, check, clip, step, log, evaluate, save.

Positions count micro-batches within an epoch and optimizer steps over the run, so that a run can be left and
continued between any two steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mamba3_jepa.errors import UserError
from mamba3_jepa.models.state_dict import load_state
from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.distributed import all_gather_object, any_rank, rank, world_size
from mamba3_jepa.training.interrupt import Interrupted, StopSignal
from mamba3_jepa.training.optim import build_optimizer
from mamba3_jepa.training.progress import ProgressReport
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.schedule import Position, Schedule, learning_rate
from mamba3_jepa.training.task import Task

logger = logging.getLogger(__name__)


def fit(task: Task, settings: TrainSettings, run: Run, accelerator: Accelerator) -> None:
    """Train `task` to the end of its schedule, saving into `run`.

    Raises:
        UserError: the loss or the gradient stopped being finite (names the step), or a file cannot be written.
        Interrupted: SIGTERM or Ctrl-C arrived; the state has been saved.
    """
    schedule = Schedule.of(task, settings)
    objective = accelerator.prepare(task.objective)
    optimizer = accelerator.prepare(
        build_optimizer(objective, lr=settings.lr or 0.0, weight_decay=settings.weight_decay)
    )
    state = _State(task, settings, run, accelerator, objective, optimizer, schedule)
    state.restore()
    with StopSignal() as stop, ProgressReport(schedule, state.position, run.is_main) as progress:
        while state.position.step < schedule.total_steps:
            for micro_batches in state.groups(progress):
                metrics = state.step(micro_batches)
                if not run.begun:  # a first step has shown that data, settings and device go together
                    run.begin(task)
                progress.advance(state.position, metrics, samples=_samples(micro_batches))
                position = state.position
                finished = position.step >= schedule.total_steps
                epoch_ends = position.batch >= schedule.steps_per_epoch * settings.grad_accum
                if position.step % settings.log_every == 0 or finished:
                    run.log(position, metrics | progress.rates())
                if finished or (position.step % settings.eval_every == 0 if settings.eval_every else epoch_ends):
                    state.evaluate()
                if epoch_ends:
                    position.epoch, position.batch = position.epoch + 1, 0
                (stopping,) = any_rank(stop.received is not None, device=accelerator.device)
                if finished or epoch_ends or stopping or position.step % settings.save_every == 0:
                    state.save()
                if stopping and not finished:
                    number = stop.received or 15
                    raise Interrupted(
                        f"stopped by request after step {position.step} of {schedule.total_steps}; "
                        f"saved in {run.last_path}; the same command with `resume` continues",
                        number,
                    )
                if finished or epoch_ends:
                    break


class _State:
    """The moving parts of one run, so that `fit` reads as the story."""

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        run: Run,
        accelerator: Accelerator,
        objective: nn.Module,
        optimizer: Any,
        schedule: Schedule,
    ) -> None:
        self.task, self.settings, self.run, self.accelerator = task, settings, run, accelerator
        self.objective, self.optimizer, self.schedule = objective, optimizer, schedule
        self.position = Position()
        self.metrics: dict[str, float] = {}

    def groups(self, progress: ProgressReport) -> Iterator[list[Any]]:
        """Lists of `grad_accum` micro-batches, from the current position to the end of the epoch."""
        group: list[Any] = []
        loader = iter(self.task.batches(self.position.epoch, skip=self.position.batch))
        while True:
            with progress.waiting():
                batch = next(loader, None)
            if batch is None:
                return
            group.append(batch)
            if len(group) == self.settings.grad_accum:
                yield group
                group = []

    def step(self, micro_batches: list[Any]) -> dict[str, float]:
        """One optimizer step; the position moves on. Returns scalars for the log."""
        lr = learning_rate(
            self.position.step,
            peak=self.settings.lr or 0.0,
            warmup_steps=self.schedule.warmup_steps,
            total_steps=self.schedule.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.objective.train()
        self.optimizer.zero_grad()
        logged: list[dict[str, Tensor]] = []
        weights = self.task.weights(micro_batches)
        for i, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
                output = self.objective(batch.to(self.accelerator.device))
                self._demand_finite("loss", output.loss)
                self.accelerator.backward(output.loss * weight)
            logged.append({"loss": output.loss.detach(), **output.logged})
        grad_norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.max_grad_norm)
        if self.settings.precision != "fp16":  # the fp16 scaler skips such steps by itself
            self._demand_finite("gradient norm", grad_norm)
        self.optimizer.step()
        self.task.after_step()
        self.position.step += 1
        self.position.batch += len(micro_batches)
        metrics = {f"train/{name}": _mean([entry[name] for entry in logged]) for name in logged[0]}
        return metrics | {"train/grad_norm": float(grad_norm), "train/lr": lr}

    def _demand_finite(self, what: str, value: Tensor) -> None:
        (broken,) = any_rank(not bool(torch.isfinite(value)), device=self.accelerator.device)
        if broken:
            raise UserError(
                f"non-finite {what} ({float(value.detach())}) at step {self.position.step + 1} "
                f"(epoch {self.position.epoch + 1}); "
                f"the weights were not updated. Last checkpoint: {self.run.describe_last()}. "
                "Try a lower `lr`, a longer `warmup_steps` or `precision` fp32."
            )

    def evaluate(self) -> None:
        """Validate, log, and keep the best weights."""
        started = time.monotonic()
        self.objective.eval()
        # never under autocast: rounding must not decide which weights are the best
        validation = self.task.validate(self.accelerator.device)
        self.metrics = validation.metrics
        better = validation.score > self.position.best_score
        if better:
            self.position.best_score = validation.score
        self.run.log(self.position, validation.metrics | {"val/seconds": time.monotonic() - started})
        if not self.run.is_main:
            return
        self.run.report(validation, self.position, better)
        if better:
            self.run.save_best(self._checkpoint_fields())
        self.task.illustrate(self.run.folder)
        self.run.plot()

    def save(self) -> None:
        """Write the last checkpoint, with everything a continuation needs."""
        rng = all_gather_object(_rng_state(self.accelerator.device))
        if self.run.is_main:
            trainer = {
                "position": dataclasses.asdict(self.position),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "objective": {
                    name: parameter.detach() for name, parameter in self.task.objective.named_parameters(recurse=False)
                },
                "rng": rng,
                "world_size": world_size(),
            }
            self.run.save_last(self._checkpoint_fields() | {"trainer": trainer})

    def restore(self) -> None:
        """Continue where the run's last checkpoint stands, if there is one to continue."""
        checkpoint = self.run.resumed
        if checkpoint is None or checkpoint.trainer is None:
            return
        trainer = checkpoint.trainer
        load_state(self.task.model, checkpoint.model, source=str(self.run.last_path))
        own = dict(self.task.objective.named_parameters(recurse=False))
        with torch.no_grad():
            for name, value in trainer["objective"].items():
                own[name].copy_(value)
        self.optimizer.load_state_dict(trainer["optimizer"])
        if self.accelerator.scaler is not None and trainer["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(trainer["scaler"])
        self.position = Position(**trainer["position"])
        self.metrics = checkpoint.metrics
        if len(trainer["rng"]) == world_size():
            _set_rng_state(trainer["rng"][rank()], self.accelerator.device)
        self.run.forget_metrics_after(self.position.step)
        logger.info(
            "continuing from step %d (epoch %d, batch %d)",
            self.position.step, self.position.epoch + 1, self.position.batch,
        )  # fmt: skip

    def _checkpoint_fields(self) -> dict[str, Any]:
        return {
            "phase": self.task.phase,
            "config": self.task.config,
            "model": self.task.model.state_dict(),
            "metrics": self.metrics,
            **self.task.checkpoint_fields(),
        }


def _samples(micro_batches: list[Any]) -> int:
    return sum(len(batch) for batch in micro_batches) * world_size()


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack([value.float().cpu() for value in values]).mean())


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
