"""The X-Encoder: the vision transformer of V-JEPA 2 or 2.1, frozen.

The network is the one in `transformers` (`VJEPA2Model`); this file feeds it. `vision_parts.py` has what is computed
another way here, and `vjepa21.py` the embeddings that are others in V-JEPA 2.1. V-JEPA 2: Assran et al. 2025, arXiv
2506.09985; 2.1: Mur-Labadia et al. 2026, arXiv 2603.14482.

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
from mamba3_jepa.models.vision_parts import (
    Embeddings,
    RotaryTable,
    pretrained_grid,
    rotary_table,
    use_rotary_table,
)
from mamba3_jepa.models.vit_checkpoint import read_vision_checkpoint
from mamba3_jepa.models.vjepa21 import Embeddings21


class VisionEncoder(nn.Module):
    """Frozen V-JEPA 2 or 2.1 encoder: always in eval mode, no trainable parameter, forward records no graph."""

    def __init__(self, config: VisionConfig) -> None:
        """Random weights; see `from_checkpoint` for trained ones."""
        super().__init__()
        self.config = config
        theirs = _transformers_config(config)
        self.encoder = VJEPA2Model(theirs).encoder
        use_rotary_table(self.encoder, theirs)
        patches = self.encoder.embeddings.patch_embeddings.proj
        embeddings = Embeddings21(theirs) if config.kind == "vjepa2.1" else Embeddings(patches)
        self.encoder.add_module("embeddings", embeddings)
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
        """Load a published encoder, of any size.

        - V-JEPA 2 of Meta's: `vitl.pt`, `vith.pt`, `vitg.pt`, `vitg-384.pt`.
        - V-JEPA 2.1 of Meta's: `vjepa2_1_vitb_dist_vitG_384.pt`, `vjepa2_1_vitl_dist_vitG_384.pt`,
          `vjepa2_1_vitg_384.pt`, `vjepa2_1_vitG_384.pt`.
        - V-JEPA 2 of Hugging Face: a folder such as `vjepa2-vitl-fpc64-256`, with `config.json` and either
          `model.safetensors`, its shards, or `pytorch_model.bin`.

        Of Meta's files it is `target_encoder`, else `ema_encoder`, else `encoder`, else the file is taken for a bare
        state dict; `module.`, `backbone.` and `_orig_mod.` before the names do not matter. A `.safetensors` file may
        have Meta's or transformers' names. What is left out: predictors, optimizers, a `pos_embed`, which a rotary
        encoder never reads (that is logged), and of V-JEPA 2.1 the norms of inner layers. docs/checkpoints.md says
        where the files come from.

        Args:
            path: the file or folder.
            image_size: side in pixels of the images it will see. By default what the file says in its settings, its
                name or the length of a `pos_embed`; else 256 for V-JEPA 2 and 384 for 2.1, which is logged.

        Raises:
            UserError: the file is missing, damaged or not such an encoder; says what was expected and what was
                found.
        """
        config, state = read_vision_checkpoint(Path(path), image_size)
        with torch.device("meta"):
            encoder = cls(config)
        load_state(encoder, state, source=str(path), assign=True)
        return encoder

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in eval mode: frozen means frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images or clips.

        Args:
            pixels: float, ImageNet-normalised, (B, 3, H, W) or (B, T, 3, H, W); H and W multiples of the
                patch size, T of the tubelet size. V-JEPA 2 sees an image as a clip of one tubelet of equal frames;
                V-JEPA 2.1 has a branch for images, which also takes clips of one frame.

        Returns:
            (B, N, D) with N = T / tubelet * H / patch * W / patch, in time-major, then row-major order; of an image
            H / patch * W / patch.

        Raises:
            UserError: the shape or the type does not fit.
        """
        grid = self.grid(pixels)
        if pixels.ndim == 4:
            pixels = pixels.unsqueeze(1)  # one frame, which the embeddings take for a tubelet of equal ones
        positions = self._positions(grid, pixels.device)
        h = self.encoder.embeddings(pixels)
        for layer in self.encoder.layer:
            h = layer(h, position_mask=positions)[0]
        return self.encoder.layernorm(h)

    def grid(self, pixels: Tensor) -> tuple[int, int, int]:
        """How many tokens of images or clips, as `forward` takes them, there are in time, rows and columns.

        Raises:
            UserError: the shape or the type does not fit.
        """
        self._check(pixels)
        frames, (height, width) = 1 if pixels.ndim == 4 else pixels.shape[1], pixels.shape[-2:]
        times = 1 if frames == 1 else frames // self.config.tubelet_size
        return times, height // self.config.patch_size, width // self.config.patch_size

    def _positions(self, grid: tuple[int, int, int], device: torch.device) -> RotaryTable:
        """Where the tokens of a grid are, in the form that the attention takes it."""
        config = self.config
        trained = pretrained_grid(config.patch_size) if config.kind == "vjepa2.1" else None
        table = rotary_table(grid, config.hidden_size // config.heads, device, pretrained_grid=trained)
        if torch.is_autocast_enabled(device.type):  # as queries and keys are; mixed types cost a GPU 10 % of a step
            kind = torch.get_autocast_dtype(device.type)
            table = table._replace(cos=table.cos.to(kind), sin=table.sin.to(kind))
        return table

    def _check(self, pixels: Tensor) -> None:
        patch, tubelet = self.config.patch_size, self.config.tubelet_size
        found = f"found {tuple(pixels.shape)}"
        if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
            raise UserError(f"X-Encoder: expected pixels (B, 3, H, W) or (B, T, 3, H, W), {found}")
        if not pixels.is_floating_point():
            raise UserError(f"X-Encoder: expected normalised floating-point pixels, found {pixels.dtype}")
        sides = pixels.shape[-2:]
        if any(side == 0 or side % patch for side in sides):
            raise UserError(f"X-Encoder: height and width must be multiples of the patch {patch}, {found}")
        frames = pixels.shape[1] if pixels.ndim == 5 else self.config.image_frames
        if frames != self.config.image_frames and (frames == 0 or frames % tubelet):
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
        "crop_size": config.image_size,
        "layer_norm_eps": 1e-6,
        "attn_implementation": "sdpa",
        # V-JEPA 2's own (mask) predictor is not used: it is built without layers, and dropped.
        "pred_hidden_size": 1,
        "pred_num_hidden_layers": 0,
        "pred_num_attention_heads": 1,
    }
    return VJEPA2Config(**values)
