"""Phase 1's loss over the batches of all ranks, in pieces: `losses.info_nce` without the memory of all scores.

Every rank scores its own samples against those of all, some rows at a time, once for the loss and once more for the
gradient (as FlashAttention does, Dao et al. 2022, arXiv 2205.14135). The ranks tell each other their embeddings and,
for each row, the logarithm of its sum; from these each has the whole gradient of its own embeddings, and none of the
others'. So no rank holds more than one piece of scores and the gradient of its own embeddings beside the embeddings.

Letters: B own samples, G samples of all ranks, M own hard negatives, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba3_jepa.models.losses import InfoNce

# What own rows (N, ...) become: those of all ranks, in rank order, and where the own ones begin; of each tensor.
Gather = Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]

_NONE = (None, None, None)  # the gradients of keys and `gather`
_PIECE = 2**22  # scores at a time: four such buffers are 64 MiB in float32


def alone(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """`Gather` where there are no other ranks."""
    return tensors, (0,) * len(tensors)


def info_nce_in_pieces(
    predicted: Tensor,
    target: Tensor,
    text_key: Tensor,
    temperature: Tensor,
    hard: Tensor | None = None,
    hard_key: Tensor | None = None,
    gather: Gather = alone,
) -> InfoNce:
    """This rank's share of `losses.info_nce` over all ranks; every rank must call it.

    The sum of the shares over the ranks is the loss, and so is that of the accuracies; `negatives` is everybody's. The
    gradient of the embeddings is that of the whole loss, that of the temperature is a share again. Alone it is all of
    it, equal to `losses.info_nce` up to rounding.

    Args:
        predicted, target: (B, E) L2-normalised embeddings of the own samples.
        text_key: (B,) integers, equal where the target texts are identical.
        temperature: scalar > 0 that divides the cosine similarities.
        hard, hard_key: (M, E) and (M,), the same of the own hard negatives.
        gather: gives the rows of all ranks.
    """
    if hard is None or hard_key is None:
        hard, hard_key = predicted[:0], text_key[:0]
    wide = torch.promote_types(predicted.dtype, torch.float32)  # the logits decide everything: never 16 bits
    embeddings = (each.to(wide) for each in (predicted, target, hard))
    return InfoNce(*_InfoNce.apply(*embeddings, temperature, text_key, hard_key, gather))


class _InfoNce(torch.autograd.Function):
    """Loss, accuracy and negatives, see `info_nce_in_pieces`."""

    @staticmethod
    def forward(
        ctx: Any,
        predicted: Tensor,
        target: Tensor,
        hard: Tensor,
        temperature: Tensor,
        key: Tensor,
        hard_key: Tensor,
        gather: Gather,
    ) -> tuple[Tensor, Tensor, Tensor]:
        everyone, (first, *_) = gather(predicted, target, key, hard, hard_key)
        all_predicted, all_target, all_key, all_hard, all_hard_key = everyone
        n_global = max(1, len(all_key))
        to_text, to_image = predicted.new_empty(len(key)), predicted.new_empty(len(key))
        total, right = predicted.new_zeros(()), predicted.new_zeros(())
        for rows in _pieces(len(key), len(all_key) + len(all_hard_key)):
            at = first + rows.start
            logits = _logits(predicted[rows], all_target, temperature)
            positive = logits.diagonal(at).clone()
            logits.masked_fill_(_same_text(key[rows], all_key, at), -torch.inf)
            highest, place = logits.max(dim=1)
            to_text[rows] = logits.logsumexp(dim=1)
            if len(all_hard):
                logits = _logits(predicted[rows], all_hard, temperature)
                logits.masked_fill_(_same_text(key[rows], all_hard_key), -torch.inf)
                place.masked_fill_(logits.amax(dim=1) > highest, -1)
                to_text[rows] = torch.logaddexp(to_text[rows], logits.logsumexp(dim=1))
            logits = _logits(target[rows], all_predicted, temperature)
            logits.masked_fill_(_same_text(key[rows], all_key, at), -torch.inf)
            to_image[rows] = logits.logsumexp(dim=1)
            total += (to_text[rows] + to_image[rows] - 2 * positive).sum()
            right += (place == torch.arange(at, at + len(place), device=place.device)).sum()
        (all_to_text, all_to_image), _ = gather(to_text, to_image)
        ctx.save_for_backward(predicted, target, hard, temperature, key, hard_key, *everyone, all_to_text, all_to_image)
        ctx.first = first
        accuracy = right / n_global
        negatives = _n_negatives(all_key, all_hard_key).to(predicted.dtype) / n_global
        ctx.mark_non_differentiable(accuracy, negatives)
        return total / (2 * n_global), accuracy, negatives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        predicted, target, hard, temperature, key, hard_key, *everyone = ctx.saved_tensors
        all_predicted, all_target, all_key, all_hard, all_hard_key, to_text, to_image = everyone
        own = slice(ctx.first, ctx.first + len(key))
        images = _Rows(predicted, key, to_text[own], temperature)
        images.add(all_target, all_key, to_image, ctx.first)
        images.add(all_hard, all_hard_key, None)
        texts = _Rows(target, key, to_image[own], temperature)
        texts.add(all_predicted, all_key, to_text, ctx.first)
        wrong = _Rows(hard, hard_key, None, temperature)
        wrong.add(all_predicted, all_key, to_text)
        scale = grad_loss / (2 * max(1, len(all_key))) / temperature
        of_temperature = (-scale * images.weighted).to(temperature.dtype)  # the images' rows have every score
        return images.pulled.mul_(scale), texts.pulled.mul_(scale), wrong.pulled.mul_(scale), of_temperature, *_NONE


class _Rows:
    """Own rows (N, E) and their gradient, 2 G times the temperature as large.

    Attributes:
        pulled: (N, E), the gradient.
        weighted: the sum of their scores, each times its gradient.
    """

    def __init__(self, rows: Tensor, key: Tensor, sums: Tensor | None, temperature: Tensor) -> None:
        """sums: (N,), the logarithms of what each row's scores add up to; None for hard negatives, which are no rows
        of the loss."""
        self._rows, self._key, self._sums, self._temperature = rows, key, sums, temperature
        self.pulled, self.weighted = torch.zeros_like(rows), rows.new_zeros(())

    def add(self, columns: Tensor, key: Tensor, sums: Tensor | None, first: int | None = None) -> None:
        """What comes of the scores with columns (K, E).

        Args:
            key: (K,), of the columns' texts.
            sums: (K,), as those of the rows, where the columns are rows of the other direction.
            first: the column of the first row's positive; None where there is none.
        """
        for piece in _pieces(len(self._rows), len(columns)):
            at = None if first is None else first + piece.start
            logits = _logits(self._rows[piece], columns, self._temperature)
            weights = torch.zeros_like(logits)
            if self._sums is not None:
                weights += (logits - self._sums[piece, None]).exp_()
            if sums is not None:
                weights += (logits - sums).exp_()
            weights.masked_fill_(_same_text(self._key[piece], key, at), 0)
            if at is not None:
                weights.diagonal(at).sub_(2)
            with torch.autocast(columns.device.type, enabled=False):
                self.pulled[piece].addmm_(weights, columns)
            self.weighted += logits.mul_(weights).sum()


def _pieces(n_rows: int, n_columns: int) -> Iterator[slice]:
    """The rows, so many at a time that their scores fit the memory of one piece; none if there are no columns."""
    if not n_columns:
        return iter(())
    size = max(1, _PIECE // n_columns)
    return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))


def _logits(rows: Tensor, columns: Tensor, temperature: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ columns.T).div_(temperature)


def _same_text(row_key: Tensor, column_key: Tensor, first: int | None = None) -> Tensor:
    """(N, K) bool: which columns are neither positive nor negative of a row, whose positive begins at `first`."""
    same = row_key[:, None] == column_key[None, :]
    if first is not None:
        same.diagonal(first).fill_(False)
    return same


def _n_negatives(key: Tensor, hard_key: Tensor) -> Tensor:
    """How many negatives all rows have together."""
    _, counts = key.unique(return_counts=True)
    negatives = len(key) * len(key) - counts.square().sum()
    if not len(hard_key):
        return negatives
    number = torch.cat([key, hard_key]).unique(return_inverse=True)[1]
    of_text = torch.bincount(number[: len(key)], minlength=len(number))
    return negatives + (len(key) - of_text[number[len(key) :]]).sum()
