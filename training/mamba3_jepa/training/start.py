"""What the phases share before their first step: the checkpoint to go on from, the data, and what a checkpoint will say
of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
from pathlib import Path

import torch
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Layer

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.answers import common_answers
from mamba3_jepa.data.content import first_difference, split_content
from mamba3_jepa.data.sample import Kind
from mamba3_jepa.data.scenes import SceneSplit
from mamba3_jepa.data.seen import warn_of_seen
from mamba3_jepa.data.sources import DataSplits, open_splits
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, DataRecord, load_checkpoint
from mamba3_jepa.models.mamba3 import Mamba3, Mamba3Backbone
from mamba3_jepa.models.state_dict import first_changed
from mamba3_jepa.models.vljepa import Mamba3Jepa, parameter_counts
from mamba3_jepa.overrides import values_by_key
from mamba3_jepa.settings.training import TrainSettings
from mamba3_jepa.training.beginning import Beginning
from mamba3_jepa.training.distributed import all_gather_object, from_rank_0, on_every_rank, rank
from mamba3_jepa.training.run import Run
from mamba3_jepa.training.session import spare_cores
from mamba3_jepa.training.shared_checkpoint import read_from_rank_0

logger = logging.getLogger(__name__)

_SCRIPTS = {1: "train_jepa.py", 2: "train_decoder.py", 3: "train_agent.py"}


def open_data(
    settings: TrainSettings,
    config: ModelConfig,
    *,
    kind: Kind = "target",
    scenes: SceneSplit = "train",
    val_samples_per_scene: int = 3,
    max_val_scenes: int = 256,
) -> DataSplits:
    """Training and validation samples of one kind.

    Args:
        scenes: the split to train on where the data is synthetic.
        val_samples_per_scene: how many samples the phase makes of each validation scene where the data is synthetic: of
            samples with a target a caption and two questions.

    Raises:
        UserError: see `open_splits`; or the ranks do not see the same data.
    """
    n_val_scenes = (settings.val_samples or 1) // val_samples_per_scene
    data = on_every_rank(
        lambda: open_splits(
            settings.data_dir,
            manifest=settings.manifest,
            image_size=config.vision.image_size,
            seed=settings.seed,
            val_fraction=settings.val_fraction,
            n_scenes=settings.synthetic_scenes or 1,
            n_val_scenes=max(2, min(max_val_scenes, n_val_scenes)),
            scenes=scenes,
            kind=kind,
            on_bad_sample=settings.on_bad_sample,
        )
    )
    if data.synthetic:
        return data
    _demand_agreement(data)
    content = from_rank_0(lambda: split_content(data.train, data.train_indices, data.val, data.val_indices))
    if content.shared and rank() == 0:
        logger.warning(
            "%d of %d validation samples show a picture that training samples show under another name: validation "
            "will look better than it is",
            content.shared, len(data.val_indices),
        )  # fmt: skip
    return dataclasses.replace(data, content=content)


def _demand_agreement(data: DataSplits) -> None:
    """Refuse hosts that do not see the same data, whose ranks would run out of it at different times."""
    seen = all_gather_object((data.fingerprint, len(data.train_indices), len(data.val_indices)))
    for number, (fingerprint, *sizes) in enumerate(seen):
        if (fingerprint, *sizes) != seen[0]:
            raise UserError(
                f"{data.train.name}: the host of rank {number} has other data ({sizes[0]} training and {sizes[1]} "
                f"validation samples) than that of rank 0 ({seen[0][1]} and {seen[0][2]}): give all hosts the same"
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
    if settings.resume:
        own = read_from_rank_0(last, lambda: load_checkpoint(last, phase=phase) if last.exists() else None)
        if own is not None:
            from_rank_0(lambda: _demand_same_model(own, last, earlier))
            return own, last
    return read_from_rank_0(earlier, lambda: load_earlier(earlier, phase=phase)), earlier


def _demand_same_model(own: Checkpoint, last: Path, path: Path) -> None:
    """Another file than the run was started with is welcome as long as it holds what that held."""
    recorded = Path(own.run.get(f"phase{own.phase - 1}_checkpoint", path))
    if not path.exists() or path.resolve() == recorded.resolve():
        return
    named = load_checkpoint(path, phase=own.phase - 1)
    name = first_changed(named.model, own.model)
    if name is not None:
        raise UserError(
            f"cannot resume {last}: `phase{named.phase}_checkpoint` {path} is another model than it was started "
            f"with ({name} differs); name that one, or choose another `output_dir`"
        )


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
    begun = run.beginning
    if begun is None:
        return
    if not data.synthetic:  # first: other texts also give another vocabulary
        _demand_same_data(run, begun, data)
    if begun.config != config:
        theirs, ours = values_by_key(begun.config), values_by_key(config)
        keys = [key for key in ours if ours[key] != theirs[key]]
        changed = "; ".join(f"{key} {theirs[key]} -> {ours[key]}" for key in keys)
        values = {key: theirs[key] if isinstance(theirs[key], str) else json.dumps(theirs[key]) for key in keys}
        again = " ".join(shlex.quote(f"{key}={value}") for key, value in values.items())
        raise UserError(
            f"cannot resume {begun.path}: it was made with another model configuration ({changed}). Resume with the "
            f"first run's, `model` {again}, or choose another `output_dir`"
        )
    if data.synthetic:  # last: it is drawn for the model's size of images
        _demand_same_data(run, begun, data)


def _demand_same_data(run: Run, begun: Beginning, data: DataSplits) -> None:
    known, changed = begun.data, ""
    if data.synthetic:  # another version may validate on other scenes; what is learnt from counts
        changed = "" if _of_training(known.fingerprint) == _of_training(data.fingerprint) else "its scenes"
    elif data.content is None or not known.content:
        changed = "" if known.fingerprint == data.fingerprint else "its names or lines"
        if not changed and data.content is not None and run.resumed is not None and run.is_main:
            logger.warning(
                "%s was written before the content of data was kept: only names were compared, not whether texts or "
                "pictures have changed",
                begun.path,
            )
    elif difference := first_difference(known.content, data.content.digests):
        changed, first, end = difference
        if end == first + 1:
            changed += f" of {data.origin(first)}"
        elif end:
            changed += f" among {end - first} samples from {data.origin(first)} on"
    if changed:
        raise UserError(
            f"cannot resume {begun.path}: the data has changed since: {changed} ({data.train.name}, "
            f"{len(data.train_indices)} training samples; it was {known.source}, {known.train_samples}). "
            "Put it back as it was, or start a new run in another `output_dir`."
        )


def _of_training(fingerprint: str | None) -> str:
    return (fingerprint or "").partition("+")[0]


def warn_of_seen_samples(start: Checkpoint, data: DataSplits, settings: TrainSettings, phase: int) -> None:
    """Say so if any earlier phase was trained on part of what is held out now.

    Args:
        start: what `phase` goes on from: the phase before, or, where a run is resumed, itself.
    """
    if data.content is None or rank() != 0:
        return
    earlier = (each for each in start.data.of_phases(start.phase) if each[0] != phase)
    same_share = start.run.get("val_fraction", settings.val_fraction) == settings.val_fraction
    warn_of_seen(earlier, data.content.held_out, same_split_as=data.fingerprint if same_share else "")


def data_record(
    data: DataSplits,
    *,
    start: Checkpoint | None = None,
    phase: int = 1,
    train_samples: int | None = None,
    confusion: dict[str, int] | None = None,
) -> DataRecord:
    """What a checkpoint of `phase` says of its data.

    Args:
        start: what the phase goes on from; its answers are kept where it has seen the same data, and in phase 3, which
            learns no answers, wherever there are some.
        train_samples: how many training samples could be read, where that is known.
        confusion: how many training samples there are of each kind, in phase 3.
    """
    known: list[str] = []
    earlier = None
    if start is not None:
        if phase == 3 or _is_same(start.data, data):
            known = start.data.answers
        # of a resumed run: it has been written down already
        earlier = start.data.earlier if start.phase == phase else start.data.without_answers()
    return DataRecord(
        source=data.train.name,
        synthetic=data.synthetic,
        train_samples=len(data.train_indices) if train_samples is None else train_samples,
        val_samples=len(data.val_indices),
        fingerprint=data.fingerprint,
        content={} if data.content is None else data.content.digests,
        seen=[] if data.content is None else data.content.seen,
        answers=known or common_answers(data.train, data.train_indices),
        confusion=confusion or {},
        earlier=earlier,
    )


def _is_same(known: DataRecord, data: DataSplits) -> bool:
    if data.content is None or not known.content:
        return known.fingerprint == data.fingerprint
    return first_difference(known.content, data.content.digests) is None


def compile_layers(model: torch.nn.Module) -> None:
    """Compile each layer of the X-Encoder and each Mamba-3 layer in place; names in the state dict stay."""
    for module in model.modules():
        if isinstance(module, (Mamba3, VJEPA2Layer)):
            module.compile()


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Keep less of each layer for the backward pass, and compute it again there."""
    for module in model.modules():
        if isinstance(module, Mamba3Backbone):
            module.checkpoint_activations = True


def say_model(model: Mamba3Jepa, trained: str | None = None) -> None:
    """The whole configuration, the parameters of each component, and which one is trained, if not all are."""
    parts: dict[str, list[str]] = {}
    for key, value in values_by_key(model.config).items():
        part, _, name = key.rpartition(".") if "." in key else ("model", "", key)
        parts.setdefault(part, []).append(f"{name} {value}")
    for part, values in parts.items():
        logger.info("%s: %s", part, ", ".join(values))
    counts = ", ".join(f"{name} {count:,}" for name, count in parameter_counts(model).items())
    logger.info("parameters: %s%s", counts, "" if trained is None else f"; only {trained} trains")
