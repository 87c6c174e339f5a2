"""The answers a data set gives most often: what a model that has seen it knows to choose from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.sample import Fetched, Source, some_of

MAX_SAMPLES_READ = 100_000  # of more, so many are looked at, spread evenly: what is frequent shows in them
MAX_FETCHED = 20_000  # of shards that have to be fetched, which is two of the usual size


def common_answers(source: Source, indices: Sequence[int] | NDArray[np.int64], limit: int = 1000) -> list[str]:
    """The `limit` most frequent answers to the questions among some samples, most frequent first.

    Where there is no question, the captions are taken instead. Equally frequent ones come in alphabetical order, so
    that the same samples give the same list. Decodes no image; a sample whose text cannot be read does not count.
    """
    indices = np.asarray(indices, dtype=np.int64)
    questions = np.intersect1d(indices, source.indices("question"))
    counts = _count(source, questions if len(questions) else np.intersect1d(indices, source.indices("caption")))
    return sorted(counts, key=lambda text: (-counts[text], text))[:limit]


def _count(source: Source, indices: NDArray[np.int64]) -> Counter[str]:
    if isinstance(source, Fetched):
        indices = some_of(source, indices, MAX_FETCHED)
    if len(indices) > MAX_SAMPLES_READ:
        indices = indices[np.linspace(0, len(indices) - 1, MAX_SAMPLES_READ).round().astype(np.int64)]
    counts: Counter[str] = Counter()
    for i in indices:
        try:
            target = source.sample(int(i)).target
        except BadSampleError:
            continue
        if target is not None and target.strip():
            counts[target.strip()] += 1
    return counts
