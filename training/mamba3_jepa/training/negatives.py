"""A contrast without negatives teaches nothing, and its loss of 0 looks like success: that is said aloud."""

from __future__ import annotations

import logging

from torch import Tensor

from mamba3_jepa.data.batch import target_keys
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.sources import DataSplits
from mamba3_jepa.data.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_IN_A_ROW = 20  # steps without negatives, after which it is said before the epoch ends


def warn_without_negatives(
    data: DataSplits, tokenizer: TextTokenizer, max_tokens: int, global_batch: int, hard_negatives: int
) -> None:
    """Say so before the first step where no batch can have negatives: batches of one, or one text for all samples.

    Decodes no image, and reads samples only until two of them say different things, or one has hard negatives.
    """
    if global_batch == 1:
        if not hard_negatives or not _any_hard(data):
            logger.warning(
                "a batch of 1 has no negatives: the contrast's loss is 0 and nothing is learned; give a larger "
                "`batch_size` or `contrast_batch` (`grad_accum` adds none), or samples with `negatives` of their own"
            )
        return
    text = _only_text(data, tokenizer, max_tokens)
    if text is not None and not (hard_negatives and _any_hard(data)):
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        logger.warning(
            "%s: all %d training samples have the same text, %r, in the %d tokens that are read: no batch has "
            "negatives, the contrast's loss is 0 and nothing is learned; give texts that tell the images apart",
            data.train.name, len(data.train_indices), shown, max_tokens,
        )  # fmt: skip


def _any_hard(data: DataSplits) -> bool:
    for i in data.train_indices:
        try:
            if data.train.sample(int(i)).negatives:
                return True
        except BadSampleError:
            continue
    return False


def _only_text(data: DataSplits, tokenizer: TextTokenizer, max_tokens: int) -> str | None:
    """The one text, or None if there are several, or none."""
    first: tuple[str, int] | None = None
    for i in data.train_indices:
        try:
            texts = data.train.sample(int(i)).targets
        except BadSampleError:
            continue
        for text, key in zip(texts, target_keys(tokenizer, tokenizer.encode(texts, max_tokens)), strict=True):
            if first is None:
                first = text, key
            elif first[1] != key:
                return None
    return None if first is None else first[0]


class NegativesWatch:
    """Counts an epoch's batches that had no negatives."""

    def __init__(self) -> None:
        self._batches = self._alone = self._in_a_row = 0

    def see(self, negatives: Tensor) -> None:
        """`negatives`: how many a sample of the last batch had on average; says it when there is none for long."""
        alone = not bool(negatives)
        self._batches += 1
        self._alone += alone
        self._in_a_row = self._in_a_row + 1 if alone else 0
        if self._in_a_row == _IN_A_ROW:
            logger.warning(
                "the last %d batches had one text each, so no negatives: nothing was learned from them; give a larger "
                "`batch_size` or `contrast_batch`, or texts that tell the images apart",
                _IN_A_ROW,
            )

    def end_epoch(self, epoch: int) -> None:
        """Say how many there were, and count anew."""
        if self._alone:
            logger.warning(
                "epoch %d: %d of %d batches had one text each, so no negatives: nothing was learned from them",
                epoch + 1, self._alone, self._batches,
            )  # fmt: skip
        self._batches = self._alone = self._in_a_row = 0
