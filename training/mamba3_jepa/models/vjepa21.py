"""What V-JEPA 2.1 does otherwise than V-JEPA 2: patches of images, modality vectors, rotary angles.

V-JEPA 2.1: Mur-Labadia et al. 2026, arXiv 2603.14482. The parts here take the places of those of `VJEPA2Model` in
`transformers`; blocks and output norm are the same.

Shape letters: B batch, T frames, H and W height and width in pixels, N tokens, D hidden size, P head size, R turned
dimensions of a head.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import VJEPA2Config
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2PatchEmbeddings3D, VJEPA2RopeAttention

_BASE = 10_000.0
# Rows and columns are counted as if every picture had the grid of one of this many pixels, which the first stage of
# training saw.
_PRETRAINED_SIZE = 256


def make_vjepa21(encoder: nn.Module, config: VJEPA2Config) -> None:
    """Turn the encoder of a `VJEPA2Model`, in place, into one of V-JEPA 2.1 with random weights."""
    encoder.embeddings = Embeddings(config)
    for layer in cast(nn.ModuleList, encoder.layer):
        layer.attention = RotaryAttention(config, config.hidden_size, config.num_attention_heads)


class Embeddings(nn.Module):
    """Pixels to tokens: images and clips each have a convolution and a learned vector of their own."""

    def __init__(self, config: VJEPA2Config) -> None:
        super().__init__()
        image_config = copy.copy(config)
        image_config.tubelet_size = 1
        self.patch_embeddings = VJEPA2PatchEmbeddings3D(config, config.hidden_size)
        self.patch_embeddings_img = VJEPA2PatchEmbeddings3D(image_config, config.hidden_size)
        self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, H, W) to (B, N, D); what has one frame is an image."""
        if pixels.shape[1] == 1:
            patches, modality = self.patch_embeddings_img, self.img_mod_embed
        else:
            patches, modality = self.patch_embeddings, self.video_mod_embed
        return patches(pixels.transpose(1, 2).to(patches.proj.weight.dtype)) + modality


class RotaryAttention(VJEPA2RopeAttention):
    """Attention whose `position_mask` is what `rotary_table` gives."""

    def get_position_ids(self, x: Tensor, masks: Tensor | None = None) -> Tensor | None:
        """What the base class hands to `apply_rotary_embeddings`."""
        return masks

    def apply_rotary_embeddings(self, qk: Tensor, pos_ids: Tensor) -> Tensor:
        """Turn the neighbours (2i, 2i + 1) of queries or keys (B, heads, N, P); what is beyond R stays."""
        cos, sin = pos_ids
        turned, rest = qk.split((cos.shape[-1], qk.shape[-1] - cos.shape[-1]), dim=-1)
        even, odd = turned[..., ::2], turned[..., 1::2]
        partner = torch.stack((-odd, even), dim=-1).flatten(-2)
        return torch.cat(((turned * cos + partner * sin).to(qk.dtype), rest), dim=-1)


def rotary_table(grid: tuple[int, int, int], patch_size: int, head_size: int, device: torch.device) -> Tensor:
    """Cosine and sine of the angle by which each dimension of a head turns at each token.

    A third of a head turns with the token's time, a third with its row, a third with its column, each a whole number of
    pairs; the two of a pair turn by the same angle. Rows and columns are stretched to the grid of a picture of 256
    pixels, from its first to its last; a single row or column stands at 0.

    Args:
        grid: tubelets (1 of an image), rows and columns of patches; N is their product.

    Returns:
        (2, N, R) float32, R = 3 * 2 * (head_size // 3 // 2).
    """
    last = max(1, _PRETRAINED_SIZE // patch_size) - 1
    time, rows, columns = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    places = torch.cartesian_prod(time, _stretched(rows, last), _stretched(columns, last))  # (N, 3)
    pairs = head_size // 3 // 2
    frequencies = _BASE ** -(torch.arange(pairs, dtype=torch.float32, device=device) / max(1, pairs))
    angles = (places[:, :, None] * frequencies.repeat_interleave(2)).flatten(1)
    return torch.stack((angles.cos(), angles.sin()))


def _stretched(positions: Tensor, last: int) -> Tensor:
    """0, 1, .. with the last of them at `last`."""
    return positions * last / max(1, len(positions) - 1)
