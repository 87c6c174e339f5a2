"""What the phases share before their first step: the checkpoint to go on from, the data, and what a checkpoint will say
of it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.answers import common_answers
from mamba3_jepa.data.sample import Kind
from mamba3_jepa.data.sources import DataSplits, open_splits
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, DataRecord, load_checkpoint
from mamba3_jepa.models.mamba3 import Mamba3
from mamba3_jepa.models.vljepa import Mamba3Jepa, parameter_counts
from mamba3_jepa.overrides import flattened
from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import spare_cores

logger = logging.getLogger(__name__)

_SCRIPTS = {1: "train_jepa.py", 2: "train_decoder.py", 3: "train_agent.py"}


def open_data(
    settings: TrainSettings,
    config: ModelConfig,
    *,
    kind: Kind = "target",
    val_samples_per_scene: int = 3,
    max_val_scenes: int = 256,
) -> DataSplits:
    """Training and validation samples of one kind.

    Args:
        val_samples_per_scene: how many samples the phase makes of each validation scene where the data is synthetic: of
            samples with a target a caption and two questions.
    """
    n_val_scenes = (settings.val_samples or 1) // val_samples_per_scene
    return open_splits(
        settings.data_dir,
        image_size=config.vision.image_size,
        seed=settings.seed,
        val_fraction=settings.val_fraction,
        n_scenes=settings.synthetic_scenes or 1,
        n_val_scenes=max(2, min(max_val_scenes, n_val_scenes)),
        kind=kind,
        on_bad_sample=settings.on_bad_sample,
    )


def workers(settings: TrainSettings) -> int:
    """Data-loading processes: as many as the settings say, or as there are cores to spare."""
    return spare_cores() if settings.workers is None else settings.workers


def starting_point(settings: TrainSettings, *, phase: int, earlier: Path) -> tuple[Checkpoint, Path]:
    """What a phase after the first goes on from, and its file: its own last checkpoint where a run is resumed,
    whatever has become of the earlier phase's, else that one.

    Raises:
        UserError: there is none, it is damaged, or it is of the wrong phase; says what to give instead.
    """
    last = settings.output_dir / f"phase{phase}_last.pt"
    if settings.resume and last.exists():
        return load_checkpoint(last, phase=phase), last
    return load_earlier(earlier, phase=phase), earlier


def load_earlier(path: Path, *, phase: int) -> Checkpoint:
    """The checkpoint of the phase before `phase` (2 or 3).

    Raises:
        UserError: there is none, it is damaged, or it is of another phase; says what to give instead.
    """
    before = phase - 1
    if not path.exists():
        raise UserError(
            f"no checkpoint at {path}: train phase {before} first ({_SCRIPTS[before]}), or name one, "
            f"`phase{before}_checkpoint`"
        )
    checkpoint = load_checkpoint(path)
    if checkpoint.phase == before:
        return checkpoint
    advice = ""
    if checkpoint.phase == phase:
        advice = f". To go on with a phase {phase} run that was left, repeat its command with `resume`"
    elif checkpoint.phase < before:
        advice = f": train phase {before} on it first ({_SCRIPTS[before]} `phase{checkpoint.phase}_checkpoint`)"
    raise UserError(
        f"{path} is a phase {checkpoint.phase} checkpoint; phase {phase} starts from one of phase {before}, such as "
        f"checkpoints/phase{before}/phase{before}_best.pt{advice}"
    )


def demand_same(run: Run, config: ModelConfig, data: DataSplits) -> None:
    """A continued run must see the model and the data it was started with.

    Raises:
        UserError: it does not.
    """
    if run.resumed is None:
        return
    if run.resumed.config != config:
        theirs, ours = flattened(run.resumed.config.to_dict()), flattened(config.to_dict())
        changed = "; ".join(f"{key} {theirs[key]} -> {ours[key]}" for key in ours if ours[key] != theirs[key])
        raise UserError(f"cannot resume {run.last_path}: it was made with another model configuration ({changed})")
    known = run.resumed.data
    if known.fingerprint != data.fingerprint:
        raise UserError(
            f"cannot resume {run.last_path}: the data has changed since ({data.train.name}, "
            f"{len(data.train_indices)} training samples; it was {known.source}, {known.train_samples}). "
            "Start a new run in another `output_dir`."
        )


def warn_of_seen_samples(start: Checkpoint, data: DataSplits, settings: TrainSettings) -> None:
    """Say so if part of what is held out now was trained on by the phase before."""
    before = start.run.get("val_fraction", settings.val_fraction)
    if data.train.name == start.data.source and not data.synthetic and before < settings.val_fraction:
        logger.warning(
            "`val_fraction` %g: the phase before held out only %g of the same data, so it has seen part of what "
            "validates this one; the numbers will look too good. Give `val_fraction` %g.",
            settings.val_fraction, before, before,
        )  # fmt: skip


def data_record(
    data: DataSplits, *, start: Checkpoint | None = None, phase: int = 1, confusion: dict[str, int] | None = None
) -> DataRecord:
    """What a checkpoint of `phase` says of its data.

    Args:
        start: what the phase goes on from; its answers are kept where it has seen the same data, and in phase 3, which
            learns no answers, wherever there are some.
        confusion: how many training samples there are of each kind, in phase 3.
    """
    known: list[str] = []
    earlier = None
    if start is not None:
        if phase == 3 or start.data.fingerprint == data.fingerprint:
            known = start.data.answers
        # of a resumed run: it has been written down already
        earlier = start.data.earlier if start.phase == phase else start.data.without_answers()
    return DataRecord(
        source=data.train.name,
        synthetic=data.synthetic,
        train_samples=len(data.train_indices),
        val_samples=len(data.val_indices),
        fingerprint=data.fingerprint,
        answers=known or common_answers(data.train, data.train_indices),
        confusion=confusion or {},
        earlier=earlier,
    )


def compile_layers(model: torch.nn.Module) -> None:
    """Compile each Mamba-3 layer in place; names in the state dict stay."""
    for module in model.modules():
        if isinstance(module, Mamba3):
            module.compile()


def say_model(model: Mamba3Jepa, trained: str | None = None) -> None:
    """The whole configuration, the parameters of each component, and which one is trained, if not all are."""
    parts: dict[str, list[str]] = {}
    for key, value in flattened(model.config.to_dict()).items():
        part, _, name = key.rpartition(".") if "." in key else ("model", "", key)
        parts.setdefault(part, []).append(f"{name} {value}")
    for part, values in parts.items():
        logger.info("%s: %s", part, ", ".join(values))
    counts = ", ".join(f"{name} {count:,}" for name, count in parameter_counts(model).items())
    logger.info("parameters: %s%s", counts, "" if trained is None else f"; only {trained} trains")
