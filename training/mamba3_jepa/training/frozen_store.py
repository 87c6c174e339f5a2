"""Frozen outputs on disk: what they are kept under, and the files they are kept in.

Shapes: n samples of one part, E embedding width, D width of the pooled state.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mamba3_jepa.data.sample import OnBadSample, Source, file_state
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.files.whole_file import whole_file
from mamba3_jepa.models.vljepa import Mamba3Jepa

FORMAT_VERSION = 1
_FROZEN = ("x_encoder.", "predictor.", "y_encoder.", "angn.")  # what the outputs are made by
_OTHER_PARTS = (
    "y_decoder",
    "prefix_tokens",
    "recursion",
    "preset",
)  # fields of the configuration they do not depend on


class PartError(Exception):
    """A part on the disk is damaged, or belongs to something else."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the frozen model made of a few thousand samples, in their order; bad samples are left out.

    index (n,) int64; embedding (n, E), pooled (n, D), target_embedding (n, E) float32; has_target (n,) bool;
    target_ids int32, all samples' tokens in one row; target_lengths (n,) int64, how many each has.
    """

    index: Tensor
    embedding: Tensor
    pooled: Tensor
    has_target: Tensor
    target_embedding: Tensor
    target_ids: Tensor
    target_lengths: Tensor
    bad: list[str]
    n_truncated: int

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


_TENSORS = [field.name for field in dataclasses.fields(Part) if field.name not in ("bad", "n_truncated")]


def cache_key(
    model: Mamba3Jepa,
    source: Source,
    indices: NDArray[np.int64],
    *,
    on_bad_sample: OnBadSample,
    precision: str,
    part_size: int,
) -> str:
    """Hex digest of everything the outputs depend on: weights, configuration, tokenizer, samples and their files."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(_FROZEN):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(_bytes(tensor))
    config = {name: value for name, value in model.config.to_dict().items() if name not in _OTHER_PARTS}
    rest = {
        "format": FORMAT_VERSION,
        "config": config,
        "tokenizer": blake2b(model.tokenizer.to_json().encode()).hexdigest(),
        "source": source.fingerprint,
        "files": file_state(source, indices),
        "indices": blake2b(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest(),
        "on_bad_sample": on_bad_sample,
        "precision": precision,
        "part_size": part_size,
    }
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


class PartStore:
    """The parts of one key, each in a file of its own under `cache_dir/key`."""

    def __init__(self, cache_dir: Path, key: str) -> None:
        self.folder, self._key = cache_dir / key, key

    def describe(self, about: dict[str, Any]) -> None:
        """Make the folder, and leave about.json for the person who wonders what it holds.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            write_json(self.folder / "about.json", about)
        except UserError as error:
            raise UserError(f"{error}; choose another folder for frozen outputs with `cache_dir`") from error

    def exists(self, number: int) -> bool:
        """Whether there is a file for part `number`; it may be damaged."""
        return self._path(number).exists()

    def write(self, number: int, part: Part) -> None:
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
            "n_truncated": str(part.n_truncated),
        }
        path = self._path(number)
        content = save(tensors, metadata)
        try:
            with whole_file(path) as file:
                file.write(content)
        except UserError as error:
            raise UserError(
                f"{error}; free some space, or choose another folder for frozen outputs with `cache_dir`"
            ) from error

    def read(self, number: int) -> Part:
        """Part `number`; its tensors are memory-mapped.

        Raises:
            PartError: damaged, or not the part of this key and number.
        """
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("key"), metadata.get("part")) != (self._key, str(number)):
                    raise PartError(f"{path} was written for something else")
                if sorted(file.keys()) != sorted(_TENSORS):
                    raise PartError(f"{path} does not hold the expected tensors")
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            if _digest(tensors) != metadata.get("digest"):
                raise PartError(f"{path} is damaged: its checksum is wrong")
            return Part(**tensors, bad=json.loads(metadata["bad"]), n_truncated=int(metadata["n_truncated"]))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
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
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
