"""The process a run lives in: device, precision, trackers, cores."""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from mamba3_jepa.device import TRAINING, best_device
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint
from mamba3_jepa.models.fused import demand_possible, fused
from mamba3_jepa.settings.training import Precision, TrainSettings
from mamba3_jepa.training.distributed import keep_group, local_world_size, rank
from mamba3_jepa.training.peers import watch_peers

# What one process does alone while the others wait may take long, such as the index of shards that are far away. That
# it is still there is seen in another way.
_PATIENCE = timedelta(hours=12)
_MIXED_PRECISION: dict[Precision, str] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(settings: TrainSettings) -> Accelerator:
    """The accelerator for these settings; joins the process group when launched as one of several, and
    watches the others from then on.

    Raises:
        UserError: a tracker is not installed, or the device cannot do the precision.
    """
    trackers = [name for name in ("wandb", "tensorboard") if getattr(settings, name)]
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"`{name}` needs the package {name}: pip install {name}")
    on_cpu = settings.cpu or best_device(TRAINING) == "cpu"
    if settings.precision == "fp16" and on_cpu:
        raise UserError("`precision` fp16 needs a CUDA GPU; on this machine use bf16 or fp32")
    accelerator = Accelerator(
        mixed_precision=_MIXED_PRECISION[settings.precision],
        cpu=on_cpu,
        log_with=trackers or None,
        project_dir=settings.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    watch_peers(settings.output_dir)
    return accelerator


def use_kernels(settings: TrainSettings, accelerator: Accelerator, resumed: Checkpoint | None) -> None:
    """Before a layer computes: which fused kernels it may take; of a run that goes on those it took before, in the same
    variants, each rank's its own.

    Raises:
        UserError: they are required, and the device or the precision has none.
    """
    demand_possible(settings.kernels, accelerator.device, settings.precision == "bf16")
    of_ranks = (resumed.trainer or {}).get("kernels") if resumed is not None else None  # older runs kept none
    fused.begin(settings.kernels, of_ranks[rank() % len(of_ranks)] if of_ranks else None)


def end_training(accelerator: Accelerator) -> None:
    """Close the trackers and leave the process group."""
    keep_group()
    accelerator.end_training()


def spare_cores() -> int:
    """Data-loading processes per training process: the cores left beside two for training, at most 8.

    On two cores that is none: a worker there would take a core from every matrix product.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // local_world_size() - 2))
