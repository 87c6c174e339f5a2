"""`mamba3-jepa lm`, and what it is made of: prompts, continuations, text as it comes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_language_model import language_model, write_language_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mamba3_jepa.cli.main import main
from mamba3_jepa.cli.output import printable
from mamba3_jepa.data.text_stream import TextStream
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.continuation import MAX_TOKENS, Continuation, Continuer
from mamba3_jepa.models.generation import sample_tokens
from mamba3_jepa.models.language_model import Mamba3LanguageModel
from mamba3_jepa.settings.inference import GenerationConfig

TEXT = "a red circle"


@pytest.fixture(scope="module")
def model(tokenizer: TextTokenizer) -> Mamba3LanguageModel:
    return language_model(tokenizer.vocab_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Mamba3LanguageModel, tokenizer: TextTokenizer) -> Path:
    return write_language_model(tmp_path_factory.mktemp("lm"), model, tokenizer)


def llama_like(tokenizer: TextTokenizer) -> TextTokenizer:
    """One that begins every text with bos, and ends it with eos, by itself."""
    wrapped = Tokenizer.from_str(tokenizer.to_json())
    wrapped.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tokenizer.bos_id), ("<eos>", tokenizer.eos_id)]
    )
    return TextTokenizer(wrapped)


# --- prompts ---


def test_a_prompt_begins_as_its_tokenizer_begins_a_text(tokenizer: TextTokenizer) -> None:
    body = tokenizer.encode([TEXT], 99).ids[0, 1:-1].tolist()
    assert tokenizer.prompt(TEXT) == body
    assert llama_like(tokenizer).prompt(TEXT) == [tokenizer.bos_id, *body]
    assert tokenizer.prompt("") == llama_like(tokenizer).prompt("") == [tokenizer.bos_id]
    assert tokenizer.eos_id not in tokenizer.prompt("<eos>"), "what somebody types is text"


def test_tokens_are_the_same_if_their_ids_are(tokenizer: TextTokenizer) -> None:
    assert tokenizer.has_same_tokens(llama_like(tokenizer))
    assert not tokenizer.has_same_tokens(TextTokenizer.train(["xyz"], 300))


# --- continuations ---


def plain_greedy(model: Mamba3LanguageModel, ids: list[int], n_tokens: int, eos: int, limit: int) -> list[int]:
    """All tokens again for each new one."""
    said: list[int] = []
    while len(said) < limit:
        token = int(model(torch.tensor([[*ids, *said]]))[0, -1, :n_tokens].argmax())
        if token == eos:
            break
        said.append(token)
    return said


@torch.no_grad()
def test_greedy_is_the_most_probable_token_each_time(model: Mamba3LanguageModel, tokenizer: TextTokenizer) -> None:
    for text in (TEXT, "", "é"):
        said = Continuer(model, tokenizer, GenerationConfig(max_tokens=9)).go_on(text)
        expected = plain_greedy(model, tokenizer.prompt(text), tokenizer.vocab_size, tokenizer.eos_id, 9)
        assert said.tokens == len(expected)
        assert said.text == tokenizer.decode(expected)


@torch.no_grad()
def test_sampling_draws_from_a_stream_of_its_own_for_each_text(
    model: Mamba3LanguageModel, tokenizer: TextTokenizer
) -> None:
    generation = GenerationConfig(method="sample", seed=5, top_k=9, max_tokens=9)
    continuer = Continuer(model, tokenizer, generation)
    first, second = continuer.go_on(TEXT), continuer.go_on(TEXT)
    assert first != second
    again = Continuer(model, tokenizer, generation)
    assert [again.go_on(TEXT), again.go_on(TEXT)] == [first, second]


@torch.no_grad()
def test_rows_that_pad_the_vocabulary_are_never_said(tokenizer: TextTokenizer) -> None:
    """Though the model would rather say them than anything else."""
    model = language_model(tokenizer.vocab_size, tied=False)
    assert model.lm_head is not None
    largest = model(torch.tensor([tokenizer.prompt(TEXT)]))[0, -1].abs().argmax()
    model.lm_head.weight[tokenizer.vocab_size :] = 2 * model.lm_head.weight[largest]
    model.lm_head.weight[tokenizer.vocab_size + 1 :] *= -1  # one of the two is the largest logit
    top = model(torch.tensor([tokenizer.prompt(TEXT)]))[0, -1].argmax()
    assert top >= tokenizer.vocab_size
    said = Continuer(model, tokenizer, GenerationConfig(max_tokens=5)).go_on(TEXT)
    assert said.tokens == 5
    assert 0 < said.confidence <= 1


@torch.no_grad()
def test_beams_find_a_text_at_least_as_probable(model: Mamba3LanguageModel, tokenizer: TextTokenizer) -> None:
    greedy = Continuer(model, tokenizer, GenerationConfig(max_tokens=6)).go_on(TEXT)
    wide = Continuer(model, tokenizer, GenerationConfig(method="beam", beams=5, max_tokens=6)).go_on(TEXT)
    assert (wide.tokens, wide.finished) == (greedy.tokens, greedy.finished) == (6, False)
    assert wide.confidence >= greedy.confidence


@torch.no_grad()
def test_the_end_mark_ends_it(tokenizer: TextTokenizer) -> None:
    model = language_model(tokenizer.vocab_size, tied=False)
    assert model.lm_head is not None
    model.lm_head.weight.zero_()
    hidden = model.hidden(torch.tensor([tokenizer.prompt(TEXT)]))[0, -1]
    model.lm_head.weight[tokenizer.eos_id] = hidden
    said = Continuer(model, tokenizer).go_on(TEXT)
    assert said == Continuation(text="", tokens=0, confidence=said.confidence, finished=True)
    assert said.confidence > 0.9


def test_a_damaged_model_is_a_user_error(tokenizer: TextTokenizer) -> None:
    model = language_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.backbone.final_norm.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="the folder: the outputs are not finite"):
        Continuer(model, tokenizer, source="the folder").go_on(TEXT)


def test_where_the_settings_say_nothing_there_is_a_limit(model: Mamba3LanguageModel, tokenizer: TextTokenizer) -> None:
    said = Continuer(model, tokenizer).go_on("")
    assert said.finished or said.tokens == MAX_TOKENS


# --- text as it comes ---


def metaspace() -> TextTokenizer:
    """Words that begin with a mark, which the first of a text loses: decoders look back."""
    words = {"<eos>": 0, "▁a": 1, "▁red": 2, "▁circle": 3, "s": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<eos>"])
    return TextTokenizer(made)


def test_pieces_join_to_the_whole_and_hold_no_half_character(tokenizer: TextTokenizer) -> None:
    for text in ("größer 🎉 日本 \n\t x", "red", "", "👩‍👩‍👧"):
        ids = tokenizer.encode([text], 999).ids[0, 1:-1].tolist()
        stream = TextStream(tokenizer, [5, 6])
        pieces = [stream.add(token) for token in ids]
        assert "".join(pieces) == text
        assert stream.rest() == ""


def test_bytes_that_are_no_character_come_at_the_end(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(["a🎉"], 99).ids[0, 1:-1].tolist()[:-1]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, ids)) == "a"
    assert stream.rest() == tokenizer.decode(ids)[1:] != ""


def test_words_keep_their_space_behind_the_prompt() -> None:
    tokenizer = metaspace()
    stream = TextStream(tokenizer, [1, 2])
    assert [stream.add(3), stream.add(4), stream.add(0), stream.add(2)] == [" circle", "s", "", " red"]
    alone = TextStream(tokenizer)
    assert [alone.add(1), alone.add(2)] == ["a", " red"]


# --- the command ---


def run(folder: Path, *arguments: str) -> int:
    return main(["lm", "--model", str(folder), *arguments])


def test_the_command_prints_the_text_and_what_follows(
    folder: Path, model: Mamba3LanguageModel, tokenizer: TextTokenizer, capfd: pytest.CaptureFixture
) -> None:
    assert run(folder, TEXT, "is it", "--max-tokens", "7", "--json") == 0
    said = json.loads(capfd.readouterr().out)
    assert [each["prompt"] for each in said] == [TEXT, "is it"]
    assert set(said[0]) == {"prompt", "text", "tokens", "confidence", "finished"}
    expected = Continuer(model, tokenizer, GenerationConfig(max_tokens=7)).go_on(TEXT)
    assert said[0]["text"] == expected.text
    assert run(folder, TEXT, "is it", "--max-tokens", "7") == 0
    shown = capfd.readouterr().out
    assert shown.startswith(TEXT)
    visible = [each if each in "\n\t" else printable(each) for each in said[0]["text"]]
    assert shown.startswith(TEXT + "".join(visible))
    assert "\n\nis it" in shown


def test_the_text_comes_while_it_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The prompt stands there before the first token, and each token before the next."""
    lengths: list[int] = []
    step = Mamba3LanguageModel.step

    def watched(self: Mamba3LanguageModel, *arguments: object) -> object:
        lengths.append(len(capfd.readouterr().out))
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Mamba3LanguageModel, "step", watched)
    assert run(folder, TEXT, "--max-tokens", "12") == 0
    assert lengths[0] == len(TEXT)
    assert sum(length > 0 for length in lengths[1:]) >= 4


