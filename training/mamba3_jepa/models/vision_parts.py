"""Parts of the X-Encoder that compute what those of `transformers` compute, in fewer and larger steps.

Their weights have the names of the parts they stand in for. V-JEPA 2: Assran et al. 2025, arXiv 2506.09985; 2.1:
Mur-Labadia et al. 2026, arXiv 2603.14482.

Shape letters: B batch, T frames, H and W height and width in pixels, N tokens, D hidden size, P head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VJEPA2Config
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Layer, VJEPA2RopeAttention

_BASE = 10_000.0
# Rows and columns of V-JEPA 2.1 are counted as if every picture had the grid of one of this many pixels, which the
# first stage of training saw.
_PRETRAINED_SIZE = 256


class PatchEmbedding(nn.Module):
    """A convolution whose steps are as long as its kernel, as the matrix product that it is.

    `transformers` has `nn.Conv3d` compute it, which for a picture takes longer than a layer of the encoder does.

    Args:
        proj: the convolution, (D, 3, tubelet, patch, patch).
    """

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, H, W) to (B, N, D), N = T / tubelet * H / patch * W / patch. One frame alone stands for a tubelet
        of equal ones."""
        weight, bias = self.proj.weight, self.proj.bias
        tubelet, patch = weight.shape[2], weight.shape[3]
        if pixels.shape[1] == 1:
            weight, tubelet = weight.sum(2, keepdim=True), 1
        pixels = pixels.to(weight.dtype)
        patches = pixels.unflatten(1, (-1, tubelet)).unflatten(4, (-1, patch)).unflatten(6, (-1, patch))
        # (B, T', tubelet, 3, H', patch, W', patch) -> (B, T', H', W', 3, tubelet, patch, patch)
        patches = patches.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches, weight.flatten(1), bias)


class Embeddings(nn.Module):
    """Pixels to tokens, as V-JEPA 2 does it."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.patch_embeddings = PatchEmbedding(proj)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, H, W) to (B, N, D)."""
        return self.patch_embeddings(pixels)


class RotaryTable(NamedTuple):
    """How far each dimension of a head turns at each token: x * cos + x[..., partner] * sin.

    cos, sin: (N, P) float32; the first of two neighbours has minus the sine. partner: (P,) int64, each one's neighbour.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor


class RotaryAttention(VJEPA2RopeAttention):
    """Attention whose `position_mask` is what `rotary_table` gives, made once for all layers."""

    def get_position_ids(self, x: Tensor, masks: RotaryTable | None = None) -> RotaryTable | None:
        """What the base class hands to `apply_rotary_embeddings`."""
        return masks

    def apply_rotary_embeddings(self, qk: Tensor, pos_ids: RotaryTable) -> Tensor:
        """Turn the neighbours (2i, 2i + 1) of queries or keys (B, heads, N, P)."""
        return (qk * pos_ids.cos + qk.index_select(-1, pos_ids.partner) * pos_ids.sin).to(qk.dtype)


def use_rotary_table(encoder: nn.Module, config: VJEPA2Config) -> None:
    """Let the layers of the encoder of a `VJEPA2Model` take a `rotary_table`; weights stay as they are."""
    for layer in cast(Iterable[VJEPA2Layer], encoder.layer):
        with torch.device("meta"):  # draws no random numbers
            attention = RotaryAttention(config, config.hidden_size, config.num_attention_heads)
        attention.load_state_dict(layer.attention.state_dict(), assign=True)
        layer.attention = attention


def rotary_table(
    grid: tuple[int, int, int], head_size: int, device: torch.device, *, pretrained_grid: int | None = None
) -> RotaryTable:
    """The angles of all tokens of one clip.

    A third of a head turns with the token's time, a third with its row, a third with its column, each a whole number of
    pairs; what is left over does not turn. In V-JEPA 2.1 the two of a pair of neighbours have the same frequency. In
    V-JEPA 2 each third has its frequencies twice, one copy behind the other, although neighbours turn there too: so it
    was trained.

    Args:
        grid: tubelets (1 of an image), rows and columns of patches; N is their product.
        pretrained_grid: of V-JEPA 2.1, the rows of a picture as it was trained: rows and columns are stretched to as
            many, from the first to the last; a single one stands at 0. V-JEPA 2 counts 0, 1, ...
    """
    pairs = head_size // 3 // 2
    time, rows, columns = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    if pretrained_grid is not None:
        rows, columns = _stretched(rows, pretrained_grid - 1), _stretched(columns, pretrained_grid - 1)
    places = torch.cartesian_prod(time, rows, columns)  # (N, 3)
    frequencies = _BASE ** -(torch.arange(pairs, dtype=torch.float32, device=device) / max(1, pairs))
    frequencies = frequencies.repeat(2) if pretrained_grid is None else frequencies.repeat_interleave(2)
    angles = F.pad((places[:, :, None] * frequencies).flatten(1), (0, head_size - 6 * pairs))
    dimension = torch.arange(head_size, device=device)
    sign = 1.0 - 2 * (dimension % 2 == 0)
    partner = torch.where(dimension < 6 * pairs, dimension ^ 1, dimension)
    return RotaryTable(angles.cos(), angles.sin() * sign, partner)


def pretrained_grid(patch_size: int) -> int:
    """Rows of patches of a picture as V-JEPA 2.1 was trained on it."""
    return max(1, _PRETRAINED_SIZE // patch_size)


def _stretched(positions: Tensor, last: int) -> Tensor:
    """0, 1, .. with the last of them at `last`."""
    return positions * last / max(1, len(positions) - 1)
