"""Shifts of training images: where the pixels go, and that they depend on seed, epoch and sample alone."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mamba3_jepa.data.augment import shift

PIXELS = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(100, 140)


def test_every_image_is_a_window_of_its_padded_self() -> None:
    moved = shift(PIXELS, INDEX, 2, seed=0, epoch=0)
    assert moved.dtype == torch.uint8
    offsets = set()
    for image, found in zip(PIXELS, moved, strict=True):
        padded = F.pad(image[None].float(), (2, 2, 2, 2), mode="replicate")[0].to(torch.uint8)
        windows = {(y, x): padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
        matching = [place for place, window in windows.items() if torch.equal(window, found)]
        assert len(matching) == 1
        offsets.update(matching)
    assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(5))


def test_it_depends_on_seed_epoch_and_sample_alone() -> None:
    moved = shift(PIXELS, INDEX, 3, seed=1, epoch=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:7]
    assert torch.equal(shift(PIXELS[order], INDEX[order], 3, seed=1, epoch=2), moved[order])
    for changes in ({"seed": 2}, {"epoch": 3}):
        assert not torch.equal(shift(PIXELS, INDEX, 3, **({"seed": 1, "epoch": 2} | changes)), moved)
    assert not torch.equal(shift(PIXELS, INDEX + 40, 3, seed=1, epoch=2), moved)


def test_nothing_moves_without_a_shift_or_an_image() -> None:
    assert shift(PIXELS, INDEX, 0, seed=0, epoch=0) is PIXELS
    assert shift(PIXELS[:0], INDEX[:0], 3, seed=0, epoch=0).shape == (0, 3, 8, 8)
