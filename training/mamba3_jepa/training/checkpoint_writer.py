"""Checkpoints are written while training goes on: the loop waits for a copy in host memory, a thread does the rest."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, save_checkpoint

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Context manager; when the block ends, everything that was given is written, unless it ends by a second Ctrl-C.

    A failure to write is raised by the next `write` or `wait`, or found by `failure`, once; one that nobody has asked
    for is logged at the end, beside what ended the block.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None
        self._given_up = threading.Event()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._given_up.set()
        try:
            self._join()
        except BaseException:  # a signal
            self._given_up.set()
            self._join()
            raise
        failure = self.failure()
        if failure is None or self._given_up.is_set():
            return
        if error is None:
            raise failure
        logger.error("%s", failure)

    def write(self, checkpoints: Mapping[Path, Checkpoint]) -> None:
        """Write each checkpoint to its path, one after the other. Returns as soon as they are copied: what they hold
        may change then. What they share is copied once.

        Waits for what was given before, so that there is never more than one copy.

        Raises:
            UserError: that was not written, or there is no memory for the copy.
        """
        self.wait()
        try:
            copied = copied_to_host(
                {path: {"model": each.model, "trainer": each.trainer} for path, each in checkpoints.items()}
            )
        except (RuntimeError, MemoryError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"no copy of the weights for {', '.join(map(str, checkpoints))}: {why}") from error
        whole = {path: _with(each, copied[path]) for path, each in checkpoints.items()}
        self._thread = threading.Thread(target=self._write, args=(whole,), name="checkpoints")
        self._thread.start()

    def wait(self) -> None:
        """Until all is written.

        Raises:
            UserError: it was not.
        """
        self._join()
        failure = self.failure()
        if failure is not None:
            raise failure

    def failure(self) -> UserError | None:
        """Why something could not be written, if that is known by now and was not asked for before."""
        failure, self._failure = self._failure, None
        return failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoints: Mapping[Path, Checkpoint]) -> None:
        try:
            for path, checkpoint in checkpoints.items():
                save_checkpoint(path, checkpoint, given_up=self._given_up.is_set)
        except UserError as error:
            self._failure = error
        except Exception as error:  # in a thread nobody would hear of it
            self._failure = UserError(f"could not write checkpoint {path}: {type(error).__name__}: {error}")
            self._failure.__cause__ = error


def _with(checkpoint: Checkpoint, fields: dict[str, Any]) -> Checkpoint:
    """A copy of `checkpoint` with other values in some fields."""
    whole = copy.copy(checkpoint)
    vars(whole).update(fields)
    return whole


def copied_to_host(value: Any) -> Any:
    """A copy of dictionaries, lists and tuples, however nested, with all tensors in them in memory of their own on the
    CPU. Tensors that share memory do so in the copy; what is no tensor is taken over as it is."""
    return _copied(value, {})


def _copied(value: Any, storages: dict[tuple[torch.device, int], torch.UntypedStorage]) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value, storages)
    if isinstance(value, dict):
        entries = copy.copy(value)  # a state dict has attributes beside its entries
        for key, entry in value.items():
            entries[key] = _copied(entry, storages)
        return entries
    if isinstance(value, list | tuple):
        return type(value)(_copied(each, storages) for each in value)
    return value


def _tensor(tensor: Tensor, storages: dict[tuple[torch.device, int], torch.UntypedStorage]) -> Tensor:
    storage = tensor.untyped_storage()
    place = (tensor.device, storage.data_ptr())
    if place not in storages:
        storages[place] = storage.clone() if tensor.device.type == "cpu" else storage.cpu()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(storages[place], tensor.storage_offset(), tensor.size(), tensor.stride())
