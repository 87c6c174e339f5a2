"""What frozen outputs depend on, as the key they are kept under."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import mamba3_jepa
from mamba3_jepa.data.sample import OnBadSample, Source, file_state
from mamba3_jepa.models.fused import fused
from mamba3_jepa.models.kernels import mimo_kernel, siso_kernel
from mamba3_jepa.models.mamba3 import Mamba3
from mamba3_jepa.models.vljepa import Mamba3Jepa

FORMAT_VERSION = 2
_FROZEN = ("x_encoder.", "predictor.", "y_encoder.", "angn.")  # what the outputs are made by
_OTHER_PARTS = (
    "y_decoder",
    "prefix_tokens",
    "recursion",
    "preset",
)  # fields of the configuration they do not depend on

_CODE = ("data/*.py", "models/*.py", "training/frozen*.py")  # what reads samples and computes with them
_PACKAGES = ("torch", "numpy", "Pillow", "tokenizers", "transformers")


class Dependence(NamedTuple):
    """What outputs are made by: what the names of the weights that count begin with, and what counts beside them."""

    weights: tuple[str, ...]
    made_with: dict[str, Any]


def of_outputs(model: Mamba3Jepa) -> Dependence:
    """What the outputs of the whole frozen model depend on."""
    made_with = {
        "config": {name: value for name, value in model.config.to_dict().items() if name not in _OTHER_PARTS},
        "tokenizer": blake2b(model.tokenizer.to_json().encode()).hexdigest(),
        "device": device_and_kernels(model),
    }
    return Dependence(_FROZEN, made_with)


def of_visual_tokens(model: Mamba3Jepa) -> Dependence:
    """What visual tokens depend on: the X-Encoder alone, and how they are pooled."""
    made_with = {
        "visual_tokens": model.config.predictor.visual_pool,
        "vision": model.config.to_dict()["vision"],
        "device": {name: value for name, value in device_and_kernels(model).items() if name != "kernels"},
    }
    return Dependence(("x_encoder.",), made_with)


def cache_key(
    model: Mamba3Jepa,
    dependence: Dependence,
    source: Source,
    indices: NDArray[np.int64],
    *,
    on_bad_sample: OnBadSample,
    precision: str,
    part_size: int,
) -> str:
    """Hex digest of everything the outputs depend on: weights and what counts beside them, samples and their files, the
    code, and what it runs on."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(dependence.weights):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(bytes_of(tensor))
    rest = dependence.made_with | {
        "format": FORMAT_VERSION,
        "source": source.fingerprint,
        "files": file_state(source, indices),
        "indices": blake2b(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest(),
        "on_bad_sample": on_bad_sample,
        "precision": precision,
        "part_size": part_size,
        "made_by": made_by(),
    }
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


@functools.cache
def made_by() -> dict[str, str]:
    """The versions that decide what is computed, that of the code among them."""
    versions = {"mamba3_jepa": mamba3_jepa.__version__, "code": _code()}
    return versions | {name: _version(name) for name in _PACKAGES}


def device_and_kernels(model: Mamba3Jepa) -> dict[str, Any]:
    """What decides how the same code rounds: the kind of device and what is used in place of plain PyTorch."""
    kernels = {"siso": siso_kernel, "mimo": mimo_kernel} if model.device.type == "cuda" and fused.use != "off" else {}
    return {
        "device": model.device.type,
        "kernels": [f"{name} of mamba-ssm {_version('mamba-ssm')}" for name, kernel in kernels.items() if kernel()],
        "compiled": any(m._compiled_call_impl is not None for m in model.modules() if isinstance(m, Mamba3)),
        "float32_products": torch.get_float32_matmul_precision(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # it came without being installed
        return "unknown"


def _code() -> str:
    """Digest of the source files that compute, whatever else an update changes."""
    root = Path(mamba3_jepa.__file__).parent
    paths: Iterable[Path] = (path for pattern in _CODE for path in sorted(root.glob(pattern)))
    digest = blake2b(digest_size=8)
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)};".encode())
        digest.update(content)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's numbers as they lie in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
