"""What all tests share. The tiny model they use is in tiny.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import write_images
from undrawn import DRAWN, UNDRAWN

from mamba3_jepa.config import preset
from mamba3_jepa.data.sample import source_texts
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.tokenizer import TextTokenizer


@pytest.fixture(scope="session", autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Several runs share a process here: each gets accelerate's global state anew, as a process of its own would."""
    start = Accelerator.__init__

    def afresh(self: Accelerator, *arguments: Any, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        start(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "__init__", afresh)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _auto_is_the_cpu() -> Iterator[None]:
    """The bounds of the tests are the CPU's: commands stay there, whatever else this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamba3_jepa.device.AUTO", ("cpu",))
        yield


@pytest.fixture(scope="session", autouse=True)
def _undrawn() -> Iterator[None]:
    """Figures are drawn for tests that ask for `real_figures`."""
    with pytest.MonkeyPatch.context() as patch:
        for undrawn in UNDRAWN:
            patch.setattr(*undrawn)
        yield


@pytest.fixture
def real_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was drawn."""
    for drawn in DRAWN:
        monkeypatch.setattr(*drawn)


@pytest.fixture(scope="module")
def scenes() -> SceneSource:
    """Few enough for batches that do not come out even."""
    return SceneSource("train", n_scenes=13, image_size=preset("tiny").vision.image_size)


@pytest.fixture(scope="module")
def tokenizer(scenes: SceneSource) -> TextTokenizer:
    """Trained on what the scenes say."""
    return TextTokenizer.train(source_texts(scenes, range(len(scenes))), 300)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PNG files of one colour, by its name."""
    return write_images(tmp_path_factory.mktemp("images") / "images")
