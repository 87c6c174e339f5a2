"""The Mamba-3 predictor: visual tokens and a query in, the embedding of the answer out.

Shape letters: B batch, Nv visual tokens, Nq query tokens, L tokens of all parts together, D model width, E embedding
width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba3_jepa.config import PredictorConfig
from mamba3_jepa.models.mamba3 import Mamba3Backbone
from mamba3_jepa.models.pooling import attention_mean, l2_normalize, masked_mean

# (layer index, residual stream (B, L, D), valid positions (B, L)) -> residual stream, as `Angn` is called
MaskedGate = Callable[[int, Tensor, Tensor], Tensor]


class PredictorOutput(NamedTuple):
    """embedding: (B, E), unit length; pooled: (B, D), the state the embedding was read from."""

    embedding: Tensor
    pooled: Tensor


class Predictor(nn.Module):
    """Visual tokens and query in the order that `config` says -> Mamba-3 backbone -> mean over the positions that it
    says -> linear head -> unit length."""

    def __init__(self, config: PredictorConfig, vision_dim: int, query_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.vision_proj = nn.Linear(vision_dim, config.d_model)
        self.query_proj = nn.Linear(query_dim, config.d_model)
        nn.init.zeros_(self.query_proj.bias)
        self.backbone = Mamba3Backbone(config, config.bidirectional)
        self.pool_score: nn.Linear | None = None
        if config.pooling == "attention":
            self.pool_score = nn.Linear(config.d_model, 1, bias=False)
            nn.init.zeros_(self.pool_score.weight)  # it starts as the mean over all
        self.pred_head = nn.Linear(config.d_model, embed_dim)

    def forward(
        self,
        visual_tokens: Tensor,
        has_image: Tensor,
        query_tokens: Tensor,
        query_mask: Tensor,
        gate: MaskedGate | None = None,
    ) -> PredictorOutput:
        """Predict the embedding of the answer.

        Args:
            visual_tokens: (B, Nv, vision_dim); rows without an image are ignored. Nv may be 0.
            has_image: (B,) bool.
            query_tokens: (B, Nq, query_dim), padded on the right.
            query_mask: (B, Nq) bool, True on valid tokens.
            gate: applied to the residual stream before each layer.

        Returns:
            what each sample alone would give, whatever else is in the batch.
        """
        tokens, mask, pooled_mask = self._sequence(visual_tokens, has_image, query_tokens, query_mask)
        h = self.backbone(tokens, gate=None if gate is None else partial(_masked, gate, mask), mask=mask)
        if self.pool_score is None:
            pooled = masked_mean(h, pooled_mask)
        else:
            pooled = attention_mean(h, self.pool_score(h), pooled_mask)
        return PredictorOutput(self.embed(pooled), pooled)

    @torch.no_grad()
    def whiten_vision(self, visual_tokens: Tensor, floor: float = 1e-2) -> None:
        """Set `vision_proj` so that it starts from whitened principal components of the visual tokens.

        Frozen features are badly scaled: a few directions (brightness, colour) have thousands of times the variance
        of those that tell shapes apart, and gradient descent is slow along the small ones. Data-dependent
        initialisation: Krähenbühl et al. 2016, arXiv 1511.06856. Only the starting point changes, no parameter.

        Args:
            visual_tokens: (n, vision_dim), several times vision_dim of them for a stable estimate.
            floor: added to every variance, as a share of the mean variance, so that noise is not blown up.
        """
        tokens = visual_tokens.double()
        mean = tokens.mean(dim=0)
        centred = tokens - mean
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(tokens))
        d_model, vision_dim = self.vision_proj.weight.shape
        kept = min(d_model, vision_dim)
        scale = (variance[-kept:] + floor * variance.mean()).rsqrt()
        # A random rotation spreads the components over all channels; its generator keeps it the same everywhere.
        noise = torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rotation = torch.linalg.qr(noise).Q[:, :kept].to(tokens.device)
        weight = rotation @ (directions[:, -kept:] * scale).T
        self.vision_proj.weight.copy_(weight)
        self.vision_proj.bias.copy_(-weight @ mean)

    def embed(self, pooled: Tensor) -> Tensor:
        """Pooled state (B, D) -> embedding (B, E) of unit length."""
        return l2_normalize(self.pred_head(pooled))

    def _sequence(
        self, visual_tokens: Tensor, has_image: Tensor, query_tokens: Tensor, query_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L, D), valid positions (B, L), and those of them that are pooled (B, L).

        What a sample lacks (the picture, the end of a longer query) is padding on the right, wherever it would have
        stood: that of the queries first, then that of the pictures. Every projection takes part in every batch, so each
        parameter has a gradient (zero where nothing used it), as data-parallel training expects.
        """
        visual, query = self.vision_proj(visual_tokens), self.query_proj(query_tokens)
        visual_mask = has_image.unsqueeze(1).expand(visual.shape[:2])
        parts = self.config.parts
        masks = [visual_mask if part == "visual" else query_mask for part in parts]
        padding = [
            (~mask).to(torch.uint8) * (2 if part == "visual" else 1) for part, mask in zip(parts, masks, strict=True)
        ]
        place = torch.cat(padding, dim=1).argsort(dim=1, stable=True)
        tokens = torch.cat([visual if part == "visual" else query for part in parts], dim=1)
        tokens = tokens.take_along_dim(place.unsqueeze(2), dim=1)
        mask = torch.cat(masks, dim=1).take_along_dim(place, dim=1)
        pooled = torch.cat(self._pooled(masks), dim=1).take_along_dim(place, dim=1)
        if self.config.pooling == "last":
            pooled = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        # Under autocast the projections give 16 bits; the residual stream keeps the parameters' precision.
        return tokens.to(self.pred_head.weight.dtype), mask, pooled

    def _pooled(self, masks: list[Tensor]) -> list[Tensor]:
        """For each part, given its valid positions (B, N), those that are pooled unless only the last is."""
        if self.config.pooling != "question":
            return masks
        last = max(i for i, part in enumerate(self.config.parts) if part == "question")
        return [mask if i == last else torch.zeros_like(mask) for i, mask in enumerate(masks)]


def _masked(gate: MaskedGate, mask: Tensor, layer: int, h: Tensor) -> Tensor:
    return gate(layer, h, mask)
