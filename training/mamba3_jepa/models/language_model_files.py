"""Official Mamba-3 language models on disk: `config.json` as mamba-ssm writes it, and the weights beside it.

Their names are translated one by one, strictly both ways: a tensor without a place is an error, and so is a place
without a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mamba3_jepa.config import AActivation, BackboneConfig, Mamba3Config
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError, shorten
from mamba3_jepa.files.published_weights import read_json_object, read_transformers_folder
from mamba3_jepa.models.key_map import layer_keys

_EXPECTED = (
    "Expected an official Mamba-3 language model: a folder with config.json and pytorch_model.bin or model.safetensors"
)
# What mamba-ssm takes where config.json is silent, and what it must be.
_DEFAULTS = {"d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "pad_vocab_size_multiple": 8}
_FIXED = {"rms_norm": True, "attn_layer_idx": []}
_FIXED_IN_LAYER = {"layer": "Mamba3", "A_floor": 1e-4, "dropout": 0.0}
_OF_LAYER = ("d_state", "expand", "headdim", "ngroups", "rope_fraction", "is_mimo", "mimo_rank", "is_outproj_norm",
             "chunk_size")  # fmt: skip
_ONLY_AT_FIRST = ("dt_min", "dt_max", "dt_init_floor")  # they decide initial weights


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Everything that decides the shape and the meaning of a language model's weights.

    Attributes:
        backbone: the stack between embedding and head.
        vocab_size: tokens there are; rows: rows of embedding and head, `vocab_size` rounded up.
        tied: whether the head is the embedding.
    """

    backbone: BackboneConfig
    vocab_size: int
    rows: int
    tied: bool = True


