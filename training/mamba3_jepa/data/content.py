"""What a run learns from its data, as digests: the same wherever the files lie and however their paths are written.

Neither the path of the data nor a time of change enters, so that a copy of the files is the same data.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.sample import Place, Sample, Source
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.files.special import is_special

# 100,000 pairs of 30 KB take about 6 s, of which a third is their captions (2 cores, files in memory; 17 s from disk).
MAX_PICTURES = 250_000  # of more, the bytes of so many are looked at; of texts, all
WHOLE_BYTES, PIECE_BYTES = 1 << 16, 1 << 14  # of larger files: size, begin, middle and end
SKETCH_SIZE = 2048

_THREADS, _TOGETHER = 8, 256  # reading waits for disks and networks
_UNREADABLE = "unreadable"
_BLOCKS = 64
_TEXTS, _PICTURES, _SIZES = "texts", "pictures", "samples"
_NUMBERS = "places among the samples that this phase does not use"


@dataclass(frozen=True, kw_only=True)
class Content:
    """Of n samples, (n,) uint64 each.

    texts: of question, target, label and knowledge; pictures: of the picture's bytes, 0 where there is none or it was
    not looked at; keys: what tells that two samples show the same: the picture, or the question where there is none; 0
    where that is not known.
    """

    texts: NDArray[np.uint64]
    pictures: NDArray[np.uint64]
    keys: NDArray[np.uint64]


def content_of(source: Source, indices: Sequence[int] | NDArray[np.int64]) -> Content:
    """Read the texts of some samples, and of their pictures as much as tells one from another. Nothing is decoded, and
    what cannot be read counts as unreadable."""
    indices = np.asarray(indices, dtype=np.int64)
    looked_at = _looked_at(source.group_hashes()[indices])
    known: dict[Place, int] = {}
    chunks = [slice(start, start + _TOGETHER) for start in range(0, len(indices), _TOGETHER)]
    rows = [np.zeros((0, 3), dtype=np.uint64)]
    with ThreadPoolExecutor(_THREADS) as pool:
        of_chunk = partial(_chunk, source, known)
        rows += pool.map(of_chunk, (indices[each] for each in chunks), (looked_at[each] for each in chunks))
    texts, pictures, keys = np.concatenate(rows).T
    return Content(texts=texts, pictures=pictures, keys=keys)


def sketch(keys: NDArray[np.uint64]) -> list[int]:
    """The smallest distinct keys, at most `SKETCH_SIZE`: what of a set is kept to recognise its members by."""
    found = np.unique(keys)
    return found[found > 0][:SKETCH_SIZE].tolist()


def recognised(keys: NDArray[np.uint64], known: Sequence[int]) -> tuple[int, int]:
    """How many of the `keys` are in the set that `known` is the sketch of, and of how many that can be told.

    Can be told of keys up to the greatest in a full sketch; hashes are random, so they are a fair sample of all.
    """
    keys = keys[keys > 0]
    if len(known) == SKETCH_SIZE:
        keys = keys[keys <= np.uint64(known[-1])]
    return int(np.isin(keys, np.array(known, dtype=np.uint64)).sum()), len(keys)


@dataclass(frozen=True, kw_only=True)
class SplitContent:
    """What is kept of the two sides of a split.

    digests: by what is digested, of up to `_BLOCKS` consecutive blocks of the samples, training samples first; equal
        where a run learns the same.
    seen: `sketch` of the training samples' keys.
    held_out: keys of the validation samples (n,).
    shared: how many of those show a picture that is among the training samples too, under another name.
    """

    digests: dict[str, list[str]]
    seen: list[int]
    held_out: NDArray[np.uint64]
    shared: int


def split_content(
    train: Source, train_indices: NDArray[np.int64], val: Source, val_indices: NDArray[np.int64]
) -> SplitContent:
    """Read both sides."""
    learnt, held_out = content_of(train, train_indices), content_of(val, val_indices)
    same_group = np.isin(val.group_hashes()[val_indices], train.group_hashes()[train_indices])
    other = held_out.keys[~same_group]
    return SplitContent(
        digests={
            _TEXTS: _digests(learnt.texts, held_out.texts),
            _PICTURES: _digests(learnt.pictures, held_out.pictures),
            _NUMBERS: _digests(train_indices, val_indices),
            _SIZES: [str(len(train_indices)), str(len(val_indices))],
        },
        seen=sketch(learnt.keys),
        held_out=held_out.keys,
        shared=int(np.isin(other[other > 0], learnt.keys).sum()),
    )


def first_difference(before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> tuple[str, int, int] | None:
    """What of `SplitContent.digests` has changed, in words, and the first block of samples in which: from, up to but
    not including. None where all is the same."""
    (*sizes,) = map(int, now[_SIZES])
    if before.get(_SIZES) != now[_SIZES]:
        theirs = " and ".join(before.get(_SIZES, ["?"]))
        return f"{sizes[0]} training and {sizes[1]} validation samples instead of {theirs}", 0, 0
    for what in (_TEXTS, _PICTURES, _NUMBERS):
        if before.get(what) == now[what]:
            continue
        differs = [each != other for each, other in itertools.zip_longest(now[what], before.get(what, []))]
        blocks = np.array_split(np.arange(sum(sizes)), len(now[what]))
        block = blocks[min(differs.index(True), len(blocks) - 1)]
        return what, int(block[0]), int(block[-1]) + 1
    return None


def _digests(*arrays: NDArray[np.generic]) -> list[str]:
    values = np.concatenate(arrays).astype("<u8")
    return [blake2b(block.tobytes(), digest_size=8).hexdigest() for block in np.array_split(values, _blocks(values))]


def _blocks(values: NDArray[np.generic]) -> int:
    return max(1, min(_BLOCKS, len(values)))


def _looked_at(groups: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Of which samples the picture is read: all, or those of `MAX_PICTURES` groups."""
    distinct = np.unique(groups)
    if len(distinct) <= MAX_PICTURES:
        return np.ones(len(groups), dtype=bool)
    return groups <= distinct[MAX_PICTURES - 1]


