"""The file structure that the README shows: `training/models/*` are the library's own classes under short names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

TRAINING = Path(__file__).parents[1]
NAMES = ["mamba3", "angn", "vit", "predictor", "y_encoder", "y_decoder", "vljepa"]


def test_every_part_has_its_file() -> None:
    assert sorted(path.stem for path in (TRAINING / "models").glob("*.py")) == sorted([*NAMES, "__init__"])


@pytest.mark.parametrize("name", NAMES)
def test_a_short_name_is_the_librarys_own_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TRAINING)
    short, own = importlib.import_module(f"models.{name}"), importlib.import_module(f"mamba3_jepa.models.{name}")
    assert short.__all__
    for each in short.__all__:
        assert getattr(short, each) is getattr(own, each)


def test_from_the_training_folder() -> None:
    code = "from models.vljepa import Mamba3Jepa; print(Mamba3Jepa.__module__)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=TRAINING, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "mamba3_jepa.models.vljepa"
