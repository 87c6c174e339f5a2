"""Answers against the model's own parts called one by one, and `mamba3-jepa ask` through its entry point."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ANSWERS, tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.cli.output import printable
from mamba3_jepa.config import NO_FLOOR, RecursionConfig
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.errors import UserError
from mamba3_jepa.inference import answerer as answerers
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.inference import GenerationConfig

QUESTIONS = ["What colour is the circle?", "Is there a square?", None]


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return tiny_model(phase=3)


@pytest.fixture
def memory(model: Mamba3Jepa) -> KnowledgeMemory:
    return KnowledgeMemory.build(model, ["the circle is red", "there is no square", "yes"])


def set_threshold(model: Mamba3Jepa, threshold: float) -> None:
    assert model.recursion is not None
    model.recursion.confusion_probe.threshold.fill_(threshold)


def spoken(model: Mamba3Jepa, embedding: torch.Tensor) -> tuple[str, list[float]]:
    """Text and log-probabilities of the tokens of one embedding (E,), greedily: a whole pass for each of them."""
    assert model.y_decoder is not None
    ids, log_probs = [model.tokenizer.bos_id], []
    with torch.no_grad():
        for _ in range(model.config.max_answer_tokens - 1):
            scores = model.y_decoder(embedding[None], torch.tensor([ids]))[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            log_probs.append(float(scores.max()))
            if ids[-1] == model.tokenizer.eos_id:
                break
    return model.tokenizer.decode(ids).strip(), log_probs


def test_an_answer_is_what_the_parts_say(model: Mamba3Jepa, images: dict[str, Path]) -> None:
    set_threshold(model, 1.0)
    pictures = [images["red"], None, images["blue"]]
    answers = Answerer(model, known_answers=ANSWERS, top=2).ask_many(pictures, QUESTIONS)
    embedding, pooled, _ = model.observe(pictures, QUESTIONS)
    cosines = embedding @ model.embed_text(ANSWERS).T
    doubts = doubt_of(model, embedding)
    scores = torch.sigmoid(model.recursion.confusion_probe(pooled, doubts)).tolist()  # type: ignore[union-attr]
    for i, answer in enumerate(answers):
        text, log_probs = spoken(model, embedding[i])
        confidence = math.exp(sum(log_probs) / len(log_probs))
        assert answer.text == text
        assert answer.confidence == pytest.approx(confidence, rel=1e-4)
        assert answer.confusion == pytest.approx(scores[i], rel=1e-5)
        assert [name for name, _ in answer.nearest] == [ANSWERS[j] for j in cosines[i].argsort(descending=True)[:2]]
        assert answer.nearest[0][1] == pytest.approx(float(cosines[i].max()), rel=1e-5)
        assert (answer.confused, answer.memory_used, answer.warnings) == (False, None, ())
        assert (answer.threshold, answer.signal, answer.sure, answer.knowledge_used) == (1.0, None, True, False)


def doubt_of(model: Mamba3Jepa, embedding: torch.Tensor) -> torch.Tensor:
    """The floor keeps what rounding makes of a sure answer from mattering."""
    rows = [spoken(model, each)[1] for each in embedding]
    return torch.tensor([[math.log(1e-5 - sum(row) / len(row)), math.log(1e-5 - min(row))] for row in rows])


def test_the_signal_is_the_answer_where_the_state_alone_would_not_confuse(
    model: Mamba3Jepa, images: dict[str, Path]
) -> None:
    pictures = [images["red"], None, images["blue"]]
    embedding, pooled, _ = model.observe(pictures, QUESTIONS)
    assert model.recursion is not None
    probe = model.recursion.confusion_probe
    doubts = doubt_of(model, embedding)
    with torch.no_grad():
        surest = torch.full_like(doubts, math.log(1e-5))
        heard, by_state = (probe.score(pooled, each).tolist() for each in (doubts, surest))
    seen = set()
    for threshold in [0.0, *sorted(a + (b - a) / 2 for a, b in zip(heard, by_state, strict=True)), 1.0]:
        set_threshold(model, threshold)
        for answer, score, alone in zip(Answerer(model).ask_many(pictures, QUESTIONS), heard, by_state, strict=True):
            expected = None if score <= threshold else "state" if alone > threshold else "answer"
            assert answer.signal == expected
            assert answer.sure is (expected is None)
            seen.add(expected)
    assert {None, "state"} <= seen


def test_observe_gives_the_embedding_and_the_state_it_is_read_from(model: Mamba3Jepa, images: dict[str, Path]) -> None:
    pictures = [images["red"], None, images["blue"]]
    embedding, pooled, _ = model.observe(pictures, QUESTIONS, batch_size=2)
    torch.testing.assert_close(embedding, model.embed(pictures, QUESTIONS))
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(model.predictor.pred_head(pooled), dim=-1), embedding)


def test_turns_alone_and_together_agree(model: Mamba3Jepa, images: dict[str, Path], memory: KnowledgeMemory) -> None:
    set_threshold(model, 0.5)
    pictures = [images["red"], None, images["blue"]]
    together = Answerer(model, memory, ANSWERS).ask_many(pictures, QUESTIONS, batch_size=2)
    one_by_one = Answerer(model, memory, ANSWERS)
    for picture, question, expected in zip(pictures, QUESTIONS, together, strict=True):
        alone = one_by_one.ask(picture, question)
        assert (alone.text, alone.memory_used, alone.confused) == (
            expected.text,
            expected.memory_used,
            expected.confused,
        )
        assert alone.smoothed_confusion == pytest.approx(expected.smoothed_confusion, rel=1e-5)


def test_confusion_is_smoothed_over_the_turns_with_a_question(model: Mamba3Jepa, images: dict[str, Path]) -> None:
    answerer = Answerer(model, smooth=True)
    first, between, second = (
        answerer.ask(images[name], question)
        for name, question in (("red", QUESTIONS[0]), ("red", QUESTIONS[1]), ("white", QUESTIONS[0]))
    )
    assert between.smoothed_confusion == between.confusion != first.confusion
    assert first.confusion is not None
    assert second.confusion is not None
    assert first.smoothed_confusion == first.confusion
    average = 0.9 * first.confusion + 0.1 * second.confusion
    assert second.smoothed_confusion == pytest.approx(average, rel=1e-6)
    assert first.confusion != pytest.approx(second.confusion, abs=1e-4)
    # A threshold between the two scores of the second turn tells which of them is judged.
    set_threshold(model, (average + second.confusion) / 2)
    for smooth, judged in ((True, average), (False, second.confusion)):
        answerer = Answerer(model, smooth=smooth)
        _, answer = answerer.ask_many([images["red"], images["white"]], [QUESTIONS[0]] * 2)
        assert answer.confused == (judged > (average + second.confusion) / 2)
        is_before = judged > (average + second.confusion) / 2 > second.confusion
        assert (answer.signal == "before") == is_before
        assert (answer.signal is None) == (not answer.confused)
    answerer.reset()
    assert answerer.ask(images["white"], QUESTIONS[0]).smoothed_confusion == pytest.approx(second.confusion, rel=1e-6)


def test_averages_of_those_asked_longest_ago_are_forgotten(
    model: Mamba3Jepa, images: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answerers, "_AVERAGES", 2)
    answerer = Answerer(model)
    is_first = []
    for name, question in (("red", "a"), ("red", "b"), ("white", "a"), ("red", "c"), ("red", "a"), ("white", "b")):
        answer = answerer.ask(images[name], question)
        is_first.append(answer.smoothed_confusion == answer.confusion)
    assert is_first == [True, True, False, True, False, True], "b was asked longest ago when c came"


@pytest.fixture(params=["retriever", "predicted"])
def looking_up(request: pytest.FixtureRequest, model: Mamba3Jepa) -> Iterator[Mamba3Jepa]:
    """A model whose questions find texts by its retriever, or by the predicted embedding."""
    assert model.recursion is not None
    retriever = model.recursion.retriever
    if request.param == "predicted":
        model.recursion.retriever = None
    yield model
    model.recursion.retriever = retriever


def cosines_to(model: Mamba3Jepa, memory: KnowledgeMemory, picture: Path | None, question: str) -> torch.Tensor:
    """(M,): how near the texts of a memory are."""
    assert model.recursion is not None
    retriever = model.recursion.retriever
    with torch.no_grad():
        if retriever is None:
            return memory.embeddings @ model.embed([picture], [question])[0]
        return retriever.text(memory.embeddings) @ retriever.question(model.embed_text([question]))[0]


def test_when_confused_it_looks_up_and_answers_from_there(
    looking_up: Mamba3Jepa, images: dict[str, Path], memory: KnowledgeMemory
) -> None:
    model = looking_up
    pictures, questions = [images["red"], images["white"]], QUESTIONS[:2]
    embedding, pooled, _ = model.observe(pictures, questions)
    scores = Answerer(model).ask_many(pictures, questions)
    assert scores[0].confusion is not None
    assert scores[1].confusion is not None
    confused = int(scores[1].confusion > scores[0].confusion)
    set_threshold(model, (scores[0].confusion + scores[1].confusion) / 2)
    answers = Answerer(model, memory, ANSWERS).ask_many(pictures, questions)
    clear = answers[1 - confused]
    assert (clear.confused, clear.memory_used, clear.text) == (False, None, scores[1 - confused].text)
    answer = answers[confused]
    text = memory.texts[int(cosines_to(model, memory, pictures[confused], questions[confused]).argmax())]
    assert (answer.confused, answer.memory_used, answer.sure, answer.knowledge_used) == (True, text, True, False)
    recursion = model.recursion
    assert recursion is not None
    with torch.no_grad():
        state = recursion.injector(pooled[confused : confused + 1], model.embed_text([text]))[0]
        injected = F.normalize(model.predictor.pred_head(state), dim=-1)
    assert answer.text == spoken(model, injected)[0]
    assert answer.nearest[0][1] == pytest.approx(float((model.embed_text(ANSWERS) @ injected).max()), rel=1e-4)
    assert answer.nearest[0][1] != pytest.approx(
        float((model.embed_text(ANSWERS) @ embedding[confused]).max()), rel=1e-3
    )


def test_below_the_floor_nothing_is_injected(
    looking_up: Mamba3Jepa, images: dict[str, Path], memory: KnowledgeMemory
) -> None:
    """The floor itself lets through, the next number does not; knowledge that is given is not held back."""
    model = looking_up
    recursion = model.recursion
    assert recursion is not None
    set_threshold(model, 0.0)  # always confused
    pictures, questions = [images["red"], images["white"]], QUESTIONS[:2]
    without = Answerer(model, known_answers=ANSWERS).ask_many(pictures, questions)
    alone = Answerer(model, known_answers=ANSWERS).ask(pictures[0], questions[0])
    cosine = float(cosines_to(model, memory, pictures[0], questions[0]).max())
    try:
        for floor, used in ((cosine - 1e-5, True), (cosine + 1e-5, False)):
            recursion.memory_floor.fill_(floor)
            answer = Answerer(model, memory, ANSWERS).ask(pictures[0], questions[0])
            assert answer.confused
            assert (answer.memory_used is not None) == used
            assert answer.sure is False, "nothing is under a threshold of 0"
            assert (answer.confusion_after is not None) == used
            if answer.memory_used is not None:
                pooled = model.observe([pictures[0]], [questions[0]]).pooled
                told = recursion.knowledge_probe.score(pooled, model.embed_text([answer.memory_used]))
                assert answer.confusion_after == pytest.approx(answer.confusion * (1 - float(told.detach())), rel=1e-5)
                between = (answer.confusion_after + answer.confusion) / 2  # confused before, and no longer
                set_threshold(model, between)
                assert Answerer(model, memory, ANSWERS).ask(pictures[0], questions[0]).sure
                set_threshold(model, 0.0)
            assert (answer.nearest == alone.nearest) != used
        recursion.memory_floor.fill_(1.5)
        answers = Answerer(model, memory, ANSWERS).ask_many(pictures, questions)
        assert [a.memory_used for a in answers] == [None, None]
        assert [a.text for a in answers] == [a.text for a in without]
        given = Answerer(model, memory, ANSWERS).ask(pictures[0], questions[0], memory.texts[0])
        assert given.nearest != alone.nearest
        assert given.knowledge_used
        assert given.confusion_after is not None
    finally:
        recursion.memory_floor.fill_(NO_FLOOR)


def test_a_retriever_looks_nothing_up_without_a_question(
    model: Mamba3Jepa, images: dict[str, Path], memory: KnowledgeMemory
) -> None:
    set_threshold(model, 0.0)
    answers = Answerer(model, memory, ANSWERS).ask_many([images["red"]] * 2, [None, QUESTIONS[0]])
    assert [answer.memory_used is None for answer in answers] == [True, False]


def test_knowledge_is_injected_where_the_model_is_confused_or_always(
    model: Mamba3Jepa, images: dict[str, Path]
) -> None:
    vector = model.embed_text(["the circle is red"])[0]
    plain = Answerer(model, known_answers=ANSWERS).ask(images["red"], QUESTIONS[0])
    for threshold, inject, used in ((1.0, "confused", False), (1.0, "always", True), (0.0, "confused", True)):
        set_threshold(model, threshold)
        answerer = Answerer(model, known_answers=ANSWERS, inject=inject)  # type: ignore[arg-type]
        by_text = answerer.ask(images["red"], QUESTIONS[0], knowledge="the circle is red")
        for knowledge in (vector, vector.tolist()):
            by_vector = answerer.ask(images["red"], QUESTIONS[0], knowledge=knowledge)
            assert by_vector.text == by_text.text
            assert dict(by_vector.nearest) == pytest.approx(dict(by_text.nearest), rel=1e-5)
        assert by_text.knowledge_used is used
        assert (by_text.nearest != plain.nearest) is used


def test_knowledge_that_does_not_fit(model: Mamba3Jepa, images: dict[str, Path], memory: KnowledgeMemory) -> None:
    width = model.config.embed_dim
    for knowledge, message in (
        ([0.5] * (width - 1), f"length {width - 1}, but this model takes length {width}"),
        (torch.zeros(1, width), "shape"),
        ([math.nan] * width, "not finite"),
        (" ", "empty"),
    ):
        with pytest.raises(UserError, match=message):
            Answerer(model).ask(images["red"], "Is there a square?", knowledge=knowledge)
    narrow = tiny_model(phase=3, recursion=RecursionConfig(knowledge_dim=5))
    assert Answerer(narrow).ask(images["red"], "Is there a square?", knowledge=[1.0] * 5).text is not None
    with pytest.raises(UserError, match="vectors of length 5"):
        Answerer(narrow).ask(images["red"], "Is there a square?", knowledge="yes")
    with pytest.raises(UserError, match="vectors of length 5"):
        Answerer(narrow, memory)
    for phase in (1, 2):
        with pytest.raises(UserError, match="phase 3"):
            Answerer(tiny_model(phase), known_answers=ANSWERS).ask(None, "Is there a square?", knowledge="yes")


def test_without_decoder_the_nearest_known_answer_is_the_answer(images: dict[str, Path]) -> None:
    model = tiny_model(phase=1)
    answer = Answerer(model, known_answers=ANSWERS).ask(images["red"], "What colour is the circle?")
    cosines = model.embed_text(ANSWERS) @ model.embed([images["red"]], ["What colour is the circle?"])[0]
    assert answer.text == answer.nearest[0][0] == ANSWERS[int(cosines.argmax())]
    assert answer.confidence == pytest.approx(float((cosines / 0.07).softmax(0).max()), rel=1e-4)
    assert (answer.confusion, answer.smoothed_confusion, answer.confused) == (None, None, None)
    with pytest.raises(UserError, match="`answers`"):
        Answerer(model)


def test_sampling_depends_on_the_turn_not_on_the_batch(model: Mamba3Jepa, images: dict[str, Path]) -> None:
    config = GenerationConfig(method="sample", temperature=2.0)
    turns = [images["red"]] * 4, [QUESTIONS[0]] * 4
    together = [answer.text for answer in Answerer(model, generation=config).ask_many(*turns)]
    answerer = Answerer(model, generation=config)
    assert [answerer.ask(*turn).text for turn in zip(*turns, strict=True)] == together
    assert len(set(together)) > 1


def test_a_script_the_tokenizer_has_not_seen(
    model: Mamba3Jepa, images: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    answerer = Answerer(model)
    answer = answerer.ask(images["red"], "какого цвета круг?")
    assert "the tokenizer has not seen this script" in answer.warnings[0]
    assert "has not seen this script" in caplog.text
    assert "the characters é" in answerer.ask(images["red"], "Is there a café?").warnings[0]
    (warning,) = answerer.ask(images["red"], 'Is "café" it\'s name?\n').warnings
    assert warning.startswith(
        '"Is \\"café\\" it\'s name?\\n": the tokenizer has not seen the characters é in training;'
    )


# The command line.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        phase: write_checkpoint(folder / f"phase{phase}_best.pt", tiny_model(phase), phase, answers=ANSWERS)
        for phase in (1, 2, 3)
    }


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_ask(phase: int, checkpoints: dict[int, Path], images: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    arguments = ["--checkpoint", str(checkpoints[phase]), "--image", str(images["red"])]
    assert main(["ask", *arguments, "What colour is the circle?", "Is there a square?", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    known = Answerer(tiny_model(phase), known_answers=ANSWERS)
    for values, question in zip(answers, ["What colour is the circle?", "Is there a square?"], strict=True):
        expected = known.ask(images["red"], question)
        assert (values["question"], values["text"], values["confused"]) == (question, expected.text, expected.confused)
        assert values["confidence"] == pytest.approx(expected.confidence, rel=1e-5)
        assert [item["text"] for item in values["nearest"]] == [text for text, _ in expected.nearest]
    assert main(["ask", *arguments, "[bold]Is there a square?"]) == 0
    shown = capsys.readouterr().out
    assert "[bold]Is there a square?" in shown
    assert ("confusion" in shown) == (phase == 3)


def test_what_would_steer_a_terminal_is_not_printed() -> None:
    assert printable("red \x1b[2J circle\n\t\u2028\u00e9 色") == "red \ufffd[2J circle   \u00e9 色"


def test_ask_without_question_describes_the_image(
    checkpoints: dict[int, Path], images: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    assert main(["ask", "--checkpoint", str(checkpoints[2]), "--image", str(images["red"])]) == 0
    assert "Describe the image." in capsys.readouterr().out


def test_ask_with_memory(
    checkpoints: dict[int, Path], images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tiny_model(3)
    set_threshold(model, 0.0)  # always confused
    checkpoint = write_checkpoint(tmp_path / "confused.pt", model, 3)
    texts, saved = tmp_path / "memory.txt", tmp_path / "memory.safetensors"
    texts.write_text("the circle is red\nthere is no square\n")
    arguments = ["ask", "--checkpoint", str(checkpoint), "--image", str(images["red"]), "Is there a square?"]
    said = []
    for extra in (["--memory", str(texts), "--save-memory", str(saved)], ["--memory", str(saved)]):
        assert main([*arguments, *extra, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    assert said[0][0]["memory_used"] in ("the circle is red", "there is no square")
    assert main([*arguments, "--memory", str(saved)]) == 0
    assert f"used: {said[0][0]['memory_used']}" in capsys.readouterr().out
    assert model.recursion is not None
    model.recursion.memory_floor.fill_(1.5)
    write_checkpoint(checkpoint, model, 3)
    assert main([*arguments, "--memory", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["memory_used"] is None
    assert main([*arguments, "--memory", str(saved)]) == 0
    assert "nothing near enough" in capsys.readouterr().out
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "not used" in shown
    assert "not sure: " in shown
    assert "over the threshold 0.00: this picture and question" in " ".join(shown.split())
    assert main([*arguments[:2], str(checkpoints[2]), *arguments[3:], "--memory", str(saved)]) == 2


def test_ask_with_a_knowledge_vector(
    checkpoints: dict[int, Path], images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    vector = tiny_model(3).embed_text(["the circle is red"])[0].tolist()
    np.save(tmp_path / "vector.npy", np.array(vector))
    (tmp_path / "vector.json").write_text(json.dumps(vector))
    arguments = ["ask", "--checkpoint", str(checkpoints[3]), "--image", str(images["red"]), "--json"]
    said = []
    for extra in (
        ["--knowledge", "the circle is red"],
        ["--knowledge-vector", str(tmp_path / "vector.npy")],
        ["--knowledge-vector", str(tmp_path / "vector.json")],
    ):
        assert main([*arguments, *extra]) == 0
        said.append(json.loads(capsys.readouterr().out)[0])
    assert said[0]["nearest"][0]["cosine"] == pytest.approx(said[1]["nearest"][0]["cosine"], rel=1e-5)
    assert said[1] == said[2]


def test_ask_with_bad_input(
    checkpoints: dict[int, Path], images: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    fake, empty, short, words, text = (tmp_path / name for name in ("a.png", "b.txt", "c.npy", "d.json", "e.npy"))
    claims, header, square = (tmp_path / name for name in ("f.npy", "g.npy", "h.npy"))
    fake.write_text("this is no image")
    empty.write_text("\n")
    np.save(short, np.zeros(3))
    words.write_text('["red"]')
    text.write_text("not numpy")
    claims.write_bytes(short.read_bytes().replace(b"(3,), }              ", b"(1000000000000000,), }"))
    header.write_bytes(short.read_bytes().replace(b"(3,), }", b"(3,, } "))
    np.save(square, np.zeros((3, 3)))
    model, image = ["--checkpoint", str(checkpoints[3])], ["--image", str(images["red"])]
    for arguments, message in (
        (["--checkpoint", str(tmp_path / "nowhere.pt"), *image, "x?"], "no checkpoint at"),
        ([*model, "--image", str(fake), "x?"], "not a readable image"),
        ([*model, "--image", str(tmp_path / "nowhere.png"), "x?"], "there is no such image file"),
        ([*model, *image, "  "], "is empty"),
        (model, "nothing to ask"),
        ([*model, *image, "x?", "--device", "toaster"], "--device toaster: not available here"),
        ([*model, *image, "x?", "--answers", str(empty)], "has no text"),
        ([*model, *image, "x?", "--memory", str(empty)], "has no text"),
        ([*model, *image, "x?", "--memory", str(tmp_path / "nowhere.safetensors")], "cannot read"),
        ([*model, *image, "x?", "--knowledge-vector", str(short)], "length 3, but this model takes length 32"),
        ([*model, *image, "x?", "--knowledge-vector", str(words)], "not a knowledge vector"),
        ([*model, *image, "x?", "--knowledge-vector", str(text)], "not a knowledge vector"),
        ([*model, *image, "x?", "--knowledge-vector", str(tmp_path / "nowhere.npy")], "cannot read"),
        ([*model, *image, "x?", "--knowledge-vector", str(claims)], "f.npy: not a knowledge vector (its header claims"),
        ([*model, *image, "x?", "--knowledge-vector", str(header)], "g.npy: not a knowledge vector"),
        ([*model, *image, "x?", "--knowledge-vector", str(square)], "its shape is (3, 3)"),
        ([*model, *image, "x?", "--knowledge", "a", "--knowledge-vector", str(short)], "exclude each other"),
        ([*model, *image, "x?", "--save-memory", "m.safetensors"], "needs a --memory"),
        ([*model, *image, "x?", "--beams", "3"], "beams has no effect with greedy"),
        ([*model, *image, "x?", "--method", "beam", "--beams", "999"], "beams is 999, but the model has only"),
        ([*model, *image, "x?", "--method", "sample", "--top-k", "50000"], "top_k is 50000, but the model has only"),
        ([*model, *image, "x?", "--top", "0"], "--top 0: must be at least 1"),
    ):
        assert main(["ask", *arguments]) == 2, arguments
        assert message in capfd.readouterr().err


@pytest.mark.parametrize("command", ["ask", "embed", "search", "classify"])
def test_help_does_not_load_torch(command: str) -> None:
    program = (
        "import sys; from mamba3_jepa.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as error: assert error.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program, command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--checkpoint" in result.stdout


def test_a_phase_1_run_leaves_the_answers_to_choose_from(
    images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--tiny", "--synthetic-scenes", "8", "--val-samples", "12", "--max-steps", "1", "--batch-size", "8"]
    assert main(["train-jepa", *arguments, "--output-dir", str(tmp_path / "run")]) == 0
    scenes = SceneSource("train", n_scenes=8, image_size=32)
    capsys.readouterr()
    arguments = ["--checkpoint", str(tmp_path / "run" / "phase1_best.pt"), "--image", str(images["red"])]
    assert main(["ask", *arguments, "What colour is the circle?", "--json", "--top", "99"]) == 0
    nearest = json.loads(capsys.readouterr().out)[0]["nearest"]
    assert {item["text"] for item in nearest} == {scenes.sample(int(i)).target for i in scenes.indices("question")}