def _chunk(
    source: Source, known: dict[Place, int], indices: NDArray[np.int64], looked_at: NDArray[np.bool_]
) -> NDArray[np.uint64]:
    """(n, 3): text, picture, key. `known`: pictures that were read already."""
    rows = np.zeros((len(indices), 3), dtype=np.uint64)
    for row, (i, look) in enumerate(zip(indices.tolist(), looked_at.tolist(), strict=True)):
        try:
            sample = source.sample(i)
        except BadSampleError:
            rows[row, 0] = stable_hash(_UNREADABLE)
            continue
        rows[row, 0] = _text_hash(sample)
        if sample.image is None:
            rows[row, 2] = stable_hash(f"asked {sample.question}")
        elif look and sample.place is not None:
            if sample.place not in known:
                known[sample.place] = _picture_hash(sample.place)
            rows[row, 1:] = known[sample.place]
    return rows


def _text_hash(sample: Sample) -> int:
    return stable_hash(json.dumps([sample.question, sample.target, sample.confused, sample.knowledge]))


def _picture_hash(place: Place) -> int:
    if is_special(place.path):
        return stable_hash(_UNREADABLE)
    try:
        return int.from_bytes(_picture_digest(place), "big") or 1
    except OSError:
        return stable_hash(_UNREADABLE)


def _picture_digest(place: Place) -> bytes:
    with open(place.path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size if place.size is None else place.size
        found = blake2b(size.to_bytes(8, "big"), digest_size=8)
        pieces = [(0, size)]
        if size > WHOLE_BYTES:
            pieces = [(start, PIECE_BYTES) for start in (0, (size - PIECE_BYTES) // 2, size - PIECE_BYTES)]
        for start, length in pieces:
            file.seek(place.offset + start)
            found.update(file.read(length))
        return found.digest()
