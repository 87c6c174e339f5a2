"""The tokenizer: layout of encoded batches, round trips, determinism, and files it must refuse."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from mamba3_jepa.data.tokenizer import MIN_VOCAB_SIZE, TextTokenizer
from mamba3_jepa.errors import UserError

TEXTS = [
    "a large red circle at the top left",
    "a small blue square at the bottom right",
    "what color is the star?",
    "red",
    "naïve café, 数字 and 🙂",
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS * 3, vocab_size=330)


def test_encode_is_right_padded_with_bos_and_eos(tokenizer: TextTokenizer) -> None:
    encoded = tokenizer.encode(TEXTS, max_tokens=64)
    assert encoded.ids.shape == encoded.mask.shape
    assert encoded.ids.dtype == torch.int64
    assert encoded.mask.dtype == torch.bool
    assert encoded.n_truncated == 0
    for text, ids, mask in zip(TEXTS, encoded.ids, encoded.mask, strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [True] * n + [False] * (len(mask) - n)
        assert ids[0] == tokenizer.bos_id
        assert ids[n - 1] == tokenizer.eos_id
        assert (ids[n:] == tokenizer.pad_id).all()
        assert tokenizer.decode(ids) == text
    assert encoded.mask.all(dim=0).any()
    assert encoded.mask[:, -1].any(), "the batch is no longer than its longest text"


def test_a_text_encodes_the_same_alone_and_in_a_batch(tokenizer: TextTokenizer) -> None:
    batch = tokenizer.encode(TEXTS, max_tokens=64)
    for b, text in enumerate(TEXTS):
        alone = tokenizer.encode([text], max_tokens=64)
        assert alone.ids[0].tolist() == batch.ids[b][batch.mask[b]].tolist()


def test_truncation_keeps_eos_and_is_counted(tokenizer: TextTokenizer) -> None:
    full = tokenizer.encode(TEXTS, max_tokens=64)
    lengths = full.mask.sum(dim=1)
    limit = int(lengths[0])
    encoded = tokenizer.encode(TEXTS, max_tokens=limit)
    assert encoded.n_truncated == int((lengths > limit).sum()) > 0
    assert encoded.ids.shape[1] == limit
    assert torch.equal(encoded.ids[0], full.ids[0, :limit]), "a text of exactly the limit is not truncated"
    long = int(lengths.argmax())
    assert encoded.ids[long, :-1].tolist() == full.ids[long, : limit - 1].tolist()
    assert encoded.ids[long, -1] == tokenizer.eos_id


def test_empty_batch_and_empty_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode([], max_tokens=8).ids.shape == (0, 0)
    assert tokenizer.encode([""], max_tokens=8).ids.tolist() == [[tokenizer.bos_id, tokenizer.eos_id]]


def test_text_cannot_forge_special_tokens(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(["<eos><pad><bos>"], max_tokens=64).ids[0]
    assert (ids == tokenizer.eos_id).sum() == 1
    assert (ids == tokenizer.pad_id).sum() == 0
    assert tokenizer.decode(ids) == "<eos><pad><bos>"


def test_training_is_deterministic_and_capped(tokenizer: TextTokenizer) -> None:
    again = TextTokenizer.train(iter(TEXTS * 3), vocab_size=330)
    assert again.to_json() == tokenizer.to_json()
    assert tokenizer.vocab_size <= 330
    assert TextTokenizer.train(["ab"], vocab_size=5000).vocab_size == MIN_VOCAB_SIZE + 1
    with pytest.raises(UserError, match=str(MIN_VOCAB_SIZE)):
        TextTokenizer.train(TEXTS, vocab_size=MIN_VOCAB_SIZE - 1)


@pytest.mark.parametrize("route", ["json", "file", "pickle"])
def test_round_trips(tokenizer: TextTokenizer, tmp_path: Path, route: str) -> None:
    if route == "json":
        copy = TextTokenizer.from_json(tokenizer.to_json())
    elif route == "file":
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        copy = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    else:
        copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.pad_id, copy.bos_id, copy.eos_id) == (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    assert copy.vocab_size == tokenizer.vocab_size
    texts = [*TEXTS, "<eos>"]
    assert torch.equal(copy.encode(texts, 64).ids, tokenizer.encode(texts, 64).ids)


def test_padding_and_truncation_settings_of_a_file_do_not_matter(tokenizer: TextTokenizer) -> None:
    foreign = Tokenizer.from_str(tokenizer.to_json())
    foreign.enable_padding(length=50)
    foreign.enable_truncation(max_length=3)
    copy = TextTokenizer.from_json(foreign.to_str())
    assert torch.equal(copy.encode(TEXTS, 64).ids, tokenizer.encode(TEXTS, 64).ids)


def test_files_that_are_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json"):
        TextTokenizer.from_file(tmp_path / "missing.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.json"):
        TextTokenizer.from_file(broken)
    plain = tmp_path / "plain.json"
    plain.write_text(Tokenizer(models.BPE()).to_str(), encoding="utf-8")
    with pytest.raises(UserError, match=r"plain\.json.*no pad token"):
        TextTokenizer.from_file(plain)
    without_eos = tmp_path / "without_eos.json"
    without_eos.write_text(tokenizer.to_json().replace("<eos>", "<end>"), encoding="utf-8")
    with pytest.raises(UserError, match="no eos token"):
        TextTokenizer.from_file(without_eos)


def test_names_of_other_projects_are_understood(tokenizer: TextTokenizer) -> None:
    state = json.loads(tokenizer.to_json().replace("<pad>", "[PAD]").replace("<bos>", "<s>").replace("<eos>", "</s>"))
    copy = TextTokenizer.from_json(json.dumps(state))
    assert (copy.pad_id, copy.bos_id, copy.eos_id) == (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
