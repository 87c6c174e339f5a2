"""From samples to batches, in worker processes: decoding, cropping and tokenising.

What a batch holds depends on (seed, epoch, position) alone, never on the number of workers, so a run can stop
after any batch and continue as if it had not. Pixels cross process boundaries as uint8 and are normalised on
the device that uses them.

Shapes: B samples, Bi of them with image, P different pictures, S pixels, Lq and La tokens of the longest query and
target.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.augment import shift
from mamba3_jepa.data.images import BadSampleError, normalize, to_pixels
from mamba3_jepa.data.sample import OnBadSample, Source
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError


@dataclass(kw_only=True)
class Batch:
    """One rank's share of one global batch. It can be empty (B = 0), see `build_loader`.

    pixels: (P, 3, S, S) uint8, each picture once; picture: (Bi,) int64, which of them each sample with image sees.
    has_image: (B,) bool.
    query_ids, query_mask: (B, Lq) int64 and bool; target_ids, target_mask: (B, La).
    target_hash: (B,) int64, equal for equal target texts.
    has_target: (B,) bool; False only where `build_loader` was told that targets are not needed. The target of
        such a sample is the empty text.
    index: (B,) int64, the samples' indices in the source.
    questions, targets: the texts; None for the question of an image-text pair, of which the query prompt was encoded.
    n_truncated: how many of the 2B texts were cut to the token limit.
    bad: what was wrong with each sample that was left out.
    """

    pixels: Tensor
    picture: Tensor
    has_image: Tensor
    query_ids: Tensor
    query_mask: Tensor
    target_ids: Tensor
    target_mask: Tensor
    target_hash: Tensor
    has_target: Tensor
    index: Tensor
    questions: list[str | None]
    targets: list[str]
    n_truncated: int
    bad: list[str]

    def __len__(self) -> int:
        return len(self.index)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `Network.forward` takes: normalised pixels, has_image, query_ids, query_mask, picture."""
        return normalize(self.pixels), self.has_image, self.query_ids, self.query_mask, self.picture

    def to(self, device: torch.device | str) -> Batch:
        """A copy with all tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which copies to a GPU do not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: function(v) if isinstance(v, Tensor) else v for name, v in values.items()})


def target_hash(text: str) -> int:
    """63-bit stable hash of a target text, for an int64 tensor."""
    return stable_hash(text) >> 1


def build_loader(
    source: Source,
    indices: Sequence[int] | NDArray[np.int64],
    tokenizer: TextTokenizer,
    config: ModelConfig,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    skip_batches: int = 0,
    drop_last: bool,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
    demand_target: bool = True,
    image_shift: int = 0,
) -> BatchLoader:
    """Batches of `indices` for one rank.

    Global batch k holds the samples [k G, (k + 1) G) of the epoch's order, G = batch_size * world_size, and
    rank r takes its r-th slice, so n ranks with batches of b see what one rank with batches of n b sees. An
    incomplete last batch is dropped, or divided as evenly as it goes, so that all ranks have equally many.

    With `on_bad_sample="skip"` an unreadable sample is left out of its batch, which becomes smaller, in the
    worst case empty; positions do not move, so resuming stays exact. `Batch.bad` says what was wrong.

    Args:
        indices: samples of `source`; they must have a target unless `demand_target` is False.
        skip_batches: start after so many batches of the epoch, without decoding them.
        workers: processes that prepare batches; 0 prepares them where they are used.
        image_shift: move each sample's image by up to so many pixels, see `augment.shift`.

    Raises:
        UserError: there is not one batch; while iterating, a sample that cannot be read.
    """
    global_size = batch_size * world_size
    if drop_last and len(indices) < global_size:
        ranks = f" ({batch_size} on each of {world_size} processes)" if world_size > 1 else ""
        raise UserError(
            f"{source.name}: `batch_size`: a batch of {global_size}{ranks} is larger than the {len(indices)} "
            f"samples there are; use at most {len(indices) // world_size}, or give more data"
        )
    if not len(indices):
        raise UserError(f"{source.name}: there are no samples to load")
    plan = BatchPlan(
        np.asarray(indices, dtype=np.int64), batch_size, shuffle, seed, rank, world_size, drop_last=drop_last
    )
    plan.set_epoch(epoch, skip_batches)
    maker = BatchMaker(source, tokenizer, config, on_bad_sample, demand_target, image_shift=image_shift, seed=seed)
    return BatchLoader(plan, maker, workers)


class BatchPlan(Sampler[list[int]]):
    """Which samples make up each batch of one rank in one epoch."""

    def __init__(
        self,
        indices: NDArray[np.int64],
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        *,
        drop_last: bool,
    ) -> None:
        self._indices = indices
        self._global_size = batch_size * world_size
        self._shuffle, self._seed = shuffle, seed
        self._rank, self._world_size = rank, world_size
        self._drop_last = drop_last
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        self.epoch, self._skip = epoch, skip_batches

    def __len__(self) -> int:
        full, rest = divmod(len(self._indices), self._global_size)
        return max(0, full + (rest > 0 and not self._drop_last) - self._skip)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._indices
        if self._shuffle:
            order = np.random.default_rng([self._seed % 2**64, self.epoch]).permutation(order)
        for k in range(self._skip, self._skip + len(self)):
            block = order[k * self._global_size : (k + 1) * self._global_size]
            yield np.array_split(block, self._world_size)[self._rank].tolist()


@dataclass(frozen=True)
class _Failure:
    """A user's error on its way out of a worker, whose exceptions would arrive wrapped in a traceback."""

    message: str


