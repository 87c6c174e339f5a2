"""What the frozen X-Encoder makes of each picture, computed once, so that fifty epochs of phase 1 pay for it once.

Each picture is looked at once, however many samples show it.

Shapes: n samples, P pictures, Nv visual tokens as the predictor reads them, D vision width.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.images import BadSampleError, normalize
from mamba3_jepa.data.sample import Kind, OnBadSample, Sample, Sharded, Source, file_state
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.folder_lock import FolderLock
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Precision
from mamba3_jepa.training.distributed import rank
from mamba3_jepa.training.frozen_key import of_visual_tokens
from mamba3_jepa.training.frozen_parts import Pass, all_parts
from mamba3_jepa.training.frozen_store import Part, PartError, PartStore
from mamba3_jepa.training.precision import autocast

logger = logging.getLogger(__name__)

_PART_BYTES, _MOST_PICTURES = 1 << 28, 2048  # of one file
_BATCH = 64  # pictures the X-Encoder sees at once
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class VisualPart(Part):
    """Visual tokens of n pictures: (n, Nv, D) bfloat16."""

    tokens: Tensor


class VisualTokens:
    """The visual tokens of all pictures of some samples, on the disk, memory-mapped (see `data.batch.Looked`).

    Data workers get a copy that opens the files anew; the folder is held by the process that asked for them.
    """

    def __init__(
        self, store: PartStore[VisualPart], parts: Sequence[VisualPart], pictures: _Pictures, shape: tuple[int, int]
    ) -> None:
        """`shape`: (Nv, D)."""
        self._store, self._pictures, self._shape = store, pictures, shape
        self._kept = np.concatenate([part.index.numpy() for part in parts])  # numbers of pictures, ascending
        self._ends = np.cumsum([len(part.index) for part in parts])
        self._lost = pictures.lost(self._kept, [text for part in parts for text in part.bad])
        self._open: dict[int, Tensor] = {}
        self._held: FolderLock | None = store.held

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}, "_held": None}

    def picture(self, i: int) -> int:
        number = self._pictures.number(i)
        if number in self._lost:
            raise BadSampleError(self._lost[number])
        return int(np.searchsorted(self._kept, number))

    def tokens(self, pictures: Sequence[int]) -> Tensor:
        tokens = torch.empty(len(pictures), *self._shape, dtype=torch.bfloat16)
        for row, place in enumerate(pictures):
            part = int(np.searchsorted(self._ends, place, side="right"))
            tokens[row] = self._part(part)[place - int(self._ends[part])]  # from the end: below 0
        return tokens

    def _part(self, number: int) -> Tensor:
        if number not in self._open:
            try:
                self._open[number] = self._store.read(number, check=False).tokens
            except PartError as error:
                raise UserError(f"{error}: it was there when the run began; `resume` computes it again") from error
        return self._open[number]


def visual_tokens(
    model: Mamba3Jepa,
    source: Source,
    indices: NDArray[np.int64],
    *,
    cache_dir: Path,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
    precision: Precision = "fp32",
    try_again: bool = True,
) -> VisualTokens | None:
    """The visual tokens of the pictures of some samples, from `cache_dir` as far as they are there; None if no sample
    has a picture.

    What is not there is computed with the model's X-Encoder and kept; see `frozen_parts.all_parts`, also for
    `try_again` and for what is raised. A picture that cannot be read is left out with "skip", and so are its samples.

    Args:
        workers: processes that decode images.
    """
    pictures = _Pictures.of(source, indices)
    if not len(pictures.numbers):
        return None
    shape = _shape(model)
    work = _Pass(model, pictures.source, _BATCH, workers, on_bad_sample, precision, _part_size(shape))
    parts, store = all_parts(work, pictures.numbers, cache_dir, try_again)
    assert store is not None
    return VisualTokens(store, parts, pictures, shape)


def _shape(model: Mamba3Jepa) -> tuple[int, int]:
    """(Nv, D)."""
    return model.config.visual_tokens, model.config.vision.hidden_size


def _part_size(shape: tuple[int, int]) -> int:
    """Pictures in one file: a power of two, as batches are."""
    fitting = max(1, _PART_BYTES // _bytes_of_one(shape))
    return min(_MOST_PICTURES, 1 << (fitting.bit_length() - 1))


def _bytes_of_one(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] * torch.bfloat16.itemsize


class _Pass(Pass[VisualPart]):
    """One pass of the X-Encoder."""

    kind, what, setting, depends_on = VisualPart, "visual tokens", "cache_visual", of_visual_tokens

    def demand_room(self, folder: Path, n_samples: int) -> None:
        each = _bytes_of_one(_shape(self.model))
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        size, free = n_samples * each, shutil.disk_usage(place).free
        if rank() == 0:
            logger.info(
                "%s: the visual tokens of %d pictures, %d KiB each, will take %.2f GB in %s, where %.2f GB are free",
                self.source.name, n_samples, each >> 10, size / _GB, folder.parent, free / _GB,
            )  # fmt: skip
        if size > free:
            raise UserError(
                f"{self.source.name}: the visual tokens of {n_samples} pictures take {size / _GB:.2f} GB, and "
                f"{folder.parent} has {free / _GB:.2f} GB free: free some space, choose another folder with "
                "`cache_visual`, or begin a run with a `visual_pool` of 2, which takes a quarter"
            )

    @torch.no_grad()
    def _compute(self, batch: Batch) -> VisualPart:
        model = self.model
        if not batch.has_image.all():
            raise UserError(f"{self.source.name}: the data has been changed since it was opened")
        tokens = torch.empty(0, *_shape(model))
        if len(batch):
            with autocast(model.device, self.precision):
                tokens = model.look(normalize(batch.pixels.to(model.device)))[batch.picture.to(model.device)]
        if not tokens.isfinite().all():
            raise UserError(
                "the X-Encoder's outputs are not finite: its weights are damaged, or `precision` is too coarse"
            )
        tokens = tokens.to(torch.bfloat16).cpu()
        return VisualPart(index=batch.index, tokens=tokens, bad=batch.bad, not_read=batch.not_read, n_truncated=0)


class _Pictures:
    """Which pictures some samples show. source: gives them by number; numbers: theirs, ascending."""

    def __init__(self, source: Source, numbers: NDArray[np.int64], of: _Shown | None) -> None:
        """`of`: which of them each sample shows; None where each shows its own, by the sample's number."""
        self.source, self.numbers, self._of = source, numbers, of

    @staticmethod
    def of(source: Source, indices: NDArray[np.int64]) -> _Pictures:
        """Those of samples `indices` of `source`."""
        indices = np.unique(indices)
        if isinstance(source, Sharded):  # each sample has a picture of its own there, read from its shard in order
            return _Pictures(source, indices, None)
        showing = indices[~np.isin(indices, source.indices("imageless"))]
        _, numbers = np.unique(source.group_hashes()[showing], return_inverse=True)
        first = np.full(numbers.max(initial=-1) + 1, len(showing))
        np.minimum.at(first, numbers, np.arange(len(showing)))
        numbers = np.argsort(np.argsort(first))[numbers]  # in the order in which they come first
        view = _PictureSource(source, showing, numbers)
        return _Pictures(view, np.arange(len(view)), _Shown(showing, numbers))

    def number(self, i: int) -> int:
        """The number of the picture of sample i."""
        return i if self._of is None else self._of.number(i)

    def lost(self, kept: NDArray[np.int64], bad: Sequence[str]) -> dict[int, str]:
        """What was wrong with the pictures that are not among the `kept`, in their order, by number."""
        return dict(zip(np.setdiff1d(self.numbers, kept).tolist(), bad, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"source": None}  # a data worker has its own


@dataclass(frozen=True)
class _Shown:
    """Samples with picture, ascending, and the number of the picture of each."""

    samples: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def number(self, i: int) -> int:
        return int(self.numbers[np.searchsorted(self.samples, i)])


class _PictureSource:
    """The different pictures of a source, each as the first of the samples that show it and can be read."""

    def __init__(self, source: Source, samples: NDArray[np.int64], numbers: NDArray[np.int64]) -> None:
        """`samples`: those with picture, ascending; `numbers`: of the picture of each, in the order they come first."""
        self._source = source
        self._order = samples[np.argsort(numbers, kind="stable")]
        self._starts = np.searchsorted(np.sort(numbers), np.arange(numbers.max(initial=-1) + 2))
        self.name, self.synthetic = source.name, source.synthetic
        firsts = self._firsts(np.arange(len(self)))
        self.fingerprint = f"{source.fingerprint} {blake2b(firsts.astype('<i8').tobytes()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def sample(self, i: int) -> Sample:
        problem: BadSampleError | None = None
        for sample in self._order[self._starts[i] : self._starts[i + 1]].tolist():
            try:
                return self._source.sample(sample)
            except BadSampleError as error:  # its text; another's may be there
                problem = problem or error
        assert problem is not None
        raise problem

    def group(self, i: int) -> str:
        return self._source.group(int(self._firsts(np.array([i]))[0]))

    def group_hashes(self) -> NDArray[np.uint64]:
        return self._source.group_hashes()[self._firsts(np.arange(len(self)))]

    def indices(self, kind: Kind) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(self._firsts(np.arange(len(self))), self._source.indices(kind)))

    def file_state(self, indices: NDArray[np.int64]) -> str:
        """See `sample.FileBacked`."""
        return file_state(self._source, self._firsts(indices))

    def _firsts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each picture the first sample that shows it."""
        return self._order[self._starts[numbers]]
