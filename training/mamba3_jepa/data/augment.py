"""Random changes of training images that leave the answers as they are.

What happens to an image depends on (seed, epoch, sample) alone, so that every rank, and a run that continues,
does the same.

Shapes: B images, S pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba3_jepa.data.splits import stable_hash


def shift(pixels: Tensor, index: Tensor, at_most: int, seed: int, epoch: int) -> Tensor:
    """Each image moved by up to `at_most` pixels along both axes; the pixels of its edges fill what opens up.

    Args:
        pixels: (B, 3, S, S), of any type.
        index: (B,) int64, the sample each image belongs to.
        at_most: 0 or more; all whole offsets from -at_most to at_most are equally likely.

    Returns:
        (B, 3, S, S); `pixels` itself when `at_most` is 0.
    """
    if not at_most or not len(pixels):
        return pixels
    span = 2 * at_most + 1
    draws = [stable_hash(f"shift {seed} {epoch} {sample}") for sample in index.tolist()]
    down = torch.tensor([draw % span - at_most for draw in draws])
    right = torch.tensor([draw // span % span - at_most for draw in draws])
    places = torch.arange(pixels.shape[-1])
    rows = (places - down[:, None]).clamp(0, len(places) - 1)  # (B, S): the row that lands on each row
    columns = (places - right[:, None]).clamp(0, len(places) - 1)
    images, channels = torch.arange(len(pixels)), torch.arange(pixels.shape[1])
    return pixels[
        images[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]
