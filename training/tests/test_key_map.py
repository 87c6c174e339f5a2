"""The names of exported tensors: one for every tensor of a model, and none for anything else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_export import build

from mamba3_jepa.config import AngnConfig, preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.key_map import COMPONENTS, exported_tensors, key_map, model_tensors
from mamba3_jepa.models.vljepa import Mamba3Jepa


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return build()


def test_the_keys_the_design_names() -> None:
    config = preset("small").replace(angn=AngnConfig(enabled=True))
    keys = [key for component in COMPONENTS for key in key_map(component, config)]
    assert len(keys) == len(set(keys))
    for key in ("predictor.layers.11.in_proj.weight", "predictor.norms.0.weight", "predictor.final_norm.weight",
                "angn.gates.11.weight", "recursion.confusion_probe.linear.weight",
                "recursion.injector.projection.weight"):  # fmt: skip
        assert key in keys
    assert not any("backbone" in key for key in keys)
    assert key_map("predictor", config)["predictor.layers.3.D"] == "predictor.backbone.layers.3.D"


def test_every_tensor_of_a_model_has_one_key() -> None:
    """Also of models with ranks, output norms and MLPs, which no preset has."""
    tiny = preset("tiny")
    layer = dataclasses.replace(tiny.predictor.layer, is_mimo=True, mimo_rank=2, is_outproj_norm=True)
    mimo = {"predictor": dataclasses.replace(tiny.predictor, layer=layer)}
    mlps = {"y_encoder": dataclasses.replace(tiny.y_encoder, mlp_dim=3)}
    for model in (build(), build(**mimo), build(**mlps)):
        names = [name for component in COMPONENTS for name in key_map(component, model.config).values()]
        assert sorted(names) == sorted(model.state_dict())


def test_unmapped_and_missing_tensors_are_errors(model: Mamba3Jepa) -> None:
    state = dict(model.state_dict())
    state["predictor.backbone.layers.0.new"] = torch.ones(1)
    with pytest.raises(UserError, match=r"here: predictor: not in the key map: predictor\.backbone\.layers\.0\.new"):
        exported_tensors(state, "predictor", model.config, "here")
    state = dict(model.state_dict())
    del state["y_decoder.lm_head.weight"]
    with pytest.raises(UserError, match=r"missing from the model: y_decoder\.lm_head\.weight"):
        exported_tensors(state, "y_decoder", model.config, "here")
    with pytest.raises(UserError, match="no component 'decoder'"):
        key_map("decoder", model.config)
    keys = exported_tensors(model.state_dict(), "angn", model.config, "here")
    back = model_tensors(keys, "angn", model.config, "here")
    assert all(back[name] is keys[name] for name in back)
    with pytest.raises(UserError, match=r"missing from the file: angn\.gates\.0\.bias"):
        model_tensors({key: keys[key] for key in keys if key != "angn.gates.0.bias"}, "angn", model.config, "here")
