"""Text to token ids and back: byte-level BPE with pad, bos and eos.

Shapes: B texts, L the longest of them in tokens, bos and eos included.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mamba3_jepa.errors import UserError
from mamba3_jepa.files.encodings import read_text_file

# `train` writes the first name of each; the others let tokenizers of other projects be used as they are. Where there is
# none, eos stands in for pad, which is masked wherever it stands, and for bos, which only has to be the same each time.
_SPECIAL_NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD_TOKEN>"),
    "bos": (
        *("<bos>", "<s>", "[BOS]", "[CLS]", "<|bos|>", "<|startoftext|>", "<|begin_of_text|>"),
        *("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<BOS_TOKEN>"),
    ),
    "eos": (
        *("<eos>", "</s>", "[EOS]", "[SEP]", "<|eos|>", "<|endoftext|>", "<|end_of_text|>"),
        *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOS_TOKEN>", "<|im_end|>"),
    ),
}
MIN_VOCAB_SIZE = 256 + len(_SPECIAL_NAMES)  # every byte has a token, so no text is unknown


class EncodedTexts(NamedTuple):
    """A batch of token sequences, padded on the right.

    ids: (B, L) int64, `pad_id` after the end; mask: (B, L) bool, True on valid tokens;
    n_truncated: how many of the texts were longer than the limit.
    """

    ids: Tensor
    mask: Tensor
    n_truncated: int


class TextTokenizer:
    """A `tokenizers.Tokenizer` with known pad, bos and eos; every encoded text is `[bos] ... [eos]`.

    One token may be several of them: GPT-2 and GPT-NeoX begin and end with `<|endoftext|>`, CLIP and Llama have no pad.

    The text never produces a special token: "<eos>" typed by somebody is encoded as five ordinary characters.
    Instances pickle, so that data workers can hold one.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = "tokenizer") -> None:
        """Wraps `tokenizer`; `source` names it in messages.

        Raises:
            UserError: eos is missing.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.pad_id, self.bos_id, self.eos_id = _special_ids(tokenizer, source)
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Learns at most `vocab_size` tokens from `texts`; the same texts give the same tokenizer.

        Few or short texts give fewer tokens, so the result's `vocab_size` is what a model must be built with.

        Raises:
            UserError: `vocab_size` has no room for the 256 bytes and the special tokens.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"vocab_size {vocab_size} is too small: byte-level BPE needs at least {MIN_VOCAB_SIZE}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[names[0] for names in _SPECIAL_NAMES.values()],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        _while_signals_are_heard(lambda: tokenizer.train_from_iterator(texts, trainer))
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        """Reads a `tokenizer.json`.

        Raises:
            UserError: the file is missing, is not a tokenizer, or lacks eos.
        """
        try:
            text = read_text_file(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read the tokenizer: {error}") from error
        return cls.from_json(text, source=str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "tokenizer") -> TextTokenizer:
        """The inverse of `to_json`; `source` names the text in messages.

        Raises:
            UserError: not a tokenizer, or one without eos.
        """
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the Rust library raises plain Exception for every malformed input
            raise UserError(f"{source}: not a tokenizer.json of the `tokenizers` library: {error}") from error
        return cls(tokenizer, source)

    def to_json(self) -> str:
        """The whole tokenizer as the text of a `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=False)

    def __reduce__(self) -> tuple[Callable[[str], TextTokenizer], tuple[str]]:
        return TextTokenizer.from_json, (self.to_json(),)

    def encode(self, texts: Sequence[str], max_tokens: int) -> EncodedTexts:
        """Encodes B texts to at most `max_tokens` tokens each; a truncated text keeps its eos.

        Raises:
            UserError: the tokenizer has no token for something in a text, nor one for what is unknown.
        """
        if max_tokens < 2:
            raise ValueError(f"max_tokens must leave room for bos and eos, got {max_tokens}")
        rows: list[list[int]] = []
        n_truncated = 0
        for text in texts:
            body = self._encoded(text).ids
            n_truncated += len(body) > max_tokens - 2
            rows.append([self.bos_id, *body[: max_tokens - 2], self.eos_id])
        length = max(map(len, rows), default=0)
        ids_bl = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask_bl = torch.zeros((len(rows), length), dtype=torch.bool)
        for b, row in enumerate(rows):
            ids_bl[b, : len(row)] = torch.tensor(row)
            mask_bl[b, : len(row)] = True
        return EncodedTexts(ids_bl, mask_bl, n_truncated)

    def prompt(self, text: str) -> list[int]:
        """The ids that a language model is to go on from, at least one.

        As its own tokenizer.json begins a text: some put bos there (Llama), some nothing (GPT-NeoX). An end that it
        puts behind is left out; where nothing is left, there is bos, or what stands in for it.

        Raises:
            UserError: as `encode`.
        """
        ids = self._encoded(text, add_special_tokens=True).ids
        while len(ids) > 1 and ids[-1] == self.eos_id:
            ids.pop()
        return ids or [self.bos_id]

    def has_same_tokens(self, other: TextTokenizer) -> bool:
        """Whether an id means the same in both."""
        ours, theirs = (each._tokenizer.get_vocab(with_added_tokens=True) for each in (self, other))
        return ours == theirs

    def unlearned(self, text: str) -> str:
        """The different characters of `text` that it has no token for, in their order.

        A byte-level vocabulary encodes any character, if need be as bytes that mean nothing by themselves. That is
        how it encodes a script it was not trained on. ASCII characters are never among them.

        Raises:
            UserError: as `encode`.
        """
        encoded = self._encoded(text)
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        pieces = [0] * len(text)
        for token, (start, end) in zip(encoded.tokens, encoded.offsets, strict=True):
            for i in range(start, end):
                pieces[i] += 2 if token == unknown else 1
        found = [character for character, n in zip(text, pieces, strict=True) if n > 1 and not character.isascii()]
        return "".join(dict.fromkeys(found))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one sequence of ids; special tokens are dropped."""
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self._tokenizer.decode(values, skip_special_tokens=True)

    def _encoded(self, text: str, add_special_tokens: bool = False) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the Rust library raises plain Exception
            if "unk" not in str(error).lower():
                raise
            raise UserError(
                f"the tokenizer cannot encode {self._without_token(text)}, and has no token for what is unknown "
                f"({error}); give one that has an unknown token in its vocabulary, or byte fallback"
            ) from error

    def _without_token(self, text: str) -> str:
        """What of `text` fails when it stands alone: characters, or words where the tokens are words."""
        by_word = isinstance(self._tokenizer.model, models.WordLevel | models.WordPiece)
        found = [part for part in dict.fromkeys(text.split() if by_word else text) if self._fails(part)]
        shown = ", ".join(map(repr, found[:8])) or repr(text[:60])
        return f"{shown} and {len(found) - 8} more" if len(found) > 8 else shown

    def _fails(self, text: str) -> bool:
        try:
            self._tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # as in `_encoded`
            return True
        return False


def _while_signals_are_heard(work: Callable[[], None]) -> None:
    """Do `work` in another thread: compiled code that returns late keeps the main thread from hearing Ctrl-C."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failure:
        raise failure[0]


def _special_ids(tokenizer: Tokenizer, source: str) -> list[int]:
    """Ids of pad, bos and eos."""
    found = {
        role: next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
        for role, names in _SPECIAL_NAMES.items()
    }
    eos = found["eos"]
    if eos is None:
        raise UserError(
            f"{source}: the tokenizer has no eos token; add one of {', '.join(_SPECIAL_NAMES['eos'])} "
            "to its vocabulary as a special token, or, if its eos has another name, rename it so in `added_tokens` "
            "and, where it stands there too, in `vocab`"
        )
    return [eos if i is None else i for i in found.values()]
