"""The Y-Encoder: a Mamba-3 text encoder, and the token embedding that questions share with it.

Shape letters: B batch, L length in tokens, D model width, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamba3_jepa.config import BackboneConfig
from mamba3_jepa.models.mamba3 import Mamba3Backbone
from mamba3_jepa.models.pooling import l2_normalize, masked_mean

# The question's tokens enter the predictor through this table: with the small spread usual for language models they
# would all start out alike beside the projection's bias, and questions would be learnt several times slower.
EMBEDDING_STD = 1.0


class YEncoder(nn.Module):
    """Text -> Mamba-3 backbone -> mean over valid positions -> linear projection -> unit length.

    Attributes:
        one_pass: `forward_distinct` never goes through the layers twice, whatever the lengths.
    """

    def __init__(self, config: BackboneConfig, vocab_size: int, embed_dim: int) -> None:
        super().__init__()
        self.one_pass = False
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

    def forward_distinct(self, ids: Tensor, mask: Tensor, text_key: Tensor) -> Tensor:
        """What `forward` gives, computed once for each distinct text and without the padding of much longer ones.

        Answers repeat ("yes", "no", "red") and are far shorter than captions: a batch of both costs a fraction.

        Args:
            ids, mask: (B, L), as for `forward`.
            text_key: (B,) integers, equal exactly where the texts are.

        Returns:
            (B, E), unit length.
        """
        if not len(ids):
            return self(ids, mask)
        _, group = torch.unique(text_key, return_inverse=True)
        n_texts = int(group.max()) + 1
        rows = torch.arange(len(group), device=group.device)
        first = torch.full((n_texts,), len(group), device=group.device).scatter_reduce(0, group, rows, "amin")
        lengths, by_length = mask[first].sum(dim=1).sort()
        # A GPU is through with a few more positions sooner than with the kernels of a second pass.
        split = len(lengths) if ids.is_cuda or self.one_pass else _cheapest_split(lengths)
        parts = [part for part in (by_length[:split], by_length[split:]) if len(part)]
        embeddings = []
        for part in parts:
            longest = int(mask[first[part]].sum(dim=1).max())
            embeddings.append(self(ids[first[part], :longest], mask[first[part], :longest]))
        place = torch.empty_like(by_length).scatter_(0, by_length, torch.arange(n_texts, device=group.device))
        return torch.cat(embeddings)[place[group]]


def _cheapest_split(lengths: Tensor) -> int:
    """Where to cut ascending lengths (N,) in two batches so that the fewest positions are computed."""
    n = len(lengths)
    count = torch.arange(1, n + 1, device=lengths.device)
    positions = count * lengths + (n - count) * lengths[-1]
    return int(positions.argmin()) + 1
