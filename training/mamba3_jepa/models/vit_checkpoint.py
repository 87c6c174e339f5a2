"""V-JEPA 2 encoder weights on disk: Meta's checkpoints, transformers folders, safetensors.

Everything is brought to one form: a `VisionConfig` and float32 tensors under the names `VisionEncoder` uses,
which are transformers' names. A name without a place in the map is an error, in both directions.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from mamba3_jepa.config import VisionConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.path_text import utf8_name
from mamba3_jepa.files.safetensors_file import open_safetensors
from mamba3_jepa.models.state_dict import shorten

logger = logging.getLogger(__name__)

_EXPECTED = (
    "Expected a V-JEPA 2 encoder: Meta's .pt or .pth file (as vitl.pt), a .safetensors file, "
    "or a transformers folder with config.json and model.safetensors"
)
_META_PREFIX = "module.backbone."
# What wrappers put before a name, in any order: data-parallel training, the authors' own, torch.compile.
_WRAPPERS = re.compile(r"^(module\.|backbone\.|_orig_mod\.)+")
# Tables that older code saves and V-JEPA 2, whose positions are rotations, never reads.
_LEFT_OVER = ("pos_embed",)
# What `torch.load` may make beside tensors: numbers of numpy, which training code leaves among losses and epochs.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]
# Meta's name of a part -> transformers' name; the parts that a block has, and the parts around the blocks.
_BLOCK_PARTS = {
    "norm1": "norm1",
    "attn.proj": "attention.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = ("attention.query", "attention.key", "attention.value")
_OUTER_PARTS = {
    "patch_embed.proj": "encoder.embeddings.patch_embeddings.proj",
    "norm": "encoder.layernorm",
}
_META_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_INDEX = re.compile(r"encoder\.layer\.(\d+)\.")
# Parts of a published transformers checkpoint that come after the encoder and are not used here.
_UNUSED = re.compile(r"(predictor|pooler|classifier)\.")
# Heads are 64 wide in ViT-L and ViT-g; (hidden size, depth) of the size where they are not: ViT-H.
_HEADS = {(1280, 32): 16}
_HEAD_DIM = 64

# What every V-JEPA 2 has in common, and `VisionConfig` therefore does not say.
_FIXED = {
    "model_type": "vjepa2",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "in_chans": 3,
}
# config.json of transformers, and metadata, -> VisionConfig.
_SETTINGS = {
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "crop_size": "image_size",
    "frames_per_clip": "frames",
    "patch": "patch_size",
    "tubelet": "tubelet_size",
} | {name: name for name in VisionConfig.__dataclass_fields__}


def read_vision_checkpoint(path: Path, image_size: int | None = None) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Read an encoder in any supported format.

    Args:
        path: a file or a transformers folder.
        image_size: side in pixels, over what the file says (256 when neither says).

    Returns:
        the configuration, and float32 tensors on the CPU, independent of the file, under the names of
        `VisionEncoder.state_dict()`.

    Raises:
        UserError: no such file, a damaged file, or not a V-JEPA 2 encoder.
    """
    weights: Mapping[str, Any]
    if path.is_dir():
        weights, settings = _read_folder(path)
    elif not path.is_file():
        raise UserError(f"no vision checkpoint at {path}. {_EXPECTED}.")
    elif path.suffix == ".safetensors":
        weights, settings = _read_safetensors(path)
    else:
        weights, settings = _read_meta(path), {}
    state = _to_transformers_names(path, weights)
    if image_size is not None:
        settings["image_size"] = image_size
    return _vision_config(path, state, settings), state


