"""What `mamba3-jepa export` does: a checkpoint's weights into a folder, all of it or nothing."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mamba3_jepa.contract import (
    CLASS_TEMPERATURE,
    CLASS_TEMPLATE,
    FORMAT,
    FORMAT_VERSION,
    MEMORY_FORMAT,
    MEMORY_FORMAT_VERSION,
)
from mamba3_jepa.data.images import IMAGENET_MEAN, IMAGENET_STD
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.golden import GOLDEN_NAMES, write_golden
from mamba3_jepa.export.reader import load_exported, read_json, sha256
from mamba3_jepa.export.verify import Difference, compare, demand_equal
from mamba3_jepa.export.writer import write_component
from mamba3_jepa.files.checkpoint import Checkpoint, load_checkpoint
from mamba3_jepa.files.folder_lock import alone_in
from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.models.key_map import COMPONENTS, Component, demand_all_mapped, phase_components
from mamba3_jepa.models.mamba3 import Mamba3
from mamba3_jepa.models.pooling import NORMALIZE_EPS
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import ExportSettings

logger = logging.getLogger(__name__)

_CONFIG, _TOKENIZER, _GOLDEN = "config.json", "tokenizer.json", "golden"


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One file of weights: how many tensors and numbers it holds, and its size in bytes."""

    path: Path
    tensors: int
    parameters: int
    size: int


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        files: the files of weights.
        golden: the golden files, if any.
        removed: files of an earlier export that were in the folder and do not belong to this one.
        differences: what `verify` found, if it was asked for.
    """

    files: list[ExportedFile]
    golden: list[Path] = field(default_factory=list)
    removed: list[Path] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)


@alone_in("output")
def export_weights(settings: ExportSettings) -> ExportReport:
    """Export a checkpoint.

    Everything is written, flushed and verified in a temporary folder first, and moved into place when all of it is
    there; `config.json`, which holds the digest of every file, comes last. Only files of an earlier export are
    replaced or removed.

    Raises:
        UserError: the checkpoint cannot be read or is of an earlier phase, a tensor does not fit the type, a file
            cannot be written, or the written files do not give the checkpoint's outputs; the folder is then as it was.
    """
    checkpoint = load_checkpoint(settings.checkpoint)
    phase = _phase(settings, checkpoint)
    demand_all_mapped(checkpoint.model, str(settings.checkpoint))
    earlier = _earlier_export(settings.output)
    model = Mamba3Jepa.from_loaded(checkpoint, str(settings.checkpoint))
    components = phase_components(checkpoint.config, phase)
    written: list[Component] = [*components, "x_encoder"] if settings.x_encoder else components
    _say_what_is_not_there(settings, checkpoint)
    with _staging(settings.output) as staging:
        tensors = {}
        for component in written:
            path = staging / f"{component}.safetensors"
            tensors[component] = write_component(model, component, path, phase=phase, dtype=settings.dtype)
        _write_text(staging / _TOKENIZER, model.tokenizer.to_json())
        files = {path.name: _entry(path) for path in sorted(staging.glob("*.safetensors"))}
        config = _config(model, checkpoint, settings, phase, files) | {"tokenizer": _entry(staging / _TOKENIZER)}
        write_json(staging / _CONFIG, config)
        differences: list[Difference] = []
        golden: list[Path] = []
        if settings.verify or settings.golden:
            reloaded = load_exported(staging, x_encoder=None if settings.x_encoder else model.x_encoder)
            if settings.verify:
                differences = compare(model, reloaded, written, settings.dtype)
                demand_equal(differences)
            if settings.golden:
                golden = write_golden(reloaded, components, staging / _GOLDEN, phase=phase, dtype=settings.dtype)
        golden_names = [path.name for path in golden]
        names = [*files, _TOKENIZER, *(f"{_GOLDEN}/{name}" for name in golden_names), _CONFIG]
        removed = _publish(staging, settings.output, names, [name for name in earlier if name not in names])
    for path in removed:
        logger.info("removed %s: it belonged to an earlier export", path)
    return ExportReport(
        files=[_exported_file(settings.output / f"{name}.safetensors", held) for name, held in tensors.items()],
        golden=[settings.output / _GOLDEN / name for name in golden_names],
        removed=removed,
        differences=differences,
    )


def _phase(settings: ExportSettings, checkpoint: Checkpoint) -> int:
    phase = checkpoint.phase if settings.phase is None else settings.phase
    if phase > checkpoint.phase:
        script = {2: "train_decoder.py", 3: "train_agent.py"}[phase]
        raise UserError(
            f"{settings.checkpoint} is a phase {checkpoint.phase} checkpoint: `phase` {phase} needs one of phase "
            f"{phase}, which {script} writes"
        )
    return phase


def _say_what_is_not_there(settings: ExportSettings, checkpoint: Checkpoint) -> None:
    if not checkpoint.config.angn.enabled:
        logger.info("ANGN is off in this model: there is no angn.safetensors")
    if settings.x_encoder:
        return
    if not checkpoint.config.vision.pretrained:
        logger.warning(
            "this model's X-Encoder has random weights that are in no other file: without `x_encoder` the exported "
            "weights cannot be used with images"
        )
    else:
        logger.info("the X-Encoder is V-JEPA 2's own file and was not exported; `x_encoder` writes it too")


def _config(
    model: Mamba3Jepa, checkpoint: Checkpoint, settings: ExportSettings, phase: int, files: dict[str, Any]
) -> dict[str, Any]:
    """`config.json`: everything a reader needs besides the tensors and the tokenizer."""
    config, tokenizer = model.config, model.tokenizer
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "phase": phase,
        "dtype": settings.dtype,
        "files": files,
        "model": config.to_dict(),
        "knowledge_dim": config.knowledge_dim,
        "tokens": {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id},
        "image": {
            "size": config.vision.image_size, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
            "resize": "centre square, then bicubic with antialiasing",
        },
        "constants": _constants(model, phase),
        "classify": {"temperature": CLASS_TEMPERATURE, "template": CLASS_TEMPLATE},
        "memory": {"format": MEMORY_FORMAT, "format_version": MEMORY_FORMAT_VERSION},
        "answers": checkpoint.data.answers,
        "data": {name: value for name, value in checkpoint.data.to_dict().items() if name in ("source", "synthetic")},
        "metrics": checkpoint.metrics,
    }  # fmt: skip
    if "y_decoder" in phase_components(config, phase):
        values["generation"] = {"max_tokens": config.max_answer_tokens - 1}  # of bos, answer, eos, bos is given
    return values


def _constants(model: Mamba3Jepa, phase: int) -> dict[str, float]:
    """Numbers of the computation that no tensor and no setting holds, as the modules have them."""
    layer = cast(Mamba3, model.predictor.backbone.layers[0])
    constants = {
        "norm_eps": model.predictor.backbone.final_norm.eps,
        "A_floor": layer.A_floor,
        "normalize_eps": NORMALIZE_EPS,
        "x_encoder_layer_norm_eps": model.x_encoder.encoder.layernorm.eps,
    }
    if "recursion" in phase_components(model.config, phase):
        assert model.recursion is not None
        constants["confusion_probe_layer_norm_eps"] = model.recursion.confusion_probe.norm.eps
    return constants


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _exported_file(path: Path, tensors: dict[str, Tensor]) -> ExportedFile:
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return ExportedFile(path=path, tensors=len(tensors), parameters=parameters, size=path.stat().st_size)


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A temporary folder in `output`, on the same disk, gone afterwards; so is `output` if nothing came into it."""
    missing = [folder for folder in (output, *output.parents) if not os.path.exists(folder)]
    try:
        output.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".export-", dir=output))
    except OSError as error:
        raise UserError(f"cannot write to the export folder {output}: {error.strerror}") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in missing:  # those this call made, innermost first
            if not any(folder.iterdir()):
                folder.rmdir()


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _earlier_export(output: Path) -> list[str]:
    """Names, below `output`, of the files that an earlier export wrote there.

    Raises:
        UserError: a config.json that is not an export's, as in the folder of a training run.
    """
    if not os.path.lexists(output / _CONFIG):
        return []
    values = read_json(output / _CONFIG)
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("files"), dict):
        raise UserError(
            f"{output} is not free for an export: its {_CONFIG} is not an export's; choose another `output`"
        )
    listed = [f"{component}.safetensors" for component in COMPONENTS if f"{component}.safetensors" in values["files"]]
    golden = [f"{_GOLDEN}/{name}.safetensors" for name in GOLDEN_NAMES]
    return [name for name in (*listed, *golden) if os.path.isfile(output / name)]


