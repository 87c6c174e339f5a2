"""The Y-Decoder: a Mamba-3 language model that speaks an embedding.

Shape letters: B batch, T tokens, P prefix tokens, D model width, E embedding width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamba3_jepa.config import BackboneConfig
from mamba3_jepa.models.mamba3 import Mamba3Backbone
from mamba3_jepa.models.scan import Mamba3State

EMBEDDING_STD = 0.02


class YDecoder(nn.Module):
    """[prefix read from the embedding ; answer tokens] -> Mamba-3 backbone -> next-token logits."""

    def __init__(self, config: BackboneConfig, vocab_size: int, embed_dim: int, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.embed_to_prefix = nn.Linear(embed_dim, prefix_tokens * config.d_model)
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.backbone = Mamba3Backbone(config)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, embedding: Tensor, ids: Tensor) -> Tensor:
        """Teacher forcing.

        Args:
            embedding: (B, E), as the predictor gives it.
            ids: (B, T) token ids that start with bos, padded on the right.

        Returns:
            logits (B, T, V); position t predicts the token after ids[:, t].
        """
        tokens = torch.cat([self._prefix(embedding), self.embedding(ids)], dim=1)
        h = self.backbone(tokens)
        return self._logits(h[:, self.prefix_tokens :])

    def prefill(self, embedding: Tensor) -> list[Mamba3State]:
        """State after the prefix of embedding (B, E), one per layer; `step` with bos comes next."""
        _, state = self.backbone(self._prefix(embedding), return_state=True)
        return state

    def step(self, ids_t: Tensor, state: list[Mamba3State]) -> tuple[Tensor, list[Mamba3State]]:
        """One token: ids (B,) -> next-token logits (B, V) and the next state, in constant time and memory."""
        h, state = self.backbone.step(self.embedding(ids_t), state)
        return self._logits(h), state

    def _logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V), in the parameters' precision under autocast too."""
        with torch.autocast(h.device.type, enabled=False):
            return self.lm_head(h.to(self.lm_head.weight.dtype))

    def _prefix(self, embedding: Tensor) -> Tensor:
        """(B, E) -> (B, P, D), in the parameters' precision under autocast too."""
        prefix = self.embed_to_prefix(embedding).unflatten(-1, (self.prefix_tokens, -1))
        return prefix.to(self.embedding.weight.dtype)
