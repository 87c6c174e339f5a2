"""Both halves together: what Python exports, the Rust command reads, with the same numbers.

`make test` builds the command and names it in KORE_VLJEPA; without it these tests are skipped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fork_server import Program
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save_file
from tiny_export import build, export, save

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import Mamba3Config, RecursionConfig, preset

SCRIPTS = Path(__file__).parents[1] / "scripts"
DEFAULT_COMMAND = Path(__file__).parents[2] / "rust/target/release/kore-vljepa"
COMMAND = os.environ.get("KORE_VLJEPA") or (str(DEFAULT_COMMAND) if DEFAULT_COMMAND.exists() else None)
BOUND = 1e-4

pytestmark = pytest.mark.skipif(COMMAND is None, reason="the Rust command is not built: make rust")

# every kind of layer that the configuration allows, spread over the three backbones
LAYERS: dict[str, dict[str, Any]] = {
    "siso": {},
    "softplus_groups": {"a_activation": "softplus", "ngroups": 2},
    "full_rope_outnorm": {"rope_fraction": 1.0, "is_outproj_norm": True},
    "mimo": {"is_mimo": True, "mimo_rank": 3},
    "mimo_outnorm_groups": {
        "is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True, "ngroups": 4, "rope_fraction": 1.0,
    },
    "mlp": {},
    "mimo_mlp": {"is_mimo": True, "mimo_rank": 2},
}  # fmt: skip
MLP_DIMS = {"mlp": 100, "mimo_mlp": 128}
CASES = [(layer, "float32", True) for layer in LAYERS] + [
    ("siso", "float16", True), ("siso", "bfloat16", True), ("mimo", "bfloat16", False),
    ("softplus_groups", "float32", False), ("mlp", "bfloat16", True),
]  # fmt: skip
# layer, order, pooling, bidirectional, ANGN: every order and pooling, from one side and from both
PREDICTORS = [
    ("siso", "question_visual", "all", False, True),
    ("mlp", "question_visual_question", "question", False, True),
    ("siso", "question_visual", "attention", False, False),
    ("siso", "question_visual_question", "attention", False, True),
    ("mimo_mlp", "question_visual", "attention", True, False),
    ("mimo", "visual_question", "last", False, True),
    ("mlp", "visual_question", "all", True, True),
    ("softplus_groups", "question_visual", "question", True, True),
    ("mimo_mlp", "question_visual_question", "all", True, False),
    ("full_rope_outnorm", "question_visual_question", "last", True, True),
]

# what a golden file gives to a component; every other tensor is computed again
INPUTS = {
    "x_encoder": r"image_u8|clip",
    "predictor": r"visual_tokens|has_image|query_ids|query_mask",
    "y_encoder": r"ids|mask",
    "angn": r"gates\.\d+\.input",
    "y_decoder": r"embedding|ids",
    "recursion": (r"pooled|doubt|knowledge|previous_score|question_embedding|text_embedding|visual_tokens|has_image"),
    "images": r"image\..*\.file",
    "tokens": r"",
}


def rust(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert COMMAND is not None
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)


def exported(
    folder: Path, layer: str = "siso", dtype: str = "float32", angn: bool = True, phase: int = 3, **predictor: Any
) -> Path:
    """A tiny model with that kind of layer in every backbone, exported with all there is; beside it its checkpoint."""
    changes: dict[str, Any] = {}
    for name in ("predictor", "y_encoder", "y_decoder"):
        backbone = getattr(preset("tiny"), name)
        kind = Mamba3Config(**(dataclasses.asdict(backbone.layer) | LAYERS[layer]))
        own = predictor if name == "predictor" else {}
        changes[name] = dataclasses.replace(backbone, layer=kind, mlp_dim=MLP_DIMS.get(layer, 0), **own)
    recursion = dataclasses.replace(preset("tiny").recursion, tools=["memory", "calculator", "dictionary"])
    changes["recursion"] = recursion if angn else RecursionConfig(knowledge_dim=11)
    checkpoint = save(build(angn=angn, **changes), folder / "checkpoint.pt", phase)
    export(checkpoint, folder / "weights", golden=True, x_encoder=True, dtype=dtype, phase=phase)
    return folder / "weights"


@pytest.mark.parametrize(("layer", "dtype", "angn"), CASES)
def test_every_golden_tensor_of_every_variant(tmp_path: Path, layer: str, dtype: str, angn: bool) -> None:
    _assert_every_golden_tensor(exported(tmp_path, layer, dtype, angn), angn)


@pytest.mark.parametrize(("layer", "order", "pooling", "bidirectional", "angn"), PREDICTORS)
def test_every_golden_tensor_of_every_predictor(
    tmp_path: Path, layer: str, order: str, pooling: str, bidirectional: bool, angn: bool
) -> None:
    weights = exported(tmp_path, layer, angn=angn, order=order, pooling=pooling, bidirectional=bidirectional)
    _assert_every_golden_tensor(weights, angn)


def test_every_golden_tensor_of_a_predictor_that_pools(tmp_path: Path) -> None:
    weights = exported(tmp_path, visual_pool=2)
    assert json.loads((weights / "config.json").read_text())["model"]["predictor"]["visual_pool"] == 2
    _assert_every_golden_tensor(weights, angn=True)
    embed = ["embed", "--image-dir", str(_pictures(tmp_path)), "--output"]
    assert main([*embed, str(tmp_path / "python.safetensors"), "--checkpoint", str(tmp_path / "checkpoint.pt")]) == 0
    done = rust(*embed, tmp_path / "rust.safetensors", "--weights", weights)
    assert done.returncode == 0, done.stderr
    images = [load((tmp_path / f"{half}.safetensors").read_bytes())["images"] for half in ("python", "rust")]
    assert torch.allclose(*images, atol=1e-5)


def _assert_every_golden_tensor(weights: Path, angn: bool) -> None:
    done = rust("verify", weights, "--json")
    assert done.returncode == 0, done.stderr or done.stdout
    found = {row["component"]: row for row in json.loads(done.stdout)["components"]}
    golden = {path.stem: path for path in (weights / "golden").glob("*.safetensors")}
    assert set(found) == set(golden)
    assert set(found) == set(INPUTS) - (set() if angn else {"angn"})
    for name, path in golden.items():
        with safe_open(path, framework="pt") as file:
            computed = [key for key in file.keys() if not re.fullmatch(INPUTS[name], key)]  # noqa: SIM118
        assert found[name]["tensors"] == len(computed), name
        if name != "images":  # lossy pictures have a bound of their own
            assert found[name]["difference"] <= BOUND, found[name]


@pytest.mark.parametrize("phase", [1, 2])
def test_earlier_phases(tmp_path: Path, phase: int) -> None:
    done = rust("verify", exported(tmp_path, phase=phase))
    assert done.returncode == 0, done.stderr or done.stdout


def test_texts_shorter_than_what_is_traced_of_a_layer(tmp_path: Path) -> None:
    """The first tokens of a sample end with the sample, not somewhere in the next."""
    checkpoint = save(build(max_answer_tokens=2, max_query_tokens=2), tmp_path / "checkpoint.pt", 3)
    export(checkpoint, tmp_path / "weights", golden=True, x_encoder=True, phase=3)
    done = rust("verify", tmp_path / "weights")
    assert done.returncode == 0, done.stderr or done.stdout


def test_verify_finds_a_wrong_number(tmp_path: Path) -> None:
    weights = exported(tmp_path)
    path = weights / "golden" / "y_decoder.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["logits"][0, 0, 0] += 0.01 * tensors["logits"].norm()
    save_file(tensors, path, metadata)
    done = rust("verify", weights)
    assert done.returncode == 1
    assert "logits" in done.stdout


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    weights = exported(tmp_path)
    for damage in ("flip", "cut", "swap", "remove"):
        folder = tmp_path / damage
        shutil.copytree(weights, folder)
        path = folder / "y_encoder.safetensors"
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[-1] ^= 1
            path.write_bytes(content)
        elif damage == "cut":
            path.write_bytes(content[:-8])
        elif damage == "swap":
            shutil.copy(folder / "predictor.safetensors", path)
        else:
            path.unlink()
        done = rust("ask", "--weights", folder, "is there a red square?")
        assert done.returncode == 2, damage
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "y_encoder.safetensors" in done.stderr, damage


CLASSIFY = ["classify", "--images", "x.png", "--labels", "a", "b"]
SAMPLE = ["ask", "x", "--method", "sample"]
BEAM = ["ask", "x", "--method", "beam"]


@pytest.mark.parametrize(
    "arguments",
    [
        *([*CLASSIFY, f"--temperature={value}"] for value in ("inf", "-inf", "nan", "0", "-1", "1e39", "1e-46")),
        *([*SAMPLE, f"--temperature={value}"] for value in ("inf", "nan", "-0.5")),
        *([*SAMPLE, f"--top-p={value}"] for value in ("nan", "0", "1.5")),
        *([*SAMPLE, f"--top-k={value}"] for value in ("0", "-1", "1000000001")),
        *(
            ["ask", "x", "--method", "beam", flag]
            for flag in ("--beams=0", "--length-penalty=nan", "--length-penalty=inf")
        ),
        *(["ask", "x", f"--max-tokens={value}"] for value in ("0", "1000000001")),
        ["ask", "x", "--top=0"],
        [*CLASSIFY, "--top=1000000001"],
        [*CLASSIFY, "--batch-size=0"],
        ["ask", "x", "--beams=2"],
        ["agent"],
        *(["agent", "x", f"--max-rounds={value}"] for value in ("-1", "101")),
        ["agent", "x", "--image", "none.png"],
        ["agent", "x", "--tools", "none.json"],
    ],
)
def test_both_refuse_a_setting_in_the_same_words(arguments: list[str], capfd: pytest.CaptureFixture) -> None:
    """How much is too much aside: of beams, tokens and batches Python refuses less than Rust does."""
    assert main([*arguments, "--checkpoint", "none.pt"]) == 2
    said = re.sub(r" and at most \d+", "", capfd.readouterr().err)
    done = rust(*arguments, "--weights", "none")
    assert (done.returncode, re.sub(r" and at most \d+", "", done.stderr)) == (2, said)


@pytest.mark.parametrize(
    ("content", "is_word_for_word"),
    [
        ("{", False),
        ("[]", False),
        ("{}", False),
        ('{"tools": {"a": []}}', False),
        ('{"tools": {"a": {"command": []}}}', False),
        ('{"tools": {"a": {"command": "x y"}}}', False),
        ('{"tools": {"a": {"command": ["x"], "timeout": 0}}}', False),
        ('{"tools": {"a": {"command": ["x"], "timeout": 86401}}}', False),
        ('{"tools": {"a": {"command": ["x"], "timeout": null}}}', False),
        ('{"tools": {"a": {"command": ["x"], "max_output": 7.0}}}', False),
        ('{"tools": {"a": {"command": ["x"], "max_output": -1}}}', False),
        ('{"tools": {"a": {"command": ["x"], "shell": true}}}', False),
        ('{"tools": {"a": {"entry_point": 3}}}', False),
        ('{"tools": {"a": {}}}', True),
        ('{"tools": {"a": {"command": ["x"], "entry_point": "m:f"}}}', True),
        ('{"tools": {"memory": {"command": ["x"]}}}', True),
        ('{"tools": {"": {"command": ["x"]}}}', True),
    ],
)
def test_both_refuse_a_file_of_tools(
    tmp_path: Path, content: str, is_word_for_word: bool, capfd: pytest.CaptureFixture
) -> None:
    """At the same field; what is wrong with it pydantic says in its own words."""
    path = tmp_path / "tools.json"
    path.write_text(content)
    asked = ["agent", "x", "--tools", str(path)]
    assert main([*asked, "--checkpoint", "none.pt"]) == 2
    done = rust(*asked, "--weights", "none")
    said, other = (text.replace('"', "'") for text in (capfd.readouterr().err, done.stderr))
    assert done.returncode == 2
    if is_word_for_word:
        assert other == said
    else:
        assert other.split(": ")[:3] == said.split(": ")[:3]


def test_python_functions_are_tools_of_python_only(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text('{"tools": {"catalogue": {"entry_point": "catalogue:look_up"}}}')
    done = rust("agent", "x", "--tools", path, "--weights", "none")
    said = f"error: {path}: tools.catalogue.entry_point: Python functions run in Python; give a command\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_both_say_which_images_they_leave_aside(tmp_path: Path) -> None:
    weights = exported(tmp_path, phase=1)
    photos = tmp_path / "photos"
    shutil.copytree(_pictures(tmp_path), photos)
    for name in ("a.tif", "b.TIF", "c.heic", "d.tar.gz", "e.x.zip", "f.mp4", ".g.tif", "h.json", "i.txt", "j"):
        (photos / name).write_bytes(b"")
    command = ["search", "red", "--image-dir", str(photos), "--json"]
    python = Program([*command, "--checkpoint", str(tmp_path / "checkpoint.pt")])
    stdout, stderr = (text.decode() for text in python.outputs())
    assert python.returncode == 0, stderr
    expected = f"WARNING {photos}: not read: 2 .tif, 1 .heic (no decoder for them: convert them to JPEG or PNG); 1 .mp4"
    assert stderr.startswith(expected)
    done = rust(*command, "--weights", weights)
    assert (done.returncode, done.stderr) == (0, stderr)
    python_images, rust_images = (
        [row["image"] for row in json.loads(text)["results"]] for text in (stdout, done.stdout)
    )
    assert rust_images == python_images


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_both_write_into_a_pipe_and_a_device(tmp_path: Path) -> None:
    weights = exported(tmp_path, phase=1)
    pipe, device = tmp_path / "pipe.safetensors", tmp_path / "device.safetensors"
    os.mkfifo(pipe)
    device.symlink_to("/dev/null")
    texts = ["embed", "--texts", "red", "blue"]
    assert COMMAND is not None

    def by_python(output: Path) -> Program:
        return Program([*texts, "--checkpoint", str(tmp_path / "checkpoint.pt"), "--output", str(output)])

    def by_rust(output: Path) -> subprocess.Popen[bytes]:
        command = [COMMAND, *texts, "--weights", str(weights), "--output", str(output)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    read = []
    for start in (by_python, by_rust):
        running = start(pipe)
        read.append(load(pipe.read_bytes())["texts"])
        assert running.wait() == 0
        assert start(device).wait() == 0
    assert torch.allclose(*read, atol=1e-5)
    assert pipe.is_fifo()
    assert device.is_char_device()


def _pictures(folder: Path) -> Path:
    assert main(["prepare", "scenes", "--output", str(folder / "scenes"), "--scenes", "2", "--image-size", "32"]) == 0
    return folder / "scenes" / "images"


def test_a_fresh_export_is_opened_without_a_word(tmp_path: Path) -> None:
    done = rust("ask", "--weights", exported(tmp_path), "is there a red square?")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_memory_goes_through_both_halves(tmp_path: Path) -> None:
    model = build()
    assert model.recursion is not None
    model.recursion.confusion_probe.threshold.fill_(0.0)  # confused by everything
    model.recursion.episode_floor.fill_(0.9)
    checkpoint = save(model, tmp_path / "checkpoint.pt", 3)
    export(checkpoint, tmp_path / "weights", x_encoder=True)
    first, second = sorted(_pictures(tmp_path).iterdir())[:2]
    files = {half: tmp_path / f"{half}.safetensors" for half in ("python", "rust")}

    def python(*arguments: str | Path) -> str:
        program = Program([*map(str, arguments)])
        stdout, stderr = program.outputs()
        assert program.returncode == 0, stderr
        return stdout.decode()

    def by_rust(*arguments: str | Path) -> str:
        done = rust(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    question = 'what "color" is größer?'
    for half, run, name in (
        ("python", python, ["--checkpoint", checkpoint]), ("rust", by_rust, ["--weights", tmp_path / "weights"]),
    ):  # fmt: skip
        seen = ["--image", first, "--question", question, "--answer", "rot\t\x1b"]
        said = run("memory", "add", files[half], *name, "a fact", "größer", *seen)
        assert said == f"{files[half]}: 3 added, 0 changed; now 2 facts and 1 episode\n"
        run("ask", *name, "--image", second, question, "--memory", files[half], "--remember", "blue")
    headers = []
    for path in files.values():
        content = path.read_bytes()
        headers.append(content[: 8 + int.from_bytes(content[:8], "little")])
    assert headers[0] == headers[1], "texts, digests and shapes are the same"
    numbers = [load(path.read_bytes()) for path in files.values()]
    for name in numbers[0]:
        assert torch.allclose(numbers[0][name], numbers[1][name], atol=1e-5), name
    for run, file in ((python, files["rust"]), (by_rust, files["python"])):
        listed = json.loads(run("memory", "list", file, "--json"))
        assert [entry["kind"] for entry in listed] == ["fact", "fact", "episode", "episode"]
        assert listed[3]["text"] == f"{question} blue"
    answers = [
        json.loads(run("ask", *name, "--image", second, question, "--memory", file, "--json"))[0]
        for run, name, file in (
            (python, ["--checkpoint", checkpoint], files["rust"]),
            (by_rust, ["--weights", tmp_path / "weights"], files["python"]),
        )
    ]
    for answer in answers:
        assert (answer["memory_used"], answer["memory_kind"]) == (f"{question} blue", "episode")
    assert list(answers[0]) == list(answers[1])
    assert answers[0]["text"] == answers[1]["text"]
    told = [run("memory", "remove", files["python"], "--text", f"{question} blue") for run in (by_rust,)]
    assert told == [f"removed episode 4: {question} blue\n{files['python']}: 2 facts and 1 episode\n"]
    for arguments in (["remove", files["python"], "9"], ["remove", files["python"], "0"], ["list", "x.txt"],
                      ["remove", files["python"], "--text", "x"], ["add", "m.safetensors", "red", " "],
                      ["add", "m.safetensors"], ["add", "m.safetensors", "--answer", "a"]):  # fmt: skip
        wrong = [*map(str, arguments)]
        made = [] if wrong[0] != "add" else ["--checkpoint", str(checkpoint)]
        by_python = Program(["memory", *wrong, *made]).said()
        made = [] if wrong[0] != "add" else ["--weights", str(tmp_path / "weights")]
        other = rust("memory", *wrong, *made)
        assert (other.returncode, other.stderr.replace('"', "'")) == (2, by_python.replace('"', "'")), wrong


@pytest.mark.parametrize(
    "command", [["search", "red", "--top", "5"], ["classify", "--labels", "red", "blue", "--question", "what is it?"]]
)
def test_both_find_label_and_doubt_alike(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    model = build()
    assert model.recursion is not None
    assert model.recursion.confusion_probe.hears_answer
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        colours = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((48, 48), Image.Resampling.NEAREST).save(photos / f"{i}.png")
    command = [*command, "--image-dir", str(photos)]

    def by_python(*flags: str) -> str:
        assert main([*command, "--checkpoint", str(tmp_path / "checkpoint.pt"), *flags]) == 0
        return capsys.readouterr().out

    def rows(found: Any) -> list[dict[str, Any]]:
        return found["results"] if command[0] == "search" else found

    save(model, tmp_path / "checkpoint.pt", 3)
    scores = sorted(row["confusion"] for row in rows(json.loads(by_python("--json"))))
    middle = len(scores) // 2
    assert scores[middle] - scores[middle - 1] > 1e-4
    model.recursion.confusion_probe.threshold.fill_((scores[middle] + scores[middle - 1]) / 2)
    export(save(model, tmp_path / "checkpoint.pt", 3), tmp_path / "weights", x_encoder=True)

    done = rust(*command, "--weights", tmp_path / "weights", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found, expected = json.loads(done.stdout), json.loads(by_python("--json"))
    _assert_close(found, expected)
    assert {row["confused"] for row in rows(found)} == {True, False}
    assert {row["signal"] for row in rows(found) if not row["confused"]} == {None}
    shown = rust(*command, "--weights", tmp_path / "weights").stdout
    assert shown.count("not sure") == sum(row["confused"] for row in rows(found)) > 0
    # the third decimal may be rounded differently; the numbers are compared above
    words = [re.sub(r"\d\.\d+", "#", text.replace("─", "")).split() for text in (shown, by_python())]
    assert words[0] == words[1]


def _assert_close(found: Any, expected: Any) -> None:
    """The same JSON, keys in their order, but for how numbers are rounded."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            _assert_close(*pair)
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


