"""What the frozen part of the model gives, computed once and reused over epochs and runs.

The phases after the first train small parts behind a frozen model, whose outputs are the same in every epoch.
They are computed here in one pass and kept on disk under a key of everything they depend on, in parts, so that an
interrupted pass goes on where it stopped.

Shapes: N samples, B rows of them, E embedding width, D width of the pooled state, La tokens of the longest target.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.left_out import LeftOut
from mamba3_jepa.data.sample import OnBadSample, Source
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.retrieval import distinct
from mamba3_jepa.files.folder_lock import FolderLock
from mamba3_jepa.models.network import eval_mode
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.training import Precision
from mamba3_jepa.training.frozen_key import of_outputs
from mamba3_jepa.training.frozen_parts import Pass, all_parts
from mamba3_jepa.training.frozen_store import Part, concatenate
from mamba3_jepa.training.precision import autocast

logger = logging.getLogger(__name__)

PART_SIZE = 2048  # samples in one file
_IN_MEMORY_BYTES = 1 << 30  # up to this size rows are read into memory; beyond it they stay memory-mapped


class Rows:
    """(N, W) float32 in consecutive pieces, which may be memory-mapped: picking rows reads those rows only."""

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        """`pieces`: (n_i, W) each; at least one."""
        size = sum(piece.numel() * piece.element_size() for piece in pieces)
        self._pieces = [torch.cat(list(pieces))] if size <= _IN_MEMORY_BYTES else list(pieces)
        self._ends = torch.tensor([len(piece) for piece in self._pieces]).cumsum(0)
        self.shape = (int(self._ends[-1]), self._pieces[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows (B,) int64 -> (B, W), a copy."""
        if len(self._pieces) == 1:
            return self._pieces[0][rows]
        picked = self._pieces[0].new_empty(len(rows), self.shape[1])
        piece_of_row = torch.bucketize(rows, self._ends, right=True)
        for piece in piece_of_row.unique().tolist():
            chosen = piece_of_row == piece
            start = int(self._ends[piece]) - len(self._pieces[piece])
            picked[chosen] = self._pieces[piece][rows[chosen] - start]
        return picked

    def tensor(self) -> Tensor:
        """All rows (N, W), in memory."""
        return self._pieces[0] if len(self._pieces) == 1 else torch.cat(self._pieces)


@dataclass(frozen=True, kw_only=True)
class OutputPart(Part):
    """Outputs of the whole frozen model; n samples.

    embedding (n, E), pooled (n, D), target_embedding (n, E) float32; has_target (n,) bool; target_ids int32, all
    samples' tokens in one row; target_lengths (n,) int64, how many each has.
    """

    embedding: Tensor
    pooled: Tensor
    has_target: Tensor
    target_embedding: Tensor
    target_ids: Tensor
    target_lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class FrozenOutputs:
    """What a frozen model made of N samples of one source, on the CPU, in the order they were asked for.

    index: (N,) int64, the samples' numbers in their source; bad samples are left out.
    embedding: (N, E) predicted embeddings of unit length; pooled: (N, D) the states they were read from.
    has_target: (N,) bool; target_embedding: (N, E), zeros where there is no target.
    target_ids: int32, the tokens of all targets, [bos] ... [eos] each, nothing where there is none; those of row r
        are `target_ids[target_offsets[r] : target_offsets[r + 1]]`.
    bad: what was wrong with each sample left out; n_truncated: texts that were cut to the token limit.
    held: keeps the folder they are read from, as long as they are there.
    """

    index: Tensor
    embedding: Rows
    pooled: Rows
    has_target: Tensor
    target_embedding: Rows
    target_ids: Tensor
    target_offsets: Tensor
    pad_id: int
    bad: list[str]
    n_truncated: int
    held: FolderLock | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def target_lengths(self) -> Tensor:
        """(N,) int64, tokens of each target with bos and eos."""
        return self.target_offsets.diff()

    def targets(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B,) -> token ids (B, La) int64 padded on the right, and which of them are valid (B, La)."""
        starts = self.target_offsets[rows]
        lengths = self.target_offsets[rows + 1] - starts
        positions = torch.arange(int(lengths.max()) if len(rows) else 0)
        mask = positions < lengths.unsqueeze(1)
        ids = torch.full(mask.shape, self.pad_id, dtype=torch.int64)
        ids[mask] = self.target_ids[(starts.unsqueeze(1) + positions)[mask]].long()
        return ids, mask


def frozen_outputs(
    model: Mamba3Jepa,
    source: Source,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    cache_dir: Path | None,
    batch_size: int,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
    precision: Precision = "fp32",
    try_again: bool = True,
) -> FrozenOutputs:
    """Predicted embeddings, pooled states and targets of some samples, from `cache_dir` as far as they are there.

    What is not there is computed on the model's device, with its weights as they are, and kept. Several processes
    share the work. Samples without target are welcome.

    Args:
        cache_dir: folder of all frozen outputs, one folder in it for each key; None keeps them in memory.
        batch_size: samples computed at once; results do not depend on it.
        workers: processes that decode images.
        try_again: samples that a pass before could not read, because the system did not give their files, are read if
            it does now. A run that is continued goes on with the samples it has.

    Raises:
        UserError: a sample is unreadable (with "skip" it is left out), none is left, or `cache_dir` is not writable.
        Interrupted: SIGTERM or Ctrl-C; complete parts are kept.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if not len(indices):
        raise UserError(f"{source.name}: there are no samples to compute")
    work = _Pass(model, source, batch_size, workers, on_bad_sample, precision, PART_SIZE)
    parts, store = all_parts(work, indices, cache_dir, try_again)
    outputs = _assemble(parts, model, source)
    return outputs if store is None else dataclasses.replace(outputs, held=store.held)


