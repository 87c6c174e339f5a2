"""The memory of texts: search against plain cosines, files that come back whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba3_jepa.config import preset
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.models.vljepa import Mamba3Jepa

TEXTS = ["red", "a blue square", "the circle is green", "zwölf"]


def make_model(seed: int = 0) -> Mamba3Jepa:
    torch.manual_seed(seed)
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=300)
    return Mamba3Jepa(preset("tiny").replace(vocab_size=tokenizer.vocab_size), tokenizer).eval()


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return make_model()


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
        KnowledgeMemory.load(tmp_path / "memory.safetensors", make_model(seed=1))
    other = make_model()
    with torch.no_grad():
        other.y_encoder.projection.bias[0] += 1e-3
    with pytest.raises(UserError, match="another Y-Encoder"):
        KnowledgeMemory.load(tmp_path / "memory.safetensors", other)


def test_damaged_memories(model: Mamba3Jepa, memory: KnowledgeMemory, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    memory.save(good)
    metadata = {"format": "mamba3-jepa memory", "format_version": "1", "encoder": memory.encoder}
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
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "[UNK]": 3, "café": 4, "the": 5}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TextTokenizer(inner).unlearned("the café où") == "ù"
