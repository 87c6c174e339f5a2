"""How near the nearest text of a memory must lie to be injected, chosen on lookups of which it is known what is right.

Shapes: M samples, T different texts, R right and W wrong lookups, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mamba3_jepa.config import NO_FLOOR

_TOGETHER = 1024


@dataclass(frozen=True, kw_only=True)
class MemoryFloor:
    """A text is injected if its cosine to the predicted embedding is at least `floor`, in float32.

    right: (R,) cosines of the nearest texts of a memory of all T, where that is the right one; wrong: (M,) those of a
    memory from which the right one is left out. The shares are measured on the lookups that the floor was chosen on.
    """

    floor: float
    right: Tensor = field(repr=False)
    wrong: Tensor = field(repr=False)

    @staticmethod
    def none() -> MemoryFloor:
        """Where nothing can be looked up."""
        return MemoryFloor(floor=NO_FLOOR, right=torch.empty(0), wrong=torch.empty(0))

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """`{prefix}/memory_floor` and `{prefix}/memory_{right,wrong}_lookups`, how many there are; where there are
        some the shares `{prefix}/memory_right_passed` and `{prefix}/memory_wrong_stopped`."""
        values = {
            f"{prefix}/memory_floor": self.floor,
            f"{prefix}/memory_right_lookups": len(self.right),
            f"{prefix}/memory_wrong_lookups": len(self.wrong),
        }
        if len(self.right):
            values[f"{prefix}/memory_right_passed"] = float((self.right >= self.floor).double().mean())
        if len(self.wrong):
            values[f"{prefix}/memory_wrong_stopped"] = float((self.wrong < self.floor).double().mean())
        return values


def choose_memory_floor(predicted: Tensor, right_text: Tensor, text_embeddings: Tensor) -> MemoryFloor:
    """Look up M samples in a memory of T texts, with and without their right one, and separate the two.

    Args:
        predicted: (M, E) embeddings predicted for samples that confuse the model.
        right_text: (M,) int64, which of the texts each of them should find.
        text_embeddings: (T, E).
    """
    found, others = [], []
    for rows in torch.arange(len(predicted)).split(_TOGETHER):
        cosines = predicted[rows].float() @ text_embeddings.float().T
        own = right_text[rows].unsqueeze(1)
        right = cosines.gather(1, own).squeeze(1)
        other = cosines.scatter(1, own, -torch.inf).amax(dim=1)
        found.append(right[right > other])
        others.append(other[other.isfinite()])  # without another text there is no wrong lookup
    right, wrong = (torch.cat(parts) if parts else torch.empty(0) for parts in (found, others))
    return MemoryFloor(floor=best_floor(right, wrong), right=right, wrong=wrong)


def best_floor(right: Tensor, wrong: Tensor) -> float:
    """The floor that lets most of the right (R,) and least of the wrong (W,) cosines through (Youden's J).

    Midway between two cosines; of equally good ones the lowest. `NO_FLOOR` where none is better than none at all.
    """
    if not len(right) or not len(wrong):
        return NO_FLOOR
    right, wrong = right.float().sort().values, wrong.float().sort().values
    values = torch.cat([right, wrong]).unique()
    floors = torch.cat([torch.tensor([NO_FLOOR]), (values[:-1] + values[1:]) / 2])
    right_stopped, wrong_stopped = torch.searchsorted(right, floors), torch.searchsorted(wrong, floors)
    # J times R W, so that ties are exact
    gain = wrong_stopped * len(right) - right_stopped * len(wrong)
    return float(floors[gain == gain.max()].min())
