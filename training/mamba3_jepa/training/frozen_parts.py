"""One pass of a frozen model over some samples, in parts that are kept on disk.

It is computed once, under a key of everything that it depends on; an interrupted pass goes on where it stopped. What is
kept is a matter of the kind of pass: `frozen.py` has what the phases after the first learn from, `frozen_visual.py`
what the first one does.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Generic

import numpy as np
from numpy.typing import NDArray

from mamba3_jepa.count_report import CountReport
from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sample import OnBadSample, Source
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Precision
from mamba3_jepa.training.distributed import (
    all_gather_object,
    from_rank_0,
    local_rank,
    local_world_size,
    on_every_rank,
    rank,
    world_size,
)
from mamba3_jepa.training.frozen_key import Dependence, cache_key
from mamba3_jepa.training.frozen_store import P, PartError, PartStore, concatenate
from mamba3_jepa.training.interrupt import Interrupted, StopRequested, StopSignal

logger = logging.getLogger(__name__)


def all_parts(
    work: Pass[P], indices: NDArray[np.int64], cache_dir: Path | None, try_again: bool
) -> tuple[list[P], PartStore[P] | None]:
    """Every part of `work` over some samples, at least one, and where they are kept: in `cache_dir`, or nowhere.

    What is not there is computed, by all processes together. As long as the store's `held` is there, nobody removes
    its folder.

    Args:
        try_again: samples that a pass before could not read, because the system did not give their files, are read if
            it does now. A run that is continued goes on with the samples it has.

    Raises:
        UserError: a sample is unreadable (with "skip" it is left out), or `cache_dir` is not writable.
        Interrupted: SIGTERM or Ctrl-C; complete parts are kept.
    """
    pieces = np.split(indices, range(work.part_size, len(indices), work.part_size))
    store = None
    if cache_dir is not None:
        key = from_rank_0(lambda: work.key(indices))
        store = PartStore[P](cache_dir, key, work.kind, work.setting)
    with StopSignal() as stop:
        try:
            parts = _computed(work, pieces) if store is None else _kept(work, store, pieces, try_again)
            if stop.received is not None:  # while the other ranks were waited for
                raise StopRequested(stop.received)
        except BaseException as error:
            complete = 0 if store is None else sum(map(store.exists, range(len(pieces))))
            if store is not None:
                store.release()
            if not isinstance(error, StopRequested):
                raise
            raise Interrupted(
                f"stopped by request while computing {work.what}: {complete} of {len(pieces)} parts are complete; "
                "the same command goes on from there",
                error.number,
            ) from None
    return parts, store


def _computed(work: Pass[P], pieces: list[NDArray[np.int64]]) -> list[P]:
    """Every part, each computed by one of the ranks."""
    mine = on_every_rank(lambda: dict(work.parts(pieces, range(rank(), len(pieces), world_size()))))
    everyone = {number: part for share in all_gather_object(mine) for number, part in share.items()}
    return [everyone[number] for number in range(len(pieces))]


def _kept(work: Pass[P], store: PartStore[P], pieces: list[NDArray[np.int64]], try_again: bool) -> list[P]:
    """Every part out of `store`, after those that are not there, or of no use, have been computed."""
    on_every_rank(store.hold)
    missing = [number for number in range(len(pieces)) if not store.exists(number)]
    missing = all_gather_object(missing)[0]  # files appear while others look
    if missing:
        on_every_rank(lambda: _compute_missing(work, store, pieces, missing))
    elif rank() == 0:
        logger.info("%s: using the %s in %s", work.source.name, work.what, store.folder)
        store.used()
    mine = range(local_rank(), len(pieces), local_world_size())  # each part is checked once on every host
    on_every_rank(lambda: _mend(work, store, pieces, mine, try_again))
    return on_every_rank(lambda: [store.read(number, check=False) for number in range(len(pieces))])


def _compute_missing(work: Pass[P], store: PartStore[P], pieces: list[NDArray[np.int64]], missing: list[int]) -> None:
    work.demand_room(store.folder, sum(len(pieces[number]) for number in missing))
    if rank() == 0:
        logger.info("%s: computing %s into %s", work.source.name, work.what, store.folder)
        store.describe({"source": work.source.name, "samples": sum(map(len, pieces)), "parts": len(pieces)})
    for number, part in work.parts(pieces, missing[rank() :: world_size()]):
        store.write(number, part)


def _mend(
    work: Pass[P], store: PartStore[P], pieces: list[NDArray[np.int64]], numbers: Iterable[int], try_again: bool
) -> None:
    """Compute those of the parts `numbers` again that are damaged or, with `try_again`, lack what can be read now."""
    lost = []
    for number in numbers:
        try:
            part = store.read(number)
        except PartError as error:
            logger.warning("%s; computing it again", error)
            lost.append(number)
            continue
        if try_again and any(work.can_be_read(i) for i in part.not_read):
            logger.info("%s: samples that could not be read before are there now", work.source.name)
            lost.append(number)
    for number, part in work.parts(pieces, lost):
        store.write(number, part)


class Pass(ABC, Generic[P]):
    """One pass of the frozen model over parts of a source.

    kind: what a part is; what: what they are called; setting: that which says where they are kept; depends_on: what in
    the model they are made by. part_size: samples in one part.
    """

    kind: type[P]
    what: ClassVar[str]
    setting: ClassVar[str]
    depends_on: ClassVar[Callable[[Mamba3Jepa], Dependence]]

    def __init__(
        self,
        model: Mamba3Jepa,
        source: Source,
        batch_size: int,
        workers: int,
        on_bad_sample: OnBadSample,
        precision: Precision,
        part_size: int,
    ) -> None:
        self.model, self.source, self.part_size = model, source, part_size
        # Parts are whole numbers of batches, so that one loader, and its workers, can serve them all.
        self._batch_size = 1 << (min(batch_size, part_size).bit_length() - 1)
        self._workers, self._on_bad_sample, self.precision = workers, on_bad_sample, precision

    def key(self, indices: NDArray[np.int64]) -> str:
        """What the parts of `indices` are kept under."""
        return cache_key(
            self.model,
            type(self).depends_on(self.model),
            self.source,
            indices,
            on_bad_sample=self._on_bad_sample,
            precision=self.precision,
            part_size=self.part_size,
        )

    @abstractmethod
    def _compute(self, batch: Batch) -> P:
        """The part of one batch."""

    def demand_room(self, folder: Path, n_samples: int) -> None:
        """Refuse, with a `UserError`, to keep so many samples if that cannot be done; what is small need not ask."""

    def can_be_read(self, i: int) -> bool:
        """Whether the system gives the files of sample `i` now."""
        try:
            load = self.source.sample(i).image
            return load is None or load() is not None
        except BadSampleError:
            return False

    def parts(self, pieces: list[NDArray[np.int64]], wanted: Sequence[int]) -> Iterator[tuple[int, P]]:
        """Compute the `wanted` parts, ascending; each is given with its number as soon as it is complete."""
        if not len(wanted):
            return
        loader = build_loader(
            self.source,
            np.concatenate([pieces[number] for number in wanted]),
            self.model.tokenizer,
            self.model.config,
            self._batch_size,
            shuffle=False,
            seed=0,
            drop_last=False,
            workers=self._workers,
            on_bad_sample=self._on_bad_sample,
            demand_target=False,
        )
        total = sum(len(pieces[number]) for number in wanted)
        batches = iter(loader)
        try:
            with CountReport(self.what, total, "samples", rank() == 0) as report:
                for number in wanted:
                    computed = []
                    for batch in itertools.islice(batches, -(-len(pieces[number]) // self._batch_size)):
                        computed.append(self._compute(batch))
                        report.advance(len(batch) + len(batch.bad))
                    yield number, _join(computed)
        finally:
            loader.close()


def _join(parts: list[P]) -> P:
    tensors = {name: concatenate(parts, name) for name in parts[0].tensors()}
    return type(parts[0])(
        **tensors,
        bad=[text for part in parts for text in part.bad],
        not_read=[i for part in parts for i in part.not_read],
        n_truncated=sum(part.n_truncated for part in parts),
    )
