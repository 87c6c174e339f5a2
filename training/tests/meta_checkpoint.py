"""Writes an X-Encoder as Meta publishes V-JEPA 2 and 2.1, for tests without the real files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mamba3_jepa.models.vit import VisionEncoder
from mamba3_jepa.models.vit_checkpoint import _BLOCK_PARTS, _OUTER, _QKV

PREFIX = "module.backbone."


def to_meta_state_dict(encoder: VisionEncoder, prefix: str = PREFIX) -> dict[str, Tensor]:
    """The encoder's weights under Meta's names: the inverse of what loading does.

    The three norms of inner layers that V-JEPA 2.1 has beside its last are filled with what must not be read.
    """
    state, kind = encoder.state_dict(), encoder.config.kind
    meta = {theirs: state[ours] for theirs, ours in _OUTER[kind].items()}
    for i in range(encoder.config.depth):
        for end in ("weight", "bias"):
            for theirs, ours in _BLOCK_PARTS.items():
                meta[f"blocks.{i}.{theirs}.{end}"] = state[f"encoder.layer.{i}.{ours}.{end}"]
            qkv = [state[f"encoder.layer.{i}.{part}.{end}"] for part in _QKV]
            meta[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(qkv)
    if kind == "vjepa2.1":
        for end in ("weight", "bias"):
            norm = state[f"encoder.layernorm.{end}"]
            meta |= {f"norms_block.{i}.{end}": torch.full_like(norm, torch.nan) for i in range(3)}
            meta[f"norms_block.3.{end}"] = norm
    return {f"{prefix}{name}": tensor for name, tensor in meta.items()}


def save_meta_checkpoint(encoder: VisionEncoder, path: str | Path) -> None:
    """The encoder as a file of Meta's."""
    weights = to_meta_state_dict(encoder)
    torch.save({"encoder": weights, "target_encoder": weights, "epoch": 0}, path)
