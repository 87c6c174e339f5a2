"""What an epoch of phase 2 learns to say, and from which embedding: where one image has several captions, another of
them than the last time.

Shapes: N samples, n of them with several captions.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.data.sample import Source, turn
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.training.distributed import rank
from mamba3_jepa.training.frozen import FrozenOutputs

logger = logging.getLogger(__name__)


class EpochTargets:
    """Frozen outputs of N samples with the targets of each epoch.

    The tokens of all captions are kept, so that an epoch reads no data. Which one it takes is what phase 1 takes
    (`Sample.target_in`).
    """

    def __init__(
        self, outputs: FrozenOutputs, source: Source, tokenizer: TextTokenizer, *, max_tokens: int, seed: int
    ) -> None:
        """
        Raises:
            BadSampleError: a sample with several captions can no longer be read.
        """
        self._outputs, self._seed = outputs, seed
        rows, counts, tokens = [], [], []
        truncated = 0
        for row in np.flatnonzero(np.isin(outputs.index.numpy(), source.indices("captions"))).tolist():
            captions = source.sample(int(outputs.index[row])).captions
            if len(captions) < 2:
                continue
            encoded = tokenizer.encode(captions, max_tokens)
            rows.append(row)
            counts.append(len(captions))
            tokens += [ids[mask].int() for ids, mask in zip(encoded.ids, encoded.mask, strict=True)]
            truncated += encoded.n_truncated
        if truncated and rank() == 0:
            logger.warning(
                "%s: %d of %d captions longer than the token limit were cut", source.name, truncated, len(tokens)
            )
        self._rows, self._counts = torch.tensor(rows, dtype=torch.int64), counts
        self._first = np.cumsum([0, *counts])  # (n + 1,) the number of each sample's first caption
        self._tokens = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32)
        self._ends = torch.tensor([0, *map(len, tokens)]).cumsum(0)

    def of(self, epoch: int) -> FrozenOutputs:
        """The outputs as they are, with this epoch's captions as targets."""
        if not self._counts:
            return self._outputs
        chosen = torch.from_numpy(self._first[:-1] + self._turns(epoch))
        starts, lengths = self._outputs.target_offsets[:-1].clone(), self._outputs.target_lengths.clone()
        starts[self._rows] = self._ends[chosen] + len(self._outputs.target_ids)
        lengths[self._rows] = self._ends[chosen + 1] - self._ends[chosen]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        places = _places(starts, lengths, offsets)
        ids = torch.cat([self._outputs.target_ids, self._tokens])[places]
        return dataclasses.replace(self._outputs, target_ids=ids, target_offsets=offsets)

    def said_from_target(self, epoch: int, share: float) -> Tensor:
        """(N,) bool: this share of the samples, drawn for the epoch, whose text is said from its own embedding.

        Kept is only the embedding of an image's first caption: the others are said from what is predicted.
        """
        drawn = torch.from_numpy(np.random.default_rng([self._seed, epoch]).random(len(self._outputs)) < share)
        if self._counts:
            drawn[self._rows] &= torch.from_numpy(self._turns(epoch) == 0)
        return drawn & self._outputs.has_target

    def _turns(self, epoch: int) -> NDArray[np.int64]:
        """(n,) Which of its captions each has in an epoch."""
        numbers = self._outputs.index[self._rows].tolist()
        return np.array([turn(n, epoch, i, self._seed) for n, i in zip(self._counts, numbers, strict=True)])


def _places(starts: Tensor, lengths: Tensor, offsets: Tensor) -> Tensor:
    """Where the tokens of consecutive texts lie that begin at `starts` and are to lie one behind the other."""
    return torch.arange(int(offsets[-1])) + (starts - offsets[:-1]).repeat_interleave(lengths)
