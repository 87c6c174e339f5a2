"""Small language models with random weights, in the layout of the official Mamba-3 checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba3_jepa.config import AActivation, BackboneConfig, Mamba3Config
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.models.language_model import Mamba3LanguageModel
from mamba3_jepa.models.language_model_files import LanguageModelConfig, official_names

FIXTURE = Path(__file__).parent / "fixtures" / "mamba3_lm"


def language_model(vocab_size: int = 300, *, tied: bool = True, seed: int = 0, **changes: Any) -> Mamba3LanguageModel:
    """Away from the initial weights, where norms are one. Nothing about it is a multiple of what it is rounded up to.

    Args:
        changes: to the layer's configuration; `mlp_dim` and `n_layers` are the backbone's.
    """
    torch.manual_seed(seed)
    backbone = {"mlp_dim": changes.pop("mlp_dim", 100), "n_layers": changes.pop("n_layers", 2)}
    layer = Mamba3Config(**{"d_model": 48, "d_state": 16, "headdim": 16, "chunk_size": 16} | changes)
    rows = -(-vocab_size // 16) * 16
    config = LanguageModelConfig(
        backbone=BackboneConfig(layer=layer, **backbone), vocab_size=vocab_size, rows=rows, tied=tied
    )
    model = Mamba3LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def official_state(model: Mamba3LanguageModel) -> dict[str, Tensor]:
    """Its weights under the names of the official files, a tied head among them."""
    state = model.state_dict()
    named = {key: state[name] for key, name in official_names(model.config).items()}
    return named | {"lm_head.weight": model.head.detach()}


def official_config(model: Mamba3LanguageModel) -> dict[str, Any]:
    """`config.json` as mamba-ssm writes it."""
    config = model.config
    layer = config.backbone.layer
    names = ("d_state", "headdim", "expand", "rope_fraction", "is_mimo", "chunk_size", "is_outproj_norm")
    ssm = {"layer": "Mamba3", **{name: getattr(layer, name) for name in names}}
    return {
        "d_model": layer.d_model,
        "d_intermediate": config.backbone.mlp_dim,
        "n_layer": config.backbone.n_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm | ({"mimo_rank": layer.mimo_rank} if layer.is_mimo else {}),
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": config.tied,
    }


def write_language_model(
    folder: Path, model: Mamba3LanguageModel, tokenizer: TextTokenizer | None = None, **beside: Any
) -> Path:
    """The folder that a hub would hold; `beside`: what else lies in `pytorch_model.bin`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(official_config(model)))
    torch.save(official_state(model) | beside, folder / "pytorch_model.bin")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return folder


def reopened(folder: Path, a_activation: AActivation = "heavy_tail") -> Mamba3LanguageModel:
    """The model of a folder."""
    return Mamba3LanguageModel.from_pretrained(folder, a_activation=a_activation)
