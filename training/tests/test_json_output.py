"""`--json`: every command that has results prints them as one strict JSON value, with the keys that README.md names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from short import BENCH_DATA, BENCH_LAYER
from tiny import tiny_model, write_checkpoint, write_images
from tiny_language_model import language_model, write_language_model

from mamba3_jepa.bench.rust import Row, RustBenchmark
from mamba3_jepa.cli.commands import Commands
from mamba3_jepa.cli.main import app, main
from mamba3_jepa.cli.output import write_out
from mamba3_jepa.data.easy_vqa import EasyVqaSummary
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.inference.agent import Call, Injection, Observation
from mamba3_jepa.settings.language_model import LanguageModelSettings
from mamba3_jepa.training.frozen import frozen_outputs

README = Path(__file__).parents[1] / "README.md"
BENCH = ["--preset", "tiny", "--threads", "1"]


def documented() -> dict[str, set[str]]:
    """The keys by command, as the table has them."""
    section = README.read_text(encoding="utf-8").partition("### What `--json` prints")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)`([^|]*)\| (.+) \|$", section, flags=re.MULTILINE)
    return {command + rest.rstrip(): set(re.findall(r"`([a-z_]+)`", keys)) for command, rest, keys in rows}


def found(value: Any) -> set[str]:
    """The keys of an object or of all in a list, and of the objects in lists under them; not those of measures."""
    if isinstance(value, list):
        return set().union(*map(found, value))
    if not isinstance(value, dict):
        return set()
    below = [found(item) for item in value.values() if isinstance(item, list)]
    return {key for key in value if "/" not in key}.union(*below)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands work."""
    root = tmp_path_factory.mktemp("json")
    model = tiny_model(3)
    write_checkpoint(root / "x.pt", model, 3, ["red", "blue"])
    write_images(root / "images")
    for name in ("list", "clean"):
        source = SceneSource("val", n_scenes=4, image_size=model.config.vision.image_size)
        frozen_outputs(model, source, source.indices("target"), cache_dir=root / name, batch_size=4)
    write_language_model(root / "lm", language_model(), model.tokenizer)
    questions = [
        {
            "image": name,
            "question": "how many?",
            "answer": 1,
            "image_id": 1,
            "question_id": 1,
            "issimple": True,
            "data_source": "x",
        }
        for name in ("red.png", "no.png")
    ]
    (root / "tally.json").write_text(json.dumps(questions))
    (root / "tools.json").write_text('{"tools": {"oracle": {"command": ["echo", "red"]}}}')
    (root / "known.txt").write_text("red\nblue\n")
    return root


def commands(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Documented name and command line of all that need nothing more than what is here."""
    model, images = ["--checkpoint", str(root / "x.pt")], ["--images", str(root / "images/red.png")]
    yield "ask", ["ask", *model, "what?"]
    yield "agent", ["agent", *model, "what?", "--tools", str(root / "tools.json"), "--answers", str(root / "known.txt")]
    memory = str(root / "m.safetensors")
    yield "memory add", ["memory", "add", memory, *model, "a fact", "another"]
    yield "memory list", ["memory", "list", memory]
    yield "memory remove", ["memory", "remove", memory, "1"]
    yield "embed", ["embed", *model, *images, "--texts", "a", "--output", str(root / "x.safetensors")]
    yield "search", ["search", "red", *model, *images]
    yield "classify", ["classify", *model, *images, "--labels", "red", "blue"]
    yield "lm", ["lm", "--model", str(root / "lm"), "a", "--max-tokens", "2"]
    yield "evaluate", ["evaluate", *model, "--samples", "4"]
    yield "export", ["export", *model, "--output", str(root / "weights"), "--x-encoder", "--verify"]
    yield "inspect FILE", ["inspect", str(root / "x.pt")]
    yield "inspect FILE", ["inspect", str(root / "weights/predictor.safetensors")]
    yield "inspect --environment", ["inspect", "--environment"]
    yield "cache list", ["cache", "list", "--cache-dir", str(root / "list")]
    yield "cache clean", ["cache", "clean", "--cache-dir", str(root / "clean"), "--all"]
    yield "prepare scenes", ["prepare", "scenes", "--output", str(root / "scenes"), "--scenes", "2"]
    tally = ["--questions", str(root / "tally.json"), "--data-dir", str(root / "images")]
    yield "prepare of published data sets", ["prepare", "tallyqa", *tally, "--output", str(root / "tally.jsonl")]
    yield "bench layer", ["bench", "layer", *BENCH_LAYER, "--threads", "1", "--scaling-lengths", "16"]
    step = ["--steps", "1", "--warm-up", "0", "--batch-size", "4", "--workers", "0"]
    yield "bench step", ["bench", "step", *BENCH, *step]
    yield "bench data", ["bench", "data", *BENCH_DATA]
    yield "bench index", ["bench", "index", "--shards", "2", "--samples", "3", "--folder", str(root)]
    strings = ["--steps", "1", "--test-lengths", "4", "--test-strings", "4", "--threads", "1"]
    yield "bench parity", ["bench", "parity", *strings, "--output-dir", str(root / "parity")]
    yield "bench decode", ["bench", "decode", *BENCH, "--early", "4", "--late", "9", "--window", "2", "--rounds", "1"]
    yield "bench cache", ["bench", "cache", *BENCH, "--batches", "2", "--batch-size", "4"]


def test_the_keys_are_those_that_are_documented(folder: Path, capfd: pytest.CaptureFixture) -> None:
    keys: dict[str, set[str]] = {}
    for name, command in commands(folder):
        capfd.readouterr()
        assert main([*command, "--json"]) == 0, name
        printed = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
        keys.setdefault(name, set()).update(found(printed))
        if name.startswith("bench"):
            assert printed["settings"].get("device", "cpu") == "cpu", "where it was measured"
    keys["agent"] |= {field.name for kind in (Observation, Call, Injection) for field in dataclasses.fields(kind)}
    keys["prepare easy-vqa"] = {field.name for field in dataclasses.fields(EasyVqaSummary)}
    keys["bench rust"] = {field.name for kind in (RustBenchmark, Row) for field in dataclasses.fields(kind)}
    expected = documented()
    assert expected.pop("inspect --preset") == set(), "it names no keys"
    assert keys == expected


def targets(group: Commands) -> Iterator[str]:
    """The words that name each command."""
    for name, target in group._targets.items():
        if isinstance(target, Commands):
            yield from (f"{name} {each}" for each in targets(target))
        else:
            yield name


@pytest.mark.parametrize("name", [name for name in targets(app) if not name.startswith("train-")])
def test_every_command_with_results_has_it(name: str) -> None:
    settings = app.settings_of(name.split())
    assert settings is not None
    assert "json" in {field.name for field in dataclasses.fields(settings)}
    assert any(name == each or name.startswith(each.partition(" ")[0]) for each in documented())


def test_results_of_any_kind_are_printed(capsys: pytest.CaptureFixture) -> None:
    settings = LanguageModelSettings(model=Path("a\udcff"), texts=("x",))
    write_out({"settings": settings, 3: (Path("b"), float("nan"))})
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["3"] == ["b", None]
    assert (printed["settings"]["model"], printed["settings"]["texts"]) == (r"a\xff", ["x"])
    assert printed["settings"]["generation"]["method"] == "greedy"
