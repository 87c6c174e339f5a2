"""How well a Y-Decoder says the targets of frozen outputs: token by token when led, and left to itself.

Shapes: N samples, B rows of them, E embedding width, La tokens of the longest target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3_jepa.models.losses import score_tokens
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.models.y_decoder import YDecoder
from mamba3_jepa.settings.inference import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """Teacher forcing over all valid tokens.

    loss: nats per token; accuracy: share of tokens in [0, 1]; exact_match: share of the texts that count of which
    every token is right. Greedy generation says these texts and no others word for word, so none is generated for it.
    """

    loss: float
    accuracy: float
    exact_match: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @staticmethod
    def of(sums: Iterable[TokenSums]) -> TokenReport:
        """From those of several batches or processes."""
        nll, right, tokens, whole, texts = (sum(column) for column in zip(*sums, strict=True))
        return TokenReport(
            loss=nll / max(1, tokens),
            accuracy=right / max(1, tokens),
            exact_match=whole / max(1, texts),
            tokens=int(tokens),
        )


class TokenSums(NamedTuple):
    """Sums of `TokenScores`; `texts`: the texts that count, `whole`: those of them that are right in every token."""

    nll: float = 0.0
    right: int = 0
    tokens: int = 0
    whole: int = 0
    texts: int = 0


@torch.no_grad()
def sum_scores(
    decoder: YDecoder, batches: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], device: torch.device | str
) -> TokenSums:
    """Of batches of (embedding, ids, mask, counts), the last (B,) bool: whether a text counts as a whole."""
    nll, right, tokens, whole, texts = TokenSums()
    for *inputs, counts in batches:
        scores = score_tokens(decoder, *(tensor.to(device) for tensor in inputs))
        nll += float(scores.nll)
        right += int(scores.right)
        tokens += int(scores.tokens)
        whole += int((scores.whole.cpu() & counts).sum())
        texts += int(counts.sum())
    return TokenSums(nll, right, tokens, whole, texts)


def generate_texts(
    model: Mamba3Jepa, embedding: Tensor, config: GenerationConfig | None = None, batch_size: int = 256
) -> list[tuple[str, bool]]:
    """What the model's decoder says of embeddings (N, E), as `Mamba3Jepa.say`, and whether it came to an end."""
    said = model.say(embedding, config, batch_size=batch_size)
    return [(model.tokenizer.decode(answer.ids), answer.finished) for answer in said]
