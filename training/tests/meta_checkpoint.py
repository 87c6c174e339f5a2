"""Writes an X-Encoder as Meta publishes V-JEPA 2, for tests without the real file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vit_checkpoint import _BLOCK_PARTS, _META_PREFIX, _OUTER_PARTS, _QKV


def to_meta_state_dict(encoder: VisionEncoder) -> dict[str, Tensor]:
    """The encoder's weights under Meta's names: the inverse of what loading does."""
    state = encoder.state_dict()
    meta = {
        f"{_META_PREFIX}{theirs}.{kind}": state[f"{ours}.{kind}"]
        for theirs, ours in _OUTER_PARTS.items()
        for kind in ("weight", "bias")
    }
    for i in range(encoder.config.depth):
        for kind in ("weight", "bias"):
            for theirs, ours in _BLOCK_PARTS.items():
                meta[f"{_META_PREFIX}blocks.{i}.{theirs}.{kind}"] = state[f"encoder.layer.{i}.{ours}.{kind}"]
            qkv = [state[f"encoder.layer.{i}.{part}.{kind}"] for part in _QKV]
            meta[f"{_META_PREFIX}blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    return meta


def save_meta_checkpoint(encoder: VisionEncoder, path: str | Path) -> None:
    """The encoder as a file of Meta's."""
    weights = to_meta_state_dict(encoder)
    torch.save({"encoder": weights, "target_encoder": weights, "epoch": 0}, path)
