"""One component of a model, as a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.contract import FORMAT, FORMAT_VERSION
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.safetensors_file import write_safetensors
from mamba3_jepa.models.key_map import Component, exported_tensors
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import DtypeName


def file_metadata(component: str, config: ModelConfig, *, phase: int, dtype: DtypeName) -> dict[str, str]:
    """The header's metadata: strings, as the format demands; `config` is JSON."""
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "component": component,
        "phase": str(phase),
        "dtype": dtype,
        "config": json.dumps(config.to_dict(), separators=(",", ":")),
    }


def write_component(
    model: Mamba3Jepa, component: str, path: Path, *, phase: int, dtype: DtypeName = "float32"
) -> dict[str, Tensor]:
    """Write one component: to a temporary file, flushed to the disk, then renamed.

    Args:
        model: a model that has the component.
        component: predictor, y_encoder, angn, y_decoder, recursion or x_encoder.
        path: the file; its folder is made if need be.
        phase: the last phase that trained these weights.
        dtype: type of the tensors that `stored_dtype` rounds.

    Returns:
        the tensors as written, by exported key.

    Raises:
        UserError: the model has no such component, a tensor is not finite or does not fit `dtype`, or the file cannot
            be written; what was at `path` is unchanged.
    """
    exported = exported_tensors(model.state_dict(), component, model.config, source="the model")
    tensors = {key: _converted(key, tensor, dtype) for key, tensor in exported.items()}
    write_safetensors(path, tensors, file_metadata(component, model.config, phase=phase, dtype=dtype))
    return tensors


def stored_dtype(key: str, dims: int, dtype: DtypeName) -> torch.dtype:
    """The type an exported tensor of `dims` dimensions is stored in.

    The weights of linear maps, convolutions and embeddings take `dtype`. The rest stays float32: it is under 1% of the
    bytes, and decay rates, step sizes, norms and gates act on everything that passes through them.
    """
    return getattr(torch, dtype) if key.endswith(".weight") and dims >= 2 else torch.float32


def as_stored(key: str, tensor: Tensor, dtype: DtypeName) -> Tensor:
    """The tensor in the type that it is stored in."""
    return tensor.to(stored_dtype(key, tensor.dim(), dtype))


def round_as_stored(model: Mamba3Jepa, components: Sequence[Component], dtype: DtypeName) -> None:
    """Round the weights of a model, in place, to the numbers that its exported files hold."""
    state = model.state_dict()  # shares its memory with the model
    for component in components:
        for key, tensor in exported_tensors(state, component, model.config, source="the model").items():
            tensor.copy_(as_stored(key, tensor, dtype))


def _converted(key: str, tensor: Tensor, dtype: DtypeName) -> Tensor:
    if not tensor.isfinite().all():
        raise UserError(f"{key} has values that are not finite: the weights are of no use, and were not exported")
    converted = as_stored(key, tensor.detach().cpu(), dtype)
    if not converted.isfinite().all():
        raise UserError(
            f"{key} has a value of {tensor.abs().max().item():.4g}, too large for {dtype} "
            f"(at most {torch.finfo(converted.dtype).max:.4g}); choose bfloat16 or float32"
        )
    return converted
