"""The three presets: names and numbers of their parameters."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_model

from mamba3_jepa.config import AngnConfig, BackboneConfig, PresetName, preset
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.models.vljepa import Mamba3Jepa, parameter_counts


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["a red circle"], vocab_size=300)


def test_names_of_the_weights(tokenizer: TextTokenizer) -> None:
    """The export is made from these names."""
    model = tiny_model(2, tokenizer)
    outside = {
        "predictor": {"vision_proj.weight", "vision_proj.bias", "query_proj.weight", "query_proj.bias"}
        | {"pool_score.weight", "pred_head.weight", "pred_head.bias", "backbone.final_norm.weight"},
        "y_encoder": {
            "embedding.weight",
            "projection.weight",
            "projection.bias",
            "backbone.final_norm.weight",
        },
        "y_decoder": {"embed_to_prefix.weight", "embed_to_prefix.bias", "embedding.weight", "lm_head.weight"}
        | {"backbone.final_norm.weight"},
    }
    for component, names in outside.items():
        keys = set(model.get_submodule(component).state_dict())
        layers = {name for name in keys if name.startswith(("backbone.layers.", "backbone.norms."))}
        assert keys - layers == names
        assert "backbone.layers.1.in_proj.weight" in layers
        assert "backbone.norms.1.weight" in layers


def backbone_parameters(config: BackboneConfig) -> int:
    """The sizes of DESIGN.md, section 2, added up by hand."""
    d, N, P = config.layer.d_model, config.layer.d_state, config.layer.headdim
    inner = config.layer.expand * d
    H, S = inner // P, N // 4
    layer = d * (2 * inner + 2 * N + 3 * H + S) + 2 * H + 2 * H * N + 2 * N + inner * d
    return config.n_layers * (layer + d) + d


def wide_tokenizer(tokenizer: TextTokenizer, vocab_size: int) -> TextTokenizer:
    values = json.loads(tokenizer.to_json())
    vocabulary = values["model"]["vocab"]
    vocabulary.update({f"unused{i}": i for i in range(tokenizer.vocab_size, vocab_size)})
    return TextTokenizer.from_json(json.dumps(values))


@pytest.mark.parametrize("name", ["small", "mini", "tiny"])
def test_parameter_counts_of_the_presets(tokenizer: TextTokenizer, name: PresetName) -> None:
    config = preset(name).replace(angn=AngnConfig(enabled=True))
    wide = wide_tokenizer(tokenizer, config.vocab_size)
    with torch.device("meta"):
        counts = parameter_counts(Mamba3Jepa(config, wide, with_decoder=True))
    d, t, y, e = (
        config.predictor.d_model,
        config.y_encoder.d_model,
        config.y_decoder.d_model,
        config.embed_dim,
    )
    vision, P, V = config.vision, config.prefix_tokens, config.vocab_size
    D = vision.hidden_size
    x_encoder = vision.depth * (12 * D * D + 13 * D) + D * (3 * 2 * vision.patch_size**2 + 1) + 2 * D
    expected = {
        "x_encoder": x_encoder,
        "predictor": backbone_parameters(config.predictor) + (D + 1) * d + (t + 1) * d + d + (d + 1) * e,
        "y_encoder": backbone_parameters(config.y_encoder) + V * t + (t + 1) * e,
        "angn": config.predictor.n_layers * 2 * d,
        "y_decoder": backbone_parameters(config.y_decoder) + 2 * V * y + (e + 1) * P * y,
    }
    assert counts == expected | {"total": sum(expected.values())}
