"""What a run learns from its data, as digests: the same wherever the files lie and however their paths are written.

Neither the path of the data nor a time of change enters, so that a copy of the files is the same data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.images import BadSampleError, NotReadNowError
from mamba3_jepa.data.sample import Digested, Place, Sample, Source
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.files.special import is_special

# A pair of 30 KB costs 85 us of one core: 9 s for 100,000.
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

    texts: of question, target, label, knowledge and negatives, and all captions and answers; pictures: of the picture's
    bytes, 0 where there is none or it was not looked at; keys: what tells that two samples show the same: the picture,
    or the question where there is none; 0 where that is not known. unread: (n,) bool, whether the system did not give
    its text or picture.
    """

    texts: NDArray[np.uint64]
    pictures: NDArray[np.uint64]
    keys: NDArray[np.uint64]
    unread: NDArray[np.bool_]


def content_of(source: Source, indices: Sequence[int] | NDArray[np.int64]) -> Content:
    """Read the texts of some samples, and of their pictures as much as tells one from another. Nothing is decoded, and
    what cannot be read counts as unreadable."""
    indices = np.asarray(indices, dtype=np.int64)
    looked_at = _looked_at(source, indices)
    if isinstance(source, Digested) and (kept := source.digests(indices)) is not None:
        texts, pictures = kept
        pictures = np.where(looked_at, pictures, np.uint64(0))
        return Content(texts=texts, pictures=pictures, keys=pictures, unread=np.zeros(len(indices), dtype=bool))
    known: dict[Place, int] = {}
    chunks = [slice(start, start + _TOGETHER) for start in range(0, len(indices), _TOGETHER)]
    rows = [np.zeros((0, 4), dtype=np.uint64)]
    with ThreadPoolExecutor(_THREADS) as pool:
        of_chunk = partial(_chunk, source, known)
        rows += pool.map(of_chunk, (indices[each] for each in chunks), (looked_at[each] for each in chunks))
    texts, pictures, keys, unread = np.concatenate(rows).T
    return Content(texts=texts, pictures=pictures, keys=keys, unread=unread > 0)


def digests_of(read: Callable[[], Sample], place: Place) -> tuple[int, int]:
    """What `Content` has of one sample with a picture, which `read` gives and which lies at `place`: text and picture.

    Raises:
        NotReadNowError: the system does not give it.
    """
    try:
        text = _text_hash(read())
    except NotReadNowError:
        raise
    except BadSampleError:
        return stable_hash(_UNREADABLE), 0
    return text, _picture_hash(place)


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
        where a run learns the same. Empty for a block of which not all could be read.
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
    both = Content(**{name: np.concatenate([value, vars(held_out)[name]]) for name, value in vars(learnt).items()})
    other = held_out.keys
    if train is not val:  # where a hash divides one source, no group is on both sides
        other = other[~np.isin(val.group_hashes()[val_indices], train.group_hashes()[train_indices])]
    return SplitContent(
        digests={
            _TEXTS: _digests(both.texts, both.unread & (both.texts == stable_hash(_UNREADABLE))),
            _PICTURES: _digests(both.pictures, both.unread),
            _NUMBERS: _digests(np.concatenate([train_indices, val_indices]), np.zeros_like(both.unread)),
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
        known = before.get(what, [""] * len(now[what]))
        if len(known) != len(now[what]):
            return what, 0, sum(sizes)
        places = np.array_split(np.arange(sum(sizes)), len(now[what]))
        for theirs, ours, place in zip(known, now[what], places, strict=True):
            if theirs not in ("", ours):  # of what could not be read then, nothing is known
                return what, int(place[0]), int(place[-1]) + 1
    return None


def _digests(values: NDArray[np.generic], unread: NDArray[np.bool_]) -> list[str]:
    n_blocks = max(1, min(_BLOCKS, len(values)))
    blocks = zip(np.array_split(values.astype("<u8"), n_blocks), np.array_split(unread, n_blocks), strict=True)
    return ["" if some.any() else blake2b(block.tobytes(), digest_size=8).hexdigest() for block, some in blocks]


def _looked_at(source: Source, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of which samples the picture is read: all, or those of `MAX_PICTURES` groups."""
    if len(indices) <= MAX_PICTURES:
        return np.ones(len(indices), dtype=bool)
    groups = source.group_hashes()[indices]
    distinct = np.unique(groups)
    return groups <= distinct[min(MAX_PICTURES, len(distinct)) - 1]


def _chunk(
    source: Source, known: dict[Place, int], indices: NDArray[np.int64], looked_at: NDArray[np.bool_]
) -> NDArray[np.uint64]:
    """(n, 4): text, picture, key, and 1 where not all was read. `known`: pictures that were read already."""
    rows = np.zeros((len(indices), 4), dtype=np.uint64)
    for row, (i, look) in enumerate(zip(indices.tolist(), looked_at.tolist(), strict=True)):
        try:
            sample = source.sample(i)
        except BadSampleError as error:
            rows[row, 0], rows[row, 3] = stable_hash(_UNREADABLE), isinstance(error, NotReadNowError)
            continue
        rows[row, 0] = _text_hash(sample)
        if sample.image is None:
            rows[row, 2] = stable_hash(f"asked {sample.question}")
        elif look and sample.place is not None:
            if sample.place not in known:
                known[sample.place] = _picture_hash(sample.place)
            rows[row, 1:3], rows[row, 3] = known[sample.place], not known[sample.place]
    return rows


def _text_hash(sample: Sample) -> int:
    texts: list[Any] = [sample.question, sample.target, sample.confused, sample.knowledge]
    if sample.captions or sample.answers:  # else as before there were lists
        texts += [sample.captions, sample.answers]
    if sample.negatives:
        texts.append([each.text for each in sample.negatives])
    return stable_hash(json.dumps(texts))


def _picture_hash(place: Place) -> int:
    """0 where the system does not give it."""
    if is_special(place.path):
        return stable_hash(_UNREADABLE)
    try:
        return int.from_bytes(_picture_digest(place), "big") or 1
    except OSError:
        return 0


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
