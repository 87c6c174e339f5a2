"""Frozen outputs on disk: the files they are kept in.

Letter: n samples of one part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.folder_lock import FolderLock
from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.files.safetensors_file import open_safetensors
from mamba3_jepa.files.whole_file import whole_file
from mamba3_jepa.training.frozen_key import bytes_of, made_by

ABOUT, PART_PATTERN = "about.json", "part-*.safetensors"


class PartError(Exception):
    """A part on the disk is damaged, or belongs to something else."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the frozen model made of some samples, in their order; bad samples are left out. Kinds of parts add tensors.

    index: (n,) int64, their numbers in the source; bad: what was wrong with the samples left out; not_read: numbers of
    those of them that another time may be read.
    """

    index: Tensor
    bad: list[str]
    not_read: list[int]
    n_truncated: int

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @classmethod
    def tensor_names(cls) -> list[str]:
        """The names of the tensors that a part of this kind has."""
        return [field.name for field in dataclasses.fields(cls) if field.type == "Tensor"]


P = TypeVar("P", bound=Part)


class PartStore(Generic[P]):
    """The parts of one key, each in a file of its own under `cache_dir/key`."""

    def __init__(self, cache_dir: Path, key: str, kind: type[P], setting: str) -> None:
        """`kind`: what the parts are; `setting`: that which `cache_dir` is the value of."""
        self.folder, self._key, self._kind, self._setting = cache_dir / key, key, kind, setting
        self.held = FolderLock(self.folder, shared=True)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which may read: the lock stays with the one that took it."""
        return {name: value for name, value in vars(self).items() if name != "held"}

    def hold(self) -> None:
        """Keep the folder from being removed, until `release`, or as long as `held` is there.

        Raises:
            UserError: it is being removed at this moment.
        """
        self.held.take()

    def release(self) -> None:
        """The folder is not needed any more."""
        self.held.release()

    def describe(self, about: dict[str, Any]) -> None:
        """Make the folder, and leave about.json, which says what it holds and what made it.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            write_json(self.folder / ABOUT, about | {"made_by": made_by()})
        except UserError as error:
            raise UserError(f"{error}; choose another folder for frozen outputs with `{self._setting}`") from error

    def used(self) -> None:
        """Note that it is of use today, by the time of about.json."""
        with contextlib.suppress(OSError):  # it may be somebody else's
            os.utime(self.folder / ABOUT)

    def exists(self, number: int) -> bool:
        """Whether there is a file for part `number`; it may be damaged."""
        return self._path(number).exists()

    def write(self, number: int, part: P) -> None:
        """Write part `number` whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        tensors = {name: tensor.contiguous() for name, tensor in part.tensors().items()}
        metadata = {
            "format": "mamba3-jepa frozen outputs",
            "key": self._key,
            "part": str(number),
            "digest": _digest(tensors),
            "bad": json.dumps(part.bad),
            "not_read": json.dumps(part.not_read),
            "n_truncated": str(part.n_truncated),
        }
        path = self._path(number)
        content = save(tensors, metadata)
        try:
            with whole_file(path) as file:
                file.write(content)
        except UserError as error:
            raise UserError(
                f"{error}; free some space, or choose another folder for frozen outputs with `{self._setting}`"
            ) from error

    def read(self, number: int, *, check: bool = True) -> P:
        """Part `number`; its tensors are memory-mapped.

        Args:
            check: read all of it once, to see that it is undamaged.

        Raises:
            PartError: damaged, or not the part of this key and number.
        """
        path, names = self._path(number), self._kind.tensor_names()
        try:
            with open_safetensors(path) as file:
                metadata = file.metadata() or {}
                if (metadata.get("key"), metadata.get("part")) != (self._key, str(number)):
                    raise PartError(f"{path} was written for something else")
                if sorted(file.keys()) != sorted(names):
                    raise PartError(f"{path} does not hold the expected tensors")
                tensors = {name: file.get_tensor(name) for name in names}
            if check and _digest(tensors) != metadata.get("digest"):
                raise PartError(f"{path} is damaged: its checksum is wrong")
            bad, not_read = json.loads(metadata["bad"]), json.loads(metadata["not_read"])
            return self._kind(**tensors, bad=bad, not_read=not_read, n_truncated=int(metadata["n_truncated"]))
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            raise PartError(f"{path} cannot be read: {error}") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.safetensors"


def concatenate(parts: Sequence[Part], name: str) -> Tensor:
    """One of the tensors of all parts, in memory."""
    return torch.cat([getattr(part, name) for part in parts])


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)};".encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()
