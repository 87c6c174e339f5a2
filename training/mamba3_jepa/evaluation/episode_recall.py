"""When an episode of a memory is near enough to be recalled, chosen on lookups of which it is known what is right.

Letters: L lookups, N samples, P episodes, R right and W wrong lookups, S length of an episode's key.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mamba3_jepa.config import SHUT
from mamba3_jepa.data.confusion_plan import CONFUSION_KINDS
from mamba3_jepa.data.splits import spread
from mamba3_jepa.evaluation.lessons import NOTHING
from mamba3_jepa.evaluation.memory_floor import best_floor
from mamba3_jepa.evaluation.phase3_data import Phase3Data
from mamba3_jepa.models.episodes import cosines
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.vljepa import Mamba3Jepa

MEMORY_EPISODES = 200
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_LOOKUPS = 1000
_TOGETHER = 64  # pictures decoded at once


@dataclass(frozen=True, kw_only=True)
class EpisodeFloor:
    """An episode is recalled if its score is at least `floor`, with the share `blend` of what is seen, in float32.

    right: (R,) scores of the best episodes of a memory, where that is the right one; wrong: (W,) those of a memory from
    which the right one is left out; lookups: L. The shares are measured on the lookups that both were chosen on.
    """

    floor: float
    blend: float
    right: Tensor = field(repr=False)
    wrong: Tensor = field(repr=False)
    lookups: int = 0

    @staticmethod
    def none() -> EpisodeFloor:
        """Where there is nothing to learn from: no episode is recalled."""
        return EpisodeFloor(floor=SHUT, blend=0.5, right=torch.empty(0), wrong=torch.empty(0))

    @property
    def recalled(self) -> float:
        """The share of lookups that find what is right, and pass; 0 without lookups."""
        return float((self.right >= self.floor).double().sum()) / max(1, self.lookups)

    @property
    def recalled_without(self) -> float:
        """The share of lookups that pass where what is right is not there; 0 without lookups."""
        return float((self.wrong >= self.floor).double().sum()) / max(1, len(self.wrong))

    @property
    def gain(self) -> float:
        """Youden's J."""
        return self.recalled - self.recalled_without

    def as_json(self) -> dict[str, float | int]:
        """`lookups`, the share that `found` what is right among all, `recalled` and `recalled_without`."""
        return {
            "lookups": self.lookups,
            "found": len(self.right) / max(1, self.lookups),
            "recalled": self.recalled,
            "recalled_without": self.recalled_without,
        }

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """`{prefix}/episode_floor`, `_blend` and `_lookups`; where there are lookups the shares `_found`, where the
        right episode is the best, and `_right_passed` of those, and `_wrong_stopped`."""
        values = {
            f"{prefix}/episode_floor": self.floor,
            f"{prefix}/episode_blend": self.blend,
            f"{prefix}/episode_lookups": self.lookups,
        }
        if self.lookups:
            values[f"{prefix}/episode_found"] = len(self.right) / self.lookups
        if len(self.right):
            values[f"{prefix}/episode_right_passed"] = float((self.right >= self.floor).double().mean())
        if len(self.wrong):
            values[f"{prefix}/episode_wrong_stopped"] = float((self.wrong < self.floor).double().mean())
        return values


