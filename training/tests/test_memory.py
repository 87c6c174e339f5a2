"""The memory of texts: search against plain cosines, files that come back whole or not at all."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, write_checkpoint
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.exporter import export_weights
from mamba3_jepa.export.reader import load_exported
from mamba3_jepa.inference.digests import encoder_digest
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import ExportSettings

TEXTS = ["red", "a blue square", "the circle is green", "zwölf"]


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return tiny_model(1, TEXTS, moved=False)


@pytest.fixture
def memory(model: Mamba3Jepa) -> KnowledgeMemory:
    return KnowledgeMemory.build(model, TEXTS)


def test_search_ranks_by_cosine(model: Mamba3Jepa, memory: KnowledgeMemory) -> None:
    queries = torch.randn(3, model.config.embed_dim, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], model.embed_text(TEXTS)[None], dim=-1)
    for row, found in zip(cosines, memory.search(queries, k=2), strict=True):
        best = row.argsort(descending=True)[:2].tolist()
        assert [text for text, _ in found] == [TEXTS[i] for i in best]
        torch.testing.assert_close(torch.tensor([score for _, score in found]), row[best])
    assert len(memory.search(queries, k=99)[0]) == len(TEXTS)


def test_a_text_finds_itself(model: Mamba3Jepa, memory: KnowledgeMemory) -> None:
    found = memory.search(model.embed_text(TEXTS), k=1)
    assert [row[0][0] for row in found] == TEXTS
    assert all(row[0][1] == pytest.approx(1, abs=1e-5) for row in found)


def test_equal_texts_are_kept_once(model: Mamba3Jepa) -> None:
    assert KnowledgeMemory.build(model, ["red", "blue", "red"]).texts == ["red", "blue"]


def test_save_and_load(model: Mamba3Jepa, memory: KnowledgeMemory, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "memory.safetensors"
    memory.save(path)
    again = KnowledgeMemory.open(path, model)
    assert again.texts == TEXTS
    assert torch.equal(again.embeddings, memory.embeddings)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_text_file(model: Mamba3Jepa, memory: KnowledgeMemory, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\ufeff" + "\r\n\r\n".join(TEXTS) + "\n red \n", encoding="utf-8", newline="")
    opened = KnowledgeMemory.open(path, model)
    assert opened.texts == TEXTS
    assert torch.equal(opened.embeddings, memory.embeddings)


def test_bad_text_files(model: Mamba3Jepa, tmp_path: Path) -> None:
    for name, content, message in (
        ("empty.txt", b"\n  \n", "has no text"),
        ("latin.txt", "zwölf".encode("latin-1"), "not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            KnowledgeMemory.open(tmp_path / name, model)
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(UserError, match="cannot read it"):
            KnowledgeMemory.open(path, model)


def test_a_memory_of_other_weights_is_refused(memory: KnowledgeMemory, tmp_path: Path) -> None:
    memory.save(tmp_path / "memory.safetensors")
    with pytest.raises(UserError, match="another Y-Encoder"):
        KnowledgeMemory.load(tmp_path / "memory.safetensors", tiny_model(1, TEXTS, moved=False, seed=1))
    other = tiny_model(1, TEXTS, moved=False)
    with torch.no_grad():
        other.y_encoder.projection.bias[0] += 1e-3
    with pytest.raises(UserError, match="another Y-Encoder"):
        KnowledgeMemory.load(tmp_path / "memory.safetensors", other)


def _digest_of_an_export(folder: Path) -> str:
    """As WEIGHT_MAPPING.md describes it, from the files' bytes alone."""
    config = json.loads((folder / "config.json").read_text())["model"]
    sizes = {"y_encoder": config["y_encoder"], "max_answer_tokens": config["max_answer_tokens"]}
    digest = hashlib.sha256(b"mamba3-jepa y_encoder\n")
    digest.update(json.dumps(sizes, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n")
    digest.update(hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest().encode() + b"\n")
    content = (folder / "y_encoder.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    del header["__metadata__"]
    for key in sorted(header, key=str.encode):
        entry = header[key]
        digest.update(f"{key} {entry['dtype']} {'x'.join(map(str, entry['shape']))}\n".encode())
        digest.update(data[slice(*entry["data_offsets"])])
    return digest.hexdigest()


def _foreign_tokenizer() -> str:
    """A file as another project might have written it: indented, with padding, truncation and a post-processor."""
    inner = Tokenizer(models.WordPiece({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "réd": 4, "blue": 5},
                                       unk_token="[UNK]"))  # fmt: skip
    inner.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    inner.normalizer = normalizers.BertNormalizer(strip_accents=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    specials = [("[SEP]", 2), ("[CLS]", 1)]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=specials)
    inner.enable_padding(length=7)
    inner.enable_truncation(5)
    return inner.to_str(pretty=True)


@pytest.mark.parametrize("foreign", [False, True])
def test_the_digest_is_that_of_the_exported_files(foreign: bool, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=300)
    if foreign:
        (tmp_path / "tokenizer.json").write_text(_foreign_tokenizer(), encoding="utf-8")
        tokenizer = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    model = tiny_model(1, tokenizer, moved=False, max_answer_tokens=9)
    checkpoint = write_checkpoint(tmp_path / "phase1.pt", model, phase=1)
    export_weights(ExportSettings(checkpoint=checkpoint, output=tmp_path / "weights", x_encoder=True))
    expected = _digest_of_an_export(tmp_path / "weights")
    assert encoder_digest(Mamba3Jepa.from_checkpoint(checkpoint)) == expected
    assert encoder_digest(load_exported(tmp_path / "weights")) == expected
    memory = KnowledgeMemory.build(Mamba3Jepa.from_checkpoint(checkpoint), ["réd", "blue"])
    memory.save(tmp_path / "memory.safetensors")
    with safe_open(tmp_path / "memory.safetensors", framework="np") as file:
        assert file.metadata() == {
            "format": "mamba3-jepa memory", "format_version": "3", "encoder": expected, "texts": '["réd", "blue"]',
        }  # fmt: skip
        assert (file.get_slice("embeddings").get_dtype(), file.get_slice("embeddings").get_shape()) == ("F32", [2, 32])


@pytest.mark.parametrize("change", ["limit", "size", "tokenizer", "weight"])
def test_the_digest_notices_every_change(model: Mamba3Jepa, change: str) -> None:
    config, tokenizer = model.config, model.tokenizer
    if change == "limit":
        config = config.replace(max_answer_tokens=31)
    if change == "size":  # one that no tensor's shape shows
        layer = dataclasses.replace(config.y_encoder.layer, a_activation="softplus")
        config = config.replace(y_encoder=dataclasses.replace(config.y_encoder, layer=layer))
    if change == "tokenizer":
        tokenizer = TextTokenizer.from_json(
            tokenizer.to_json().replace('"add_prefix_space":false', '"add_prefix_space":true')
        )
    other = Mamba3Jepa(config, tokenizer)
    other.load_state_dict(model.state_dict())
    if change == "weight":
        with torch.no_grad():
            other.y_encoder.backbone.layers[0].D[0] += 1e-3
    assert encoder_digest(other) != encoder_digest(model)


def test_a_memory_of_format_1(memory: KnowledgeMemory, model: Mamba3Jepa, tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    metadata = {"format": "mamba3-jepa memory", "format_version": "1", "encoder": "0" * 32, "texts": json.dumps(TEXTS)}
    save_file({"embeddings": memory.embeddings}, path, metadata)
    with pytest.raises(UserError, match=r"of format 1, this version reads 2 and 3; make it again from its texts"):
        KnowledgeMemory.load(path, model)


def test_damaged_memories(model: Mamba3Jepa, memory: KnowledgeMemory, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    memory.save(good)
    metadata = {"format": "mamba3-jepa memory", "format_version": "2", "encoder": memory.encoder}
    embeddings = load_file(good)["embeddings"]

    def write(name: str, tensor: torch.Tensor, texts: str) -> Path:
        save_file({"embeddings": tensor}, tmp_path / name, metadata | {"texts": texts})
        return tmp_path / name

    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:-7])
    save_file({"weights": embeddings}, tmp_path / "foreign.safetensors")
    for path, message in (
        (tmp_path / "short.safetensors", "cannot read"),
        (tmp_path / "nowhere.safetensors", "cannot read"),
        (tmp_path / "foreign.safetensors", "not a saved memory"),
        (write("fewer.safetensors", embeddings, json.dumps(TEXTS[1:])), "damaged"),
        (write("no_texts.safetensors", embeddings, "["), "damaged"),
        (write("numbers.safetensors", embeddings, "[1, 2, 3, 4]"), "damaged"),
        (write("nan.safetensors", embeddings * torch.nan, json.dumps(TEXTS)), "damaged"),
        (write("narrow.safetensors", embeddings[:, :-1].contiguous(), json.dumps(TEXTS)), "damaged"),
        (write("half.safetensors", embeddings.half(), json.dumps(TEXTS)), "finite F32"),
        (write("double.safetensors", embeddings.double(), json.dumps(TEXTS)), "finite F32"),
        (write("surrogate.safetensors", embeddings, json.dumps([*TEXTS[1:], "half a \ud800"])), "damaged"),
        (write("deep.safetensors", embeddings, "[" * 100_000), "damaged"),
    ):
        with pytest.raises(UserError, match=message):
            KnowledgeMemory.load(path, model)


def test_an_unwritable_place(memory: KnowledgeMemory) -> None:
    with pytest.raises(UserError, match="cannot write"):
        memory.save("/proc/nowhere/memory.safetensors")


def test_characters_the_tokenizer_never_learned() -> None:
    tokenizer = TextTokenizer.train(["the café is at the naïve café"] * 4, vocab_size=400)
    assert tokenizer.unlearned("What is the café?\n\t~") == ""
    assert tokenizer.unlearned("какого цвета") == "каогцвет"
    assert tokenizer.unlearned("café 色 of 😀, 色") == "色😀"


def test_characters_of_a_tokenizer_with_an_unknown_token() -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "[UNK]": 3, "café": 4, "the": 5}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TextTokenizer(inner).unlearned("the café où") == "ù"
