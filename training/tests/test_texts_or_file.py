"""What takes texts or one text file: the name of a file that is not there is no text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import tiny_model, write_checkpoint, write_images

from mamba3_jepa.cli.main import main
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.lines import texts_or_file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    Path("there.txt").write_text("a\nnone.txt\na/b\n")
    Path("there").write_text("c\n")
    Path("data").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["there.txt"], ["a", "none.txt", "a/b"]),
        (["there"], ["c"]),
        (["./there"], ["c"]),
        (["red"], ["red"]),
        (["red", "there", "red"], ["red", "there"]),
        (["data"], ["data"]),
        (["is it red and/or blue?"], ["is it red and/or blue?"]),
        (["n/a", "TV/monitor"], ["n/a", "TV/monitor"]),
        (["km/h"], ["km/h"]),
        (["it costs 3.50"], ["it costs 3.50"]),
        (["what is a .txt file?"], ["what is a .txt file?"]),
        (["x" * 5000], ["x" * 5000]),
        ([], []),
    ],
)
@pytest.mark.usefixtures("folder")
def test_texts_and_lines(given: list[str], expected: list[str]) -> None:
    assert texts_or_file(given, "label", "labels") == expected


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["none.txt"], "none.txt: there is no such file"),
        (["data/none"], "data/none: there is no such file"),
        (["/my data/none"], "/my data/none: there is no such file"),
        (["my none.CSV"], "my none.CSV: there is no such file"),
        (["data/"], "data/: it is no file"),
        (["there.txt", "there.txt"], "there.txt: a file must stand alone"),
        (["red", "none.json"], "none.json: there is no such file"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_names_of_files_are_no_texts(given: list[str], complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        texts_or_file(given, "label", "labels")
    assert str(refused.value).startswith(f"`labels` {complaint}; if it is the label itself, write it into a text file")


def test_a_pipe_is_no_file(folder: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    os.mkfifo("pipe.txt")
    with pytest.raises(UserError, match=r"`texts` pipe\.txt: it is no file"):
        texts_or_file(["pipe.txt"], "text", "texts")


def test_no_command_takes_a_missing_file_for_a_text(folder: Path, capfd: pytest.CaptureFixture) -> None:
    model = ["--checkpoint", str(write_checkpoint(folder / "x.pt", tiny_model(1), 1))]
    image = ["--images", str(write_images(folder / "images")["red"])]
    labels = ["--labels", "red", "blue"]
    for flag, arguments in (
        ("--texts", ["embed", *model, "--output", "x.npy"]),
        ("--labels", ["classify", *model, *image]),
        ("--template", ["classify", *model, *image, *labels]),
        ("--label-template", ["evaluate", *model]),
    ):
        assert main([*arguments, flag, "none.txt"]) == 2
        assert capfd.readouterr().err.startswith(f"error: {flag} none.txt: there is no such file; ")
    assert not Path("x.npy").exists()
