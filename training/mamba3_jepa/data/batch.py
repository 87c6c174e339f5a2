"""A batch: samples decoded, cropped and tokenised.

Pixels cross process boundaries as uint8 and are normalised on the device that uses them.

Shapes: B samples, Bi of them with image, P different pictures, M hard negatives, S pixels, Lq, La and Ln tokens of the
longest query, target and hard negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mamba3_jepa.config import ModelConfig
from mamba3_jepa.data.augment import shift
from mamba3_jepa.data.hard_negatives import Negative, drawn
from mamba3_jepa.data.images import BadSampleError, NotReadNowError, normalize, to_pixels
from mamba3_jepa.data.question_type import asked_type
from mamba3_jepa.data.sample import OnBadSample, Source
from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.data.tokenizer import EncodedTexts, TextTokenizer
from mamba3_jepa.errors import UserError


@dataclass(kw_only=True)
class Batch:
    """One rank's share of one global batch. It can be empty (B = 0), see `build_loader`.

    pixels: (P, 3, S, S) uint8, each picture once; picture: (Bi,) int64, which of them each sample with image sees.
    has_image: (B,) bool.
    query_ids, query_mask: (B, Lq) int64 and bool; target_ids, target_mask: (B, La).
    target_hash: (B,) int64, equal for target texts that are equal in the tokens that are read of them.
    has_target: (B,) bool; False only where `build_loader` was told that targets are not needed. The target of
        such a sample is the empty text.
    index: (B,) int64, the samples' indices in the source.
    questions, targets: the texts; None for the question of an image-text pair, of which the query prompt was encoded.
    types: what is asked, see `question_type.asked_type`; None likewise.
    n_truncated: how many of the 2B + M texts were cut to the token limit.
    bad: what was wrong with each sample that was left out; not_read: indices of those of them of which only is known
        that the system did not give their file.
    negative_ids, negative_mask: (M, Ln), the hard negatives as the targets are; negative_hash: (M,), as `target_hash`.
    negative_of: (M,) int64, of which of the B samples each is a hard negative; negative_kinds: their M kinds.
    looked: (P, Nv, D) bfloat16, the pictures' visual tokens where those are kept; pixels are then (0, 3, S, S).
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
    types: list[str | None]
    targets: list[str]
    n_truncated: int
    bad: list[str]
    not_read: list[int] = dataclasses.field(default_factory=list)
    negative_ids: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    negative_mask: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))
    negative_hash: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    negative_of: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    negative_kinds: list[str] = dataclasses.field(default_factory=list)
    looked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What `Network.forward` takes: normalised pixels, has_image, query_ids, query_mask, picture, looked."""
        return normalize(self.pixels), self.has_image, self.query_ids, self.query_mask, self.picture, self.looked

    def texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The targets and behind them the hard negatives, as `YEncoder.forward_distinct` takes them: ids and mask
        (B + M, L), keys (B + M,)."""
        if not len(self.negative_ids):
            return self.target_ids, self.target_mask, self.target_hash
        length = max(self.target_ids.shape[1], self.negative_ids.shape[1])
        ids, mask = (
            torch.cat([F.pad(part, (0, length - part.shape[1])) for part in parts])
            for parts in ((self.target_ids, self.negative_ids), (self.target_mask, self.negative_mask))
        )
        return ids, mask, torch.cat([self.target_hash, self.negative_hash])

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


def target_keys(tokenizer: TextTokenizer, encoded: EncodedTexts) -> list[int]:
    """`target_hash` of what a model reads of each text: texts that are cut to the same tokens are the same to it."""
    return [target_hash(tokenizer.decode(ids[mask])) for ids, mask in zip(encoded.ids, encoded.mask, strict=True)]


class Looked(Protocol):
    """Visual tokens of the pictures of a source, kept from before; cheap to pickle into worker processes."""

    def picture(self, i: int) -> int:
        """The number of the picture of sample i, which has one. Raises `BadSampleError` if it could not be read."""
        ...

    def tokens(self, pictures: Sequence[int]) -> Tensor:
        """(P, Nv, D) of some pictures by number, on the CPU."""
        ...


@dataclass(frozen=True)
class Failure:
    """A user's error on its way out of a worker, whose exceptions would arrive wrapped in a traceback."""

    message: str


