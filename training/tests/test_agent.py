"""The agent's steps against the parts it is made of, and `mamba3-jepa agent` through its entry point."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny import ANSWERS, tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.agent import Agent, Call, Injection, Observation
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.inference.memory import KnowledgeMemory
from mamba3_jepa.inference.tools import ToolError, ToolRegistry
from mamba3_jepa.models.recursion import Recursion
from mamba3_jepa.models.vljepa import Mamba3Jepa

NAMES = ["abacus", "memory", "oracle"]
QUESTION = "What colour is the circle?"


def agent_model(tools: list[str] = NAMES) -> Mamba3Jepa:
    model = tiny_model(phase=3)
    config = dataclasses.replace(model.config.recursion, tools=tools, weighs_knowledge=True)
    model.config = model.config.replace(recursion=config)
    torch.manual_seed(3)
    model.recursion = Recursion(
        model.config.predictor.layer.d_model,
        model.config.embed_dim,
        model.config.knowledge_dim,
        config,
        model.config.episode_dim,
    )
    torch.nn.init.normal_(model.recursion.injector.projection.weight)
    return model.eval()


@pytest.fixture
def model() -> Mamba3Jepa:
    return agent_model()


def prefer(model: Mamba3Jepa, logits: list[float]) -> list[float]:
    """Make the selector give these logits for every state; the probabilities."""
    assert model.recursion is not None
    selector = model.recursion.tool_selector
    assert selector is not None
    with torch.no_grad():
        selector.linear.weight.zero_()
        selector.linear.bias.copy_(torch.tensor(logits))
    return torch.tensor(logits).softmax(0).tolist()


def judge(model: Mamba3Jepa, logit: float, threshold: float) -> float:
    """Make everything that is told answer with this logit; its probability."""
    assert model.recursion is not None
    probe = model.recursion.knowledge_probe
    assert probe is not None
    with torch.no_grad():
        probe.linear.weight.zero_()
        probe.linear.bias.fill_(logit)
    model.recursion.confusion_probe.threshold.fill_(threshold)
    return float(torch.sigmoid(torch.tensor(logit)))


def says(text: str, asked: list[tuple[str | None, str | None]] | None = None):
    def tool(question: str | None, image: str | None) -> str:
        if asked is not None:
            asked.append((question, image))
        return text

    return tool


def fails(question: str | None, image: str | None) -> str:
    raise ToolError("it broke")


def test_who_is_not_confused_calls_nothing(model: Mamba3Jepa, images: dict[str, Path]) -> None:
    judge(model, 5.0, threshold=1.0)
    asked: list[tuple[str | None, str | None]] = []
    found = Agent(Answerer(model), ToolRegistry({"abacus": says("three", asked)})).run(images["red"], QUESTION)
    assert (found.stopped, found.tools, asked) == ("sure", [], [])
    answer = Answerer(model).ask(images["red"], QUESTION)
    assert found.answer == answer
    assert found.trace == [
        Observation(
            answer=answer.text, confidence=answer.confidence, confusion=answer.confusion, threshold=1.0, sure=True,
            signal=None,
        )
    ]  # fmt: skip


def test_the_likeliest_tool_is_called_and_what_it_says_injected(model: Mamba3Jepa, images: dict[str, Path]) -> None:
    probabilities = prefer(model, [0.0, 3.0, 1.0])  # the memory is not there
    first = Answerer(model).ask(images["red"], QUESTION)
    assert first.confusion is not None
    answers = judge(model, 5.0, threshold=first.confusion / 2)
    asked: list[tuple[str | None, str | None]] = []
    registry = ToolRegistry({"abacus": says("three"), "oracle": says("  red\n", asked)})
    found = Agent(Answerer(model), registry).run(images["red"], QUESTION)
    assert asked == [(QUESTION, str(images["red"].absolute()))]
    assert (found.stopped, found.tools) == ("sure", ["oracle"])
    observed, call, injection, again = found.trace
    assert isinstance(observed, Observation)
    assert not observed.sure
    assert observed.signal is not None
    assert call == Call(tool="oracle", probability=pytest.approx(probabilities[2]), result="red", error=None)
    assert injection == Injection(knowledge="red", answers=pytest.approx(answers), kept=True)
    assert isinstance(again, Observation)
    told = Answerer(model).ask(images["red"], QUESTION, "red")
    assert (again.answer, again.sure, again.signal) == (told.text, True, None)
    assert again.confusion == pytest.approx(first.confusion * (1 - answers), rel=1e-5)
    assert told.confusion_after == pytest.approx(again.confusion, rel=1e-5)


def test_what_does_not_answer_is_put_back_and_the_next_tool_called(model: Mamba3Jepa, images: dict[str, Path]) -> None:
    prefer(model, [1.0, 0.0, 0.5])
    judge(model, -3.0, threshold=0.0)
    registry = ToolRegistry({"abacus": says("three"), "oracle": says("four")})
    memory = KnowledgeMemory.build(model, ["the circle is red"])
    found = Agent(Answerer(model, memory), registry).run(images["red"], QUESTION)
    assert found.tools == ["abacus", "oracle", "memory"]
    assert [step.kept for step in found.trace if isinstance(step, Injection)] == [False] * 3
    assert found.stopped == "no tool"
    assert found.answer == Answerer(model).ask(images["red"], QUESTION)
    fewer = Agent(Answerer(model, memory), registry, max_rounds=2).run(images["red"], QUESTION)
    assert (fewer.tools, fewer.stopped) == (["abacus", "oracle"], "rounds")
    assert Agent(Answerer(model), registry, max_rounds=0).run(None, QUESTION).tools == []


def test_what_was_told_adds_up(model: Mamba3Jepa, images: dict[str, Path]) -> None:
    prefer(model, [1.0, 0.0, 0.5])
    answers = judge(model, 0.5, threshold=0.0)
    registry = ToolRegistry({"abacus": says("three"), "oracle": says("four")})
    found = Agent(Answerer(model), registry).run(images["red"], QUESTION)
    first, *_, last = [step for step in found.trace if isinstance(step, Observation)]
    assert last.confusion == pytest.approx((first.confusion or 0) * (1 - answers) ** 2, rel=1e-5)
    assert model.recursion is not None
    _, pooled, _ = model.observe([images["red"]], [QUESTION])
    for text in ("three", "four"):
        pooled = model.recursion.injector(pooled, model.embed_text([text]))
    expected = model.predictor.embed(pooled)
    shown = Answerer(model, known_answers=ANSWERS)
    nearest = Agent(shown, registry).run(images["red"], QUESTION).answer.nearest
    cosines = (expected @ model.embed_text(ANSWERS).T)[0].sort(descending=True)
    assert [name for name, _ in nearest] == [ANSWERS[i] for i in cosines.indices.tolist()][: len(nearest)]


def test_tools_that_fail_or_are_silent_or_unlikely_are_passed_over(model: Mamba3Jepa) -> None:
    prefer(model, [5.0, 0.0, 5.0])
    judge(model, 5.0, threshold=0.0)
    found = Agent(Answerer(model), ToolRegistry({"abacus": fails, "oracle": says(" \n"), "zoo": says("a")})).run(
        None, QUESTION
    )
    calls = [step for step in found.trace if isinstance(step, Call)]
    assert [(call.tool, call.result, call.error) for call in calls] == [
        ("abacus", None, "it broke"), ("oracle", None, None)
    ]  # fmt: skip
    assert found.stopped == "no tool", "the selector never learned of a zoo"
    assert len(found.trace) == 3


def test_the_same_twice_is_nothing_new(model: Mamba3Jepa) -> None:
    prefer(model, [1.0, 0.0, 0.5])
    judge(model, 0.5, threshold=0.0)
    found = Agent(Answerer(model), ToolRegistry({"abacus": says("four"), "oracle": says("four")})).run(None, QUESTION)
    assert (found.stopped, found.tools) == ("nothing new", ["abacus", "oracle"])
    assert sum(isinstance(step, Injection) for step in found.trace) == 1


def test_without_a_selector_tools_are_tried_in_their_order(images: dict[str, Path]) -> None:
    model = agent_model([])
    judge(model, -3.0, threshold=0.0)
    memory = KnowledgeMemory.build(model, ["the circle is red"])
    registry = ToolRegistry({"zoo": says("a"), "abacus": says("b")})
    found = Agent(Answerer(model, memory), registry).run(images["red"], QUESTION)
    assert found.tools == ["memory", "zoo", "abacus"]
    assert {call.probability for call in found.trace if isinstance(call, Call)} == {None}


def test_a_model_that_cannot_be_confused_is_no_agent() -> None:
    with pytest.raises(UserError, match="cannot know when to call a tool"):
        Agent(Answerer(tiny_model(phase=2)))
    with pytest.raises(UserError, match="`max_rounds` is -1"):
        Agent(Answerer(agent_model()), max_rounds=-1)


# --- the command ---


def test_the_command_shows_and_writes_the_trace(
    model: Mamba3Jepa, images: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    prefer(model, [0.0, 0.0, 2.0])
    judge(model, -3.0, threshold=0.0)
    path = write_checkpoint(tmp_path / "model.pt", model, phase=3)
    tools = {"abacus": {"command": ["echo", "three"]}, "oracle": {"command": ["sh", "-c", "exit 2"]}}
    (tmp_path / "tools.json").write_text(json.dumps({"tools": tools}))
    asked = ["agent", "--checkpoint", str(path), "--image", str(images["red"]), "--tools", str(tmp_path / "tools.json")]
    questions = [QUESTION, "Is there a square?"]
    assert main([*asked, *questions, "--json", "--trace", str(tmp_path / "trace.json"), "--device", "cpu"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert json.loads((tmp_path / "trace.json").read_text()) == printed
    assert [each["question"] for each in printed] == questions
    for each in printed:
        assert each["tools"] == ["oracle", "abacus"]
        assert each["stopped"] == "no tool"
        assert [step["step"] for step in each["trace"]] == ["observe", "call", "call", "inject"]
        assert each["trace"][1]["error"] == "it ended with 2"
    assert main([*asked, QUESTION, "--max-rounds", "1", "--device", "cpu"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "calls oracle" in shown
    assert "it ended with 2" in shown
    assert "not sure" in shown
    for wrong, message in (
        ([], "nothing to ask"),
        ([QUESTION, " "], "question 2 of 2 is empty"),
        ([QUESTION, "--trace", str(tmp_path)], "it is a folder"),
    ):
        assert main([*asked[:3], *wrong]) == 2
        assert message in " ".join(capfd.readouterr().err.split())