def read_language_model_config(folder: Path, a_activation: AActivation) -> LanguageModelConfig:
    """What `config.json` says; `a_activation` is what it does not say.

    Raises:
        UserError: there is no such folder, or its model is of another kind; names the key.
    """
    path = folder / "config.json"
    try:
        values = read_json_object(path, path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {_EXPECTED}.") from error
    for name, expected in _FIXED.items():
        if values.get(name, expected) != expected:
            raise UserError(f"{path}: {name} is {values[name]!r}, expected {expected!r}. {_EXPECTED}.")
    ssm = values.get("ssm_cfg")
    if not isinstance(ssm, dict) or "layer" not in ssm:
        raise UserError(f"{path}: it names no ssm_cfg.layer. {_EXPECTED}.")
    for name, expected in _FIXED_IN_LAYER.items():
        if ssm.get(name, expected) != expected:
            raise UserError(f"{path}: ssm_cfg.{name} is {ssm[name]!r}, expected {expected!r}. {_EXPECTED}.")
    strange = [name for name in ssm if name not in (*_FIXED_IN_LAYER, *_OF_LAYER, *_ONLY_AT_FIRST)]
    if strange:
        raise UserError(f"{path}: ssm_cfg has {shorten(strange)}, which a Mamba-3 layer has not")
    sizes = {name: _whole(path, name, values.get(name, default)) for name, default in _DEFAULTS.items()}
    of_layer = {name: ssm[name] for name in _OF_LAYER if name in ssm}
    try:
        layer = Mamba3Config(d_model=sizes["d_model"], a_activation=a_activation, **of_layer)
        backbone = BackboneConfig(n_layers=sizes["n_layer"], layer=layer, mlp_dim=sizes["d_intermediate"])
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
    layer.check(f"{path}: ssm_cfg")
    multiple = max(1, sizes["pad_vocab_size_multiple"])
    rows = -(-sizes["vocab_size"] // multiple) * multiple
    tied = values.get("tie_embeddings", True)
    if not isinstance(tied, bool):
        raise UserError(f"{path}: tie_embeddings is {tied!r}, expected true or false")
    return LanguageModelConfig(backbone=backbone, vocab_size=sizes["vocab_size"], rows=rows, tied=tied)


def read_language_model_weights(
    folder: Path, config: LanguageModelConfig, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Float32 tensors on the CPU, independent of the files, under the names of `Mamba3LanguageModel`.

    Args:
        shapes: what shape each of them must have.

    Raises:
        UserError: a file or shard is missing or damaged, or a tensor is missing, too many, of another shape, not
            finite; of a tied model, a head that is another than the embedding.
    """
    found, _ = read_transformers_folder(folder, _EXPECTED)
    weights = {name: value for name, value in found.items() if isinstance(value, Tensor)}  # numbers may lie beside them
    names = official_names(config)
    if config.tied and "lm_head.weight" in weights:
        _demand_tied(folder, weights.pop("lm_head.weight"), weights)
    missing = [key for key in names if key not in weights]
    strange = [key for key in weights if key not in names]
    wrong = [
        f"{key}: expected shape {tuple(shapes[name])}, found {tuple(weights[key].shape)}"
        for key, name in names.items()
        if key in weights and tuple(weights[key].shape) != tuple(shapes[name])
    ]
    problems = [f"missing: {shorten(missing)}"] if missing else []
    problems += [f"not expected: {shorten(strange)}"] if strange else []
    problems += [shorten(wrong, separator="; ")] if wrong else []
    if problems:
        raise UserError(f"{folder}: the weights do not fit its config.json: {'. '.join(problems)}")
    return {name: _own(folder, key, weights.pop(key)) for key, name in names.items()}


def _demand_tied(folder: Path, head: Tensor, weights: Mapping[str, Tensor]) -> None:
    embedding = weights.get("backbone.embedding.weight")
    if embedding is not None and embedding.is_floating_point() and not torch.equal(head, embedding):
        raise UserError(f"{folder}: lm_head.weight differs from backbone.embedding.weight, but config.json ties them")


def _own(folder: Path, key: str, tensor: Tensor) -> Tensor:
    """A float32 copy that does not hang on to the file."""
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise UserError(f"{folder}: {key} has values that are no finite numbers: the file is damaged")
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def read_language_model_tokenizer(folder: Path, config: LanguageModelConfig, file: Path | None = None) -> TextTokenizer:
    """`tokenizer.json` of the folder, or `file`.

    Raises:
        UserError: there is none, or it has tokens that the model has no row for.
    """
    path = folder / "tokenizer.json" if file is None else file
    if file is None and not path.is_file():
        raise UserError(
            f"{folder}: there is no tokenizer.json: put the one there that the model was trained with (its page names "
            "it), or give `tokenizer`"
        )
    tokenizer = TextTokenizer.from_file(path)
    if tokenizer.vocab_size > config.rows:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size} tokens, but the model in {folder} only {config.rows} rows for "
            "them: it was trained with another one"
        )
    return tokenizer


def official_names(config: LanguageModelConfig) -> dict[str, str]:
    """Each tensor's name in the files, and its name in `Mamba3LanguageModel`."""
    names = {"backbone.embedding.weight": "embedding.weight"}
    for i in range(config.backbone.n_layers):
        theirs = f"backbone.layers.{i}"
        names[f"{theirs}.norm.weight"] = f"backbone.norms.{i}.weight"
        names |= {f"{theirs}.mixer.{key}": f"backbone.layers.{i}.{key}" for key in layer_keys(config.backbone.layer)}
        if config.backbone.mlp_dim:
            names[f"{theirs}.norm2.weight"] = f"backbone.mlp_norms.{i}.weight"
            names |= {f"{theirs}.mlp.{fc}.weight": f"backbone.mlps.{i}.{fc}.weight" for fc in ("fc1", "fc2")}
    names["backbone.norm_f.weight"] = "backbone.final_norm.weight"
    return names if config.tied else names | {"lm_head.weight": "lm_head.weight"}


def _whole(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"{path}: {name} is {value!r}, expected a whole number")
    return value