def test_every_flag_its_readme_names_exists() -> None:
    commands = (
        "ask",
        "agent",
        "embed",
        "search",
        "classify",
        "inspect",
        "verify",
        "bench",
        "memory add",
        "memory list",
        "memory remove",
    )
    helps = "".join(rust(*command.split(), "--help").stdout for command in commands)
    readme = (Path(__file__).parents[2] / "rust" / "README.md").read_text()
    others = {"--release", "--example", "--open", "--golden", "--checkpoint"}  # cargo's and Python's
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme)) - others
    assert "--weights" in flags
    assert sorted(flag for flag in flags if not re.search(rf"{flag}\b", helps)) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini that has trained a little in all three phases, its export, and scenes to ask about."""
    folder = tmp_path_factory.mktemp("trained")
    common = ["--synthetic-scenes", "96", "--val-samples", "48", "--batch-size", "16", "--workers", "0"]
    for command in (
        ["train-jepa", "--preset", "mini", "--angn-enabled", "--max-steps", "60", "--output-dir", f"{folder}/1",
         *common],
        ["train-decoder", "--phase1-checkpoint", f"{folder}/1/phase1_best.pt", "--max-steps", "60", "--output-dir",
         f"{folder}/2", *common],
        ["train-agent", "--phase2-checkpoint", f"{folder}/2/phase2_best.pt", "--max-steps", "40", "--output-dir",
         f"{folder}/3", *common],
        ["export", "--checkpoint", f"{folder}/3/phase3_best.pt", "--output", f"{folder}/weights", "--x-encoder",
         "--golden"],
        ["prepare", "scenes", "--output", f"{folder}/scenes", "--scenes", "25"],
    ):  # fmt: skip
        assert main(command) == 0
    (folder / "facts.txt").write_text("red\nblue\nthere is no star\nthe circle is green\n", encoding="utf-8")
    return folder


def test_a_trained_mini_verifies(trained: Path) -> None:
    done = rust("verify", trained / "weights")
    assert done.returncode == 0, done.stderr or done.stdout


@pytest.mark.parametrize("memory", [False, True])
def test_both_commands_give_the_same_answers(trained: Path, memory: bool) -> None:
    script = _script("side_by_side")
    pairs = script.side_by_side(
        script.Settings(
            checkpoint=trained / "3/phase3_best.pt",
            weights=trained / "weights",
            data_dir=trained / "scenes",
            memory=trained / "facts.txt" if memory else None,
        )
    )
    assert len(pairs) == 50
    assert [(pair.image, pair.differences) for pair in pairs if pair.differences] == []
    assert len({pair.python["text"] for pair in pairs}) > 1
    assert any(pair.python["nearest"] for pair in pairs)


@pytest.mark.skipif(os.name != "posix", reason="the tools are a shell's")
@pytest.mark.parametrize("knows_tools", [True, False])
def test_both_agents_take_the_same_steps(tmp_path: Path, knows_tools: bool) -> None:
    tools = ["memory", "counter", "oracle", "broken"] if knows_tools else []
    model = build(recursion=dataclasses.replace(preset("tiny").recursion, tools=tools, weighs_knowledge=True))
    recursion = model.recursion
    assert recursion is not None
    assert recursion.knowledge_probe is not None
    with torch.no_grad():
        recursion.knowledge_probe.linear.bias.fill_(-0.8)
        recursion.confusion_probe.threshold.fill_(0.15)
        recursion.memory_floor.fill_(-1.0)
    checkpoint = save(model, tmp_path / "checkpoint.pt", 3)
    export(checkpoint, tmp_path / "weights", x_encoder=True)
    _pictures(tmp_path)
    (tmp_path / "facts.txt").write_text("the circle is red\nthere is no star\n")
    commands = {
        "counter": ["sh", "-c", 'echo "  ${#1} letters"; echo', "sh", "{question}"],
        "broken": ["sh", "-c", 'echo first >&2; echo "$1: no such thing" >&2; exit 3', "sh", "{image}"],
        "oracle": ["echo", "größer"],
    }
    path = tmp_path / "tools.json"
    path.write_text(json.dumps({"tools": {name: {"command": command} for name, command in commands.items()}}))
    script = _script("side_by_side")
    pairs = script.side_by_side(
        script.Settings(
            checkpoint=checkpoint, weights=tmp_path / "weights", data_dir=tmp_path / "scenes", questions=4,
            memory=tmp_path / "facts.txt", tools=path,
        )
    )  # fmt: skip
    assert [(pair.image, pair.differences) for pair in pairs if pair.differences] == []
    steps = [step for pair in pairs for step in pair.rust["trace"]]
    assert len({pair.rust["stopped"] for pair in pairs}) > 1, "the questions ask for different things"
    assert {step["kept"] for step in steps if step["step"] == "inject"} == {True, False}
    assert any(step.get("error") for step in steps)


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
