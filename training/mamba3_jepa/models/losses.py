"""Training losses. Letters: G batch (over all ranks), E embedding width."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class InfoNce(NamedTuple):
    """`loss`: scalar, nats. `accuracy`: share of rows whose own target scores highest among the distinct texts."""

    loss: Tensor
    accuracy: Tensor


def info_nce(predicted: Tensor, target: Tensor, text_key: Tensor, temperature: Tensor) -> InfoNce:
    """Symmetric InfoNCE (van den Oord et al. 2018; CLIP's form) that knows when two targets are the same text.

    Row i's positive is column i. Another column with the same text as i is neither positive nor negative: it is
    left out of the sum, in both directions.

    Args:
        predicted: (G, E) L2-normalised predicted embeddings.
        target: (G, E) L2-normalised embeddings of the target texts.
        text_key: (G,) integers, equal where the target texts are identical.
        temperature: scalar > 0 that divides the cosine similarities.
    """
    wide = torch.promote_types(predicted.dtype, torch.float32)  # the logits decide everything: never 16 bits
    with torch.autocast(predicted.device.type, enabled=False):
        logits = predicted.to(wide) @ target.to(wide).T / temperature
    if not len(logits):  # every sample of the batch was left out: nothing to learn, and no gradient
        return InfoNce(logits.sum() + 0 * temperature, logits.new_zeros(()))
    same_text = text_key[:, None] == text_key[None, :]
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(same_text & ~own, float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
    return InfoNce(loss, accuracy)
