"""An exported folder back into a model: every key, shape, type and digest must be what it says."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.contract import FORMAT, READABLE_VERSIONS
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.writer import stored_dtype
from mamba3_jepa.files.checkpoint import add_missing_floor, check_recursion_scalars
from mamba3_jepa.files.safetensors_file import open_safetensors
from mamba3_jepa.models.key_map import model_tensors, phase_components
from mamba3_jepa.models.state_dict import load_state
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import DtypeName

logger = logging.getLogger(__name__)

_KEYS = ("format", "format_version", "phase", "dtype", "files", "tokenizer", "model")
_KEYS_SINCE_2 = ("constants", "classify", "memory", "answers")
_OTHER_KEYS = ("knowledge_dim", "tokens", "image", "generation", "data", "metrics")


@dataclass(frozen=True, kw_only=True)
class ExportedConfig:
    """What `config.json` of an export says.

    Attributes:
        format_version: one of `READABLE_VERSIONS`; every file of the folder has the same.
        phase: the phase it was exported as.
        dtype: type of its large tensors.
        config: the model's configuration.
        digests: SHA-256 in hex of each component's file, by component, and of `tokenizer`.
    """

    format_version: int
    phase: int
    dtype: DtypeName
    config: ModelConfig
    digests: dict[str, str]


def load_exported(
    folder: str | Path, x_encoder: VisionEncoder | None = None, device: torch.device | str = "cpu"
) -> Mamba3Jepa:
    """The model of an exported folder, in eval mode, in float32 whatever type the files have.

    Args:
        folder: what `mamba3-jepa export` wrote.
        x_encoder: the frozen vision encoder; by default the folder's own x_encoder.safetensors.
        device: where to put the model.

    Raises:
        UserError: a file is missing, damaged or changed since the export, a key, shape or type is not the expected one,
            or there is no X-Encoder.
    """
    folder = Path(folder)
    exported = read_config(folder)
    components = [*phase_components(exported.config, exported.phase)]
    if x_encoder is None:
        if "x_encoder" not in exported.digests:
            raise UserError(
                f"{folder} holds no x_encoder.safetensors: give load_exported the X-Encoder "
                "(VisionEncoder.from_checkpoint reads V-JEPA 2's own file), or export with `x_encoder`"
            )
        components.append("x_encoder")
    state: dict[str, Tensor] = {}
    for component in components:
        state |= read_component(folder, component, exported)
    tokenizer_file = folder / "tokenizer.json"
    tokenizer = TextTokenizer.from_file(tokenizer_file)
    _demand_digest(tokenizer_file, exported.digests["tokenizer"])
    model = Mamba3Jepa(
        exported.config,
        tokenizer,
        x_encoder=VisionEncoder.empty(exported.config.vision) if x_encoder is None else x_encoder,
        with_decoder="y_decoder" in components,
        with_recursion="recursion" in components,
    )
    if x_encoder is not None:
        state |= {f"x_encoder.{name}": tensor for name, tensor in x_encoder.state_dict().items()}
    load_state(model, state, source=str(folder))
    model.source = str(folder)
    return model.eval().to(device)


def read_config(folder: Path) -> ExportedConfig:
    """`config.json` of an exported folder.

    Raises:
        UserError: it is missing, is not one of ours, or lists other components than its phase has.
    """
    path = folder / "config.json"
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT or not set(_KEYS) <= set(values):
        raise UserError(f"{path} is not the config.json of a Mamba3-JEPA export: it needs {', '.join(_KEYS)}")
    version = values["format_version"]
    if version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise UserError(f"{path} has export format {version}; this version reads {readable}")
    if version >= 2 and not set(_KEYS_SINCE_2) <= set(values):
        missing = ", ".join(key for key in _KEYS_SINCE_2 if key not in values)
        raise UserError(f"{path} lacks {missing}, which export format {version} has")
    unknown = sorted(set(values) - {*_KEYS, *_KEYS_SINCE_2, *_OTHER_KEYS})
    if unknown:
        logger.warning("%s: not known to this version, and ignored: %s", path, ", ".join(unknown))
    config = ModelConfig.from_dict(values["model"], source=str(path))
    if values["phase"] not in (1, 2, 3) or values["dtype"] not in get_args(DtypeName):
        raise UserError(
            f"{path}: phase {values['phase']!r} and dtype {values['dtype']!r}: expected 1, 2 or 3, and "
            f"{', '.join(get_args(DtypeName))}"
        )
    try:
        digests = {name.removesuffix(".safetensors"): entry["sha256"] for name, entry in values["files"].items()}
        digests["tokenizer"] = values["tokenizer"]["sha256"]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f'{path}: "files" and "tokenizer" must give the sha256 of every file') from error
    expected = set(phase_components(config, values["phase"]))
    if set(digests) - {"x_encoder", "tokenizer"} != expected:
        raise UserError(
            f"{path}: an export of phase {values['phase']} has {', '.join(sorted(expected))}; "
            f"this one lists {', '.join(sorted(set(digests) - {'tokenizer'}))}"
        )
    return ExportedConfig(
        format_version=version, phase=values["phase"], dtype=values["dtype"], config=config, digests=digests
    )


def read_component(folder: Path, component: str, exported: ExportedConfig) -> dict[str, Tensor]:
    """The tensors of one component under the names of the model's state dict.

    Raises:
        UserError: the file is missing, damaged, of another model or format, differs from what was exported, or has a
            temperature, threshold or floor that cannot be one.
    """
    path = folder / f"{component}.safetensors"
    with opened(path) as file:
        _check_metadata(path, component, file.metadata() or {}, exported)
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    if exported.format_version == 1:
        add_missing_floor(tensors)  # its key is the same in files and models
    named = model_tensors(tensors, component, exported.config, source=str(path))
    check_recursion_scalars(named, source=str(path))
    for key, tensor in tensors.items():
        expected = stored_dtype(key, tensor.dim(), exported.dtype)
        if tensor.dtype != expected:
            raise UserError(f"{path}: {key}: expected {expected}, found {tensor.dtype}")
    _demand_digest(path, exported.digests[component])
    return named


def read_json(path: Path) -> Any:
    """The values of an export's JSON file.

    Raises:
        UserError: it is missing, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; expected a folder that `mamba3-jepa export` wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading as torch tensors.

    Raises:
        UserError: it is missing, damaged, or cut short.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    try:
        with open_safetensors(path) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file, or was cut short: {error}") from error


def sha256(path: Path) -> str:
    """Digest of a file in hex, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _demand_digest(path: Path, digest: str) -> None:
    if sha256(path) != digest:
        raise UserError(f"{path} has changed since the export: its SHA-256 is not the one in config.json")


def _check_metadata(path: Path, component: str, metadata: dict[str, str], exported: ExportedConfig) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a file of a Mamba3-JEPA export: its metadata names no format {FORMAT!r}")
    if metadata.get("format_version") != str(exported.format_version):
        raise UserError(
            f"{path} has export format {metadata.get('format_version')}, but config.json beside it says "
            f"{exported.format_version}"
        )
    if metadata.get("component") != component:
        raise UserError(f"{path} holds {metadata.get('component')!r}, not {component!r}")
    config = ModelConfig.from_json(metadata.get("config", "null"), source=f"{path}: metadata")
    if config != exported.config:
        raise UserError(f"{path} belongs to another model: its configuration differs from config.json's")
