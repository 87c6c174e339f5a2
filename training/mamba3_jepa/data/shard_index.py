"""The indexes of WebDataset shards, kept in a folder: one small file a shard, so that data of any size opens at once.

Such a file is as good as its shard as long as that has the size and the time of change that it was made at; a stale or
damaged one is made again. In memory there is nothing for each sample but the hash of its group, once that is asked for:
where a sample lies, and its key, is read from the file (two reads of some bytes), and checked.

It also keeps digests of every sample's text and picture (`content`), so that a run that goes on need not read all data
to see that it is the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mamba3_jepa.data.content import digests_of
from mamba3_jepa.data.sample import Place
from mamba3_jepa.data.shard_sample import LocalShard, Row, read_sample
from mamba3_jepa.data.shard_scan import Found, ShardScan
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.survey import Tally
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.safetensors_file import Layout, read_layout, write_safetensors
from mamba3_jepa.files.special import is_special

FORMAT = "mamba3-jepa shard index 1"
SUFFIX = ".index.safetensors"

# Columns, (n,) each, uint64 kept as int64: of the group, of the group where several samples have the key, of content.
_HASHES = ("key", "sized_key", "text", "picture")
_ROW = 6  # numbers a sample: those of `Row`, the last one with where the key ends; and a checksum of them and the key
_ROW_BYTES = 8 * _ROW
_LONGEST_KEY = 1 << 20  # bytes; of a damaged index not more is read


@dataclass(frozen=True, kw_only=True)
class IndexHead:
    """What is known of a kept index without reading its columns.

    path: the file; state: of its shard, when it was made; n: samples; n_json: those whose caption is in a JSON object;
    digest: of what it says of its samples; starts: where each column begins in the file; sums: checksums of the columns
    of hashes.
    """

    path: str
    state: str
    n: int
    n_json: int
    digest: bytes
    found: Found
    starts: dict[str, int]
    sums: dict[str, int]


def index_path(index_dir: str | Path, name: str) -> Path:
    """Where the index of the shard of this name, a whole path or address, is kept."""
    stem = os.path.basename(name).removesuffix(".tar")[:100]
    return Path(index_dir, f"{stem}.{blake2b(os.fsencode(name), digest_size=8).hexdigest()}{SUFFIX}")


def state_of(path: str | Path) -> str:
    """What must be the same for an index to hold: size and time of change; empty where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def make_index(index: Path, shard: Path, name: str, state: str) -> bool:
    """Read the shard, and write its index; False where the system does not give it.

    Raises:
        UserError: the index cannot be written.
    """
    scan = ShardScan.of(shard)
    if not scan.is_given:
        return False
    rows, key_end = np.zeros((len(scan.samples), _ROW), dtype=np.int64), 0
    hashes = {column: np.zeros(len(scan.samples), dtype=np.uint64) for column in _HASHES}
    local = LocalShard(str(shard))
    for j, (raw_key, image, text) in enumerate(scan.samples):
        key_end += len(raw_key)
        is_json = text.extension.endswith("json")
        row, key = Row(image.offset, image.size, text.offset, text.size, is_json), _text(raw_key)
        rows[j, :5] = (*row[:4], 2 * key_end + is_json)
        hashes["key"][j], hashes["sized_key"][j] = stable_hash(key), stable_hash(sized(key, image.size))
        place = Place(local.name, image.offset, image.size)
        hashes["text"][j], hashes["picture"][j] = digests_of(lambda: read_sample(local, key, row), place)  # noqa: B023
    write_index(index, name, state, rows, [raw_key for raw_key, _, _ in scan.samples], hashes, scan.found)
    return True


def write_index(
    index: Path,
    name: str,
    state: str,
    rows: NDArray[np.int64],
    raw_keys: Sequence[bytes],
    hashes: dict[str, NDArray[np.uint64]],
    found: Found,
) -> None:
    """Write the index of a shard; the last of each sample's `rows`, its checksum, is filled in.

    Raises:
        UserError: it cannot be written.
    """
    keys = b"".join(raw_keys)
    digest = blake2b(rows[:, :5].tobytes() + keys, digest_size=16).digest()
    seed = _seed(digest)
    for j, raw_key in enumerate(raw_keys):
        rows[j, 5] = _checksum(seed, rows[j, :5].tobytes(), raw_key)
    tensors = {column: torch.from_numpy(values.view(np.int64)) for column, values in hashes.items()}
    tensors |= {
        "rows": torch.from_numpy(rows),
        "keys": torch.frombuffer(bytearray(keys) or bytearray(1), dtype=torch.uint8)[: len(keys)],
    }
    metadata = {
        "format": FORMAT,
        "shard": os.fsencode(name).hex(),
        "state": state,
        "digest": digest.hex(),
        "json": str(int((rows[:, 4] % 2).sum())),
        "sums": " ".join(str(zlib.crc32(hashes[column].tobytes())) for column in _HASHES),
        "found": json.dumps(asdict(found)),
    }
    try:
        write_safetensors(index, tensors, metadata)
    except UserError as error:
        raise UserError(f"{error}; choose another folder for the index with `index_dir`") from error


