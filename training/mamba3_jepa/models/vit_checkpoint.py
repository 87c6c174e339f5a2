"""V-JEPA 2 and 2.1 encoder weights as they are published, under the names that `VisionEncoder` uses.

Those are the names of `transformers`. A name without a place in the map is an error, in both directions; what the
encoder has no use for is listed here, and nothing else is left out.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mamba3_jepa.config import VisionConfig, VisionKind
from mamba3_jepa.errors import UserError, shorten
from mamba3_jepa.files.published_weights import (
    read_json_object,
    read_safetensors_file,
    read_torch_file,
    read_transformers_folder,
)

logger = logging.getLogger(__name__)

_EXPECTED = (
    "Expected a V-JEPA 2 or 2.1 encoder: Meta's .pt or .pth file (as vitl.pt), a .safetensors file, "
    "or a transformers folder with config.json and model.safetensors"
)
# The encoders in a file of Meta's, best first: the moving average is what the authors' own frozen evaluations use.
_ENCODERS = ("target_encoder", "ema_encoder", "encoder")
# What wrapping a model puts before its names: data parallelism, masked prediction, compilation, a larger model.
_WRAPPERS = re.compile(r"^((module|backbone|_orig_mod|vjepa2)\.)+")
# Meta's name of a part -> transformers' name; the parts that a block has, and the tensors around the blocks.
_BLOCK_PARTS = {
    "norm1": "norm1",
    "attn.proj": "attention.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = ("attention.query", "attention.key", "attention.value")
_OUTER: dict[VisionKind, dict[str, str]] = {
    "vjepa2": {
        "patch_embed.proj.weight": "encoder.embeddings.patch_embeddings.proj.weight",
        "patch_embed.proj.bias": "encoder.embeddings.patch_embeddings.proj.bias",
        "norm.weight": "encoder.layernorm.weight",
        "norm.bias": "encoder.layernorm.bias",
    },
    "vjepa2.1": {
        "patch_embed.proj.weight": "encoder.embeddings.patch_embeddings.proj.weight",
        "patch_embed.proj.bias": "encoder.embeddings.patch_embeddings.proj.bias",
        "patch_embed_img.proj.weight": "encoder.embeddings.patch_embeddings_img.proj.weight",
        "patch_embed_img.proj.bias": "encoder.embeddings.patch_embeddings_img.proj.bias",
        "img_mod_embed": "encoder.embeddings.img_mod_embed",
        "video_mod_embed": "encoder.embeddings.video_mod_embed",
        "norms_block.3.weight": "encoder.layernorm.weight",
        "norms_block.3.bias": "encoder.layernorm.bias",
    },
}
_META_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
# V-JEPA 2.1 was also trained on what three of its inner layers give, each through a norm of its own.
_INNER_NORM = re.compile(r"norms_block\.[012]\.(weight|bias)")
_LAYER_INDEX = re.compile(r"encoder\.layer\.(\d+)\.")
# Parts of a published transformers checkpoint that come after the encoder and are not used here.
_UNUSED = re.compile(r"(predictor|pooler|classifier)\.")
# A table that V-JEPA 2's rotary encoder never reads, but some files have.
_POSITIONS = "pos_embed"
# Heads are 64 wide in all sizes but one; (hidden size, depth) of that, ViT-H.
_HEADS = {(1280, 32): 16}
_HEAD_DIM = 64

_SIZES = (256, 384)  # of the published models, in pixels
_SIZE_IN_NAME = re.compile(r"(?<![0-9a-z])(256|384)(?![0-9a-z])", re.IGNORECASE)
_SIZE_IN_REPOSITORY = re.compile(r"vjepa2-vit\w+-fpc\d+-(256|384)")
_USUAL_SIZE: dict[VisionKind, int] = {"vjepa2": 256, "vjepa2.1": 384}

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
} | {name: name for name in VisionConfig.__dataclass_fields__ if name not in ("kind", "pretrained")}


def read_vision_checkpoint(path: Path, image_size: int | None = None) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Read an encoder in any supported format.

    Args:
        path: a file or a transformers folder.
        image_size: side in pixels, over what the file says.

    Returns:
        the configuration, and float32 tensors on the CPU, independent of the file, under the names of
        `VisionEncoder.state_dict()`.

    Raises:
        UserError: no such file, a damaged file, or not a V-JEPA 2 or 2.1 encoder.
    """
    weights, settings = _read(path)
    weights = _unwrapped(path, weights)
    positions = weights.pop(_POSITIONS, None)
    if positions is not None:
        logger.info("%s: %s is left out: V-JEPA 2 turns its tokens and reads no table of positions", path, _POSITIONS)
    kind: VisionKind = "vjepa2.1" if any(map(_is_of_21, weights)) else "vjepa2"
    state = _to_transformers_names(path, weights, kind)
    shapes = _sizes_in_shapes(path, state)
    if image_size is not None:
        settings["image_size"] = image_size
    elif "image_size" not in settings:
        settings["image_size"] = _image_size(path, kind, positions, shapes["patch_size"])
    return _vision_config(path, kind, shapes, settings), state


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Weights under the names they have there, and settings under the names of `VisionConfig`."""
    if path.is_dir():
        weights, config_path = read_transformers_folder(path, _EXPECTED)
        return weights, _settings(config_path, config_path.read_bytes())
    if not path.is_file():
        raise UserError(f"no vision checkpoint at {path}. {_EXPECTED}.")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors_file(path)
        return tensors, _settings(path, metadata.get("config", "{}"))
    return _encoder_of(path, read_torch_file(path, _EXPECTED)), {}


def _encoder_of(path: Path, values: Mapping[Any, Any]) -> Mapping[str, Any]:
    """The encoder in a file of Meta's; of a bare state dict the tensors."""
    for name in _ENCODERS:
        if isinstance(values.get(name), Mapping):
            return values[name]
    if not any(isinstance(value, Tensor) for value in values.values()):
        raise UserError(
            f"{path} has no 'target_encoder', 'ema_encoder' or 'encoder', and no tensors; found "
            f"{shorten([str(key) for key in values]) or 'nothing'}. {_EXPECTED}."
        )
    return values