class _InEpoch(Sampler[tuple[int, list[int]]]):
    """The batches of a plan with their epoch, which worker processes are not told otherwise."""

    def __init__(self, plan: BatchPlan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return ((self._plan.epoch, indices) for indices in self._plan)


class BatchMaker(Dataset["Batch | _Failure"]):
    """Turns an epoch and the indices of one of its batches into the batch."""

    def __init__(
        self,
        source: Source,
        tokenizer: TextTokenizer,
        config: ModelConfig,
        on_bad_sample: OnBadSample,
        demand_target: bool,
        *,
        image_shift: int,
        seed: int,
    ) -> None:
        self._source, self._tokenizer, self._config = source, tokenizer, config
        self._skip_bad, self._demand_target = on_bad_sample == "skip", demand_target
        self._image_shift, self._seed = image_shift, seed

    def __getitem__(self, asked: tuple[int, list[int]]) -> Batch | _Failure:
        try:
            return self._make(*asked)
        except UserError as error:
            return _Failure(str(error))

    def _make(self, epoch: int, indices: list[int]) -> Batch:
        config, size = self._config, self._config.vision.image_size
        kept: list[int] = []
        pictures = _Pictures(size)
        has_image: list[bool] = []
        questions: list[str | None] = []
        targets: list[str] = []
        has_target: list[bool] = []
        bad: list[str] = []
        for i in indices:
            try:
                sample = self._source.sample(i)
                if sample.target is None and self._demand_target:
                    raise ValueError(f"sample {i} of {self._source.name} has no target")
                if sample.image is not None:
                    pictures.add(sample.image, sample.picture if not self._image_shift else None)
            except BadSampleError as error:
                if not self._skip_bad:
                    raise
                bad.append(str(error))
                continue
            kept.append(i)
            has_image.append(sample.image is not None)
            questions.append(sample.question)
            targets.append(sample.target or "")
            has_target.append(sample.target is not None)
        pixels, index = pictures.pixels(), torch.tensor(kept, dtype=torch.int64)
        seeing = torch.tensor(has_image, dtype=torch.bool)
        if self._image_shift:  # every sample has a picture of its own then
            pixels = shift(pixels, index[seeing], self._image_shift, self._seed, epoch)
        queries = [config.query_prompt if question is None else question for question in questions]
        encoded = self._tokenizer.encode(queries, config.max_query_tokens)
        answers = self._tokenizer.encode(targets, config.max_answer_tokens)
        return Batch(
            pixels=pixels,
            picture=torch.tensor(pictures.seen, dtype=torch.int64),
            has_image=seeing,
            query_ids=encoded.ids,
            query_mask=encoded.mask,
            target_ids=answers.ids,
            target_mask=answers.mask,
            target_hash=torch.tensor([target_hash(text) for text in targets], dtype=torch.int64),
            has_target=torch.tensor(has_target, dtype=torch.bool),
            index=index,
            questions=questions,
            targets=targets,
            n_truncated=encoded.n_truncated + answers.n_truncated,
            bad=bad,
        )


class _Pictures:
    """The different pictures of one batch, each decoded once. seen: for each image added, the number of its picture."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pixels: list[Tensor] = []
        self._numbers: dict[str, int] = {}
        self.seen: list[int] = []

    def add(self, load: Callable[[], Image.Image], picture: str | None) -> None:
        """`picture` tells it from others; None for one that is like no other."""
        number = None if picture is None else self._numbers.get(picture)
        if number is None:
            number = len(self._pixels)
            self._pixels.append(to_pixels(load(), self._size))
            if picture is not None:
                self._numbers[picture] = number
        self.seen.append(number)

    def pixels(self) -> Tensor:
        """(P, 3, S, S) uint8."""
        shape = (0, 3, self._size, self._size)
        return torch.stack(self._pixels) if self._pixels else torch.empty(shape, dtype=torch.uint8)


class BatchLoader:
    """Iterates over the batches of one epoch; see `build_loader`.

    Worker processes start with the first iteration and stay until `close`, until the loader is dropped, or to
    the end of the process; `set_epoch` lets one loader, and its workers, serve a whole run.
    """

    def __init__(self, plan: BatchPlan, maker: BatchMaker, workers: int) -> None:
        self._plan = plan
        self._workers = workers
        options: dict[str, Any] = {}
        if workers:
            # "spawn": forking a process that already runs threads (torch, tokenizers, CUDA) can hang.
            options = {
                "multiprocessing_context": multiprocessing.get_context("spawn"),
                "persistent_workers": True,
                "worker_init_fn": partial(_start_worker, parent=os.getpid()),
            }
        self._loader: DataLoader[Any] = DataLoader(
            maker,
            sampler=_InEpoch(plan),
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every iteration would draw from the global one
            **options,
        )
        self._close = weakref.finalize(self, _shut_down, self._loader)

    def __len__(self) -> int:
        """Batches that one iteration gives."""
        return len(self._plan)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """What the next iteration goes through: `epoch`, without its first `skip_batches` batches."""
        self._plan.set_epoch(epoch, skip_batches)

    def __iter__(self) -> Iterator[Batch]:
        try:
            with _signals_held_back():
                batches = iter(self._loader)
            for batch in batches:
                if isinstance(batch, _Failure):
                    raise UserError(batch.message)
                yield batch
        except RuntimeError as error:
            if self._workers and "DataLoader worker" in str(error):
                raise UserError(
                    f"a data worker process died ({error}); the machine may be out of memory or of shared "
                    "memory (/dev/shm): use fewer `workers`, or `workers` 0"
                ) from error
            raise

    def close(self) -> None:
        """Stops the worker processes."""
        self._close()


def _unchanged(batch: Any) -> Any:
    return batch


def _shut_down(loader: DataLoader[Any]) -> None:
    iterator = loader._iterator
    loader._iterator = None
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started inside never see Ctrl-C or a SIGTERM to the group; this one gets them afterwards.

    The training process decides when to stop and needs its workers until then. A blocked signal stays blocked
    in a child from its first instruction on, before any Python code in it could choose to ignore it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would unblock the signals again if it had to start in between
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start_worker(worker_id: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_obey_parent_only, args=(parent,), daemon=True).start()


def _obey_parent_only(parent: int) -> None:
    """Ends this worker when its parent asks with SIGTERM or is gone; a SIGTERM from anybody else is dropped.

    The parent may have died while this worker was still starting, which torch's own watch would not notice.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
