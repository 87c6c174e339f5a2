"""What tells one text encoder, and one observer of pictures and questions, from another.

WEIGHT_MAPPING.md says what is hashed, so that any language can compute it.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import torch

from mamba3_jepa.files.safetensors_file import dtype_name
from mamba3_jepa.models.key_map import exported_tensors
from mamba3_jepa.models.vljepa import Mamba3Jepa


def encoder_digest(model: Mamba3Jepa) -> str:
    """SHA-256 in hex of everything a text's embedding depends on: token limit, sizes, tokenizer and weights.

    An exported folder in float32 has the digest of the checkpoint it came from; one in 16 bits has its own, because its
    embeddings differ.
    """
    config = model.config
    sizes = {"max_answer_tokens": config.max_answer_tokens, "y_encoder": config.to_dict()["y_encoder"]}
    tokenizer = sha256(model.tokenizer.to_json().encode()).hexdigest()
    digest = sha256(f"mamba3-jepa y_encoder\n{_canonical(sizes)}\n{tokenizer}\n".encode())
    _add_tensors(digest, model, "y_encoder")
    return digest.hexdigest()


def observer_digest(model: Mamba3Jepa) -> str:
    """SHA-256 in hex of everything a pooled state depends on but the picture, the question and the X-Encoder.

    That is frozen, and a published file or the export's own: its sizes are in, its weights are not.
    """
    config = model.config
    values = config.to_dict()
    parts = {
        "angn": config.angn.enabled,
        "max_query_tokens": config.max_query_tokens,
        "predictor": values["predictor"],
        "query_prompt": config.query_prompt,
        "vision": values["vision"],
    }
    digest = sha256(f"mamba3-jepa observer\n{encoder_digest(model)}\n{_canonical(parts)}\n".encode())
    for component in ("predictor", "angn") if config.angn.enabled else ("predictor",):
        _add_tensors(digest, model, component)
    return digest.hexdigest()


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _add_tensors(digest: Any, model: Mamba3Jepa, component: str) -> None:
    """The tensors of a component under their exported keys, sorted, each behind a line with key, type and shape."""
    tensors = exported_tensors(model.state_dict(), component, model.config, source="the model")
    for key, tensor in sorted(tensors.items()):
        shape = "x".join(map(str, tensor.shape))
        digest.update(f"{key} {dtype_name(tensor.dtype)} {shape}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
