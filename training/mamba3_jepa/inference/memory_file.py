"""What a saved memory's file holds, read and checked without a model.

Letters: M texts, P episodes, S length of an episode's key, E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mamba3_jepa.contract import MEMORY_FORMAT, MEMORY_FORMAT_VERSION, READABLE_MEMORY_VERSIONS
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.json_file import from_json
from mamba3_jepa.files.safetensors_file import open_safetensors, write_safetensors
from mamba3_jepa.inference.episodes import Episode, Episodes

SUFFIX = ".safetensors"
_EPISODE_TENSORS = {"seen": "episode_states", "questions": "episode_questions", "answers": "episode_answers"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """Of a file, checked against itself: texts, their embeddings (M, E) float32, who made them, and the episodes."""

    texts: list[str]
    embeddings: Tensor
    encoder: str
    episodes: Episodes | None


def demand_suffix(path: Path, setting: str | None = None) -> None:
    """Demand a name that says what the file is.

    Raises:
        UserError: it ends in something else; begins with `setting`, if that is given.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{f'`{setting}` ' if setting else ''}{path}: its name must end in {SUFFIX}")


def read_contents(path: str | Path) -> Contents:
    """Read a saved memory.

    Raises:
        UserError: the file is missing, damaged, or no memory that this version reads.
    """
    try:
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read it as a saved memory: {error}") from error
    if metadata.get("format") != MEMORY_FORMAT:
        raise UserError(f"{path}: not a saved memory; make one with ask `save_memory`, or memory add")
    version = metadata.get("format_version")
    if version not in READABLE_MEMORY_VERSIONS:
        raise UserError(
            f"{path}: a saved memory of format {version}, this version reads {' and '.join(READABLE_MEMORY_VERSIONS)}; "
            "make it again from its texts: ask `memory` TEXTS.txt `save_memory` FILE"
        )
    texts, embeddings = _texts(metadata.get("texts", "")), found.get("embeddings")
    if texts is None or embeddings is None or not _is_finite_float32(embeddings, (len(texts), None)):
        number = 0 if texts is None else len(texts)
        raise UserError(f"{path}: damaged: expected {number} texts and finite F32 embeddings of shape ({number}, E)")
    episodes = _episodes(metadata, found, str(path), embeddings.shape[1])
    return Contents(texts=texts, embeddings=embeddings, encoder=metadata.get("encoder", ""), episodes=episodes)


def write_contents(path: Path, contents: Contents) -> None:
    """Write a file of the newest format, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    metadata = {
        "format": MEMORY_FORMAT,
        "format_version": MEMORY_FORMAT_VERSION,
        "encoder": contents.encoder,
        "texts": json.dumps(contents.texts, ensure_ascii=False),
    }
    tensors = {"embeddings": contents.embeddings}
    episodes = contents.episodes
    if episodes is not None:
        metadata["observer"] = episodes.observer
        entries = [entry.to_dict() for entry in episodes.entries]
        metadata["episodes"] = json.dumps(entries, ensure_ascii=False)
        tensors |= {name: getattr(episodes, field) for field, name in _EPISODE_TENSORS.items()}
    write_safetensors(path, tensors, metadata)


def _episodes(metadata: Mapping[str, str], found: Mapping[str, Tensor], path: str, width: int) -> Episodes | None:
    """The episodes of a file with text embeddings of `width`."""
    said = metadata.get("episodes")
    if said is None and not any(name in found for name in _EPISODE_TENSORS.values()):
        return None
    entries = _entries(said or "")
    tensors = {field: found.get(name) for field, name in _EPISODE_TENSORS.items()}
    number = 0 if entries is None else len(entries)
    shapes = {"seen": (number, None), "questions": (number, width), "answers": (number, width)}
    whole = {
        field: tensor
        for field, tensor in tensors.items()
        if tensor is not None and _is_finite_float32(tensor, shapes[field])
    }
    if not entries or len(whole) < len(tensors) or "observer" not in metadata:
        raise UserError(
            f"{path}: damaged: expected {number} episodes with an observer, and finite F32 "
            f"{', '.join(_EPISODE_TENSORS.values())} with a row for each"
        )
    return Episodes(entries=tuple(entries), observer=metadata["observer"], **whole)


def _is_finite_float32(tensor: Tensor, shape: tuple[int, int | None]) -> bool:
    """`shape`: None is any width."""
    is_shaped = tensor.ndim == 2 and len(tensor) == shape[0] and shape[1] in (None, tensor.shape[1])
    return tensor.dtype == torch.float32 and is_shaped and bool(tensor.isfinite().all())


def _texts(value: str) -> list[str] | None:
    """The texts of a JSON list; None where it is no such list."""
    texts = _json_list(value)
    return texts if texts is not None and all(isinstance(text, str) for text in texts) else None


def _entries(value: str) -> list[Episode] | None:
    """The episodes of a JSON list; None where it is no such list."""
    try:
        return [Episode.from_dict(each) for each in _json_list(value) or []]
    except ValueError:
        return None


def _json_list(value: str) -> list[Any] | None:
    """None where it is no list."""
    try:
        found = from_json(value)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None
