"""Phase 2 from settings to checkpoints: takes phase 1's model, computes what its frozen part gives, trains the
Y-Decoder on it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from numpy.typing import NDArray

from mamba3_jepa.data.answers import common_answers
from mamba3_jepa.data.sources import DataSplits, Source
from mamba3_jepa.data.splits import spread
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.models.vljepa import Mamba3Jepa, parameter_counts
from mamba3_jepa.settings.training import Phase2Settings, TrainSettings
from mamba3_jepa.training.decoder import DecoderTask
from mamba3_jepa.training.frozen import FrozenOutputs, frozen_outputs
from mamba3_jepa.training.jepa import describe
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.phase1 import compile_layers, demand_same, open_data
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import build_accelerator, spare_cores
from mamba3_jepa.training.task import demand_one_batch

logger = logging.getLogger(__name__)

_FROZEN_BATCH = 64  # samples the frozen model sees at once


def train_decoder(settings: Phase2Settings) -> None:
    """Train as `settings` say; leaves checkpoints, metrics and plots in the output directory.

    A resumed run goes on with the weights it was started with, whatever has become of the phase 1 checkpoint.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM or Ctrl-C; the state has been saved.
    """
    settings.check()
    last = settings.output_dir / "phase2_last.pt"
    if settings.resume and last.exists():
        start, start_path = load_checkpoint(last, phase=2), last
    else:
        start, start_path = load_phase1(settings.phase1_checkpoint), settings.phase1_checkpoint
    settings = settings.resolved(start.config.preset)
    accelerator = build_accelerator(settings)
    data = open_data(settings, start.config)
    run = Run(settings, phase=2, accelerator=accelerator)
    demand_same(run, start.config, data)
    model = Mamba3Jepa.from_loaded(start, str(start_path), accelerator.device)
    warn_of_seen_samples(start, data, settings)
    model.requires_grad_(False)
    set_seed(settings.seed)  # the decoder's first weights depend on the seed alone
    decoder = model.y_decoder or model.add_decoder()
    decoder.requires_grad_(True)
    if settings.compile:
        compile_layers(model)
    demand_one_batch(data.train.name, len(data.train_indices), settings)
    train = _outputs(model, data.train, data.train_indices, settings)
    val = _outputs(model, data.val, spread(data.val_indices, settings.val_samples or 1), settings)
    if run.is_main:
        _say(model, data, train, val)
    provenance = describe(data) | {"phase1": origin(start), "answers": _answers(start, data)}
    fit(DecoderTask(model, train, val, data, settings, provenance), settings, run, accelerator)
    accelerator.end_training()
    if run.is_main:
        logger.info("done: %s (best), %s (last)", run.best_path, run.last_path)


def load_phase1(path: Path) -> Checkpoint:
    """The checkpoint of phase 1 that phase 2 starts from.

    Raises:
        UserError: there is none, it is damaged, or it is of another phase; says what to give instead.
    """
    if not path.exists():
        raise UserError(
            f"no checkpoint at {path}: train phase 1 first (train_jepa.py), or name one, --phase1-checkpoint"
        )
    checkpoint = load_checkpoint(path)
    if checkpoint.phase == 2:
        raise UserError(
            f"{path} is a phase 2 checkpoint; phase 2 starts from one of phase 1, such as "
            "checkpoints/phase1/phase1_best.pt. To go on with a phase 2 run that was left, repeat its command with "
            "--resume"
        )
    if checkpoint.phase != 1:
        raise UserError(
            f"{path} is a phase {checkpoint.phase} checkpoint; phase 2 starts from one of phase 1, such as "
            "checkpoints/phase1/phase1_best.pt"
        )
    return checkpoint


def warn_of_seen_samples(start: Checkpoint, data: DataSplits, settings: TrainSettings) -> None:
    """Say so if part of what is held out now was trained on by the phase before."""
    before = start.run.get("val_fraction", settings.val_fraction)
    if data.train.name == start.data.get("source") and not data.synthetic and before < settings.val_fraction:
        logger.warning(
            "--val-fraction %g: the phase before held out only %g of the same data, so it has seen part of what "
            "validates this one; the numbers will look too good. Give --val-fraction %g.",
            settings.val_fraction, before, before,
        )  # fmt: skip


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an earlier phase was trained on, for the checkpoint of the next one."""
    if checkpoint.phase != 1:  # a resumed run: it has been written down already
        return dict(checkpoint.data.get("phase1", {}))
    return {name: value for name, value in checkpoint.data.items() if name != "answers"}


def _outputs(model: Mamba3Jepa, source: Source, indices: NDArray[np.int64], settings: Phase2Settings) -> FrozenOutputs:
    return frozen_outputs(
        model,
        source,
        indices,
        cache_dir=settings.cache_dir,
        batch_size=_FROZEN_BATCH,
        workers=spare_cores() if settings.workers is None else settings.workers,
        on_bad_sample=settings.on_bad_sample,
        precision=settings.precision,
    )


def _answers(start: Checkpoint, data: DataSplits) -> list[str]:
    """The most frequent answers of the training data, from the checkpoint where it has seen the same data."""
    known = start.data.get("answers")
    if known is not None and start.data.get("fingerprint") == data.fingerprint:
        return list(known)
    return common_answers(data.train, data.train_indices)


def _say(model: Mamba3Jepa, data: DataSplits, train: FrozenOutputs, val: FrozenOutputs) -> None:
    counts = ", ".join(f"{name} {count:,}" for name, count in parameter_counts(model).items())
    logger.info("parameters: %s; only y_decoder trains", counts)
    logger.info("data: %s, %d training and %d validation samples", data.train.name, len(train), len(val))
