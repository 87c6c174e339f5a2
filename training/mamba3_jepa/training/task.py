"""What the loop asks of a phase. The three phases differ only behind this interface."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.distributed import world_size


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

    @property
    def objective(self) -> nn.Module:
        """Takes a batch on the device and returns a StepOutput; its parameters with requires_grad are what trains."""

    @property
    def model(self) -> nn.Module:
        """What a checkpoint stores."""

    def batches(self, epoch: int, skip: int) -> Iterable[Any]:
        """This process's micro-batches of `epoch`, without the first `skip`; the same for every call."""

    def weights(self, batches: Sequence[Any]) -> list[float]:
        """The factor of each micro-batch's loss in the step's loss."""

    def after_step(self) -> None:
        """Keep parameters where they belong after an optimizer step."""

    def validate(self, device: torch.device) -> Validation:
        """Measure the model on the held-out data; called on every rank, with the same result on all."""

    def illustrate(self, folder: Path) -> None:
        """Leave pictures of what the last validation saw in `folder`; called on the main process."""

    def checkpoint_fields(self) -> dict[str, Any]:
        """`tokenizer` and `data` of the checkpoint."""


def demand_one_batch(name: str, n_samples: int, settings: TrainSettings) -> None:
    """Refuse a global batch that the training data cannot fill once.

    Raises:
        UserError: names the data, `name`, and both sizes.
    """
    size = (settings.batch_size or 1) * world_size()
    if n_samples < size:
        ranks = f" ({settings.batch_size} on each of {world_size()} processes)" if world_size() > 1 else ""
        raise UserError(
            f"{name}: `batch_size`: a batch of {size}{ranks} is larger than the {n_samples} samples there are"
        )
