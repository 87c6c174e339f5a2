"""How many operations a step of phase 1 needs: those of its matrix products, a multiplication and an addition each.

What the results need is counted, not what a way to compute them does: nothing that is computed twice to save memory,
and of the scan the products of the recurrence itself, which no chunk size changes. A backward pass needs two products
for each of the forward pass, one by the weights and one by the inputs; for weights that see frozen inputs, one.
Everything else (norms, activations, the contrast) is a few in a thousand of the whole, and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mamba3_jepa.models.mamba3 import Mamba3, Mamba3Backbone
from mamba3_jepa.models.network import Network
from mamba3_jepa.models.predictor import Predictor
from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.y_encoder import YEncoder

_FORWARD, _OF_WEIGHTS, _AND_OF_INPUTS = 1, 2, 3  # passes: forward; and back to the weights; and to the inputs


@contextmanager
def counted(model: Network) -> Iterator[Counter[str]]:
    """Operations of all steps of phase 1 in the block, forward and backward, by part: x_encoder, predictor,
    y_encoder."""
    found: Counter[str] = Counter()

    def x_encoder(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, VisionEncoder):
            found["x_encoder"] += of_images(module, len(inputs[0]))

    def predictor(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        visual, _, query, _ = inputs
        found["predictor"] += of_predictor(model.predictor, len(visual), visual.shape[1], query.shape[1])

    def y_encoder(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found["y_encoder"] += of_texts(model.y_encoder, *inputs[0].shape)

    hooks = [
        model.x_encoder.register_forward_pre_hook(x_encoder),
        model.predictor.register_forward_pre_hook(predictor),
        model.y_encoder.register_forward_pre_hook(y_encoder),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def of_images(encoder: VisionEncoder, n_images: int) -> int:
    """Of so many images through the frozen X-Encoder."""
    config = encoder.config
    tokens = n_images * config.n_tokens
    patches = 3 * config.patch_size**2 * config.hidden_size  # an image is one frame
    attention = 2 * config.n_tokens * config.hidden_size * config.depth  # queries with keys, weights with values
    return 2 * tokens * (patches + attention + _weights(encoder.encoder.layer)) * _FORWARD


def of_predictor(predictor: Predictor, n_samples: int, n_visual: int, n_query: int) -> int:
    """Of so many samples, each of so many visual tokens and tokens of its query, padding included."""
    parts = predictor.config.parts
    length = sum(n_visual if part == "visual" else n_query for part in parts)
    per_sample = (
        n_visual * _weights(predictor.vision_proj) * _OF_WEIGHTS
        + n_query * _weights(predictor.query_proj) * _AND_OF_INPUTS
        + length * _of_a_token(predictor.backbone) * _AND_OF_INPUTS
        + _weights(predictor.pred_head) * _AND_OF_INPUTS
    )
    if predictor.pool_score is not None:
        per_sample += length * _weights(predictor.pool_score) * _AND_OF_INPUTS
    return 2 * n_samples * per_sample


def of_texts(y_encoder: YEncoder, n_texts: int, length: int) -> int:
    """Of so many texts, each of so many tokens, padding included."""
    per_text = length * _of_a_token(y_encoder.backbone) + _weights(y_encoder.projection)
    return 2 * n_texts * per_text * _AND_OF_INPUTS


def _of_a_token(backbone: Mamba3Backbone) -> int:
    """Products of one token: the linear maps, and in each layer K V^T into the state and the state with Q."""
    scans = [layer for layer in backbone.modules() if isinstance(layer, Mamba3)]
    return _weights(backbone) + sum(2 * layer.rank * layer.d_state * layer.d_inner for layer in scans)


def _weights(module: nn.Module) -> int:
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear))
