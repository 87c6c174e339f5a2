"""What a file holds, without building a model: checkpoints and safetensors files."""

from __future__ import annotations

import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

from mamba3_jepa.errors import UserError
from mamba3_jepa.export.reader import opened
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.files.path_text import path_text


def inspect_file(path: Path) -> dict[str, Any]:
    """A description of a checkpoint or a safetensors file, ready for JSON.

    Returns:
        `kind` ("checkpoint" or "safetensors"), `file`, `bytes` and `parameters` (by component, with their `total`). A
        checkpoint adds phase, config, data, metrics, temperature, run, resumable; a safetensors file metadata and
        tensors.

    Raises:
        UserError: the file is missing, damaged, or neither.
    """
    if os.path.isdir(path):
        inside = sorted(item.name for item in path.iterdir() if item.suffix in (".pt", ".safetensors"))
        held = f"it holds {', '.join(inside)}" if inside else "and holds no checkpoint and no safetensors file"
        raise UserError(f"{path} is a folder, {held}: name a file")
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    found = _checkpoint(path) if path.suffix == ".pt" or zipfile.is_zipfile(path) else _safetensors(path)
    return {"file": path_text(path), "bytes": path.stat().st_size, **found}


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.model.items()}
    return {
        "kind": "checkpoint",
        "phase": checkpoint.phase,
        "config": checkpoint.config.to_dict(),
        "data": checkpoint.data.in_short().to_dict(),
        "metrics": checkpoint.metrics,
        "temperature": checkpoint.temperature,
        "run": checkpoint.run,
        "resumable": checkpoint.trainer is not None,
        "parameters": _counts(shapes),
    }


def _safetensors(path: Path) -> dict[str, Any]:
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        tensors = [
            {"name": name, "dtype": piece.get_dtype(), "shape": piece.get_shape()} for name, piece in slices.items()
        ]
        metadata = {name: _parsed(value) for name, value in sorted((file.metadata() or {}).items())}
    return {
        "kind": "safetensors",
        "metadata": metadata,
        "tensors": tensors,
        "parameters": _counts({tensor["name"]: tensor["shape"] for tensor in tensors}),
    }


def _counts(shapes: dict[str, list[int]]) -> dict[str, int]:
    """How many numbers there are under each first part of a name, and in all."""
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        component = name.partition(".")[0]
        counts[component] = counts.get(component, 0) + math.prod(shape)
    return counts | {"total": sum(counts.values())}


def _parsed(value: str) -> Any:
    """Metadata values are texts; those that are JSON objects or lists are shown as such."""
    try:
        parsed = json.loads(value)
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()  # what other readers of JSON refuse is text
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict | list) else value
