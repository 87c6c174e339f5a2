"""The tokenizer: layout of encoded batches, round trips, determinism, and files it must refuse."""

from __future__ import annotations

import json
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mamba3_jepa.data.tokenizer import MIN_VOCAB_SIZE, TextTokenizer, _while_signals_are_heard
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
    with pytest.raises(UserError, match=r"plain\.json.*no eos token"):
        TextTokenizer.from_file(plain)
    without_eos = tmp_path / "without_eos.json"
    without_eos.write_text(tokenizer.to_json().replace("<eos>", "<end>"), encoding="utf-8")
    with pytest.raises(UserError, match="no eos token"):
        TextTokenizer.from_file(without_eos)


@pytest.mark.parametrize(
    ("model", "text", "shown"),
    [
        (models.Unigram([("a", 0.0), ("</s>", 0.0)], None, False), "aéa日é", "'é', '日'"),
        (models.Unigram([("a", 0.0), ("</s>", 0.0)], None, False), "abcdefghijk", "'b', .*'i' and 2 more"),
        (models.BPE({"a": 0, "</s>": 1}, [], unk_token="<unk>"), "aéa", "'é'"),
        (models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"), "a é été", "'é', 'été'"),
        (models.WordPiece({"a": 0, "</s>": 1}, unk_token="<unk>"), "a été", "'été'"),
    ],
)
def test_what_a_tokenizer_without_unknown_token_cannot_encode_is_named(
    model: models.Model, text: str, shown: str
) -> None:
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    read = TextTokenizer(made)
    assert read.encode(["a"], 8).ids.tolist() == [[1, 0, 1]]
    message = f"^the tokenizer cannot encode {shown}, and .*; give one that has an unknown token .* byte fallback$"
    with pytest.raises(UserError, match=message):
        read.encode(["a", text], 8)
    with pytest.raises(UserError, match=message):
        read.unlearned(text)
    with pytest.raises(UserError, match=message):
        read.prompt(text)


def test_names_of_other_projects_are_understood(tokenizer: TextTokenizer) -> None:
    state = json.loads(tokenizer.to_json().replace("<pad>", "[PAD]").replace("<bos>", "<s>").replace("<eos>", "</s>"))
    copy = TextTokenizer.from_json(json.dumps(state))
    assert (copy.pad_id, copy.bos_id, copy.eos_id) == (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize(
    ("names", "pad", "bos", "eos"),
    [
        (["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"], 1, 0, 1),  # DeepSeek
        (["<PAD_TOKEN>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>"], 0, 2, 3),  # Cohere
        (["<|im_start|>", "<|im_end|>"], 1, 1, 1),
        (["<|im_end|>", "<|endoftext|>"], 1, 1, 1),  # Qwen
    ],
)
def test_names_of_chat_models_are_understood(names: list[str], pad: int, bos: int, eos: int) -> None:
    made = Tokenizer(models.BPE())
    made.add_special_tokens(names)
    read = TextTokenizer.from_json(made.to_str())
    assert (read.pad_id, read.bos_id, read.eos_id) == (pad, bos, eos)


def test_an_eos_of_another_name_is_renamed_as_the_message_says(tokenizer: TextTokenizer) -> None:
    state = json.loads(tokenizer.to_json().replace("<eos>", "<end>"))
    with pytest.raises(UserError, match=r"another name, rename it so in `added_tokens` and, .*, in `vocab`$"):
        TextTokenizer.from_json(json.dumps(state))
    for token in state["added_tokens"]:
        token["content"] = token["content"].replace("<end>", "<eos>")
    state["model"]["vocab"]["<eos>"] = state["model"]["vocab"].pop("<end>")
    assert TextTokenizer.from_json(json.dumps(state)).eos_id == tokenizer.eos_id


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def of_another_project(layout: str) -> str:
    """A tokenizer.json laid out as GPT-2's, GPT-NeoX's, CLIP's or Llama's, with few tokens."""
    specials = {
        "GPT-2": ["<|endoftext|>"],
        "GPT-NeoX": ["<|endoftext|>", "<|padding|>"],
        "CLIP": ["<|startoftext|>", "<|endoftext|>"],
        "Llama": ["<unk>", "<s>", "</s>"],
    }[layout]
    first = BYTES
    if layout == "CLIP":
        first = [*BYTES, *(f"{letter}</w>" for letter in BYTES)]
    elif layout == "Llama":
        first = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(97, 123))]
    at_the_end = layout != "Llama"
    tokens = [*first, *specials] if at_the_end else [*specials, *first]
    vocab = {token: i for i, token in enumerate(tokens)}
    if layout == "CLIP":
        model = models.BPE(vocab, [], unk_token="<|endoftext|>", end_of_word_suffix="</w>")
        made = Tokenizer(model)
        made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.RobertaProcessing(
            ("<|endoftext|>", vocab["<|endoftext|>"]), ("<|startoftext|>", vocab["<|startoftext|>"])
        )
    elif layout == "Llama":
        made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    else:
        made = Tokenizer(models.BPE(vocab, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens(specials)
    return made.to_str()


@pytest.mark.parametrize(
    ("layout", "pad", "bos", "eos"),
    [
        ("GPT-2", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
        ("GPT-NeoX", "<|padding|>", "<|endoftext|>", "<|endoftext|>"),
        ("CLIP", "<|endoftext|>", "<|startoftext|>", "<|endoftext|>"),
        ("Llama", "</s>", "<s>", "</s>"),
    ],
)
def test_tokenizers_of_other_projects_are_used_as_they_are(
    layout: str, pad: str, bos: str, eos: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(of_another_project(layout), encoding="utf-8")
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    read = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    assert (read.pad_id, read.bos_id, read.eos_id) == tuple(map(library.token_to_id, (pad, bos, eos)))
    texts = ["a red circle", "red", f"what is {eos}"]
    encoded = read.encode(texts, 64)
    for text, ids, mask in zip(texts, encoded.ids, encoded.mask, strict=True):
        inside = ids[mask][1:-1].tolist()
        assert (ids[0], ids[mask][-1]) == (read.bos_id, read.eos_id)
        assert (ids[~mask] == read.pad_id).all()
        assert not {read.bos_id, read.eos_id} & set(inside), "a text never gives a special token"
        assert inside == library.encode(text, add_special_tokens=False).ids or eos in text
    assert read.decode(encoded.ids[0]).replace("</w>", " ").strip() == "a red circle"
    assert read.vocab_size == library.get_vocab_size()
    assert torch.equal(pickle.loads(pickle.dumps(read)).encode(texts, 64).ids, encoded.ids)


@pytest.mark.parametrize("layout", ["GPT-2", "GPT-NeoX", "CLIP", "Llama"])
def test_a_tokenizer_of_another_project_goes_through_two_phases_and_the_export(layout: str, tmp_path: Path) -> None:
    from mamba3_jepa.cli.main import main

    (tmp_path / "tokenizer.json").write_text(of_another_project(layout), encoding="utf-8")
    few = ["--tiny", "--cpu", "--synthetic-scenes", "8", "--val-samples", "6", "--max-steps", "2", "--batch-size", "4"]
    first, second, weights = tmp_path / "1", tmp_path / "2", tmp_path / "weights"
    given = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--output-dir", str(first)]
    assert main(["train-jepa", *few, *given]) == 0
    given = ["--phase1-checkpoint", str(first / "phase1_best.pt"), "--output-dir", str(second)]
    assert main(["train-decoder", *few, *given]) == 0
    checkpoint = ["--checkpoint", str(second / "phase2_best.pt")]
    assert main(["export", *checkpoint, "--output", str(weights), "--x-encoder", "--verify"]) == 0
    read = TextTokenizer.from_file(weights / "tokenizer.json")
    tokens = json.loads((weights / "config.json").read_text())["tokens"]
    assert tokens == {"pad": read.pad_id, "bos": read.bos_id, "eos": read.eos_id}


def test_signals_are_heard_while_one_is_trained() -> None:
    """The compiled trainer returns after many seconds; Ctrl-C does not wait for it."""

    class Heard(BaseException):
        pass

    def hear(*_: object) -> None:
        raise Heard

    before = signal.signal(signal.SIGALRM, hear)
    trained = threading.Event()

    def train() -> None:
        trained.wait(60)

    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Heard):
            _while_signals_are_heard(train)
    finally:
        signal.signal(signal.SIGALRM, before)
        trained.set()


def test_what_fails_while_one_is_trained_is_raised() -> None:
    def texts() -> Iterator[str]:
        yield "one"
        raise UserError("the second text cannot be read")

    with pytest.raises(UserError, match="the second text cannot be read"):
        TextTokenizer.train(texts(), 300)
