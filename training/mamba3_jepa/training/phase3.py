"""Phase 3 from settings to checkpoints: takes phase 2's model, makes confusion from the data, trains the confusion
monitor and the state injector on the frozen model's pooled states, and exports them."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from numpy.typing import NDArray

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.answers import common_answers
from mamba3_jepa.data.confusion import CONFUSION_KINDS, ConfusionSource
from mamba3_jepa.data.sources import DataSplits, open_splits
from mamba3_jepa.data.splits import spread
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.writer import write_component
from mamba3_jepa.files.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.models.vljepa import Mamba3Jepa, parameter_counts
from mamba3_jepa.settings.training import Phase3Settings
from mamba3_jepa.training.agent import AgentTask
from mamba3_jepa.training.agent_data import AgentData, agent_data
from mamba3_jepa.training.jepa import describe
from mamba3_jepa.training.loop import fit
from mamba3_jepa.training.phase1 import compile_layers, demand_same
from mamba3_jepa.training.phase2 import warn_of_seen_samples
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import build_accelerator, spare_cores
from mamba3_jepa.training.task import demand_one_batch

logger = logging.getLogger(__name__)

_VAL_SAMPLES_PER_SCENE = 5  # a caption and two questions, and each question once more as one that confuses


def train_agent(settings: Phase3Settings) -> None:
    """Train as `settings` say; leaves checkpoints, recursion.safetensors, metrics and plots in the output directory.

    A resumed run goes on with the weights it was started with, whatever has become of the phase 2 checkpoint.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM or Ctrl-C; the state has been saved.
    """
    settings.check()
    last = settings.output_dir / "phase3_last.pt"
    if settings.resume and last.exists():
        start, start_path = load_checkpoint(last, phase=3), last
    else:
        start, start_path = load_phase2(settings.phase2_checkpoint), settings.phase2_checkpoint
    settings = settings.resolved(start.config.preset)
    config = _with_knowledge_dim(start.config, settings)
    accelerator = build_accelerator(settings)
    data = _open_data(settings, config)
    run = Run(settings, phase=3, accelerator=accelerator)
    demand_same(run, config, data)
    model = Mamba3Jepa.from_loaded(dataclasses.replace(start, config=config), str(start_path), accelerator.device)
    warn_of_seen_samples(start, data, settings)
    model.requires_grad_(False)
    set_seed(settings.seed)  # the first weights depend on the seed alone
    recursion = model.recursion or model.add_recursion()
    recursion.requires_grad_(True)
    if settings.compile:
        compile_layers(model)
    train, train_rows = _confusion(data, "train", settings, config.query_prompt)
    val, val_rows = _confusion(data, "val", settings, config.query_prompt)
    provenance = describe(data) | {
        "confusion": _counts(train),
        "earlier": _earlier(start),
        "answers": start.data.get("answers") or common_answers(data.train, data.train_indices),
    }
    demand_one_batch(train.name, len(train_rows), settings)
    train_data = _outputs(model, train, train_rows, settings, demand_vectors=True)
    val_data = _outputs(model, val, val_rows, settings, demand_vectors=False)
    if run.is_main:
        _say(model, train, train_data, val_data)
    fit(AgentTask(model, train_data, val_data, settings, provenance), settings, run, accelerator)
    accelerator.end_training()
    if run.is_main:
        exported = export_recursion(run.best_path, settings.output_dir)
        logger.info("done: %s (best), %s (last), %s", run.best_path, run.last_path, exported)


def export_recursion(checkpoint: Path, folder: Path) -> Path:
    """Write the trained part of a phase 3 checkpoint to `folder`/recursion.safetensors.

    Raises:
        UserError: the checkpoint cannot be read, or the file not be written.
    """
    path = folder / "recursion.safetensors"
    write_component(Mamba3Jepa.from_checkpoint(checkpoint), "recursion", path, phase=3)
    return path


def load_phase2(path: Path) -> Checkpoint:
    """The checkpoint of phase 2 that phase 3 starts from.

    Raises:
        UserError: there is none, it is damaged, or it is of another phase; says what to give instead.
    """
    if not path.exists():
        raise UserError(
            f"no checkpoint at {path}: train phase 2 first (train_decoder.py), or name one, --phase2-checkpoint"
        )
    checkpoint = load_checkpoint(path)
    if checkpoint.phase == 2:
        return checkpoint
    advice = (
        "train the decoder on it first (train_decoder.py --phase1-checkpoint)"
        if checkpoint.phase == 1
        else "to go on with a phase 3 run that was left, repeat its command with --resume"
    )
    raise UserError(
        f"{path} is a phase {checkpoint.phase} checkpoint; phase 3 starts from one of phase 2, such as "
        f"checkpoints/phase2/phase2_best.pt: {advice}"
    )


def _with_knowledge_dim(config: ModelConfig, settings: Phase3Settings) -> ModelConfig:
    if settings.knowledge_dim is None:
        return config
    return config.replace(recursion=dataclasses.replace(config.recursion, knowledge_dim=settings.knowledge_dim))


def _open_data(settings: Phase3Settings, config: ModelConfig) -> DataSplits:
    """All samples there are: phase 3 learns from questions without answer too, if they are labelled."""
    return open_splits(
        settings.data_dir,
        image_size=config.vision.image_size,
        seed=settings.seed,
        val_fraction=settings.val_fraction,
        n_scenes=settings.synthetic_scenes or 1,
        n_val_scenes=max(2, min(512, (settings.val_samples or 1) // _VAL_SAMPLES_PER_SCENE)),
        kind="all",
        on_bad_sample=settings.on_bad_sample,
    )


def _confusion(
    data: DataSplits, side: str, settings: Phase3Settings, query_prompt: str
) -> tuple[ConfusionSource, NDArray[np.int64]]:
    """Clear and confused samples of one side of the split, made of nothing from the other; and which to use."""
    if side == "train":
        source = ConfusionSource(
            data.train, data.train_indices, settings.seed, settings.confusion_kinds,
            beside=[data.val], query_prompt=query_prompt,
        )  # fmt: skip
        return source, np.arange(len(source))
    at_most = settings.val_samples or 1
    chosen = spread(data.val_indices, at_most)
    source = ConfusionSource(
        data.val, chosen, settings.seed, settings.confusion_kinds, beside=[data.train], query_prompt=query_prompt
    )
    return source, spread(np.arange(len(source)), at_most)


def _outputs(
    model: Mamba3Jepa,
    source: ConfusionSource,
    rows: NDArray[np.int64],
    settings: Phase3Settings,
    demand_vectors: bool,
) -> AgentData:
    return agent_data(
        model,
        source,
        rows,
        cache_dir=settings.cache_dir,
        workers=spare_cores() if settings.workers is None else settings.workers,
        on_bad_sample=settings.on_bad_sample,
        precision=settings.precision,
        demand_vectors=demand_vectors,
    )


def _counts(source: ConfusionSource) -> dict[str, int]:
    """Samples of each kind."""
    return dict(Counter(CONFUSION_KINDS[kind] for kind in source.kinds.tolist()))


def _earlier(start: Checkpoint) -> dict[str, Any]:
    """What the phases before were trained on."""
    if start.phase == 3:  # a resumed run: it has been written down already
        return dict(start.data.get("earlier", {}))
    return {name: value for name, value in start.data.items() if name != "answers"}


def _say(model: Mamba3Jepa, source: ConfusionSource, train: AgentData, val: AgentData) -> None:
    counts = ", ".join(f"{name} {count:,}" for name, count in parameter_counts(model).items())
    logger.info("parameters: %s; only recursion trains", counts)
    kinds = ", ".join(f"{name} {count:,}" for name, count in _counts(source).items())
    logger.info("data: %s, %d training (%s) and %d validation samples", source.name, len(train), kinds, len(val))
