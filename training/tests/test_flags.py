"""What the library calls a setting, the command line calls a flag: in errors and in the log, and nowhere else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mamba3_jepa.cli.flags import FlagFilter, as_flag, with_flags
from mamba3_jepa.cli.main import main


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
