"""How long a run is, where it stands, and the learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.distributed import world_size
from mamba3_jepa.training.task import Task


@dataclass(kw_only=True)
class Position:
    """Where the run stands: optimizer steps done, micro-batches consumed in the current epoch, the best validation's
    score, and the step of the last one."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_score: float = float("-inf")
    validated: int = 0


@dataclass(kw_only=True)
class Schedule:
    """How long the run is, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @staticmethod
    def of(task: Task, settings: TrainSettings) -> Schedule:
        steps_per_epoch = task.batches_per_epoch // task.micro_batches
        if steps_per_epoch == 0:
            raise UserError(
                f"one optimizer step needs {task.micro_batches} batches of {settings.batch_size} "
                f"on each of {world_size()} process(es), but an epoch has only {task.batches_per_epoch}: "
                "lower `batch_size` or `grad_accum`, or give more data"
            )
        total = steps_per_epoch * (settings.epochs or 1)
        total = min(total, settings.max_steps or total)
        warmup = settings.warmup_steps
        if warmup is None:
            warmup = min(2000, max(1, total // 20))
        return Schedule(steps_per_epoch=steps_per_epoch, total_steps=total, warmup_steps=warmup)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, final: float = 0.05) -> float:
    """The rate for optimizer step `step` (0-based): linear warm-up to `peak`, then a cosine down to `final * peak`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
