"""Which exported key is which tensor of the model: written out from the configuration, strict both ways.

The keys are a contract with readers in other languages, so nothing here looks at the names the model happens to have: a
tensor that was renamed, added or forgotten is an error, not another key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, cast, get_args

from torch import Tensor

from mamba3_jepa.config import BackboneConfig, Mamba3Config, ModelConfig, RecursionConfig
from mamba3_jepa.errors import UserError, shorten

Component = Literal["predictor", "y_encoder", "angn", "y_decoder", "recursion", "x_encoder"]
COMPONENTS: tuple[Component, ...] = get_args(Component)

_PHASES: dict[Component, int] = {"predictor": 1, "y_encoder": 1, "angn": 1, "y_decoder": 2, "recursion": 3}
_VISION_LAYER = ("norm1", "attention.query", "attention.key", "attention.value", "attention.proj", "norm2", "mlp.fc1",
                 "mlp.fc2")  # fmt: skip


def phase_components(config: ModelConfig, phase: int) -> list[Component]:
    """The components an export of `phase` holds: a later phase adds to the earlier ones, ANGN only where it is on."""
    return [name for name, first in _PHASES.items() if first <= phase and (name != "angn" or config.angn.enabled)]


def checked_component(name: str) -> Component:
    """`name`, if it is a component.

    Raises:
        UserError: it is not.
    """
    if name not in COMPONENTS:
        raise UserError(f"there is no component {name!r}: choose one of {', '.join(COMPONENTS)}")
    return cast(Component, name)


def key_map(component: str, config: ModelConfig) -> dict[str, str]:
    """Exported key -> name in `Mamba3Jepa.state_dict()`, for every tensor of a component.

    Raises:
        UserError: there is no such component.
    """
    name = checked_component(component)
    if name == "x_encoder":  # behind the component these are the names `transformers` gives V-JEPA 2
        return {f"x_encoder.{key}": f"x_encoder.{key}" for key in _vision_keys(config)}
    if name == "angn":
        gates = [f"angn.gates.{i}.{kind}" for i in range(config.predictor.n_layers) for kind in ("weight", "bias")]
        return {key: key for key in gates}
    if name == "recursion":
        return {f"recursion.{key}": f"recursion.{key}" for key in _recursion_keys(config.recursion)}
    backbone = {"predictor": config.predictor, "y_encoder": config.y_encoder, "y_decoder": config.y_decoder}[name]
    own = {
        "predictor": [*_linear("vision_proj"), *_linear("query_proj"), *_pooling(config), *_linear("pred_head")],
        "y_encoder": ["embedding.weight", *_linear("projection")],
        "y_decoder": [*_linear("embed_to_prefix"), "embedding.weight", "lm_head.weight"],
    }[name]
    plain = {f"{name}.{key}": f"{name}.{key}" for key in own}
    bidirectional = name == "predictor" and config.predictor.bidirectional
    return plain | {f"{name}.{key}": f"{name}.backbone.{key}" for key in _backbone_keys(backbone, bidirectional)}


def exported_tensors(
    state: Mapping[str, Tensor], component: str, config: ModelConfig, source: str
) -> dict[str, Tensor]:
    """The tensors of a component under their exported keys.

    Args:
        state: state dict of a `Mamba3Jepa`.
        component: one of `COMPONENTS`.
        config: the model's configuration.
        source: where `state` came from, for the error message.

    Raises:
        UserError: the state has no such component, lacks a tensor of it, or has one more than the map knows.
    """
    names = key_map(component, config)
    present = [name for name in state if name.startswith(f"{component}.")]
    if not present:
        raise UserError(f"{source} has no {component}")
    known = set(names.values())
    _demand_none("missing from the model", [name for name in names.values() if name not in state], component, source)
    _demand_none("not in the key map", [name for name in present if name not in known], component, source)
    return {key: state[name] for key, name in names.items()}


def model_tensors(
    exported: Mapping[str, Tensor], component: str, config: ModelConfig, source: str
) -> dict[str, Tensor]:
    """The inverse of `exported_tensors`: exported keys to the names of the state dict.

    Raises:
        UserError: a key is missing or has no place; `source` names the file.
    """
    names = key_map(component, config)
    _demand_none("missing from the file", [key for key in names if key not in exported], component, source)
    _demand_none("not in the key map", [key for key in exported if key not in names], component, source)
    return {name: exported[key] for key, name in names.items()}


def demand_all_mapped(state: Mapping[str, Tensor], source: str) -> None:
    """Every tensor of a model belongs to a component.

    Raises:
        UserError: some do not.
    """
    strangers = [name for name in state if name.partition(".")[0] not in COMPONENTS]
    if strangers:
        raise UserError(f"{source}: tensors that belong to no component: {shorten(strangers)}")


def _demand_none(what: str, names: list[str], component: str, source: str) -> None:
    if names:
        raise UserError(f"{source}: {component}: {what}: {shorten(names)}")


def _linear(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _pooling(config: ModelConfig) -> list[str]:
    return ["pool_score.weight"] if config.predictor.pooling == "attention" else []


def layer_keys(config: Mamba3Config) -> list[str]:
    """The tensors of one Mamba-3 layer."""
    keys = ["in_proj.weight", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight"]
    keys += ["mimo_x", "mimo_z", "mimo_o"] if config.is_mimo else []
    return keys + ["D"] + (["norm.weight"] if config.is_outproj_norm else []) + ["out_proj.weight"]


def _backbone_keys(config: BackboneConfig, bidirectional: bool) -> Iterator[str]:
    for i in range(config.n_layers):
        yield f"norms.{i}.weight"
        for layers in ("layers", "reverse_layers") if bidirectional else ("layers",):
            for key in layer_keys(config.layer):
                yield f"{layers}.{i}.{key}"
        if config.mlp_dim:
            yield f"mlp_norms.{i}.weight"
            yield f"mlps.{i}.fc1.weight"
            yield f"mlps.{i}.fc2.weight"
    yield "final_norm.weight"


def _recursion_keys(config: RecursionConfig) -> Iterator[str]:
    for key in (*_linear("norm"), *_linear("hidden"), *_linear("linear"), "threshold", "temperature"):
        yield f"confusion_probe.{key}"
    yield "injector.projection.weight"
    if config.injector_sees_state:
        for key in (*_linear("norm"), *_linear("hidden"), "output.weight"):
            yield f"injector.{key}"
    for name in ["knowledge_probe"] * config.weighs_knowledge + ["tool_selector"] * bool(config.tools):
        for key in (*_linear("norm"), *_linear("hidden"), *_linear("linear")):
            yield f"{name}.{key}"
    if config.retriever_dim:
        for tower in ("question", "text"):
            for key in (*_linear("hidden"), *_linear("output")):
                yield f"retriever.{tower}.{key}"
    yield "memory_floor"
    if config.episodes:
        yield from ("episode_blend", "episode_floor", f"{config.episode_key}_mean")


def _vision_keys(config: ModelConfig) -> Iterator[str]:
    yield from _linear("encoder.embeddings.patch_embeddings.proj")
    if config.vision.kind == "vjepa2.1":
        yield from _linear("encoder.embeddings.patch_embeddings_img.proj")
        yield from ("encoder.embeddings.img_mod_embed", "encoder.embeddings.video_mod_embed")
    for i in range(config.vision.depth):
        for name in _VISION_LAYER:
            yield from _linear(f"encoder.layer.{i}.{name}")
    yield from _linear("encoder.layernorm")
