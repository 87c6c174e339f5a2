"""What a run was begun with, and whether a command that continues it is the same run.

What counts is what the run learns from: its settings, its model, its data, and how many samples make one step.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.checkpoint import Checkpoint, DataRecord
from mamba3_jepa.settings.training import TrainSettings

_SHARING = ("batch_size", "grad_accum", "contrast_batch")  # looked at together with the number of processes


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """path: the file that says it; processes: how many trained together."""

    path: Path
    settings: dict[str, Any]
    processes: int
    config: ModelConfig
    data: DataRecord

    @staticmethod
    def of_checkpoint(path: Path, checkpoint: Checkpoint) -> Beginning:
        """Of the run that wrote `checkpoint`, which can be continued."""
        return Beginning(
            path=path,
            settings=checkpoint.run,
            processes=len((checkpoint.trainer or {})["rng"]),
            config=checkpoint.config,
            data=checkpoint.data,
        )

    @staticmethod
    def of_config_file(path: Path, phase: int) -> Beginning | None:
        """Of a run that was left before its first save: from its config.json; None if that is not one of this phase."""
        try:
            values = json.loads(path.read_bytes())
            if values["phase"] != phase:
                return None
            return Beginning(
                path=path,
                settings=dict(values["settings"]),
                processes=int(values["processes"]),
                config=ModelConfig.from_dict(values["model"], source=str(path)),
                data=DataRecord.from_dict(values["data"], source=str(path)),
            )
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None

    def demand_same_settings(self, settings: TrainSettings, processes: int) -> None:
        """Refuse settings with which another run would go on.

        Raises:
            UserError: names what differs, and what to give instead.
        """
        theirs = type(settings)().to_dict() | settings.BEFORE | self.settings  # an older run lacks newer settings
        self._demand_equal(theirs, settings, settings.to_dict().keys() - settings.FREE_ON_RESUME - {*_SHARING})
        self._demand_same_step(theirs, settings, processes)
        if theirs.get("shard_window") is not None and self.processes != processes:
            raise UserError(
                f"cannot resume {self.path}: with `shard_window` each process reads shards of its own, and there were "
                f"{self.processes} processes, not {processes}: use as many, or choose another `output_dir`"
            )
        if not settings.ACCUMULATES:
            self._demand_equal(theirs, settings, {"grad_accum"})

    def _demand_equal(self, theirs: dict[str, Any], settings: TrainSettings, names: Set[str]) -> None:
        changed = [
            f"`{name}` {theirs.get(name)} -> {value}"
            for name, value in settings.to_dict().items()
            if name in names and not _is_same(settings, name, theirs.get(name), value)
        ]
        if changed:
            raise UserError(
                f"cannot resume {self.path}: the settings differ ({'; '.join(changed)}). "
                "Resume with the settings of the first run, or choose another `output_dir`."
            )

    def _demand_same_step(self, theirs: dict[str, Any], settings: TrainSettings, processes: int) -> None:
        """The samples of a step may be shared by other processes and, where accumulation is the same as a larger batch,
        by other micro-batches, as may those of one contrast; how many there are may not change."""
        before = _Step.of(theirs, self.processes, settings.ACCUMULATES)
        now = _Step.of(settings.to_dict(), processes, settings.ACCUMULATES)
        if before.samples == now.samples:
            return
        batch_size, rest = divmod(before.samples, now.shares)
        shares = "processes x `grad_accum`" if settings.ACCUMULATES else "a number of processes"
        cure = f"choose {shares} to divide {before.samples}" if rest else f"give `batch_size` {batch_size}"
        if before.contrast_batch or now.contrast_batch:
            cure = f"give `contrast_batch` {before.samples}"
        raise UserError(
            f"cannot resume {self.path}: the global batch was {before.samples} samples ({before}) and would now be "
            f"{now.samples} ({now}): {cure}, or choose another `output_dir`"
        )


def _is_same(settings: TrainSettings, name: str, before: Any, now: Any) -> bool:
    return (before is None) == (now is None) if name in settings.PLACES else before == now


@dataclass(frozen=True)
class _Step:
    """How the samples that are learned from together are shared."""

    batch_size: int
    grad_accum: int
    processes: int
    accumulates: bool
    contrast_batch: int | None

    @staticmethod
    def of(settings: dict[str, Any], processes: int, accumulates: bool) -> _Step:
        return _Step(
            settings["batch_size"] or 1, settings["grad_accum"], processes, accumulates, settings.get("contrast_batch")
        )

    @property
    def shares(self) -> int:
        return self.processes * (self.grad_accum if self.accumulates else 1)

    @property
    def samples(self) -> int:
        return self.contrast_batch or self.batch_size * self.shares

    def __str__(self) -> str:
        if self.contrast_batch:
            return f"`contrast_batch` {self.contrast_batch}"
        accumulated = f", `grad_accum` {self.grad_accum}," if self.accumulates and self.grad_accum > 1 else ""
        where = "1 process" if self.processes == 1 else f"each of {self.processes} processes"
        return f"`batch_size` {self.batch_size}{accumulated} on {where}"
