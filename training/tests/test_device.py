"""Where commands compute when nobody says where: on the best that there is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.device import TRAINING, best_device, checked_device
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings import bench, export, inference, language_model
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training.session import build_accelerator

AUTO = ("cuda", "mps", "cpu")
THERE_IS_NONE = "cuda:99"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine that has these, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in request.param)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in request.param)


@pytest.mark.parametrize(
    ("machine", "best", "best_for_training"),
    [((), "cpu", "cpu"), (("mps",), "mps", "cpu"), (("cuda",), "cuda", "cuda"), (("cuda", "mps"), "cuda", "cuda")],
    indirect=["machine"],
)
@pytest.mark.usefixtures("machine")
def test_the_best_device_there_is(best: str, best_for_training: str) -> None:
    assert best_device(AUTO) == best
    assert best_device(TRAINING) == best_for_training
    settings = Phase1Settings(precision="fp16")
    if best_for_training == "cpu":
        with pytest.raises(UserError, match="needs a CUDA GPU"):
            build_accelerator(settings)


def test_what_is_named_is_checked() -> None:
    assert checked_device("cpu") == checked_device("auto") == torch.device("cpu")
    for name, message in ((THERE_IS_NONE, "not available here; cpu always is"), ("xpu", "give auto or one of"),
                          ("gpu", "not available here; give auto, cpu, cuda, cuda:1 or mps")):  # fmt: skip
        with pytest.raises(UserError, match=f"`device` {name}: {message}"):
            checked_device(name)


def test_every_command_that_computes_chooses_by_itself() -> None:
    """All that have a device; `inspect` reads a file."""
    kinds = [
        kind
        for module in (bench, export, inference, language_model)
        for kind in vars(module).values()
        if dataclasses.is_dataclass(kind) and kind is not export.InspectSettings
    ]
    defaults = [field.default for kind in kinds for field in dataclasses.fields(kind) if field.name == "device"]
    assert len(defaults) >= 10
    assert set(defaults) == {"auto"}


def test_commands_go_where_auto_leads(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ["--checkpoint", str(write_checkpoint(tmp_path / "x.pt", tiny_model(1), 1, ["red", "blue"]))]
    text = ["embed", *checkpoint, "--texts", "red", "--output", str(tmp_path / "x.npy")]
    monkeypatch.setattr("mamba3_jepa.device.best_device", lambda among: THERE_IS_NONE)
    for arguments in (
        ["ask", *checkpoint, "what?"],
        ["evaluate", *checkpoint, "--samples", "4"],
        ["lm", "--model", str(tmp_path), "Once"],
        text,
        *(["bench", name, "--preset", "tiny"] for name in ("data", "decode", "cache")),
        ["bench", "layer"],
    ):
        assert main(arguments) == 2, arguments
        assert f"--device {THERE_IS_NONE}: not available here; cpu always is" in capfd.readouterr().err
    assert main([*text, "--device", "cpu"]) == 0
