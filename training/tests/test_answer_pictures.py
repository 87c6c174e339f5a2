"""The answer sheet and the chart of answers by type: what is drawn is what was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.answer_plots import plot_answers_by_type
from mamba3_jepa.evaluation.answer_sheet import answer_sheet
from mamba3_jepa.evaluation.palette import GENERATED, NEAREST, RIGHT, WRONG

pytestmark = pytest.mark.usefixtures("real_figures")

GREEN, RED, DARK, LIGHT = map(ImageColor.getrgb, (RIGHT, WRONG, GENERATED, NEAREST))
GREY = (0xE1, 0xE4, 0xE8)


def share(path: Path, color: tuple[int, int, int]) -> float:
    """Share of the picture's pixels that have exactly this color."""
    return float((np.asarray(Image.open(path).convert("RGB")) == color).all(axis=-1).mean())


def widths(path: Path, color: tuple[int, int, int]) -> list[int]:
    """The width in pixels of each bar of a color, from top to bottom."""
    per_row = (np.asarray(Image.open(path).convert("RGB")) == color).all(axis=-1).sum(axis=1)
    starts = np.flatnonzero((per_row[1:] > 0) & (per_row[:-1] == 0)) + 1
    return [int(per_row[start + 2]) for start in starts]


def test_answer_sheet_marks_right_and_wrong_and_nothing(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (40, 20), (10, 200, 250, 255))
    right = answer_sheet([picture], ["what?"], ["a cat"], [" A Cat"], tmp_path / "right.png")
    wrong = answer_sheet([picture], ["what?"], ["a cat"], ["a dog"], tmp_path / "wrong.png")
    empty = answer_sheet([None], [None], ["a cat"], [""], tmp_path / "empty.png")
    assert share(right, GREEN) > 0
    assert share(right, RED) == 0
    assert share(right, (10, 200, 250)) > 0.1
    for path in (wrong, empty):
        assert share(path, RED) > 0
        assert share(path, GREEN) == 0
    assert share(empty, GREY) > 0.3


def test_answer_sheet_grid_and_long_texts(tmp_path: Path) -> None:
    long = "supercalifragilistic" * 9 + " and more words" * 40
    path = answer_sheet([None] * 6, [long, None] * 3, [long] * 6, [long] * 6, tmp_path / "sheet.png")
    one = answer_sheet([None], ["q"], [""], ["x"], tmp_path / "one.png")
    assert Image.open(path).width > 3 * Image.open(one).width
    sheet = np.asarray(Image.open(path))
    assert (sheet[:, -20:] == sheet[0, 0]).all()  # nothing runs over the right margin


def test_answer_sheet_refuses_nothing_unequal_lists_and_a_bad_path(tmp_path: Path) -> None:
    for lists in (([], [], [], []), ([None], [None], ["a"], [])):
        with pytest.raises(ValueError, match="equally many"):
            answer_sheet(*lists, tmp_path / "sheet.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        answer_sheet([None], [None], ["a"], ["a"], tmp_path / "file" / "sheet.png")


def test_bars_are_as_long_as_the_shares_and_end_with_the_total(tmp_path: Path) -> None:
    by_type = {"is there": (0.25, 100), "what color": (1.0, 300), "how many": (0.5, 10)}
    path = plot_answers_by_type(tmp_path / "plots" / "a.png", generated=by_type)
    full, quarter, half, total, _ = widths(path, DARK)  # the last one is the legend's
    assert quarter / full == pytest.approx(0.25, abs=0.02)
    assert half / full == pytest.approx(0.5, abs=0.02)
    assert total / full == pytest.approx((300 + 25 + 5) / 410, abs=0.02)
    assert share(path, LIGHT) == 0
    alone = plot_answers_by_type(tmp_path / "b.png", nearest=by_type)
    assert len(widths(alone, LIGHT)) == 5
    assert share(alone, DARK) == 0, "each way to answer has its colour, alone too"


def test_a_second_way_to_answer_is_a_second_bar(tmp_path: Path) -> None:
    by_type = {"what color": (1.0, 300), "is there": (0.5, 100)}
    other = {"what color": (0.5, 300)}
    path = plot_answers_by_type(tmp_path / "a.png", generated=by_type, nearest=other)
    bars, others = widths(path, DARK), widths(path, LIGHT)
    assert others[0] / bars[0] == pytest.approx(0.5, abs=0.02)
    assert len(others) == 2, "one bar and the legend's patch: a total over fewer questions is left out"


def test_rare_types_share_a_bar(tmp_path: Path) -> None:
    by_type = {f"kind {number}": (1.0, 100 - number) for number in range(60)}
    assert len(widths(plot_answers_by_type(tmp_path / "a.png", generated=by_type), DARK)) == 19 + 1 + 1 + 1


def test_chart_of_nothing_and_a_bad_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no question type"):
        plot_answers_by_type(tmp_path / "a.png", generated={})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plot_answers_by_type(tmp_path / "file" / "a.png", nearest={"a": (1.0, 1)})
