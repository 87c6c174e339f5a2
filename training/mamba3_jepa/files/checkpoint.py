"""Checkpoints: one self-contained file, written whole or not at all, read without unpickling code.

A checkpoint holds the weights (the frozen X-Encoder included, so that the file alone is enough), the model
configuration, the tokenizer, where the data came from, the validation metrics, the settings of the run, and, in
`phaseN_last.pt`, everything the loop needs to continue bit for bit.
"""

from __future__ import annotations

import errno
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

from mamba3_jepa.config import NO_FLOOR, ModelConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.path_text import utf8_name
from mamba3_jepa.files.whole_file import whole_file

FORMAT_VERSION = 1
_REQUIRED = ("format_version", "phase", "config", "model", "tokenizer", "data", "metrics", "run", "trainer")
_TYPES = {"phase": int, "config": dict, "model": dict, "tokenizer": str, "data": dict, "metrics": dict, "run": dict}


@pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DataRecord:
    """Where the data of a phase came from.

    Attributes:
        source: the data's name; synthetic: whether nothing of it is real.
        train_samples, val_samples: how many of each there were.
        fingerprint: changes when the data does, as far as names and the lines of a manifest tell.
        content: digests of what is learnt from the data (`data.content.SplitContent`); empty where it is made up,
            and in older files.
        seen: the sketch of the training samples' keys (`data.content.sketch`); empty where `content` is.
        answers: the most frequent answers, or captions where there are no questions, most frequent first.
        confusion: training samples of each kind of confusion, in phase 3.
        earlier: what the phase before was trained on; its answers are not repeated.
    """

    source: str | None = None
    synthetic: bool | None = None
    train_samples: int | None = None
    val_samples: int | None = None
    fingerprint: str | None = None
    content: dict[str, list[str]] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    confusion: dict[str, int] = field(default_factory=dict)
    earlier: DataRecord | None = None

    def without_answers(self) -> DataRecord:
        """A copy without `answers`."""
        return replace(self, answers=[])

    def in_short(self) -> DataRecord:
        """A copy to be read by people: without what only the next run compares."""
        earlier = None if self.earlier is None else self.earlier.in_short()
        return replace(self, content={}, seen=[], earlier=earlier)

    def of_phases(self, phase: int) -> Iterator[tuple[int, DataRecord]]:
        """This record, which is of `phase`, and those of the phases before, with the numbers of their phases."""
        record: DataRecord | None = self
        while record is not None:
            yield phase, record
            phase, record = phase - 1, record.earlier

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; what is not known is left out."""
        values = {name: value for name, value in vars(self).items() if value not in (None, [], {})}
        return values | ({} if self.earlier is None else {"earlier": self.earlier.to_dict()})

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str) -> DataRecord:
        """The inverse of `to_dict`; `source` names the file in messages.

        Raises:
            UserError: a field is unknown, or has the wrong type.
        """
        try:
            return _DATA_RECORD.validate_python(_with_earlier(values))
        except ValidationError as error:
            field_name = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(f"{source} is damaged: its data: {field_name}: {error.errors()[0]['msg']}") from error


_DATA_RECORD = TypeAdapter(DataRecord)


def _with_earlier(values: Mapping[str, Any]) -> dict[str, Any]:
    """Phase 2 once called `earlier` "phase1"."""
    renamed = {"earlier" if name == "phase1" else name: value for name, value in values.items()}
    if isinstance(earlier := renamed.get("earlier"), Mapping):
        renamed["earlier"] = _with_earlier(earlier)
    return renamed


@dataclass(kw_only=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        phase: 1, 2 or 3: the last phase that trained these weights.
        config: shape and meaning of the weights.
        model: state dict of `Mamba3Jepa`.
        tokenizer: the tokenizer as JSON.
        data: where the training data came from.
        metrics: validation metrics at the moment of saving.
        temperature: what phase 1 has learned to divide cosines by, before a softmax over texts; None in older files.
        run: settings of the run that wrote the file.
        trainer: state of the training loop (optimizer, step, data position, RNG), or None when only the weights
            were kept.
    """

    phase: int
    config: ModelConfig
    model: dict[str, Tensor]
    tokenizer: str
    data: DataRecord = field(default_factory=DataRecord)
    metrics: dict[str, float] = field(default_factory=dict)
    temperature: float | None = None
    run: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] | None = None


def save_checkpoint(path: Path, checkpoint: Checkpoint, given_up: Callable[[], bool] | None = None) -> None:
    """Write `checkpoint` to `path` through `whole_file`.

    Args:
        given_up: asked between two tensors whether to leave what was at `path`.

    Raises:
        UserError: the file cannot be written (disk full, no permission) or was given up; what was at `path` is
            unchanged.
    """
    values: dict[str, Any] = {name: getattr(checkpoint, name) for name in _REQUIRED[1:] if name != "config"}
    values["format_version"] = FORMAT_VERSION
    values["config"], values["data"] = checkpoint.config.to_dict(), checkpoint.data.to_dict()
    values["temperature"] = checkpoint.temperature
    try:
        with whole_file(path) as file:
            torch.save(values, file if given_up is None else cast(BinaryIO, _Abandonable(file, given_up)))
    except (UserError, RuntimeError) as error:
        raise UserError(
            f"could not write checkpoint {path}: {_write_failure(error)}. "
            "Whatever was there before is unchanged; free some space or choose another `output_dir`."
        ) from error


