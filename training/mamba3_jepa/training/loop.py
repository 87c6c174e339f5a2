"""The training loop, one for all phases: fetch, accumulate, check, clip, step, log, evaluate, save.

Positions count micro-batches within an epoch and optimizer steps over the run, so that a run can be left and
continued between any two steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.models.fused import fused
from mamba3_jepa.models.state_dict import load_state
from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.distributed import (
    all_gather_object,
    any_rank,
    fail_together,
    from_rank_0,
    rank,
    sum_over_ranks,
    world_size,
)
from mamba3_jepa.training.interrupt import Interrupted, StopRequested, StopSignal
from mamba3_jepa.training.optim import build_optimizer
from mamba3_jepa.training.progress import ProgressReport
from mamba3_jepa.training.rng import rng_state, set_rng_state
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.schedule import Position, Schedule, learning_rate
from mamba3_jepa.training.shared_checkpoint import read_from_rank_0
from mamba3_jepa.training.sharing import SharedOut, whole_value
from mamba3_jepa.training.task import Task, Validation

logger = logging.getLogger(__name__)

_UNDRAWN = 30  # times as long as pictures took to draw passes before they are drawn again


def fit(task: Task, settings: TrainSettings, run: Run, accelerator: Accelerator) -> None:
    """Train `task` to the end of its schedule, saving into `run`.

    Raises:
        UserError: the loss or the gradient stopped being finite (names the step), nothing of an epoch can be read, or a
            file cannot be written.
        Interrupted: SIGTERM or Ctrl-C arrived; the state has been saved.
    """
    schedule = Schedule.of(task, settings)
    state = _State(task, settings, run, accelerator, schedule)
    state.restore()
    with run.writer, StopSignal() as stop, ProgressReport(schedule, state.position, run.is_main) as progress:
        if state.validation_due():  # it was stopped
            state.begin()
            state.settle()
        while not state.finished:
            try:
                metrics = state.step(partial(state.read, progress, stop))
            except _OutOfDataError:
                state.run_out()
                continue
            if not run.begun:  # a first step has shown that data, settings and device go together
                state.begin()
            progress.advance(state.position, metrics, samples=state.n_samples)
            if state.finished or state.position.step % settings.log_every == 0:
                state.log(metrics | state.counts() | progress.rates())
            state.settle()
        state.finish()


class _OutOfDataError(Exception):
    """The data ended before the step had all its micro-batches."""


class _State:
    """The moving parts of one run, so that `fit` reads as the story."""

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        run: Run,
        accelerator: Accelerator,
        schedule: Schedule,
    ) -> None:
        self.task, self.settings, self.run, self.accelerator = task, settings, run, accelerator
        self.schedule = schedule
        self.objective: nn.Module = task.objective
        self.optimizer: Any = None  # until `restore`
        self._shared: SharedOut | None = None
        self.position = Position()
        self.metrics: dict[str, float] = {}
        self.n_samples = 0  # of the last step, over all ranks
        self._epoch_samples: int | None = 0  # of the epoch so far; None where it was continued
        self._counts: dict[str, float] = {}
        self._loader: Iterator[Any] | None = None
        self._failure: UserError | None = None
        self._saved_step = -1
        self._drawn_next = -math.inf  # by the clock: not before
        self._before_step: dict[str, Tensor] | None = None  # of the random numbers, while a step is being done

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.position.step >= self.schedule.total_steps

    def read(self, progress: ProgressReport, stop: StopSignal) -> Any:
        """The next micro-batch of this process; all ranks read together.

        Raises:
            _OutOfDataError: there is none.
            UserError, Interrupted: see `obey`.
        """
        if self._loader is None:
            self._loader = iter(self.task.batches(self.position.epoch, skip=self.position.batch))
        batch = None
        try:
            with StopSignal.heard_at_once(), progress.waiting():
                batch = next(self._loader, None)
        except StopRequested:
            pass  # `obey` will not return
        except UserError as error:
            self._failure = error
        self.obey(stop)
        if batch is None:
            raise _OutOfDataError
        return batch

    def obey(self, stop: StopSignal) -> None:
        """Leave, all ranks together, if one of them cannot read or write on or was asked to stop.

        Raises:
            UserError: the data's, or the checkpoint's.
            Interrupted: as asked; the state has been saved.
        """
        self._failure = self._failure or self.run.writer.failure()
        stopping, failed = any_rank(
            stop.received is not None, self._failure is not None, device=self.accelerator.device
        )  # fmt: skip
        if failed:
            fail_together(self._failure)
        if stopping:
            self.leave(stop.received or signal.SIGTERM)

    def leave(self, number: int) -> NoReturn:
        """Save, unless nothing has been done, and end the run because of signal `number`."""
        self.task.say_left_out()
        if self._before_step is not None:
            set_rng_state(self._before_step, self.accelerator.device)
        if self.position.step == 0:
            raise Interrupted("stopped by request before the first step; nothing was saved", number)
        if self.run.begun and self._saved_step != self.position.step:
            self.save(last=True)
        self.finish()
        raise Interrupted(
            f"stopped by request after step {self.position.step} of {self.schedule.total_steps}; "
            f"saved in {self.run.last_path}; the same command with `resume` continues",
            number,
        )

    def settle(self) -> None:
        """What is due after a step: validation, the end of the epoch, a save."""
        position, settings = self.position, self.settings
        epoch_ends = self._epoch_ends()
        if epoch_ends and self._epoch_samples == 0:
            raise UserError(
                f"epoch {position.epoch + 1}: not one of its samples could be read{self.task.say_left_out()}"
            )
        better = self.validation_due() and self.evaluate()
        if epoch_ends:
            self.end_epoch()
        self.save(best=better, last=self.finished or epoch_ends or position.step % settings.save_every == 0)

    def validation_due(self) -> bool:
        """Whether the last step is one to validate after, and that has not been done."""
        every, step = self.settings.eval_every, self.position.step
        due = self.finished or (step % every == 0 if every else self._epoch_ends())
        return due and step != self.position.validated

    def _epoch_ends(self) -> bool:
        return self.position.batch >= self.schedule.steps_per_epoch * self.task.micro_batches

    def run_out(self) -> None:
        """The data ended before the epoch's last step: fewer samples can be read than when the run was saved.

        Raises:
            UserError: there was not one step in the whole epoch.
        """
        if self.position.batch == 0:
            raise UserError(
                f"epoch {self.position.epoch + 1}: the data gave fewer batches than one step needs"
                f"{self.task.say_left_out()}"
            )
        self.end_epoch()

    def end_epoch(self) -> None:
        """On to the next one."""
        self.position.epoch, self.position.batch = self.position.epoch + 1, 0
        self._loader, self._epoch_samples = None, 0

    def step(self, read: Callable[[], Any]) -> dict[str, float]:
        """One optimizer step; the position moves on. Returns scalars for the log.

        Args:
            read: gives the next micro-batch.
        """
        lr = learning_rate(
            self.position.step,
            peak=self.settings.lr or 0.0,
            warmup_steps=self.schedule.warmup_steps,
            total_steps=self.schedule.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # runs from before there was one have none
        self.objective.train()
        self.optimizer.zero_grad()
        self._before_step = rng_state(self.accelerator.device)
        logged: list[dict[str, Tensor]] = []
        weights: list[float] = []
        n_samples = 0
        for batch, weight in self.task.step(read):
            last = len(logged) == self.task.micro_batches - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
                output = self.objective(batch.to(self.accelerator.device))
                self._demand_finite("loss", output.loss)
                self.accelerator.backward(output.loss * weight)
            logged.append({"loss": output.loss.detach(), **output.logged})
            weights.append(weight)
            n_samples += len(batch)
        grad_norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.max_grad_norm)
        grad_norm = whole_value(grad_norm)
        if self.settings.precision != "fp16":  # the fp16 scaler skips such steps by itself
            self._demand_finite("gradient norm", grad_norm)
        self.optimizer.step()
        self.task.after_step()
        self._before_step = None
        self.position.step += 1
        self.position.batch += len(logged)
        metrics = self._over_ranks(logged, weights, n_samples)
        return metrics | {"train/grad_norm": float(grad_norm), "train/lr": lr}

    def _over_ranks(self, logged: list[dict[str, Tensor]], weights: list[float], n_samples: int) -> dict[str, float]:
        """What was logged of a step, over its micro-batches and all ranks: means, weighted as the losses are; counts
        are added up until `counts` is asked for them."""
        factors = {name: [1.0] * len(weights) if name in self.task.counts else weights for name in logged[0]}
        sums = [
            sum(float(entry[name]) * factor for entry, factor in zip(logged, factors[name], strict=True))
            for name in factors
        ]
        *sums, total = sum_over_ranks([*sums, n_samples], self.accelerator.device)
        self.n_samples = int(total)
        if self._epoch_samples is not None:
            self._epoch_samples += self.n_samples
        means = {}
        for name, value in zip(factors, sums, strict=True):
            if name in self.task.counts:
                self._counts[name] = self._counts.get(name, 0.0) + value
            else:
                means[f"train/{name}"] = value / world_size()
        return means

    def counts(self) -> dict[str, float]:
        """Counts since the last call."""
        counts, self._counts = self._counts, {}
        return {f"train/{name}": value for name, value in counts.items()}

    def _demand_finite(self, what: str, value: Tensor) -> None:
        (broken,) = any_rank(not bool(torch.isfinite(value)), device=self.accelerator.device)
        if broken:
            raise UserError(
                f"non-finite {what} ({float(value.detach())}) at step {self.position.step + 1} "
                f"(epoch {self.position.epoch + 1}); "
                f"the weights were not updated. Last checkpoint: {self.run.describe_last()}. "
                "Try a lower `lr`, a longer `warmup_steps` or `precision` fp32."
            )

    def begin(self) -> None:
        """Make the run's folder."""
        with self._whole():
            self.run.begin(self.task)

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """For what needs all weights; all ranks enter together."""
        return contextlib.nullcontext() if self._shared is None else self._shared.whole()

    def evaluate(self) -> bool:
        """Validate and log; whether the weights are the best so far."""
        with self._whole():
            return self._evaluate()

    def _evaluate(self) -> bool:
        started = time.monotonic()
        self.objective.eval()
        try:  # never under autocast: rounding must not decide which weights are the best
            validation = self.task.validate(self.accelerator.device)
        except StopRequested as request:
            self.leave(request.number)  # it is due again when the run goes on
        self.position.validated = self.position.step
        self.metrics = validation.metrics
        better = validation.score > self.position.best_score
        if better:
            self.position.best_score = validation.score
        self.log(validation.metrics | {"val/seconds": time.monotonic() - started})
        from_rank_0(lambda: self._show(validation, better))
        return better

    def _show(self, validation: Validation, better: bool) -> None:
        self.run.report(validation, self.position, better)
        started = time.monotonic()
        if self.finished or started >= self._drawn_next:
            self.task.illustrate(self.run.folder)
            self.run.plot()
            ended = time.monotonic()
            self._drawn_next = ended + _UNDRAWN * (ended - started)

    def log(self, metrics: dict[str, float]) -> None:
        """Log at the position; that it cannot be done ends the run of all ranks a little later."""
        try:
            self.run.log(self.position, metrics)
        except UserError as error:
            self._failure = self._failure or error

    def save(self, *, best: bool = False, last: bool = False) -> None:
        """Write the best weights, the last checkpoint, which has everything a continuation needs, or both. Training
        stands still until they are copied, and until what was saved before is written.

        Raises:
            UserError: that cannot be written, nor what was logged; on every rank.
        """
        if not (best or last):
            return
        gathered: dict[str, Any] = {}
        if last:
            rng, kernels = all_gather_object(rng_state(self.accelerator.device)), all_gather_object(fused.kept())
            gathered = {"optimizer": self._optimizer_state(), "rng": rng, "kernels": kernels}
        with self._whole():
            from_rank_0(lambda: self._save(gathered, best=best, last=last))
        if last:
            self._saved_step = self.position.step

    def _optimizer_state(self) -> dict[str, Any]:
        """On rank 0 all of it; all ranks call it together."""
        if self._shared is None:
            return self.optimizer.state_dict()
        return self._shared.whole_state(self.optimizer.optimizer)

    def _save(self, gathered: dict[str, Any], *, best: bool, last: bool) -> None:
        self._demand_logged()
        fields = {
            "phase": self.task.phase,
            "config": self.task.config,
            "model": self.task.model.state_dict(),
            "metrics": self.metrics,
            **self.task.checkpoint_fields(),
        }
        self.run.save(
            best=fields if best else None, last=fields | {"trainer": self._trainer(gathered)} if last else None
        )

    def _trainer(self, gathered: dict[str, Any]) -> dict[str, Any]:
        """Everything that a continuation needs beside the weights; `gathered`: what is of all ranks."""
        return {
            "position": dataclasses.asdict(self.position),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "objective": {
                name: parameter.detach() for name, parameter in self.task.objective.named_parameters(recurse=False)
            },
            **gathered,
            "measure": self.task.measure,
            "world_size": world_size(),
            "micro_batches": self.task.micro_batches,
        }

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            UserError: it was not; on every rank.
        """
        from_rank_0(self._demand_written)

    def _demand_written(self) -> None:
        self.run.writer.wait()
        self._demand_logged()

    def _demand_logged(self) -> None:
        if self._failure is not None:
            raise self._failure

    def restore(self) -> None:
        """Get ready to train: where the run's last checkpoint stands, if there is one to continue."""
        checkpoint = self.run.resumed
        if checkpoint is None or checkpoint.trainer is None:
            self._prepare()
            return
        trainer = checkpoint.trainer
        best_score = None if trainer.get("measure") == self.task.measure else self._score_best_again()
        load_state(self.task.model, checkpoint.model, source=str(self.run.last_path))
        own = dict(self.task.objective.named_parameters(recurse=False))
        with torch.no_grad():
            for name, value in trainer["objective"].items():
                own[name].copy_(value)
        self._prepare()
        if self._shared is None:
            self.optimizer.load_state_dict(trainer["optimizer"])
        else:
            self._shared.load_whole_state(self.optimizer.optimizer, trainer["optimizer"])
        if self.accelerator.scaler is not None and trainer["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(trainer["scaler"])
        # Earlier versions did not write down when they had validated; they saved after it.
        self.position = Position(**{"validated": trainer["position"]["step"]} | trainer["position"])
        if best_score is not None:
            self.position.best_score = best_score
        theirs = trainer.get("micro_batches") or checkpoint.run.get("grad_accum", self.settings.grad_accum)
        self.position.batch = self.position.batch // theirs * self.task.micro_batches
        self._epoch_samples = None if self.position.batch else 0
        self._saved_step = self.position.step
        self.metrics = checkpoint.metrics
        self.task.resume(checkpoint)
        if len(trainer["rng"]) == world_size():
            set_rng_state(trainer["rng"][rank()], self.accelerator.device)
        self.run.forget_metrics_after(self.position.step)
        logger.info(
            "continuing from step %d (epoch %d, batch %d)",
            self.position.step, self.position.epoch + 1, self.position.batch,
        )  # fmt: skip

    def _prepare(self) -> None:
        """The objective on all processes, with its first weights, and its optimizer."""
        if self.task.shares_weights:
            # as in evaluation, so that it is not copied to all processes: only its precision is arranged for
            self.objective = self.accelerator.prepare_model(self.task.objective, evaluation_mode=True)
            self._shared = SharedOut(self.objective, self.accelerator.device)
        else:
            self.objective = self.accelerator.prepare(self.task.objective)
        self.optimizer = self.accelerator.prepare(
            build_optimizer(self.objective, self.settings.lr or 0.0, self.settings.weight_decay, self.task.lr_scales)
        )

    def _score_best_again(self) -> float:
        """The score of the run's best weights, for a run whose own measure is another; the model then has them."""
        path = self.run.best_path
        best = read_from_rank_0(path, lambda: load_checkpoint(path) if path.exists() else None)
        if best is None:
            return float("-inf")
        load_state(self.task.model, best.model, source=str(path))
        self.objective.eval()
        score = self.task.validate(self.accelerator.device).score
        if self.run.is_main:
            logger.warning("%s was chosen by another measure than today's: it was measured again", path)
        return score
