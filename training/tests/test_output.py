"""Output never ends in a traceback: closed pipes, any encoding of the terminal, any file name, any text."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import Program
from tiny import tiny_model, write_checkpoint, write_images

NAME = "a[/b] é 日"  # markup to rich, no ASCII, half of it no Latin-1
LABELS = ["réd", "[/red]", "日本"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mamba3_jepa.cli.main import main

    made = tmp_path_factory.mktemp("output") / NAME
    write_checkpoint(made / "[x]é.pt", tiny_model(3), 3, LABELS)
    assert main(["prepare", "scenes", "--output", str(made / "scenes"), "--scenes", "2", "--image-size", "32"]) == 0
    return made


def commands(folder: Path) -> dict[str, list[str]]:
    model, images = ["--checkpoint", str(folder / "[x]é.pt")], ["--image-dir", str(folder / "scenes")]
    return {
        "help": ["--help"],
        "help of a command": ["train-jepa", "--help"],
        "inspect": ["inspect", str(folder / "[x]é.pt")],
        "inspect as JSON": ["inspect", "--json", str(folder / "[x]é.pt")],
        "preset": ["inspect", "--preset", "tiny"],
        "prepare": ["prepare", "scenes", "--output", str(folder / f"more {os.getpid()} [/é]"), "--scenes", "1"],
        "classify": ["classify", *model, *images, "--labels", *LABELS],
        "classify as JSON": ["classify", "--json", *model, *images, "--labels", *LABELS],
        "search": ["search", *model, *images, "[/é] 日"],
        "search as JSON": ["search", "--json", *model, *images, "[/é] 日"],
        "embed": ["embed", *model, *images, "--output", str(folder / "[/é].npy")],
        "ask": ["ask", *model, "[/é] 日\x1b[31m"],
        "ask as JSON": ["ask", "--json", *model, "[/é] 日"],
        "evaluate": ["evaluate", *model, "--samples", "4", "--skip-generation"],
        "export": ["export", *model, "--output", str(folder / "[/weights] é")],
        "a wrong choice": ["train-jepa", "--preset", "[/é] 日"],
        "a wrong file": ["inspect", str(folder / "[/none] é\x1b[31m\udcff.pt")],
    }


ALL = list(commands(Path()))


def run(
    arguments: list[str], stdout: int | None = None, stderr: int | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    if "prepare" in arguments:
        arguments = [text.replace("more", f"more {environment} {stdout}".replace("/", "")) for text in arguments]
    program = Program(arguments, stdout=stdout, stderr=stderr, environment=environment, drawn=True)
    return subprocess.CompletedProcess(arguments, program.wait(), *program.outputs())


@pytest.mark.parametrize("name", ALL)
def test_a_terminal_that_only_knows_ascii(folder: Path, name: str) -> None:
    done = run(commands(folder)[name], PYTHONIOENCODING="ascii:strict")
    assert b"Traceback" not in done.stderr
    assert done.returncode == (2 if name.startswith("a wrong") else 0)
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout + done.stderr
    if name.endswith("JSON"):
        assert json.loads(done.stdout)
    if name == "classify as JSON":
        assert {label["label"] for label in json.loads(done.stdout)[0]["labels"]} == set(LABELS)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("latin-1", "inspect"), ("latin-1", "a wrong file"), ("latin-1", "prepare"), ("utf-8", "prepare")],
)
def test_other_terminals(folder: Path, encoding: str, name: str) -> None:
    done = run(commands(folder)[name], PYTHONIOENCODING=f"{encoding}:strict")
    assert b"Traceback" not in done.stderr
    assert done.returncode == (2 if name.startswith("a wrong") else 0)
    text = done.stdout.decode(encoding)
    if name == "prepare":
        assert text.count("[/é]") == 1, "a path is no markup"


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("a wrong")])
def test_a_pipe_that_nobody_reads(folder: Path, name: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(commands(folder)[name], writer)
    os.close(writer)
    assert done.returncode == 141
    assert not [word for word in (b"Traceback", b"BrokenPipe", b"Exception ignored") if word in done.stderr]


def test_a_socket_that_nobody_reads(folder: Path) -> None:
    reader, writer = socket.socketpair()
    reader.close()
    with writer:
        done = run(commands(folder)["inspect"], writer.fileno())
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_from_the_start(folder: Path, closed: str) -> None:
    line = f'exec "$0" -m mamba3_jepa.cli.main "$@" {closed}'
    arguments = ["sh", "-c", line, sys.executable, *commands(folder)["inspect as JSON"]]
    done = subprocess.run(arguments, capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    if ">&- " not in closed + " ":
        assert json.loads(done.stdout)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("name", "code"), [("a wrong file", 2), ("a wrong choice", 2), ("export", 0), ("inspect as JSON", 0)]
)
def test_messages_that_nobody_reads_change_nothing(folder: Path, name: str, code: int, full: bool) -> None:
    """The standard error is a pipe without a reader, or a file on a full disk."""
    if full and not Path("/dev/full").exists():
        pytest.skip("no full disk here")
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") if full else os.fdopen(writer, "wb") as stderr:
        done = run(commands(folder)[name], stderr=stderr.fileno())
    assert done.returncode == code
    if name == "inspect as JSON":
        assert json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="file names here are always text")
def test_every_file_may_have_a_name_that_is_no_text(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    from mamba3_jepa.cli.main import main

    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    pictures = write_images(folder / "images")
    small = ["--tiny", "--cpu", "--synthetic-scenes", "8", "--val-samples", "6", "--max-steps", "1"]
    (folder / "facts.txt").write_text("red\nblue\n")
    model = ["--checkpoint", str(folder / "3/phase3_last.pt")]
    ask = ["ask", *model, "--image", str(pictures["red"]), "x", "--memory"]
    for arguments in (
        ["train-jepa", *small, "--output-dir", str(folder / "1")],
        [
            "train-decoder",
            *small,
            "--phase1-checkpoint",
            str(folder / "1/phase1_last.pt"),
            "--output-dir",
            str(folder / "2"),
        ],
        [
            "train-agent",
            *small,
            "--phase2-checkpoint",
            str(folder / "2/phase2_last.pt"),
            "--output-dir",
            str(folder / "3"),
        ],
        [*ask, str(folder / "facts.txt"), "--save-memory", str(folder / "facts.safetensors")],
        [*ask, str(folder / "facts.safetensors")],
        ["export", *model, "--output", str(folder / "weights"), "--x-encoder", "--verify", "--golden"],
        ["inspect", str(folder / "weights/predictor.safetensors")],
        ["train-jepa", *small[1:], "--preset", "small", "--vit-checkpoint", str(folder / "none.pt")],
    ):
        expected = 2 if "small" in arguments else 0
        assert main(arguments) == expected, arguments
    said = "".join(capfd.readouterr())
    assert r"\xff\xfe" in said
    assert r"\udc" not in said
