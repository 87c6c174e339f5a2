"""What data asks of its images, and what it answers without one, so that made confusion does not contradict it.

Questions are compared as plain texts (`plain_text`) by their hashes; an image-text pair asks the query prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.plain_text import plain_text
from mamba3_jepa.data.sample import Source
from mamba3_jepa.data.splits import stable_hash

_PAIR_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # spreads question hashes before a group's hash is added


@dataclass(frozen=True, kw_only=True)
class Asked:
    """pairs: (P,) uint64, the questions with the groups of images they are asked of (`pair_hashes`); without_image:
    (Q,) uint64, the questions that have an answer, or are labelled as not confused, without an image."""

    pairs: NDArray[np.uint64]
    without_image: NDArray[np.uint64]

    @staticmethod
    def of(
        source: Source,
        index: NDArray[np.int64],
        question_hash: NDArray[np.uint64],
        beside: Sequence[Source] = (),
        *,
        query_prompt: str,
    ) -> Asked:
        """What `source` and the sources `beside` it ask of the images of some samples, and all they answer without.

        Args:
            index: (n,) samples of `source`.
            question_hash: (n,) what those ask, as `question_hashes` says; it is not read again.
        """
        groups = source.group_hashes()[index]
        pairs, without_image = [], []
        for each in (source, *(other for other in beside if other is not source)):
            group, imageless = each.group_hashes(), each.indices("imageless")
            hashes = np.zeros(len(each), dtype=np.uint64)
            concerned = np.union1d(np.flatnonzero(np.isin(group, groups)), imageless)
            unread = concerned
            if each is source:
                hashes[index] = question_hash
                unread = np.setdiff1d(concerned, index)
            hashes[unread] = question_hashes(each, unread, query_prompt)
            labelled_clear = np.setdiff1d(each.indices("confused"), each.indices("confusing"))
            clear = np.union1d(each.indices("target"), labelled_clear)
            pairs.append(pair_hashes(hashes[concerned], group[concerned]))
            without_image.append(hashes[np.intersect1d(imageless, clear)])
        return Asked(pairs=np.unique(np.concatenate(pairs)), without_image=np.unique(np.concatenate(without_image)))


def question_hashes(source: Source, indices: NDArray[np.int64], query_prompt: str) -> NDArray[np.uint64]:
    """(n,) hashes of what n samples ask; reads no image, and no caption.

    A sample that cannot be read has the prompt's: whoever wants to use it is told, or leaves it out.
    """
    hashes = np.full(len(indices), stable_hash(plain_text(query_prompt)), dtype=np.uint64)
    for row in np.flatnonzero(~np.isin(indices, source.indices("caption"))):
        try:
            question = source.sample(int(indices[row])).question
        except BadSampleError:
            continue
        if question is not None:
            hashes[row] = stable_hash(plain_text(question))
    return hashes


def pair_hashes(question_hash: NDArray[np.uint64], group: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(n,) hashes of n questions together with the groups of the images they are asked of."""
    return question_hash * _PAIR_FACTOR + group  # uint64 arrays wrap around
