"""The official language model as one page of numpy in float64, token by token, from its own files and names.

The reference of `Mamba3LanguageModel`: nothing is shared with it. Shape letters: L tokens, D width, V rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy_reader import Layer, gated_mlp, rms_norm

_LAYER = {"d_state": 128, "expand": 2, "headdim": 64, "ngroups": 1, "rope_fraction": 0.5, "is_mimo": False,
          "mimo_rank": 4, "is_outproj_norm": False}  # fmt: skip
_CONSTANTS = {"norm_eps": 1e-5, "A_floor": 1e-4}


def plain_language_model(folder: Path, ids: list[int], a_activation: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (L,) -> hidden states (L, D) after the final norm, and logits (L, V)."""
    config = json.loads((folder / "config.json").read_text())
    loaded = torch.load(folder / "pytorch_model.bin", weights_only=True)
    w = {key: tensor.double().numpy() for key, tensor in loaded.items()}
    layer = {**_LAYER, **config["ssm_cfg"], "d_model": config["d_model"], "a_activation": a_activation}
    numbers = range(config["n_layer"])
    mixers = [Layer(w, f"backbone.layers.{i}.mixer.", layer, _CONSTANTS) for i in numbers]
    hidden = []
    for token in ids:
        h = w["backbone.embedding.weight"][token]
        for i, mixer in enumerate(mixers):
            block = f"backbone.layers.{i}"
            h = h + mixer(rms_norm(h, w[f"{block}.norm.weight"], 1e-5))
            if config["d_intermediate"]:
                normed = rms_norm(h, w[f"{block}.norm2.weight"], 1e-5)
                h = h + gated_mlp(normed, w[f"{block}.mlp.fc1.weight"], w[f"{block}.mlp.fc2.weight"])
        hidden.append(rms_norm(h, w["backbone.norm_f.weight"], 1e-5))
    states = np.stack(hidden)
    return states, states @ w["lm_head.weight"].T
