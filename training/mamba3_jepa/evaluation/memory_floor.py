"""How near the nearest text of a memory must lie to be injected, chosen on lookups of which it is known what is right.

Shapes: M samples, T different texts, R right and W wrong lookups, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mamba3_jepa.config import NO_FLOOR

MEMORY_TEXTS = 200
_TOGETHER = 256


@dataclass(frozen=True, kw_only=True)
class MemoryFloor:
    """A text is injected if its cosine is at least `floor`, in float32.

    right: (R,) cosines of the nearest texts of a memory, where that is the right one; wrong: (W,) those of a memory
    from which the right one is left out; lookups: M. The shares are measured on the lookups that the floor was chosen
    on.
    """

    floor: float
    right: Tensor = field(repr=False)
    wrong: Tensor = field(repr=False)
    lookups: int = 0

    @staticmethod
    def none() -> MemoryFloor:
        """Where nothing can be looked up."""
        return MemoryFloor(floor=NO_FLOOR, right=torch.empty(0), wrong=torch.empty(0))

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """`{prefix}/memory_floor` and `{prefix}/memory_{right,wrong}_lookups`, how many there are; where there are
        some the shares `{prefix}/memory_found`, where the right text is the nearest, and `{prefix}/memory_right_passed`
        of those, and `{prefix}/memory_wrong_stopped`."""
        values = {
            f"{prefix}/memory_floor": self.floor,
            f"{prefix}/memory_right_lookups": len(self.right),
            f"{prefix}/memory_wrong_lookups": len(self.wrong),
        }
        if self.lookups:
            values[f"{prefix}/memory_found"] = len(self.right) / self.lookups
        if len(self.right):
            values[f"{prefix}/memory_right_passed"] = float((self.right >= self.floor).double().mean())
        if len(self.wrong):
            values[f"{prefix}/memory_wrong_stopped"] = float((self.wrong < self.floor).double().mean())
        return values


def choose_memory_floor(
    asked: Tensor,
    right_text: Tensor,
    texts: Tensor,
    answers: Callable[[Tensor, Tensor], Tensor] | None = None,
    memory: int = MEMORY_TEXTS,
) -> MemoryFloor:
    """Look up M samples in memories of some of T texts, with and without their right one, and separate the two.

    Args:
        asked: (M, E) unit vectors that look up.
        right_text: (M,) int64, which of the texts each of them should find.
        texts: (T, E) unit vectors that are looked up.
        answers: tells of some of the M (B,) and of some texts (C,) which texts are right for which, (B, C) bool; such
            are not in a memory beside the one to find.
        memory: texts in a memory, the right one included; the others are drawn, for each chunk of samples anew.
    """
    found, others = [], []
    dice = torch.Generator().manual_seed(0)
    for rows in torch.arange(len(asked)).split(_TOGETHER):
        drawn = torch.randperm(len(texts), generator=dice)[: memory - 1]
        own = (asked[rows].float() * texts[right_text[rows]].float()).sum(dim=1)
        cosines = asked[rows].float() @ texts[drawn].float().T
        excluded = drawn == right_text[rows].unsqueeze(1)
        if answers is not None:
            excluded = excluded | answers(rows, drawn)
        other = (
            cosines.masked_fill(excluded, -torch.inf).amax(dim=1) if len(drawn) else torch.full_like(own, -torch.inf)
        )
        found.append(own[own > other])
        others.append(other[other.isfinite()])  # without another text there is no wrong lookup
    right, wrong = (torch.cat(parts) if parts else torch.empty(0) for parts in (found, others))
    return MemoryFloor(floor=best_floor(right, wrong), right=right, wrong=wrong, lookups=len(asked))


def best_floor(right: Tensor, wrong: Tensor, lookups: int | None = None) -> float:
    """The floor that lets most of the right (R,) and least of the wrong (W,) cosines through (Youden's J).

    `lookups`: of how many lookups the right ones are a share, those that find nothing right included; R if None. Midway
    between two cosines; of equally good ones the lowest. `NO_FLOOR` where none is better than none at all.
    """
    if not len(right) or not len(wrong):
        return NO_FLOOR
    right, wrong = right.float().sort().values, wrong.float().sort().values
    values = torch.cat([right, wrong]).unique()
    floors = torch.cat([torch.tensor([NO_FLOOR]), (values[:-1] + values[1:]) / 2])
    right_stopped, wrong_stopped = torch.searchsorted(right, floors), torch.searchsorted(wrong, floors)
    # J times R W, so that ties are exact
    gain = wrong_stopped * (len(right) if lookups is None else lookups) - right_stopped * len(wrong)
    return float(floors[gain == gain.max()].min())
