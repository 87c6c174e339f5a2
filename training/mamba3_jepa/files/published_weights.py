"""Weights that other projects publish: torch's files, safetensors, transformers folders, whole or in shards.

Nothing of a pickle is run. Tensors come as the file has them, and may be views of it.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mamba3_jepa.errors import UserError, shorten
from mamba3_jepa.files.path_text import utf8_name
from mamba3_jepa.files.safetensors_file import open_safetensors


class _Ignored:
    """What a number or an array of numpy's in a pickle becomes: an object that keeps nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Training loops leave numbers of numpy's beside the weights. What a pickle calls to make one is answered by stand-ins
# of the same names, so that numpy is not called with what a stranger wrote.
_NUMPY: list[Any] = [
    type(name, (_Ignored,), {"__module__": module})
    for module, name in (
        ("numpy", "dtype"), ("numpy", "ndarray"),
        ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    )
]  # fmt: skip


def read_torch_file(path: Path, expected: str) -> dict[Any, Any]:
    """The dictionary in a file that `torch.save` wrote.

    Args:
        expected: a sentence for messages, about what the file should have been.

    Raises:
        UserError: it is damaged, holds something else than a dictionary, or more than tensors, texts and numbers.
    """
    try:
        # Only torch's zip format can be mapped; what is not asked for then stays on the disk.
        mmap = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_NUMPY), utf8_name(path) as name:
            values = torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: no checkpoint, or it holds more than tensors, "
            "numbers and texts, of which none was run; where it was made, save the weights' state dict alone "
            f"with torch.save. {expected}."
        ) from error
    except Exception as error:  # a file that is no checkpoint can make the unpickler raise almost anything
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: {_first_line(error)}. {expected}."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}. {expected}.")
    return values


def read_safetensors_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its metadata.

    Raises:
        UserError: it is damaged.
    """
    try:
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error


def read_transformers_folder(path: Path, expected: str) -> tuple[dict[str, Any], Path]:
    """All tensors of a folder that `transformers` wrote, and its config.json.

    The weights are in the first there is of model.safetensors, the shards that model.safetensors.index.json names,
    model*.safetensors, pytorch_model.bin, and the shards that pytorch_model.bin.index.json names.

    Raises:
        UserError: there are none, a shard is missing or a file is damaged.
    """
    config, files = path / "config.json", _weight_files(path)
    if not config.is_file() or not files:
        found = shorten(sorted(entry.name for entry in path.iterdir())) or "nothing"
        raise UserError(f"{path} is not a transformers folder: found {found}. {expected}.")
    weights: dict[str, Any] = {}
    for file in files:
        weights |= read_safetensors_file(file)[0] if file.suffix == ".safetensors" else read_torch_file(file, expected)
    return weights, config


def read_json_object(path: Path, text: str | bytes) -> dict[str, Any]:
    """What `text`, which came with the file `path`, says.

    Raises:
        UserError: it is not JSON, or not an object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the configuration is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: the configuration is not a JSON object")
    return values


def _weight_files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            return _shards(index)
        if whole.endswith(".safetensors") and (files := sorted(folder.glob("model*.safetensors"))):
            return files
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each once."""
    places = read_json_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f'{index}: its "weight_map" must give the file of every tensor')
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:  # one with a separator could lead anywhere
            raise UserError(f"{index}: {name!r} is not the name of a file in this folder")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing: {index.name} names it as a part of the model")
    return [index.parent / name for name in names]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
