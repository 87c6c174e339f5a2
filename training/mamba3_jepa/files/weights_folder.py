"""The weights of a folder as Hugging Face's hub holds them: safetensors or torch's format, one file or shards."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.torch_weights import read_torch_file

_NAMES = ("model.safetensors", "pytorch_model.bin")  # the first that is there, alone or as shards
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def read_weights_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, on the CPU; those of torch's format may be mapped from the disk.

    Raises:
        UserError: there are no weights, a shard is missing, a file is damaged, or a name stands in two shards.
    """
    weights: dict[str, Tensor] = {}
    for path in _files(folder):
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
        twice = weights.keys() & tensors.keys()
        if twice:
            raise UserError(f"{path}: {min(twice)} stands in another shard too")
        weights |= tensors
    return weights


def _files(folder: Path) -> list[Path]:
    for name in _NAMES:
        if os.path.isfile(folder / name):
            return [folder / name]
        shards = _indexed(folder / f"{name}.index.json") or _numbered(folder, name)
        if not shards:
            continue
        missing = [path.name for path in shards if not os.path.isfile(path)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{folder}: the shard {missing[0]}{more} of its {len(shards)} is missing")
        return shards
    raise UserError(f"{folder}: holds no weights: expected {' or '.join(_NAMES)}, or shards of them")


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names; none where there is no index."""
    if not os.path.isfile(index):
        return []
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard is not beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of shards: {error}") from error
    return [index.parent / name for name in sorted(names)]


def _numbered(folder: Path, name: str) -> list[Path]:
    """The shards whose names count them, without an index."""
    stem, _, ending = name.rpartition(".")
    found = [match for each in folder.glob(f"{stem}-*.{ending}") if (match := _SHARD.fullmatch(each.name))]
    count = max((int(match[3]) for match in found), default=0)
    return [folder / f"{stem}-{i:05}-of-{count:05}.{ending}" for i in range(1, count + 1)]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, or cut short: {error}") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict; what else lies in it is left."""
    values = read_torch_file(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected tensors by name")
    return {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
