"""`mamba3-jepa inspect` on checkpoints, exported files and what is neither, and on the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_export import ANSWERS, build, save

from mamba3_jepa.cli.main import main
from mamba3_jepa.export import environment as environment_module
from mamba3_jepa.export.environment import environment
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
    assert found["temperature"] is None
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


def test_environment(capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", "--environment", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["python", "packages", "optional", "system", "devices", "kernels"]
    assert found["python"]["version"] == platform.python_version()
    for name in ("torch", "numpy", "tyro"):
        assert found["packages"][name] == importlib.metadata.version(name)
    assert None not in found["packages"].values()
    assert found["system"]["cores"] == os.cpu_count()
    assert 0 < found["system"]["memory_gib"] < 10**5
    assert found["devices"]["cuda_of_torch"] == torch.version.cuda
    assert main(["inspect", "--environment"]) == 0
    shown = capsys.readouterr().out
    for word in (torch.__version__, platform.python_version(), "nvidia_driver", "siso"):
        assert word.partition("+")[0] in shown


def test_kernels_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason for which the scan is not the fused one, then the fused one."""
    installed: dict[str, str] = {}
    monkeypatch.setattr(environment_module, "_version", installed.get)
    monkeypatch.setattr(
        environment_module, "_said_by", lambda *command: "570.1\n570.1" if "smi" in command[0] else None
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment()["kernels"]["siso"] == "chunked scan: there is no CUDA device"

    properties = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(environment_module.kernels, "siso_kernel", lambda: print)
    monkeypatch.setattr(environment_module.kernels, "mimo_kernel", lambda: None)
    found = environment()
    assert found["devices"]["cuda:0"] == {"name": "A GPU", "capability": "9.0", "memory_gib": 80.0}
    assert found["devices"]["nvidia_driver"] == "570.1"
    assert found["kernels"]["siso"] == "chunked scan: mamba-ssm is not installed"
    installed["mamba-ssm"] = "2.3.2"
    assert environment()["kernels"] == {
        "siso": "mamba-ssm 2.3.2 for bfloat16 on CUDA where the sizes fit, else chunked scan",
        "mimo": "chunked scan: mamba-ssm 2.3.2 has no fitting kernel, or it cannot be imported",
    }


def test_a_program_that_is_missing_fails_or_hangs_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    python = (sys.executable, "-c")
    assert environment_module._said_by(*python, "print(' 12 ')") == "12"
    assert environment_module._said_by("/nowhere/program") is None
    assert environment_module._said_by(*python, "print(1); raise SystemExit(3)") is None
    monkeypatch.setattr(environment_module, "_PATIENCE", 0.2)
    assert environment_module._said_by(*python, "import time; time.sleep(60)") is None


@pytest.mark.parametrize("arguments", [[], ["--environment", "--preset", "mini"], ["x.pt", "--environment"]])
def test_one_thing_at_a_time(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", *arguments]) == 2
    assert capsys.readouterr().err == "error: name one thing to look into: a file, --preset or --environment\n"


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
