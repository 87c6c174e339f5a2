"""What the command line was silent about is filled by the preset; what was given stands, even if it is the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from mamba3_jepa.config import PresetName
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.inference import AskSettings
from mamba3_jepa.settings.memory import MemoryAddSettings
from mamba3_jepa.settings.training import Phase1Settings, Phase2Settings, Phase3Settings, TrainSettings


def resolved(phase: int, name: PresetName, **given: int | float) -> TrainSettings:
    if phase == 1:
        return Phase1Settings(preset=name, **given).resolved()  # type: ignore[arg-type]
    settings = Phase2Settings if phase == 2 else Phase3Settings
    return settings(**given).resolved(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_preset_fills_only_what_was_left_open(phase: int) -> None:
    names: tuple[PresetName, ...] = ("small", "mini", "tiny")
    defaults = [resolved(phase, name).to_dict() for name in names]
    decided = {field for field, value in resolved(phase, "tiny").to_dict().items() if value is not None}
    decided &= {field for field in decided if len({str(values[field]) for values in defaults}) > 1}
    assert {"epochs", "batch_size", "lr", "synthetic_scenes", "val_samples"} <= decided
    for name in names:
        for other in defaults:  # every value that is a default somewhere, given where it is not
            given = {field: other[field] for field in decided - {"preset"} if other[field] is not None}
            values = resolved(phase, name, **given).to_dict()
            assert {field: values[field] for field in given} == given


def test_2048_validation_samples_are_2048_for_tiny_too() -> None:
    assert Phase1Settings(tiny=True).resolved().val_samples == 96
    assert Phase1Settings(tiny=True, val_samples=2048).resolved().val_samples == 2048
    assert Phase1Settings().val_samples is None
    assert Phase1Settings(random_vit=True).resolved().val_samples == 2048


def test_tiny_contradicts_a_preset_that_was_named_even_the_default() -> None:
    assert Phase1Settings(random_vit=True).resolved().preset == "small"
    assert Phase1Settings(tiny=True, preset="tiny").resolved().preset == "tiny"
    for name in ("small", "mini"):
        with pytest.raises(UserError, match=f"`tiny` and `preset` {name} contradict"):
            Phase1Settings(tiny=True, preset=name).resolved()  # type: ignore[arg-type]


def test_an_empty_text_is_named_by_its_setting() -> None:
    checkpoint, file = Path("x.pt"), Path("m.safetensors")
    with pytest.raises(UserError, match="`knowledge` is empty: ' '; give a text"):
        AskSettings(checkpoint=checkpoint, questions=("what?",), knowledge=" ").check()
    for given, message in (
        ({"facts": ("a", "")}, "sentence 2 of 2 is empty: ''"),
        ({"question": "", "answer": "red"}, "`question` is empty: ''"),
        ({"question": "what?", "answer": "\t"}, "`answer` is empty: '\\\\t'"),
    ):
        with pytest.raises(UserError, match=message):
            MemoryAddSettings(checkpoint=checkpoint, file=file, **given).check()  # type: ignore[arg-type]
