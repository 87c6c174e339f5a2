"""What the loop asks of a phase. The three phases differ only behind this interface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, DataRecord
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.distributed import world_size

logger = logging.getLogger(__name__)

LrScales = Sequence[tuple[nn.Module, float]]


class StepOutput(NamedTuple):
    """What one forward pass returns: the scalar to minimise, and detached scalars worth logging."""

    loss: Tensor
    logged: dict[str, Tensor]


@dataclass(kw_only=True)
class Validation:
    """Result of a validation: flat metrics, the score that picks the best checkpoint (higher is better), and
    sentences the user should read."""

    metrics: dict[str, float]
    score: float
    warnings: list[str] = field(default_factory=list)


class Task(Protocol):
    """One phase of training."""

    phase: int
    config: ModelConfig
    batches_per_epoch: int
    """Micro-batches each process sees in one epoch."""
    micro_batches: int
    """Those of them that make one optimizer step."""
    counts: Sequence[str]
    """Names of what the objective logs that are counts, to be added up; the others are means."""
    lr_scales: LrScales
    """Modules that learn with a share of the learning rate, and the share."""
    shares_weights: bool
    """Whether each process keeps only a part of the weights, gradients and optimizer state."""
    measure: str
    """Which measure, on which data, `Validation.score` is: scores are compared with those of the same one only."""

    @property
    def objective(self) -> nn.Module:
        """Takes a batch on the device and returns a StepOutput; its parameters with requires_grad are what trains."""

    @property
    def model(self) -> nn.Module:
        """What a checkpoint stores."""

    def batches(self, epoch: int, skip: int) -> Iterable[Any]:
        """This process's micro-batches of `epoch`, without the first `skip`; the same for every call. One may come more
        than once, if that is how `step` reads them."""

    def step(self, read: Callable[[], Any]) -> Iterable[tuple[Any, float]]:
        """The `micro_batches` of one optimizer step, and the factor of each one's loss in the step's loss. Each goes
        through the objective before the next is asked for.

        Args:
            read: gives the next of `batches`, called equally often on every rank.
        """

    def say_left_out(self) -> str:
        """Say what was left out of training since the last time, on all ranks; called on every rank.

        Returns:
            the same in a few words, to stand behind a sentence; empty if nothing was.
        """

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over what a run that is continued knew of its data, and say what has changed."""

    def after_step(self) -> None:
        """Keep parameters where they belong after an optimizer step."""

    def validate(self, device: torch.device) -> Validation:
        """Measure the model on the held-out data; called on every rank, with the same result on all."""

    def illustrate(self, folder: Path) -> None:
        """Leave pictures of what the last validation saw in `folder`; called on the main process."""

    def checkpoint_fields(self) -> dict[str, Any]:
        """`tokenizer`, `data` and `temperature` of the checkpoint."""


def measure_on(name: str, record: DataRecord) -> str:
    """`Task.measure`: the measure called `name` on the validation samples of some data. Made-up samples, which another
    version may make otherwise, are part of it; real ones are not, as their files may have other names today."""
    held_out = (record.fingerprint or "").partition("+")[2]
    return f"{name}, {held_out}" if record.synthetic else name


class KeptOutputs:
    """What tasks share that train on frozen outputs kept from before: no data is read meanwhile."""

    model: Mamba3Jepa

    counts: Sequence[str] = ()
    lr_scales: LrScales = ()
    shares_weights = False

    def __init__(
        self,
        settings: TrainSettings,
        measure: str,
        record: DataRecord,
        bad: Sequence[str],
        temperature: float | None,
    ) -> None:
        """`measure`: name of what the score is; `record`: what the checkpoint says about the data; `bad`: what was
        wrong with samples left out of it; `temperature`: what phase 1 has learned, to be handed on."""
        self.micro_batches = settings.grad_accum
        self._record, self._bad, self._temperature = record, bad, temperature
        self.measure = measure_on(measure, record)

    def step(self, read: Callable[[], Any]) -> Iterable[tuple[Any, float]]:
        """They are small: all of a step are there at once, so that each may know the others' tokens."""
        batches = [read() for _ in range(self.micro_batches)]
        return zip(batches, self.weights(batches), strict=True)

    def weights(self, batches: Sequence[Any]) -> list[float]:
        """The factor of each micro-batch's loss in the step's loss: all count alike."""
        return [1 / len(batches)] * len(batches)

    def say_left_out(self) -> str:
        """It was said when the outputs were computed."""
        return left_out_of(self._bad)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Say so if other samples can be read than by the run that wrote `checkpoint`."""
        before, now = checkpoint.data.train_samples, self._record.train_samples
        if before != now:
            logger.warning(
                "%s: %s training samples can be read, it was %s when the run was saved: from here on they come in "
                "another order, and the schedule is theirs",
                self._record.source, now, before,
            )  # fmt: skip

    def after_step(self) -> None:
        """Nothing to keep in place."""

    def checkpoint_fields(self) -> dict[str, Any]:
        """The tokenizer, where the data came from, and phase 1's temperature."""
        tokenizer = self.model.tokenizer.to_json()
        return {"tokenizer": tokenizer, "data": self._record, "temperature": self._temperature}


def demand_one_batch(name: str, n_samples: int, settings: TrainSettings, bad: Sequence[str] = ()) -> None:
    """Refuse a global batch that the training data cannot fill once.

    Args:
        bad: what was wrong with samples that are not among the `n_samples`.

    Raises:
        UserError: names the data, `name`, both sizes, and what was left out.
    """
    size = (settings.batch_size or 1) * world_size()
    if n_samples < size:
        ranks = f" ({settings.batch_size} on each of {world_size()} processes)" if world_size() > 1 else ""
        raise UserError(
            f"{name}: `batch_size`: a batch of {size}{ranks} is larger than the {n_samples} samples there are"
            f"{left_out_of(bad)}"
        )


def left_out_of(bad: Sequence[str]) -> str:
    """Bad samples in a few words, to stand behind a sentence; empty if there are none."""
    return f": {len(set(bad))} were left out, the first: {bad[0]}" if bad else ""