def _assemble(parts: list[OutputPart], model: Mamba3Jepa, source: Source) -> FrozenOutputs:
    lengths = concatenate(parts, "target_lengths")
    outputs = FrozenOutputs(
        index=concatenate(parts, "index"),
        embedding=Rows([part.embedding for part in parts]),
        pooled=Rows([part.pooled for part in parts]),
        has_target=concatenate(parts, "has_target"),
        target_embedding=Rows([part.target_embedding for part in parts]),
        target_ids=concatenate(parts, "target_ids"),
        target_offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        pad_id=model.tokenizer.pad_id,
        bad=[text for part in parts for text in part.bad],
        n_truncated=sum(part.n_truncated for part in parts),
    )
    LeftOut().say(source.name, outputs.bad)  # several samples may be made of one that is bad
    if outputs.n_truncated:
        logger.warning("%s: %d texts longer than the token limit were cut", source.name, outputs.n_truncated)
    if not len(outputs):
        raise UserError(f"{source.name}: not one of {len(outputs.bad)} samples could be read")
    return outputs


class _Pass(Pass[OutputPart]):
    """One pass of the whole frozen model."""

    kind, what, setting, depends_on = OutputPart, "frozen outputs", "cache_dir", of_outputs

    @torch.no_grad()
    def _compute(self, batch: Batch) -> OutputPart:
        model = self.model
        device = model.device
        on_device = batch.to(device)
        with eval_mode(model), autocast(device, self.precision):
            predicted = model(*on_device.inputs())
            labels, first = distinct(batch.targets)
            target = model.y_encoder(on_device.target_ids[first], on_device.target_mask[first])[labels]
        if not (predicted.embedding.isfinite().all() and predicted.pooled.isfinite().all()):
            raise UserError(
                "the frozen model's outputs are not finite: its checkpoint is damaged, or `precision` too coarse"
            )
        if model.angn is not None:
            model.angn.reset_context()  # its moving average is for inference
        mask = batch.target_mask & batch.has_target.unsqueeze(1)
        return OutputPart(
            index=batch.index,
            embedding=predicted.embedding.float().cpu(),
            pooled=predicted.pooled.float().cpu(),
            has_target=batch.has_target,
            target_embedding=torch.where(batch.has_target.unsqueeze(1), target.float().cpu(), 0.0),
            target_ids=batch.target_ids[mask].int(),
            target_lengths=mask.sum(dim=1),
            bad=batch.bad,
            not_read=batch.not_read,
            n_truncated=batch.n_truncated,
        )
