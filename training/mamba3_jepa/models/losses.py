"""The losses of the three phases.

Letters: B samples, G batch over all ranks, M its hard negatives, E embedding width, La tokens of the longest answer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3_jepa.models.y_decoder import YDecoder

LOOKUP_SCALE, LOOKUP_MIDDLE = 20.0, 0.5  # of cosines in `lookup_loss`
_IGNORED = -100  # no token


class InfoNce(NamedTuple):
    """`loss`: scalar, nats. `accuracy`: share of rows whose own target scores highest among all texts.
    `negatives`: mean number of a row's negatives; without any the loss is 0 and has no gradient."""

    loss: Tensor
    accuracy: Tensor
    negatives: Tensor


def info_nce(
    predicted: Tensor,
    target: Tensor,
    text_key: Tensor,
    temperature: Tensor,
    hard: Tensor | None = None,
    hard_key: Tensor | None = None,
) -> InfoNce:
    """Symmetric InfoNCE (van den Oord et al. 2018; CLIP's form) that knows when two targets are the same text.

    Row i's positive is column i. Another column with the same text as i is neither positive nor negative: it is
    left out of the sum, in both directions. Hard negatives are further columns for every row (NegCLIP, Yuksekgonul et
    al. 2023); as rows of the other direction they would have no positive.

    Args:
        predicted: (G, E) L2-normalised predicted embeddings.
        target: (G, E) L2-normalised embeddings of the target texts.
        text_key: (G,) integers, equal where the target texts are identical.
        temperature: scalar > 0 that divides the cosine similarities.
        hard, hard_key: (M, E) and (M,), the same of the hard negatives.
    """
    wide = torch.promote_types(predicted.dtype, torch.float32)  # the logits decide everything: never 16 bits
    with torch.autocast(predicted.device.type, enabled=False):
        logits = predicted.to(wide) @ target.to(wide).T / temperature
    if not len(logits):  # every sample of the batch was left out: nothing to learn, and no gradient
        return InfoNce(logits.sum() + 0 * temperature, logits.new_zeros(()), logits.new_zeros(()))
    same_text = text_key[:, None] == text_key[None, :]
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(same_text & ~own, float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    to_texts, negatives = logits, (~same_text).sum()
    if hard is not None and hard_key is not None and len(hard):
        same_text = text_key[:, None] == hard_key[None, :]
        with torch.autocast(predicted.device.type, enabled=False):
            columns = predicted.to(wide) @ hard.to(wide).T / temperature
        to_texts = torch.cat([logits, columns.masked_fill(same_text, float("-inf"))], dim=1)
        negatives = negatives + (~same_text).sum()
    loss = (F.cross_entropy(to_texts, labels) + F.cross_entropy(logits.T, labels)) / 2
    accuracy = (to_texts.detach().argmax(dim=1) == labels).float().mean()
    return InfoNce(loss, accuracy, negatives / len(logits))


class TokenScores(NamedTuple):
    """Sums over the valid tokens of a batch: negative log-likelihood (nats, differentiable), how many had the
    highest logit, and how many there are. whole: (B,) bool, the texts of which every token had: what greedy generation
    says word for word."""

    nll: Tensor
    right: Tensor
    tokens: Tensor
    whole: Tensor


def score_tokens(decoder: YDecoder, embedding: Tensor, ids: Tensor, mask: Tensor) -> TokenScores:
    """Teacher forcing: every token after bos, up to and including eos, is predicted from those before it.

    Args:
        embedding: (B, E).
        ids, mask: (B, La) `[bos] ... [eos]`, padded on the right, and which of them are valid.
    """
    valid = mask[:, 1:]
    logits = decoder(embedding, ids[:, :-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    expected = ids[:, 1:].masked_fill(~valid, _IGNORED)
    nll = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=_IGNORED, reduction="sum")
    right = logits.argmax(-1) == expected
    return TokenScores(nll, right.sum(), valid.sum(), (right | ~valid).all(dim=1))


def confusion_loss(logits: Tensor, confused: Tensor) -> Tensor:
    """Phase 3: binary cross-entropy, a scalar in nats, of the confusion monitor's logits (B,) and labels (B,) bool."""
    return F.binary_cross_entropy_with_logits(logits.float(), confused.float())


def injection_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Phase 3: squared error (L,), mean over E, of embeddings (L, E) predicted with knowledge."""
    return (predicted - target).float().square().mean(dim=-1)


def knowledge_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Phase 3: binary cross-entropies in nats (...) of the knowledge probe's logits (...) and whether what was told
    answers (...) bool."""
    return F.binary_cross_entropy_with_logits(logits.float(), answers.float(), reduction="none")


def tool_loss(logits: Tensor, tool: Tensor) -> Tensor:
    """Phase 3: cross-entropies (B,) in nats of the tool selector's logits (B, T); `tool` (B,) int64 is the one that is
    needed, negative where none is, which counts nothing."""
    return F.cross_entropy(logits.float(), tool.clamp(min=-1), ignore_index=-1, reduction="none")


def lookup_loss(right: Tensor, others: Tensor, is_other: Tensor) -> Tensor:
    """Phase 3: (B,) in nats, how badly questions tell the text that answers them from M others.

    The cross-entropy of the right one among all (Oord et al. 2018, arXiv 1807.03748), which orders them, and the binary
    cross-entropies of each by itself (Zhai et al. 2023, arXiv 2303.15343), so that one cosine separates what answers
    from what does not, whatever else is in the memory.

    Args:
        right: (B,) cosines. others: (B, M) cosines; is_other: (B, M) bool, which of them count.
    """
    right, others = ((cosines.float() - LOOKUP_MIDDLE) * LOOKUP_SCALE for cosines in (right, others))
    others = others.masked_fill(~is_other, -torch.inf)
    among = torch.cat([right.unsqueeze(1), others], dim=1)
    alone = F.softplus(-right) + F.softplus(others).sum(dim=1)
    return among.logsumexp(dim=1) - right + alone