class _Abandonable:
    """A file that is not written to any more when that has been given up."""

    def __init__(self, file: BinaryIO, given_up: Callable[[], bool]) -> None:
        self._file, self._given_up = file, given_up
        self.flush = file.flush

    def write(self, content: bytes | memoryview) -> int:
        """As of any file."""
        if self._given_up():
            raise InterruptedError(errno.EINTR, "interrupted")
        return self._file.write(content)


def load_checkpoint(path: str | Path, phase: int | tuple[int, ...] | None = None) -> Checkpoint:
    """Read and check a checkpoint.

    Args:
        path: the `.pt` file.
        phase: the phase, or phases, that are acceptable here; None for any.

    Raises:
        UserError: the file is missing, damaged, not one of ours, or of another phase; names the file and what was
            expected.
    """
    path = Path(path)
    values = _read(path)
    if not isinstance(values, dict) or not set(_REQUIRED) <= set(values):
        missing = sorted(set(_REQUIRED) - set(values)) if isinstance(values, dict) else list(_REQUIRED)
        raise UserError(
            f"{path} is not a Mamba3-JEPA checkpoint: it lacks {', '.join(missing)}. "
            "Expected a file written by train_jepa.py, train_decoder.py or train_agent.py."
        )
    if values["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {values['format_version']}; this version reads format {FORMAT_VERSION}"
        )
    accepted = (phase,) if isinstance(phase, int) else phase
    if accepted is not None and values["phase"] not in accepted:
        wanted = " or ".join(str(number) for number in accepted)
        raise UserError(f"{path} is a phase {values['phase']} checkpoint; phase {wanted} is needed here")
    for name, kind in _TYPES.items():
        if not isinstance(values[name], kind):
            raise UserError(f"{path} is damaged: its {name} is a {type(values[name]).__name__}, not a {kind.__name__}")
    config = ModelConfig.from_dict(values["config"], source=str(path))
    fields = {name: values[name] for name in _REQUIRED[1:] if name != "config"}
    fields["data"] = DataRecord.from_dict(values["data"], source=str(path))
    fields["temperature"] = _temperature(values, path)
    add_missing_floor(fields["model"])
    check_recursion_scalars(fields["model"], source=str(path))
    return Checkpoint(config=config, **fields)


def _temperature(values: dict[str, Any], path: Path) -> float | None:
    found = values.get("temperature")
    if found is None or (isinstance(found, float) and 0 < found < math.inf):
        return found
    raise UserError(f"{path} is damaged: its temperature is {found!r}, expected a finite number above 0")


def content_digest(path: Path) -> str | None:
    """Tells one checkpoint from another by the checksums of its parts, without reading them; None where there is no
    file, and for one that is no whole archive its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            return blake2b(repr([(entry.filename, entry.CRC) for entry in archive.infolist()]).encode()).hexdigest()
    except (OSError, zipfile.BadZipFile):
        return f"damaged, {path.stat().st_size} bytes" if path.is_file() else None


def add_missing_floor(state: dict[str, Tensor]) -> None:
    """Give a model's state with a recursion part from before there was a `memory_floor` the value it acts as."""
    if any(name.startswith("recursion.") for name in state):
        state.setdefault("recursion.memory_floor", torch.tensor(NO_FLOOR))


def check_recursion_scalars(state: dict[str, Tensor], source: str) -> None:
    """Demand that the numbers which decide about confusion are finite in float32, and the temperature above 0.

    Raises:
        UserError: one is not; names it and `source`.
    """
    for name in ("confusion_probe.temperature", "confusion_probe.threshold", "memory_floor", "episode_blend",
                 "episode_floor"):  # fmt: skip
        tensor = state.get(key := f"recursion.{name}")
        if tensor is None or tensor.ndim != 0:  # loading says so
            continue
        value, positive = float(tensor.float()), name.endswith("temperature")
        if not math.isfinite(value) or (positive and value <= 0):
            rule = "a finite number above 0" if positive else "a finite number"
            raise UserError(f"{source}: {key} is {value}, expected {rule}: the file is damaged, or its training failed")


def _read(path: Path) -> Any:
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}" + (": it is a directory" if os.path.isdir(path) else ""))
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare the checksums itself
        if damaged is not None:
            raise UserError(f"{path} is damaged: the checksum of its entry {damaged} is wrong")
        with utf8_name(path) as name:
            return torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is not a checkpoint, or was cut short ({path.stat().st_size} bytes): {_first_line(error)}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of ours: it holds more than tensors, numbers and texts; none of it was run"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error


def _write_failure(error: BaseException) -> str:
    """torch closes its archive on the way out of a failed write and reports that; the cause is behind it."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__context__
    return behind.strerror or str(behind) if isinstance(behind, OSError) else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
