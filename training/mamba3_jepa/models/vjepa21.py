"""How V-JEPA 2.1 turns pixels into tokens: images and clips each have a convolution and a learned vector of their own.

V-JEPA 2.1: Mur-Labadia et al. 2026, arXiv 2603.14482. Of its rotary angles, `vision_parts.rotary_table` says what is
otherwise than in V-JEPA 2; blocks and output norm are the same.

Shape letters: B batch, T frames, H and W height and width in pixels, N tokens, D hidden size.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import VJEPA2Config

from mamba3_jepa.models.vision_parts import PatchEmbedding


class Embeddings21(nn.Module):
    """Pixels to tokens."""

    def __init__(self, config: VJEPA2Config) -> None:
        super().__init__()
        self.patch_embeddings = PatchEmbedding(_convolution(config, config.tubelet_size))
        self.patch_embeddings_img = PatchEmbedding(_convolution(config, 1))
        self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, H, W) to (B, N, D); what has one frame is an image."""
        if pixels.shape[1] == 1:
            return self.patch_embeddings_img(pixels) + self.img_mod_embed
        return self.patch_embeddings(pixels) + self.video_mod_embed


def _convolution(config: VJEPA2Config, tubelet: int) -> nn.Conv3d:
    patch = cast(int, config.patch_size)
    size = (tubelet, patch, patch)
    return nn.Conv3d(config.in_chans, config.hidden_size, kernel_size=size, stride=size)
