"""Every number that a command takes has a range: what lies outside is refused when it is read, in one sentence."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from mamba3_jepa.cli.main import main
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings import bench, export, inference, prepare, training
from mamba3_jepa.settings.limits import Range, ranges
from mamba3_jepa.settings.training import Phase1Settings

SETTINGS = [
    value
    for module in (bench, export, inference, prepare, training)
    for value in vars(module).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == module.__name__
]
REQUIRED = {"checkpoint": Path("x.pt"), "output": Path("x.npy"), "labels": ("red",), "text": "red"}
NUMBERS = [(kind, name) for kind in SETTINGS for name in ranges(kind)]


def made(kind: type, name: str, value: Any) -> Any:
    """The settings with one number in its place: alone, or in a tuple."""
    by_name = {field.name: field for field in dataclasses.fields(kind)}
    given = {needed: REQUIRED[needed] for needed in REQUIRED.keys() & by_name.keys()}
    if isinstance(by_name[name].default, tuple):
        value = (value,)
    if name in ("temperature", "top_k", "top_p") and "method" in by_name:
        given["method"] = "sample"
    if name in ("beams", "length_penalty"):
        given["method"] = "beam"
    if name == "dt_min":
        given["dt_max"] = sys.float_info.max
    if name == "dt_max":
        given["dt_min"] = sys.float_info.min
    return kind(**given | {name: value})


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_number_has_a_range(kind: type) -> None:
    assert {name for name, hint in get_type_hints(kind).items() if is_number(hint)} == set(ranges(kind))


def is_number(hint: Any) -> bool:
    """An int or a float, beside None or in a tuple."""
    return hint in (int, float) or any(map(is_number, get_args(hint)))


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_what_lies_outside_is_refused_and_the_ends_are_not(kind: type, name: str) -> None:
    allowed = ranges(kind)[name]
    outside = [math.nan, math.inf, -math.inf]
    outside += [] if allowed.low == -math.inf else [allowed.low if allowed.open else allowed.low - 1, -(10**400)]
    outside += [] if allowed.high == math.inf else [allowed.high if allowed.open else allowed.high + 1, 10**400]
    for value in outside:
        with pytest.raises(UserError) as refused:
            made(kind, name, value)
        named = name if kind is inference.GenerationConfig else f"`{name}`"
        assert f"{named} " in str(refused.value)
        assert f"must be {allowed}" in str(refused.value)
    if name != "top_p":
        ends = [end for end in (allowed.low, allowed.high) if abs(end) < math.inf and not allowed.open]
        for value in ends:
            assert made(kind, name, value)


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (Range(1, 5), "at least 1 and at most 5"),
        (Range(0, 1, open=True), "greater than 0 and less than 1"),
        (Range(0, open=True), "finite and greater than 0"),
        (Range(0), "finite and at least 0"),
        (Range(), "finite"),
    ],
)
def test_a_range_says_what_it_holds(allowed: Range, text: str) -> None:
    assert str(allowed) == text
    assert allowed.complaint(math.nan) == f"must be {text}"
    assert allowed.complaint(0.5 if allowed.open else 1) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train-jepa", "--tiny", "--seed", "4294967296"],
            "--seed 4294967296: must be at least 0 and at most 4294967295",
        ),
        (["train-decoder", "--seed", "-1"], "--seed -1: must be at least 0 and at most 4294967295"),
        (["train-agent", "--lr", "nan"], "--lr nan: must be finite and greater than 0"),
        (["train-jepa", "--tiny", "--angn-sparsity-weight", "inf"], "--angn-sparsity-weight inf: must be finite"),
        (["train-jepa", "--batch-size", "9" * 30], "must be at least 1 and at most 65536"),
        (
            ["train-jepa", "--tiny", "--image-size", "1000000000"],
            "--image-size 1000000000: must be at least 1 and at most",
        ),
        (
            ["train-agent", "--knowledge-dim", "1000000000"],
            "--knowledge-dim 1000000000: must be at least 1 and at most",
        ),
        (["embed", "--checkpoint", "x.pt", "--output", "x.npy", "--batch-size", "100000"], "at most 65536"),
        (
            ["ask", "--checkpoint", "x.pt", "x", "--method", "beam", "--beams", "5000"],
            "beams is 5000, it must be at least 1 and at most 1000",
        ),
        (["lm", "--model", "x", "x", "--max-tokens", "1000000000"], "max_tokens is 1000000000, it must be at least 1"),
        (
            ["lm", "--model", "x", "x", "--method", "beam", "--beams", "1000", "--max-tokens", "10001"],
            "beams is 1000 and max_tokens 10001; a search remembers their product, which must be at most 10000000",
        ),
        (["bench", "layer", "--length", "1000000000"], "--length 1000000000: must be at least 1 and at most 1000000"),
        (["prepare", "scenes", "--output", "x", "--image-size", "1"], "--image-size 1: must be at least 16"),
        (["prepare", "scenes", "--output", "x", "--scenes", "0"], "--scenes 0: must be at least 1"),
        (["bench", "layer", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["bench", "parity", "--dt-min", "2"], "--dt-min 2.0: must not be above --dt-max 1.5"),
        (["bench", "parity", "--lr", "-inf"], "--lr -inf: must be finite and greater than 0"),
        (["evaluate", "--checkpoint", "x.pt", "--workers", "-1"], "--workers -1: must be at least 0"),
        (["ask", "--checkpoint", "x.pt", "x", "--max-tokens", "0"], "max_tokens is 0, it must be at least 1"),
    ],
)
def test_a_command_refuses_before_it_does_anything(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_seeds_at_both_ends_train(tmp_path: Path, seed: int) -> None:
    arguments = ["--tiny", "--cpu", "--synthetic-scenes", "8", "--val-samples", "6", "--max-steps", "1"]
    assert main(["train-jepa", *arguments, "--seed", str(seed), "--output-dir", str(tmp_path / "run")]) == 0


def test_memory_that_there_is_not_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    import mamba3_jepa.cli.main as command

    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator:\n can't allocate memory")):

        def fail(error: Exception = error, **_: object) -> None:
            raise error

        monkeypatch.setattr(command.app, "cli", fail)
        assert main([]) == 2
        said = capfd.readouterr().err
        assert said.startswith("error: out of memory: ")
        assert said.count("\n") == 1


def test_the_defaults_are_in_their_ranges_whatever_the_preset() -> None:
    for preset in ("small", "mini", "tiny"):
        assert Phase1Settings(preset=preset).resolved().batch_size  # type: ignore[arg-type]
