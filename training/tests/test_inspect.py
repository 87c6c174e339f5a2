"""`mamba3-jepa inspect` on checkpoints, exported files and what is neither."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_export import ANSWERS, build, save

from mamba3_jepa.cli.main import main
from mamba3_jepa.export.inspect import inspect_file
from mamba3_jepa.export.writer import write_component


def test_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = build()
    path = save(model, tmp_path / "phase2_best.pt", phase=2)
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["phase"], found["resumable"]) == ("checkpoint", 2, False)
    assert found["bytes"] == path.stat().st_size
    assert found["config"] == model.config.to_dict()
    assert found["data"] == {
        "source": "synthetic scenes", "synthetic": True, "train_samples": 3, "answers": ANSWERS,
    }  # fmt: skip
    assert found["metrics"]["val/loss"] == 0.5
    assert found["run"]["seed"] == 0
    expected = {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in model.named_children()
        if name != "recursion"
    }
    assert found["parameters"] == {**expected, "total": sum(expected.values())}
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    for word in ("phase 2", "weights only", "synthetic scenes", "val/loss", "predictor.layer.d_state", "y_decoder"):
        assert word in shown


def test_exported_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, path = build(), tmp_path / "angn.safetensors"
    write_component(model, "angn", path, phase=1)
    found = inspect_file(path)
    assert found["metadata"]["component"] == "angn"
    assert found["metadata"]["config"] == model.config.to_dict()
    assert found["tensors"][0] == {"name": "angn.gates.0.bias", "dtype": "F32", "shape": [64]}
    assert found["parameters"] == {"angn": 256, "total": 256}
    assert main(["inspect", str(path)]) == 0
    assert "angn.gates.1.weight" in capsys.readouterr().out


def test_any_safetensors_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_file({"a.x": torch.ones(2, 3).bfloat16(), "b": torch.tensor(1)}, tmp_path / "weights.bin")
    assert main(["inspect", str(tmp_path / "weights.bin"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"] == {}
    assert found["tensors"] == [
        {"name": "a.x", "dtype": "BF16", "shape": [2, 3]},
        {"name": "b", "dtype": "I64", "shape": []},
    ]
    assert found["parameters"] == {"a": 6, "b": 1, "total": 7}
    assert main(["inspect", str(tmp_path / "weights.bin")]) == 0
    assert "scalar" in capsys.readouterr().out


def test_what_cannot_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.safetensors").write_text("not at all")
    (tmp_path / "text.pt").write_text("not at all")
    save_file({"a": torch.ones(100)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-1])
    for path, message in (
        (tmp_path / "nothing.pt", "there is no such file"),
        (tmp_path, "is a folder, it holds cut.safetensors, text.pt, text.safetensors: name a file"),
        (tmp_path / "text.safetensors", "is not a safetensors file, or was cut short"),
        (tmp_path / "cut.safetensors", "is not a safetensors file, or was cut short"),
        (tmp_path / "text.pt", "is not a checkpoint, or was cut short"),
    ):
        assert main(["inspect", str(path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "inspect"])
def test_help_does_not_load_torch(command: str) -> None:
    program = (
        "import sys; from mamba3_jepa.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as error: assert error.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout
