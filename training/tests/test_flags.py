"""What the library calls a setting, the command line calls a flag: in errors and in the log, and nowhere else."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mamba3_jepa.cli.commands import Commands
from mamba3_jepa.cli.flags import FlagFilter, as_flag, gathered, with_flags
from mamba3_jepa.cli.main import app, main
from mamba3_jepa.errors import UserError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`val_fraction` 2: expected a share", "--val-fraction 2: expected a share"),
        ("use fewer `workers`, or `workers` 0", "use fewer --workers, or --workers 0"),
        ("lower `batch_size` or `grad_accum`", "lower --batch-size or --grad-accum"),
        ("`make rust` builds it", "`make rust` builds it"),
        ("`make` builds it", "`make` builds it"),
        ("val_fraction 2", "val_fraction 2"),
        ("`embed_dim` is a key of a model", "`embed_dim` is a key of a model"),
        ("the file `Model` is", "the file `Model` is"),
        ("an odd ` is left, `seed` is not", "an odd ` is left, --seed is not"),
        ("", ""),
    ],
)
def test_settings_in_backticks_are_shown_as_flags(message: str, shown: str) -> None:
    assert with_flags(message) == shown
    assert with_flags(shown) == shown


def test_a_flag_is_a_setting_with_dashes() -> None:
    assert as_flag("on_bad_sample") == "--on-bad-sample"


def test_the_log_shows_flags_with_its_values_filled_in() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "`val_fraction` %g of %s", (0.5, "100%s"), None)
    assert FlagFilter().filter(record)
    assert record.getMessage() == "--val-fraction 0.5 of 100%s"


def test_an_error_of_the_library_reaches_the_user_with_its_flag(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["train-decoder", "--cpu", "--phase1-checkpoint", str(tmp_path / "none.pt")]) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert "--phase1-checkpoint" in error
    assert "`" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["train-jepa", "--tiny", "--output-dir", ""],
        ["train-jepa", "--tiny", "--data-dir=", "--cpu"],
        ["train-decoder", "--phase1-checkpoint", ""],
        ["export", "--checkpoint", "x.pt", "--output="],
        ["evaluate", "--checkpoint", ""],
        ["prepare", "gqa", "--questions", "x.json", "--data-dir", "x", "--output", ""],
    ],
)
def test_an_empty_path_is_not_the_current_directory(arguments: list[str], capfd: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    flag = next(each for each in reversed(arguments) if each.startswith("--") and each != "--cpu").rstrip("=")
    assert f"{flag}: the path is empty" in capfd.readouterr().err


@dataclasses.dataclass
class Part:
    """Settings within settings."""

    seed: int = 0


@dataclasses.dataclass
class Settings:
    """One of each kind."""

    model: tuple[str, ...] = ()
    image_size: int | None = None
    tiny: bool = False
    part: Part = dataclasses.field(default_factory=Part)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a --b c", "a --b c"),
        ("a --model k=1 l=2 --b c", "a --model k=1 l=2 --b c"),
        ("a --model k=1 --b c --model l=2 m=3", "a --b c --model k=1 l=2 m=3"),
        ("a --model=k=1 --model l=2 -h", "a --model=k=1 l=2 -h"),
        ("a --model --b --model", "a --b --model"),
        ("a --model k=1 --image_size 2 x --model=l=2 y", "a --image_size 2 x --model k=1 l=2 y"),
        ("a --tiny --tiny --image-size 1 --seed=2", "a --tiny --tiny --image-size 1 --seed=2"),
        ("a --seed 1 -- --seed 2 --model", "a --seed 1 -- --seed 2 --model"),
        ("--other 1 --other 2", "--other 1 --other 2"),
        ("", ""),
    ],
)
def test_an_option_given_twice_keeps_the_values_of_both(given: str, expected: str) -> None:
    assert gathered(given.split(), Settings) == expected.split()
    assert gathered(given.split(), None) == given.split()


@pytest.mark.parametrize(
    "given", ["--image-size 1 --image-size 1", "--seed=1 a --seed=2", "--image_size 1 --model k=1 --image-size=2"]
)
def test_an_option_of_one_value_is_given_once(given: str) -> None:
    flag = given.split()[-1 if "=" in given.split()[-1] else -2].partition("=")[0]
    with pytest.raises(UserError, match=f"^{flag} is given twice, and only one value counts"):
        gathered(given.split(), Settings)


def commands(group: Commands, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """The words that name each command, and what it takes."""
    for name, target in group._targets.items():
        if isinstance(target, Commands):
            yield from commands(target, (*words, name))
        elif settings := app.settings_of([*words, name]):
            yield (*words, name), settings


@pytest.mark.parametrize(("words", "settings"), [*commands(app)])
def test_no_command_drops_a_value(words: tuple[str, ...], settings: type, capfd: pytest.CaptureFixture) -> None:
    once = [field.name for field in dataclasses.fields(settings) if field.type in ("_Path", "Path", "str", "Device")]
    for flag in map(as_flag, once):
        assert main([*words, flag, "a", f"{flag}=b"]) == 2
        assert (
            capfd.readouterr().err
            == f"error: {flag} is given twice, and only one value counts: leave one of them out\n"
        )