def _publish(staging: Path, output: Path, names: list[str], stale: list[str]) -> list[Path]:
    """Move the files called `names`, config.json last, from `staging` into `output`; returns the stale ones, now gone.

    What they replace is moved aside first, config.json before all else: a reader that looks in between finds none.
    If anything fails, everything is put back.
    """
    aside = staging / "aside"
    moved: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        aside.mkdir()
        for name in [*reversed(names), *stale]:
            target = output / name
            if target.exists() and not target.is_file():
                what = "a folder" if target.is_dir() else "not a file,"
                raise UserError(f"{target} is {what} where a file is to go; remove it or choose another `output`")
            if os.path.lexists(target):
                kept = aside / str(len(moved))
                os.replace(target, kept)
                moved.append((target, kept))
        for name in names:
            target = output / name
            target.parent.mkdir(exist_ok=True)
            os.replace(staging / name, target)
            placed.append(target)
    except BaseException as error:  # Ctrl-C too: what was moved aside would be gone with `staging`
        for target in placed:
            target.unlink()
        for target, kept in moved:
            os.replace(kept, target)
        if isinstance(error, OSError):
            where = f"{error.filename}: {error.strerror}"
            raise UserError(f"cannot move the exported files into {output}: {where}") from error
        raise
    return [output / name for name in stale]