def choose_episode_floor(
    seen: Tensor,
    said: Tensor,
    own: Tensor,
    excluded: Tensor,
    alike: Tensor,
    memory: int = MEMORY_EPISODES,
    *,
    stored: tuple[float, float] | None = None,
) -> EpisodeFloor:
    """Look up L times in memories of some of N episodes, with and without the right one, and separate the two.

    Of the others in a memory as many as half ask the same, where there are so many; the rest are drawn from all.

    Args:
        seen, said: (L, N) cosines of the keys, and of the questions.
        own: (L,) int64, which episode each lookup should find.
        excluded: (L, N) bool, what is right as well: not among the others.
        alike: (L, N) bool, which episodes ask the same.
        memory: episodes in a memory, the right one included.
        stored: blend and floor to measure with, instead of choosing them.
    """
    if not len(own):
        return EpisodeFloor.none()
    excluded = excluded.scatter(1, own.unsqueeze(1), True)
    key = torch.rand(seen.shape, generator=torch.Generator().manual_seed(0)) + excluded * 4.0
    others = min(memory - 1, seen.shape[1] - 1)
    half = min(others // 2, seen.shape[1])
    asks_the_same = (key + ~alike).topk(half, dim=1, largest=False).indices
    rest = key.scatter_add(1, asks_the_same, torch.full_like(asks_the_same, 8).float())
    drawn = torch.cat([asks_the_same, rest.topk(others - half, dim=1, largest=False).indices], dim=1)
    is_out = excluded.gather(1, drawn)
    best = EpisodeFloor.none()
    for blend in BLENDS if stored is None else stored[:1]:
        scores = blend * seen + (1 - blend) * said
        right = scores.gather(1, own.unsqueeze(1)).squeeze(1)
        other = scores.gather(1, drawn).masked_fill(is_out, -torch.inf)
        other = other.amax(dim=1) if others else torch.full_like(right, -torch.inf)
        found, wrong = right[right > other], other[other.isfinite()]
        if stored is not None:
            return EpisodeFloor(floor=stored[1], blend=blend, right=found, wrong=wrong, lookups=len(own))
        if not len(found) or not len(wrong):
            continue  # who never saw what is wrong would let everything pass
        floor = best_floor(found, wrong, lookups=len(own))
        chosen = EpisodeFloor(floor=floor, blend=blend, right=found, wrong=wrong, lookups=len(own))
        if chosen.gain > max(best.gain, 0.0):
            best = chosen
    return best


class EpisodeTrial:
    """Spoilt versions of pictures and questions look up the same as they are, again and again while a model learns."""

    def __init__(self, model: Mamba3Jepa, data: Phase3Data) -> None:
        """Looks at the pictures once, if that is what episodes are found by; reads no sample otherwise."""
        self._data = data
        self._lookups, self._own, self._episodes = _pairs(data)
        lessons, source = data.lessons, data.source
        prompt = model.embed_text([model.config.query_prompt]).cpu()

        def asked(rows: Tensor) -> Tensor:
            question = lessons.question[rows]
            if not len(lessons.questions):
                return prompt.expand(len(rows), -1)
            return torch.where((question == NOTHING).unsqueeze(1), prompt, lessons.questions[question.clamp(min=0)])

        def seen(rows: Tensor) -> Tensor:
            if model.config.recursion.episode_key == "state":
                return data.frozen.pooled[rows]
            samples = [source.sample(i) for i in data.frozen.index[rows].tolist()]
            names = [id(sample) if sample.picture is None else sample.picture for sample in samples]
            different = dict(zip(names, samples, strict=True))  # a picture asked several questions is looked at once
            place = {name: at for at, name in enumerate(different)}
            loads = [sample.image for sample in different.values()]
            keys = [torch.empty(0, model.config.episode_dim)]
            for start in range(0, len(loads), _TOGETHER):
                images = [None if load is None else load() for load in loads[start : start + _TOGETHER]]
                keys.append(model.picture_keys(images).cpu())
            return torch.cat(keys)[[place[name] for name in names]]

        self._seen, self._keys = seen(self._lookups), seen(self._episodes)
        self._said = cosines(asked(self._lookups), asked(self._episodes))
        group = source.group_hashes()[data.frozen.index.numpy()]
        topic = np.asarray(lessons.topic)
        rows, columns = self._lookups.numpy(), self._episodes.numpy()
        self._alike = torch.from_numpy(topic[rows][:, None] == topic[columns])
        self._same_picture = torch.from_numpy(group[rows][:, None] == group[columns])

    def mean(self) -> Tensor:
        """Of what the episodes are found by, in float64: (S,); zeros without any."""
        return self._keys.double().sum(dim=0) / max(1, len(self._keys))

    def run(self, recursion: Recursion, notices: Tensor, *, stored: bool = False) -> EpisodeFloor:
        """Chosen on what the model is confused by or answers wrongly.

        Args:
            notices: (N,) bool, by which samples the model counts as confused.
            stored: measure with the model's own blend and floor, instead of choosing them anew.
        """
        chosen = (self._data.confused | notices.cpu())[self._lookups]
        if not bool(chosen.any()):
            return EpisodeFloor.none()
        mean, alike = recursion.episode_mean.float().cpu(), self._alike[chosen]
        return choose_episode_floor(
            cosines(self._seen[chosen].float() - mean, self._keys.float() - mean),
            self._said[chosen],
            self._own[chosen],
            alike & self._same_picture[chosen],
            alike,
            stored=(float(recursion.episode_blend), float(recursion.episode_floor)) if stored else None,
        )


def _pairs(data: Phase3Data) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (L,) of spoilt samples, for each the place (L,) of its clear one among the episodes, and their rows (P,)."""
    index = data.frozen.index.numpy()
    kinds, bases = data.source.kinds[index], data.source.bases(index)
    has_target = data.frozen.has_target.numpy()
    clear = np.flatnonzero((kinds == CONFUSION_KINDS.index("clear")) & has_target)
    place = {base: at for at, base in enumerate(bases[clear].tolist())}
    is_lookup = kinds == CONFUSION_KINDS.index("degraded")
    spoilt = [row for row in np.flatnonzero(is_lookup).tolist() if int(bases[row]) in place]
    spoilt = [spoilt[i] for i in spread(np.arange(len(spoilt)), _MOST_LOOKUPS).tolist()] if spoilt else []
    own = [place[int(bases[row])] for row in spoilt]
    return (
        torch.tensor(spoilt, dtype=torch.int64),
        torch.tensor(own, dtype=torch.int64),
        torch.from_numpy(clear.astype(np.int64)),
    )