def read_head(index: Path, name: str, state: str | None) -> IndexHead | None:
    """Of a kept index; None if it is not there, not of this shard in this state (None: whatever it is), or damaged.

    Raises:
        UserError: it is a pipe, socket or device.
    """
    if is_special(index):
        raise UserError(f"{index}: a pipe, socket or device is no file; remove it, or choose another `index_dir`")
    try:
        layout = read_layout(index)
        said = layout.metadata
        if (said["format"], bytes.fromhex(said["shard"])) != (FORMAT, os.fsencode(name)):
            return None
        if state is not None and said["state"] != state:
            return None
        n = layout.shapes["rows"][0]
        return IndexHead(
            path=str(index),
            state=str(said["state"]),
            n=n,
            n_json=int(said["json"]),
            digest=bytes.fromhex(said["digest"]),
            found=_found(said["found"]),
            starts={column: _start(layout, column, n) for column in (*_HASHES, "rows", "keys")},
            sums=dict(zip(_HASHES, map(int, said["sums"].split()), strict=True)),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def sized(key: str, image_size: int) -> str:
    """The group of a sample whose key other samples have too."""
    return f"{key}, {image_size} bytes"


class KeptIndex:
    """The kept indexes of several shards, one after the other. ends: (shards,), where the samples of each end."""

    def __init__(self, heads: Sequence[IndexHead], index_dir: Path) -> None:
        self._dir = index_dir
        self._paths = [head.path for head in heads]
        self._digests = [head.digest for head in heads]
        self._rows_at = np.array([head.starts["rows"] for head in heads], dtype=np.int64)
        self._keys_at = np.array([head.starts["keys"] for head in heads], dtype=np.int64)
        self._columns_at = np.array([[head.starts[each] for each in _HASHES] for head in heads], dtype=np.int64)
        self._sums = np.array([[head.sums[each] for each in _HASHES] for head in heads], dtype=np.int64)
        self._n_json = np.array([head.n_json for head in heads], dtype=np.int64)
        self.ends = np.cumsum([head.n for head in heads], dtype=np.int64)
        together = blake2b(b"kept indexes", digest_size=16)
        for digest in self._digests:
            together.update(digest)
        self.fingerprint = together.hexdigest()
        self._hashes: NDArray[np.uint64] | None = None

    def row(self, shard: int, j: int) -> tuple[str, Row]:
        """Key and place of sample j of a shard.

        Raises:
            UserError: the file of the index is gone, damaged or replaced.
        """
        path = self._paths[shard]
        before = 1 if j else 0  # the row before says where the key begins
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(int(self._rows_at[shard]) + (j - before) * _ROW_BYTES)
                content = file.read((1 + before) * _ROW_BYTES)
                numbers = np.frombuffer(content, dtype="<i8").tolist()
                begin, end = (numbers[4] // 2 if before else 0), numbers[-2] // 2
                file.seek(int(self._keys_at[shard]) + begin)
                raw_key = file.read(min(max(0, end - begin), _LONGEST_KEY))
        except (OSError, ValueError, IndexError, OverflowError) as error:
            why = getattr(error, "strerror", None) or "it is damaged"
            raise UserError(f"{path}: cannot read the index: {why}; do not change `index_dir` during a run") from error
        if numbers[-1] != _checksum(_seed(self._digests[shard]), content[-_ROW_BYTES:-8], raw_key):
            raise UserError(
                f"{path}: the index is damaged, or was replaced while in use: remove it, and it is made again; do not "
                "change data during a run"
            )
        image_offset, image_size, text_offset, text_size, last = numbers[-_ROW:-1]
        return _text(raw_key), Row(image_offset, image_size, text_offset, text_size, bool(last % 2))

    def in_json(self) -> NDArray[np.int64]:
        """The samples whose captions are in JSON objects, ascending."""
        parts = [np.zeros(0, dtype=np.int64)]
        for shard, (n_json, n, end) in enumerate(zip(self._n_json, self._counts, self.ends, strict=True)):
            if n_json == n:
                parts.append(np.arange(end - n, end))
            elif n_json:
                content = self._read(shard, int(self._rows_at[shard]), int(n) * _ROW_BYTES)
                rows = np.frombuffer(content, dtype="<i8").reshape(-1, _ROW)
                parts.append(end - n + np.flatnonzero(rows[:, 4] % 2))
        return np.concatenate(parts)

    def group_hashes(self) -> NDArray[np.uint64]:
        """(n,) of all samples' groups; kept, so that asking again costs nothing."""
        if self._hashes is None:
            hashes = self.column("key")
            repeated = self._repeated(hashes)
            if len(repeated):
                for shard in np.unique(np.searchsorted(self.ends, repeated, side="right")):
                    start, end = int(self.ends[shard] - self._counts[shard]), int(self.ends[shard])
                    here = repeated[(repeated >= start) & (repeated < end)]
                    hashes[here] = self._column(int(shard), "sized_key")[here - start]
            self._hashes = hashes
        return self._hashes

    def column(self, name: str) -> NDArray[np.uint64]:
        """One of `_HASHES` of all samples (n,)."""
        values = np.empty(int(self.ends[-1]), dtype=np.uint64)
        for shard, (end, n) in enumerate(zip(self.ends.tolist(), self._counts.tolist(), strict=True)):
            self._column(shard, name, values[end - n : end])
        return values

    @property
    def _counts(self) -> NDArray[np.int64]:
        return np.diff(self.ends, prepend=0)

    def _column(self, shard: int, name: str, into: NDArray[np.uint64] | None = None) -> NDArray[np.uint64]:
        values = np.empty(int(self._counts[shard]), dtype=np.uint64) if into is None else into
        column = _HASHES.index(name)
        content = self._read(shard, int(self._columns_at[shard, column]), values.nbytes)
        if zlib.crc32(content) != self._sums[shard, column]:
            raise UserError(f"{self._paths[shard]}: the index is damaged: remove it, and it is made again")
        values[:] = np.frombuffer(content, dtype="<u8")
        return values

    def _read(self, shard: int, start: int, size: int) -> bytes:
        path = self._paths[shard]
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                content = file.read(size)
        except OSError as error:
            raise UserError(f"{path}: cannot read the index: {error.strerror}") from error
        return content

    def _repeated(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The samples whose key another has too, ascending. Sorting many hashes takes seconds, so what it gave is kept.

        Of 10^8 keys two have one hash with a probability of 0.03%; they then count as repeated.
        """
        path = self._dir / f"repeated.{self.fingerprint}{SUFFIX}"
        with contextlib.suppress(OSError, ValueError, KeyError):
            layout = read_layout(path)
            with path.open("rb") as file:
                file.seek(layout.starts["bits"])
                bits = file.read(layout.shapes["bits"][0])
            if int(layout.metadata["sum"]) == zlib.crc32(bits) and len(bits) in (0, -(-len(hashes) // 8)):
                return np.flatnonzero(np.unpackbits(np.frombuffer(bits, dtype=np.uint8))) if bits else _NONE
        ordered = np.sort(hashes)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        mask = np.isin(hashes, twice) if len(twice) else np.zeros(0, dtype=bool)
        packed = np.packbits(mask)
        sum_of_bits = zlib.crc32(packed.tobytes())
        with contextlib.suppress(UserError):  # it may be a folder to read only
            write_safetensors(path, {"bits": torch.from_numpy(packed)}, {"sum": str(sum_of_bits)})
        return np.flatnonzero(mask)


_NONE = np.zeros(0, dtype=np.int64)


def _start(layout: Layout, column: str, n: int) -> int:
    expected = {"rows": [n, _ROW], "keys": layout.shapes["keys"]}.get(column, [n])
    if layout.shapes[column] != expected:
        raise ValueError(column)
    return layout.starts[column]


@lru_cache(maxsize=64)
def _found(text: str) -> Found:
    """Mostly the same for all shards, and only read."""
    said = json.loads(text)
    tallies = {name: Tally(**said.pop(name)) for name in ("texts_alone", "links")}
    return Found(**said | tallies | {"unread": Counter(said.pop("unread"))})


def _text(raw_key: bytes) -> str:
    return raw_key.decode("utf-8", "surrogateescape")


def _seed(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "big")


def _checksum(seed: int, row: bytes, raw_key: bytes) -> int:
    return zlib.crc32(raw_key, zlib.crc32(row, seed))