def test_the_a_activation_is_a_flag(folder: Path, capfd: pytest.CaptureFixture) -> None:
    shown = []
    for activation in ("heavy_tail", "softplus"):
        assert run(folder, TEXT, "--json", "--a-activation", activation) == 0
        shown.append(capfd.readouterr().out)
    assert shown[0] != shown[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to go on from: give a text"),
        (["x", "--device", "abacus"], "--device abacus: not available here"),
        (["x", "--top-k", "3"], "top_k has no effect with greedy"),
        (["x", "--method", "beam", "--beams", "999"], "beams is 999, but the model has only"),
        (["x", "--tokenizer", "none.json"], "none.json: cannot read the tokenizer"),
        (["x\udcff"], "is not valid UTF-8"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture) -> None:
    assert run(folder, *arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_tokenizer_takes_one(
    tmp_path: Path, folder: Path, model: Mamba3LanguageModel, capfd: pytest.CaptureFixture
) -> None:
    bare = write_language_model(tmp_path / "bare", model)
    assert run(bare, TEXT) == 2
    assert "there is no tokenizer.json: put the one there" in capfd.readouterr().err
    assert run(bare, TEXT, "--json", "--tokenizer", str(folder / "tokenizer.json")) == 0
    with_own = capfd.readouterr().out
    assert run(folder, TEXT, "--json") == 0
    assert capfd.readouterr().out == with_own


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_says_the_same(folder: Path, capfd: pytest.CaptureFixture) -> None:
    shown = []
    for device in ("cpu", "cuda"):
        assert run(folder, TEXT, "--json", "--device", device) == 0
        shown.append(json.loads(capfd.readouterr().out)[0])
    assert shown[0]["text"] == shown[1]["text"]


def test_sampled_tokens_follow_their_probabilities(model: Mamba3LanguageModel, tokenizer: TextTokenizer) -> None:
    """The same rule as for answers: a uniform number picks from the sorted probabilities."""
    continuer = Continuer(model, tokenizer)
    ids = torch.tensor(tokenizer.prompt(TEXT))
    with torch.no_grad():
        logits, _ = continuer.step(ids[-1:], model.prefill(ids[None, :-1]))
    assert logits.shape == (1, tokenizer.vocab_size)
    probability, order = logits.softmax(-1).sort(descending=True, stable=True)
    half = int((probability.cumsum(-1) <= 0.5).sum())
    assert sample_tokens(logits, torch.tensor([0.5]), GenerationConfig(method="sample")) == order[0, half]