def _settings(path: Path, text: str | bytes) -> dict[str, Any]:
    """The settings in a JSON object that `VisionConfig` knows, under its names."""
    values = read_json_object(path, text)
    for name, expected in _FIXED.items():
        if values.get(name, expected) != expected:
            raise UserError(f"{path}: expected {name} {expected!r} (V-JEPA 2), found {values[name]!r}")
    found = {_SETTINGS[name]: value for name, value in values.items() if name in _SETTINGS}
    if "crop_size" in values:  # what transformers goes by, whatever stands beside it
        found["image_size"] = values["crop_size"]
    return found


def _unwrapped(path: Path, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights without what wraps their names, and without what is not the encoder's, such as the number of an
    epoch."""
    named: dict[str, Tensor] = {}
    for wrapped, tensor in weights.items():
        name = _WRAPPERS.sub("", str(wrapped))
        if _UNUSED.match(name) or not isinstance(tensor, Tensor) or not tensor.ndim:
            continue
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {wrapped} has whole numbers, of type {tensor.dtype}. {_EXPECTED}.")
        if name in named:
            raise UserError(f"{path} has {name} twice, once as {wrapped}")
        named[name] = tensor
    return named


def _is_of_21(name: str) -> bool:
    """Whether V-JEPA 2.1 has such a tensor, under Meta's name or under ours, and V-JEPA 2 has not."""
    return name.startswith("norms_block.") or "_img.proj." in name or name.endswith("_mod_embed")


def _to_transformers_names(path: Path, weights: Mapping[str, Tensor], kind: VisionKind) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        if _INNER_NORM.fullmatch(name):
            continue
        renamed = {name: tensor} if name.startswith("encoder.") else dict(_from_meta(name, tensor, kind))
        state |= {ours: _own(path, name, part) for ours, part in renamed.items()}
        unknown += [] if renamed else [name]
    if unknown or not state:
        found = shorten(unknown) if unknown else "no encoder weights"
        raise UserError(f"{path} does not hold the weights of a V-JEPA 2 encoder: found {found}. {_EXPECTED}.")
    if missing := _missing_of_meta(weights, kind):
        raise UserError(f"{path}: the encoder is not whole: missing: {shorten(missing)}")
    return state


def _missing_of_meta(weights: Mapping[str, Tensor], kind: VisionKind) -> list[str]:
    """Meta's names that a file with names of Meta's lacks."""
    blocks = [int(match[1]) for match in map(_META_BLOCK.fullmatch, weights) if match]
    if not blocks:
        return []
    parts = [f"{part}.{end}" for part in ("attn.qkv", *_BLOCK_PARTS) for end in ("weight", "bias")]
    expected = [*_OUTER[kind], *(f"blocks.{i}.{part}" for i in range(1 + max(blocks)) for part in parts)]
    return [name for name in expected if name not in weights]


def _from_meta(name: str, tensor: Tensor, kind: VisionKind) -> Iterator[tuple[str, Tensor]]:
    """What a tensor of Meta's becomes under transformers' names; nothing when the name is not Meta's."""
    if name in (outer := _OUTER[kind]):
        yield outer[name], tensor
    elif match := _META_BLOCK.fullmatch(name):
        layer, part, end = match.groups()
        if part == "attn.qkv":
            for ours, share in zip(_QKV, tensor.chunk(3), strict=False):  # odd shapes are found on loading
                yield f"encoder.layer.{layer}.{ours}.{end}", share
        elif part in _BLOCK_PARTS:
            yield f"encoder.layer.{layer}.{_BLOCK_PARTS[part]}.{end}", tensor


def _sizes_in_shapes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes that the shapes of the weights give, by their names in `VisionConfig`."""
    patch = state.get("encoder.embeddings.patch_embeddings.proj.weight")
    fc1 = state.get("encoder.layer.0.mlp.fc1.weight")
    if patch is None or patch.ndim != 5 or patch.shape[1] != 3 or not patch.numel() or fc1 is None or fc1.ndim != 2:
        shape = "none" if patch is None else str(tuple(patch.shape))
        raise UserError(
            f"{path}: expected a patch embedding (D, 3, tubelet, patch, patch) and layer 0, "
            f"found shape {shape} and {shorten(list(state))}. {_EXPECTED}."
        )
    hidden_size = patch.shape[0]
    mlp_ratio = fc1.shape[0] / hidden_size
    if int(hidden_size * mlp_ratio) != fc1.shape[0]:  # the division rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "hidden_size": hidden_size,
        "depth": 1 + max(int(match[1]) for match in map(_LAYER_INDEX.match, state) if match),
        "mlp_ratio": mlp_ratio,
        "patch_size": patch.shape[-1],
        "tubelet_size": patch.shape[2],
    }


def _image_size(path: Path, kind: VisionKind, positions: Tensor | None, patch_size: int) -> int:
    """Side in pixels of the images the encoder was trained on: as its name or its table says, else the usual one."""
    named = _size_in_name(path)
    if named is not None:
        logger.info("%s: for images of %d pixels, as its name says; give `image_size` for others", path, named)
        return named
    found = None if positions is None else _size_of_table(positions, patch_size)
    if found is None:
        found = _USUAL_SIZE[kind]
        logger.info("%s does not say how large its images were; taken for %d pixels, give `image_size` for others",
                    path, found)  # fmt: skip
    return found


def _size_in_name(path: Path) -> int | None:
    """The last number in vitg-384.pt, or in vjepa2-vitg-fpc64-384, a repository's copy that the file is in."""
    of_name = _SIZE_IN_NAME.findall(path.name) if "vit" in path.name.lower() else []  # 384 may be a step, too
    sizes = _SIZE_IN_REPOSITORY.findall(str(path.absolute().parent)) + of_name
    return int(sizes[-1]) if sizes else None


def _size_of_table(positions: Tensor, patch_size: int) -> int | None:
    """The size whose patches, of a number of tubelets that is a power of two, a table (1, N, D) has places for."""
    places = positions.shape[-2] if positions.ndim >= 2 else 0
    for size in _SIZES:
        tubelets, left_over = divmod(places, max(1, size // patch_size) ** 2)
        if left_over == 0 and tubelets.bit_count() == 1:
            return size
    return None


def _vision_config(path: Path, kind: VisionKind, shapes: dict[str, Any], settings: dict[str, Any]) -> VisionConfig:
    """What the shapes say, checked against what the file's settings say and completed by them."""
    for name, value in shapes.items():
        said = settings.get(name, value)
        if not isinstance(said, int | float) or not math.isclose(said, value, rel_tol=1e-6):
            raise UserError(f"{path}: the configuration says {name} {said!r}, the weights say {value}")
    hidden_size = shapes["hidden_size"]
    heads = _HEADS.get((hidden_size, shapes["depth"]), max(1, hidden_size // _HEAD_DIM))
    try:
        return VisionConfig(**{"heads": heads, **settings, **shapes}, kind=kind, pretrained=True)
    except ValidationError as error:
        raise UserError(f"{path}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _own(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A float32 copy that does not hang on to the file."""
    if not tensor.isfinite().all():
        raise UserError(f"{path}: {name} has values that are no finite numbers: the file is damaged")
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