class BatchMaker(Dataset["Batch | Failure"]):
    """Turns an epoch and the indices of one of its batches into the batch.

    hard_negatives: how many of its negatives a sample brings along, drawn anew in each epoch; None: all.
    looked: visual tokens that are kept, in place of pictures that are decoded.
    sign_of_life: called before each sample, if there is one.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: TextTokenizer,
        config: ModelConfig,
        on_bad_sample: OnBadSample,
        demand_target: bool,
        *,
        image_shift: int,
        draw_captions: bool,
        hard_negatives: int | None,
        seed: int,
        looked: Looked | None = None,
    ) -> None:
        self._source, self._tokenizer, self._config = source, tokenizer, config
        self._skip_bad, self._demand_target = on_bad_sample == "skip", demand_target
        self._image_shift, self._draw_captions, self._seed = image_shift, draw_captions, seed
        self._hard_negatives, self._looked = hard_negatives, looked
        self.sign_of_life: Callable[[], None] | None = None

    def __getitem__(self, asked: tuple[int, list[int]]) -> Batch | Failure:
        try:
            return self._make(*asked)
        except UserError as error:
            return Failure(str(error))

    def _make(self, epoch: int, indices: list[int]) -> Batch:
        config, size = self._config, self._config.vision.image_size
        kept: list[int] = []
        pictures: _Pictures | _LookedAt = _Pictures(size) if self._looked is None else _LookedAt(self._looked, size)
        has_image: list[bool] = []
        questions: list[str | None] = []
        types: list[str | None] = []
        targets: list[str] = []
        has_target: list[bool] = []
        wrong: list[tuple[int, Negative]] = []
        bad: list[str] = []
        not_read: list[int] = []
        for i in indices:
            if self.sign_of_life is not None:
                self.sign_of_life()
            try:
                sample = self._source.sample(i)
                if sample.target is None and self._demand_target:
                    raise ValueError(f"sample {i} of {self._source.name} has no target")
                if sample.image is not None:
                    pictures.add(i, sample.image, sample.picture if not self._image_shift else None)
            except BadSampleError as error:
                if not self._skip_bad:
                    raise
                bad.append(str(error))
                if isinstance(error, NotReadNowError):
                    not_read.append(i)
                continue
            wrong += [(len(kept), each) for each in drawn(sample.negatives, self._hard_negatives, self._seed, epoch, i)]
            kept.append(i)
            has_image.append(sample.image is not None)
            questions.append(sample.question)
            types.append(asked_type(sample))
            target = sample.target_in(epoch, index=i, seed=self._seed) if self._draw_captions else sample.target
            targets.append(target or "")
            has_target.append(sample.target is not None)
        pixels, index = pictures.pixels(), torch.tensor(kept, dtype=torch.int64)
        seeing = torch.tensor(has_image, dtype=torch.bool)
        if self._image_shift:  # every sample has a picture of its own then
            pixels = shift(pixels, index[seeing], self._image_shift, self._seed, epoch)
        queries = [config.query_prompt if question is None else question for question in questions]
        encoded = self._tokenizer.encode(queries, config.max_query_tokens)
        answers = self._tokenizer.encode(targets, config.max_answer_tokens)
        negatives = self._tokenizer.encode([each.text for _, each in wrong], config.max_answer_tokens)
        return Batch(
            pixels=pixels,
            picture=torch.tensor(pictures.seen, dtype=torch.int64),
            has_image=seeing,
            query_ids=encoded.ids,
            query_mask=encoded.mask,
            target_ids=answers.ids,
            target_mask=answers.mask,
            target_hash=torch.tensor(target_keys(self._tokenizer, answers), dtype=torch.int64),
            has_target=torch.tensor(has_target, dtype=torch.bool),
            index=index,
            questions=questions,
            types=types,
            targets=targets,
            n_truncated=encoded.n_truncated + answers.n_truncated + negatives.n_truncated,
            bad=bad,
            not_read=not_read,
            negative_ids=negatives.ids,
            negative_mask=negatives.mask,
            negative_hash=torch.tensor(target_keys(self._tokenizer, negatives), dtype=torch.int64),
            negative_of=torch.tensor([row for row, _ in wrong], dtype=torch.int64),
            negative_kinds=[each.kind for _, each in wrong],
            looked=pictures.tokens(),
        )


class _Pictures:
    """The different pictures of one batch, each decoded once. seen: for each image added, the number of its picture."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pixels: list[Tensor] = []
        self._numbers: dict[str, int] = {}
        self.seen: list[int] = []

    def add(self, i: int, load: Callable[[], Image.Image], picture: str | None) -> None:
        """That of sample i; `picture` tells it from others; None for one that is like no other."""
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

    def tokens(self) -> None:
        """They are for the X-Encoder to find."""
        return None


class _LookedAt:
    """`_Pictures` whose visual tokens are kept."""

    def __init__(self, looked: Looked, size: int) -> None:
        self._looked, self._size = looked, size
        self._numbers: dict[int, int] = {}
        self.seen: list[int] = []

    def add(self, i: int, load: Callable[[], Image.Image], picture: str | None) -> None:
        """That of sample i, which is not loaded, unless it could not be: that says what is wrong with it."""
        try:
            number = self._looked.picture(i)
        except BadSampleError:
            to_pixels(load(), self._size)
            raise
        self.seen.append(self._numbers.setdefault(number, len(self._numbers)))

    def pixels(self) -> Tensor:
        """None of them: (0, 3, S, S) uint8."""
        return torch.empty(0, 3, self._size, self._size, dtype=torch.uint8)

    def tokens(self) -> Tensor:
        """(P, Nv, D)."""
        return self._looked.tokens(list(self._numbers))
