"""WebDataset shards as img2dataset writes them: tars of `KEY.jpg` (.png, ...) and `KEY.txt` or `KEY.json`.

`KEY.json` has a `caption`, and may have `negatives` as a manifest's line has them; beside `KEY.txt` it is not read.

Samples are read by position, so that shuffling, the hash split and exact resume are those of every other
source. The index is made here because the alternatives do not fit: webdataset streams (and its random-access
module, `wids`, is gone since 1.0), while `tarfile` spends 65 microseconds a member on it, ten minutes for
CC3M; reading only names and sizes takes 7, one minute. A kept index (`shard_index`) takes none.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.data.sample import Kind, OnBadSample, Sample, state_of_files
from mamba3_jepa.data.shard_index import KeptIndex, sized
from mamba3_jepa.data.shard_indexing import kept_heads
from mamba3_jepa.data.shard_sample import LocalShard, Row, Shard, read_sample
from mamba3_jepa.data.shard_scan import Found, ShardScan
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.survey import Tally, described, suffix_of, walk_visible
from mamba3_jepa.errors import UserError


class ShardSource:
    """Image-text pairs in every `*.tar` under a directory, in the order of the files' paths and of their members.

    Opening reads the headers of all shards, or, of those that have one, their kept index. The group of a sample is its
    key, with the size of its image where several samples have that key: shards may be renamed and moved. Hidden files,
    folders and members are not looked at.

    n_left_out: images without text; n_further: images of samples that have one already; texts_alone: texts without
    image; unread: members that look like samples and are not read, by suffix; links: images and texts that are no
    regular members; damaged: what is wrong with shards that are read as far as they are whole; n_folders: that hold
    shards.
    """

    synthetic = False

    def __init__(
        self, data_dir: str | Path, on_bad_sample: OnBadSample = "error", index_dir: str | Path | None = None
    ) -> None:
        """
        Args:
            index_dir: where the index of each shard is kept; what is missing or stale there is made. None: no index is
                kept.

        Raises:
            UserError: a shard is truncated or no tar (with "skip", what is whole is used), an image has no text (with
                "skip" it is left out and counted), there is no sample at all, or an index cannot be written.
        """
        self.name = str(data_dir)
        self._begin(on_bad_sample)
        names = sorted(_find_shards(Path(data_dir)))
        self._shards = [str(Path(data_dir) / name) for name in names]
        self.n_folders = len({os.path.dirname(name) for name in names})
        self._index: _Scanned | KeptIndex
        if index_dir is None:
            self._index = self._scanned()
        else:
            heads = kept_heads(self.name, names, Path(index_dir))
            for path, head in zip(self._shards, heads, strict=True):
                self._note(path, head.found)
            self._index = KeptIndex(heads, Path(index_dir))
        self._demand_samples()
        self.fingerprint = self._index.fingerprint

    def _begin(self, on_bad_sample: OnBadSample) -> None:
        self.n_left_out = self.n_further = 0
        self.texts_alone = Tally()
        self.unread: Counter[str] = Counter()
        self.links = Tally()
        self.damaged = Tally()
        self._skips = on_bad_sample == "skip"

    def _scanned(self) -> _Scanned:
        index = _Scanned()
        for path in self._shards:
            scan = ShardScan.of(path)
            self._note(path, scan.found)
            index.add(scan)
        index.finish()
        return index

    def _demand_samples(self) -> None:
        if len(self):
            return
        seen = [described(self.unread), self.damaged.first, f"{self.links.count} links" if self.links.count else ""]
        but = f", but {'; '.join(filter(None, seen))}" if any(seen) else ""
        raise UserError(f"{self.name}: no image with a caption in {len(self._shards)} *.tar shards{but}")

    def _note(self, path: str, found: Found) -> None:
        """Count what lies in a shard beside its samples."""
        if found.problem and not self._skips:
            raise UserError(f"{path}: {found.problem}")
        if found.damage:
            self.damaged.add(f"{path}: {found.damage.split('; download', maxsplit=1)[0]}")
        self.n_left_out += found.n_left_out
        self.n_further += found.n_further
        self.texts_alone.add_all(found.texts_alone, f"{path}: ")
        self.links.add_all(found.links, f"{path}: ")
        self.unread += found.unread

    def __len__(self) -> int:
        return int(self._index.ends[-1])

    @property
    def shard_ends(self) -> NDArray[np.int64]:
        """(shards,), where the samples of each shard end."""
        return self._index.ends

    def sample(self, i: int) -> Sample:
        shard, key, row = self._row(i)
        return read_sample(self._shard(shard), key, row)

    def _shard(self, number: int) -> Shard:
        return LocalShard(self._shards[number])

    def group(self, i: int) -> str:
        _, key, row = self._row(i)
        return key if self.group_hashes()[i] == stable_hash(key) else sized(key, row.image_size)

    def group_hashes(self) -> NDArray[np.uint64]:
        return self._index.group_hashes()

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        if kind == "captions":  # how many a JSON member holds is seen when it is read
            return self._index.in_json()
        return np.arange(len(self) if kind in ("all", "target", "caption") else 0)

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """Changes when a shard of these samples does (see `sample.FileBacked`)."""
        return state_of_files(self._shards[shard] for shard in np.unique(self._shard_of(indices)))

    def digests(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]] | None:
        """Those of the kept index (see `sample.Digested`)."""
        if isinstance(self._index, _Scanned):
            return None
        return self._index.column("text")[indices], self._index.column("picture")[indices]

    def _shard_of(self, indices: NDArray[np.int64] | int) -> NDArray[np.int64]:
        return np.searchsorted(self._index.ends, indices, side="right")

    def _row(self, i: int) -> tuple[int, str, Row]:
        """The number of its shard, its key, and where it lies."""
        shard = int(self._shard_of(i))
        return shard, *self._index.row(shard, i - (int(self._index.ends[shard - 1]) if shard else 0))


class _Scanned:
    """An index that is kept nowhere: of shards just read. ends: (shards,), where the samples of each end."""

    def __init__(self) -> None:
        self._growing, self._raw_keys, self._ends = array("q"), list[bytes](), array("q")
        self._digest = blake2b(b"groups without shards", digest_size=16)

    def add(self, scan: ShardScan) -> None:
        """One more shard."""
        for raw_key, image, text in scan.samples:
            row = (len(self._ends), image.offset, image.size, text.offset, text.size, text.extension.endswith("json"))
            self._growing.extend(row[1:])
            self._raw_keys.append(raw_key)
            self._digest.update(repr((row, raw_key)).encode())
        self._ends.append(len(self._raw_keys))

    def finish(self) -> None:
        """There are no more."""
        self.ends = np.array(self._ends, dtype=np.int64)
        self._keys = np.array(self._raw_keys or [b""])  # one fixed-width array: far smaller than as many objects
        self._places = np.array(self._growing, dtype=np.int64).reshape(-1, 5)
        self.fingerprint = self._digest.hexdigest()
        self._hashes: NDArray[np.uint64] | None = None
        del self._growing, self._raw_keys, self._ends, self._digest  # which is not to be pickled

    def row(self, shard: int, j: int) -> tuple[str, Row]:
        """Key and place of sample j of a shard."""
        return self._row(j + (int(self.ends[shard - 1]) if shard else 0))

    def _row(self, i: int) -> tuple[str, Row]:
        image_offset, image_size, text_offset, text_size, is_json = map(int, self._places[i])
        key = bytes(self._keys[i]).decode("utf-8", "surrogateescape")
        return key, Row(image_offset, image_size, text_offset, text_size, bool(is_json))

    def in_json(self) -> NDArray[np.int64]:
        """The samples whose captions are in JSON objects, ascending."""
        return np.flatnonzero(self._places[:, 4])

    def group_hashes(self) -> NDArray[np.uint64]:
        """(n,) of all samples' groups; kept, so that asking again costs nothing."""
        if self._hashes is None:
            _, number, count = np.unique(self._keys, return_inverse=True, return_counts=True)
            repeated = (count > 1)[number]
            self._hashes = np.fromiter(self._groups(repeated.tolist()), dtype=np.uint64, count=len(self._places))
        return self._hashes

    def _groups(self, repeated: Sequence[bool]) -> Iterator[int]:
        for i in range(len(self._places)):
            key, row = self._row(i)
            yield stable_hash(sized(key, row.image_size) if repeated[i] else key)


def _find_shards(root: Path) -> Iterator[str]:
    """Paths, relative to `root`, of its shards."""
    for folder, names in walk_visible(root):
        yield from (os.path.join(folder, name) for name in names if suffix_of(name) == ".tar")
