"""The Y-Encoder: a Mamba-3 text encoder, and the token embedding that questions share with it.

Shape letters: B batch, L length in tokens, D model width, E embedding width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mamba3_jepa.config import BackboneConfig
from mamba3_jepa.models.mamba3 import Mamba3Backbone
from mamba3_jepa.models.pooling import l2_normalize, masked_mean

EMBEDDING_STD = 0.02


class YEncoder(nn.Module):
    """Text -> Mamba-3 backbone -> mean over valid positions -> linear projection -> unit length."""

    def __init__(self, config: BackboneConfig, vocab_size: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.backbone = Mamba3Backbone(config)
        self.projection = nn.Linear(config.d_model, embed_dim)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> token embeddings (B, L, D)."""
        return self.embedding(ids)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed texts.

        Args:
            ids: (B, L) token ids, padded on the right.
            mask: (B, L) bool, True on valid tokens.

        Returns:
            (B, E), unit length.
        """
        h = self.backbone(self.embed_tokens(ids))
        return l2_normalize(self.projection(masked_mean(h, mask)))
