"""Swap accuracy: how often the right text is nearer to the predicted embedding than texts that are wrong in one thing.

The measure of ARO (Yuksekgonul et al. 2023) and SugarCrepe (Hsieh et al. 2023): a model that takes a text for a bag of
words does no better than chance where two objects have exchanged their colours. Letters: B samples of a batch, M wrong
texts of theirs, E embedding width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.hard_negatives import ALL_KINDS
from mamba3_jepa.models.y_encoder import YEncoder

_TIE = 1e-6  # two float32 cosines closer than this differ by rounding only


@dataclass(frozen=True)
class WrongText:
    """One wrong text of sample number `sample`: its kind, the hash of what is read of it, and how much nearer the right
    one is, as cosines."""

    sample: int
    kind: str
    key: int
    margin: float


@dataclass(frozen=True, kw_only=True)
class SwapShare:
    """Of `samples` samples the share in [0, 1] with the right text before all wrong ones, and the share that chance
    would give."""

    right: float
    chance: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """total: of the captions; where none has wrong texts, of the questions. by_kind: of each kind that has a name, most
    frequent first, of captions and questions alike."""

    total: SwapShare
    by_kind: Mapping[str, SwapShare]

    def metrics(self) -> dict[str, float]:
        """Flat numbers: `swap_accuracy`, `swap_chance`, `swap_samples`, and `swap_accuracy_{kind}` of each kind."""
        values = {"swap_accuracy": self.total.right, "swap_chance": self.total.chance}
        values["swap_samples"] = self.total.samples
        return values | {f"swap_accuracy_{kind}": share.right for kind, share in self.by_kind.items()}

    def rows(self) -> dict[str, dict[str, float]]:
        """For each kind how many samples, chance, and the share that is right; `all` for all of them together."""
        shares = {ALL_KINDS: self.total, **self.by_kind}
        return {kind: {"samples": s.samples, "chance": s.chance, "right": s.right} for kind, s in shares.items()}


@torch.no_grad()
def wrong_texts(y_encoder: YEncoder, batch: Batch, predicted: Tensor, target: Tensor, start: int) -> list[WrongText]:
    """Compare a batch's wrong texts with its right ones.

    A wrong text that is the right one in all the tokens that are read of it is passed over. Wrong texts of a sample
    that are equal so are one.

    Args:
        predicted, target: (B, E), of unit length.
        start: number of the batch's first sample.
    """
    if not len(batch.negative_ids):
        return []
    of = batch.negative_of
    wrong = y_encoder.forward_distinct(batch.negative_ids, batch.negative_mask, batch.negative_hash)
    margins = ((target[of] - wrong) * predicted[of]).float().sum(dim=-1)
    differs = batch.negative_hash != batch.target_hash[of]
    keys = batch.negative_hash.tolist()
    rows = zip(of.tolist(), batch.negative_kinds, keys, margins.tolist(), differs.tolist(), strict=True)
    return [
        WrongText(sample=start + i, kind=kind, key=key, margin=margin)
        for i, kind, key, margin, differ in rows
        if differ
    ]


def swap_accuracy(found: Iterable[WrongText], questions: Sequence[str | None]) -> SwapReport | None:
    """From the wrong texts of some samples and their questions, None for a caption; None if there are none."""
    by_kind: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    captions: dict[int, dict[int, float]] = defaultdict(dict)
    others: dict[int, dict[int, float]] = defaultdict(dict)
    for each in found:
        by_kind[each.kind][each.sample][each.key] = each.margin
        (captions if questions[each.sample] is None else others)[each.sample][each.key] = each.margin
    if not by_kind:
        return None
    shares = {kind: _share(margins) for kind, margins in by_kind.items() if kind}
    frequent_first = sorted(shares.items(), key=lambda item: -item[1].samples)
    return SwapReport(total=_share(captions or others), by_kind=dict(frequent_first))


def _share(margins: Mapping[int, Mapping[int, float]]) -> SwapShare:
    """From the margins of each sample's different wrong texts."""
    n = len(margins)
    right = sum(min(of_sample.values()) > _TIE for of_sample in margins.values())
    chance = sum(1 / (1 + len(of_sample)) for of_sample in margins.values())
    return SwapShare(right=right / n, chance=chance / n, samples=n)
