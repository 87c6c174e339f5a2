"""The X-Encoder: V-JEPA 2's vision transformer, frozen.

The network is the one in `transformers` (`VJEPA2Model`); this file feeds it. V-JEPA 2: Assran et al. 2025,
arXiv 2506.09985.

Shape letters: B batch, T frames, H and W height and width in pixels, N visual tokens, D hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from mamba3_jepa.config import VisionConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.state_dict import load_state
from mamba3_jepa.models.vit_checkpoint import read_vision_checkpoint

# Side, in patches, of the square grid in which a position id t * G^2 + row * G + column is read. V-JEPA 2 has
# no position table, ids only become rotary angles: a grid larger than every input serves every input size.
_GRID = 4096


class VisionEncoder(nn.Module):
    """Frozen V-JEPA 2 encoder: always in eval mode, no trainable parameter, forward records no graph."""

    def __init__(self, config: VisionConfig) -> None:
        """Random weights; see `from_checkpoint` for trained ones."""
        super().__init__()
        self.config = config
        self.encoder = VJEPA2Model(_transformers_config(config)).encoder
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def empty(cls, config: VisionConfig) -> VisionEncoder:
        """Uninitialised weights, for a caller that fills them: skips the time random numbers take."""
        with torch.device("meta"):
            encoder = cls(config)
        return encoder.to_empty(device="cpu")

    @classmethod
    def from_checkpoint(cls, path: str | Path, image_size: int | None = None) -> VisionEncoder:
        """Load a V-JEPA 2 encoder.

        Args:
            path: Meta's `.pt`/`.pth`, a `.safetensors` file with Meta's or transformers' names, or a
                transformers folder (`config.json` and `model.safetensors`).
            image_size: side in pixels of the images it will see; by default what the file says, else 256.

        Raises:
            UserError: the file is missing, damaged or not a V-JEPA 2 encoder; says what was expected and what
                was found.
        """
        config, state = read_vision_checkpoint(Path(path), image_size)
        encoder = cls.empty(config)
        load_state(encoder, state, source=str(path))
        return encoder

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in eval mode: frozen means frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images or clips.

        Args:
            pixels: float, ImageNet-normalised, (B, 3, H, W) or (B, T, 3, H, W); H and W multiples of the
                patch size, T of the tubelet size. An image is seen as a clip of one tubelet of equal frames.

        Returns:
            (B, N, D) with N = T / tubelet * H / patch * W / patch, in time-major, then row-major order.

        Raises:
            UserError: the shape or the type does not fit.
        """
        self._check(pixels)
        if pixels.ndim == 4:
            pixels = pixels.unsqueeze(1).expand(-1, self.config.tubelet_size, -1, -1, -1)
        positions = self._position_ids(pixels)
        h = self.encoder.embeddings(pixels)
        for layer in self.encoder.layer:
            h = layer(h, position_mask=positions)[0]
        return self.encoder.layernorm(h)

    def _position_ids(self, clip: Tensor) -> Tensor:
        """Ids (1, N) of the tokens of a clip (B, T, 3, H, W) in the grid the rotary code reads them in.

        Left to itself that code takes every input for a square of the configured size.
        """
        _, frames, _, height, width = clip.shape
        time = torch.arange(frames // self.config.tubelet_size, device=clip.device)
        row = torch.arange(height // self.config.patch_size, device=clip.device)
        column = torch.arange(width // self.config.patch_size, device=clip.device)
        ids = time[:, None, None] * _GRID**2 + row[:, None] * _GRID + column
        return ids.reshape(1, -1)

    def _check(self, pixels: Tensor) -> None:
        patch, tubelet = self.config.patch_size, self.config.tubelet_size
        found = f"found {tuple(pixels.shape)}"
        if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
            raise UserError(f"X-Encoder: expected pixels (B, 3, H, W) or (B, T, 3, H, W), {found}")
        if not pixels.is_floating_point():
            raise UserError(f"X-Encoder: expected normalised floating-point pixels, found {pixels.dtype}")
        sides = pixels.shape[-2:]
        if any(side == 0 or side % patch or side > patch * _GRID for side in sides):
            raise UserError(f"X-Encoder: height and width must be multiples of the patch {patch}, {found}")
        if pixels.ndim == 5 and (pixels.shape[1] == 0 or pixels.shape[1] % tubelet):
            raise UserError(f"X-Encoder: the number of frames must be a multiple of {tubelet}, {found}")


def _transformers_config(config: VisionConfig) -> VJEPA2Config:
    values: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "patch_size": config.patch_size,
        "tubelet_size": config.tubelet_size,
        "frames_per_clip": config.frames,
        "crop_size": config.patch_size * _GRID,
        "layer_norm_eps": 1e-6,
        "attn_implementation": "sdpa",
        # V-JEPA 2's own (mask) predictor is not used: it is built without layers, and dropped.
        "pred_hidden_size": 1,
        "pred_num_hidden_layers": 0,
        "pred_num_attention_heads": 1,
    }
    return VJEPA2Config(**values)