def _read_meta(path: Path) -> Mapping[str, Any]:
    try:
        # Only torch's zip format can be mapped; mapping leaves the optimizer's part of the file on the disk.
        mmap = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_NUMBERS), utf8_name(path) as name:
            values = torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: no checkpoint, or it holds more than tensors, "
            "numbers and texts, of which none was run; where it was made, save the encoder's state dict alone "
            f"with torch.save. {_EXPECTED}."
        ) from error
    except Exception as error:  # a file that is no checkpoint can make the unpickler raise almost anything
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: {_first_line(error)}. {_EXPECTED}."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}. {_EXPECTED}.")
    # The moving average, which V-JEPA 2.1 calls otherwise, is what the authors' own frozen evaluations use.
    for name in ("target_encoder", "ema_encoder", "encoder"):
        if isinstance(values.get(name), dict):
            return values[name]
    if values and all(isinstance(value, Tensor) for value in values.values()):
        return values
    raise UserError(
        f"{path} has neither 'target_encoder' nor 'encoder'; found {shorten([str(key) for key in values])}. "
        f"{_EXPECTED}."
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with open_safetensors(path) as file:
            config = (file.metadata() or {}).get("config", "{}")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error
    return weights, _settings(path, config)


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config_path = path / "config.json"
    files = sorted(path.glob("model*.safetensors"))  # one file, or the shards of a large model
    if not config_path.is_file() or not files:
        found = shorten(sorted(entry.name for entry in path.iterdir())) or "nothing"
        raise UserError(f"{path} is not a transformers folder: found {found}. {_EXPECTED}.")
    settings = _settings(config_path, config_path.read_bytes())
    weights = {name: tensor for file in files for name, tensor in _read_safetensors(file)[0].items()}
    return weights, settings


def _settings(path: Path, text: str | bytes) -> dict[str, Any]:
    """The settings in a JSON object that `VisionConfig` knows, under its names."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the configuration is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: the configuration is not a JSON object")
    for name, expected in _FIXED.items():
        if values.get(name, expected) != expected:
            raise UserError(f"{path}: expected {name} {expected!r} (V-JEPA 2), found {values[name]!r}")
    return {_SETTINGS[name]: value for name, value in values.items() if name in _SETTINGS}


def _to_transformers_names(path: Path, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is not a floating-point tensor. {_EXPECTED}.")
        name = name.removeprefix("vjepa2.")
        if name.startswith("encoder."):
            state[name] = _own(tensor)
        elif (plain := _WRAPPERS.sub("", name)) in _LEFT_OVER:
            logger.info("%s: %s is left out: positions are rotations here", path, name)
        elif not _UNUSED.match(name):
            renamed = dict(_from_meta(plain, tensor))
            state.update(renamed)
            unknown += [] if renamed else [name]
    if unknown or not state:
        found = shorten(unknown) if unknown else "no encoder weights"
        raise UserError(f"{path} does not hold the weights of a V-JEPA 2 encoder: found {found}. {_EXPECTED}.")
    return state


def _from_meta(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a tensor of Meta's becomes under transformers' names; nothing when the name is not Meta's."""
    part, _, kind = name.rpartition(".")
    if part in _OUTER_PARTS and kind in ("weight", "bias"):
        yield f"{_OUTER_PARTS[part]}.{kind}", _own(tensor)
    elif match := _META_BLOCK.fullmatch(name):
        layer, part, kind = match.groups()
        if part == "attn.qkv":
            for ours, share in zip(_QKV, tensor.chunk(3), strict=False):  # odd shapes are found on loading
                yield f"encoder.layer.{layer}.{ours}.{kind}", _own(share)
        elif part in _BLOCK_PARTS:
            yield f"encoder.layer.{layer}.{_BLOCK_PARTS[part]}.{kind}", _own(tensor)


def _vision_config(path: Path, state: Mapping[str, Tensor], settings: dict[str, Any]) -> VisionConfig:
    """What the shapes say, checked against what the file's settings say and completed by them."""
    patch = state.get("encoder.embeddings.patch_embeddings.proj.weight")
    fc1 = state.get("encoder.layer.0.mlp.fc1.weight")
    if patch is None or patch.ndim != 5 or patch.shape[1] != 3 or fc1 is None or fc1.ndim != 2:
        shape = "none" if patch is None else str(tuple(patch.shape))
        raise UserError(
            f"{path}: expected a patch embedding (D, 3, tubelet, patch, patch) and layer 0, "
            f"found shape {shape} and {shorten(list(state))}. {_EXPECTED}."
        )
    hidden_size = patch.shape[0]
    mlp_ratio = fc1.shape[0] / hidden_size
    if int(hidden_size * mlp_ratio) != fc1.shape[0]:  # the division rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    depth = 1 + max(int(match[1]) for match in map(_LAYER_INDEX.match, state) if match)
    shapes = {
        "hidden_size": hidden_size,
        "depth": depth,
        "mlp_ratio": mlp_ratio,
        "patch_size": patch.shape[-1],
        "tubelet_size": patch.shape[2],
    }
    for name, value in shapes.items():
        said = settings.get(name, value)
        if not isinstance(said, int | float) or not math.isclose(said, value, rel_tol=1e-6):
            raise UserError(f"{path}: the configuration says {name} {said!r}, the weights say {value}")
    heads = _HEADS.get((hidden_size, depth), max(1, hidden_size // _HEAD_DIM))
    try:
        return VisionConfig(**{"heads": heads, **settings, **shapes}, pretrained=True)
    except ValidationError as error:
        raise UserError(f"{path}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _own(tensor: Tensor) -> Tensor:
    """A float32 copy that does not hang on to the file."""
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
