"""Plots of a metrics.jsonl and the contact sheet: what is read, what is drawn, odd files."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.contact_sheet import contact_sheet
from mamba3_jepa.evaluation.palette import RIGHT, WRONG
from mamba3_jepa.evaluation.plots import _smooth, plot_training, read_series
from mamba3_jepa.files.metrics_log import MetricsLog

pytestmark = pytest.mark.usefixtures("real_figures")

GREEN, RED, GREY = (*map(ImageColor.getrgb, (RIGHT, WRONG)), (0xE1, 0xE4, 0xE8))


def write_run(path, steps):
    log = MetricsLog(path / "metrics.jsonl")
    for step in steps:
        train = {
            "loss": 3 / step, "accuracy": 0.5, "temperature": 0.07, "lr": 3e-4, "grad_norm": 1.0,
            "samples_per_second": 100.0, "gate_activity_0": 0.8, "gate_activity_1": 0.4,
        }  # fmt: skip
        log.append(step, 1, {f"train/{key}": value for key, value in train.items()})
    validation = {
        "loss": 1.0, "alignment": 0.3, "uniformity": -2.0, "effective_rank_predicted": 9.0,
        "effective_rank_target": 11.0, "answer_accuracy": 0.5, "answer_accuracy_colour": 0.25,
        "exact_match": 0.4, "exact_match_what_color": 0.1, "caption_exact_match": 0.0, "bleu": 12.0, "perplexity": 3.0,
        "token_accuracy": 0.6, "image_to_text_r1": 0.5, "image_to_text_r5": 0.7, "text_to_image_r10": 1.0,
    }  # fmt: skip
    log.append(steps[-1], 1, {f"val/{key}": value for key, value in validation.items()})
    return log


def ink(path):
    """Share of pixels that are not white."""
    return (np.asarray(Image.open(path).convert("L")) < 250).mean()


@pytest.mark.parametrize("steps", [[1], range(1, 4), range(10, 500, 10)])
def test_every_picture_is_drawn_from_few_and_many_points(tmp_path, steps):
    write_run(tmp_path, steps)
    paths = plot_training(tmp_path)
    names = ["loss", "answers", "retrieval", "embeddings", "optimization", "gates"]
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in names]
    assert all(ink(path) > 0.01 for path in paths)


def test_what_was_not_logged_is_left_out(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, 1, {"train/loss": 2.0, "train/lr": 0.0, "train/grad_norm": float("nan")})
    assert [path.stem for path in plot_training(tmp_path)] == ["loss", "optimization"]
    log.append(1, 1, {"val/gate_activity_0": 0.5, "val/alignment": 1.0})
    assert [path.stem for path in plot_training(tmp_path)] == ["loss", "embeddings", "optimization", "gates"]


def test_an_empty_log_draws_nothing_and_a_missing_one_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        plot_training(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_training(tmp_path) == []


def test_resumed_run_later_line_wins_and_truncated_tail_is_ignored(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)):
        log.append(step, 1, {"a": value, "only_before": value})
    for step, value in ((3, 30.0), (5, 50.0), (5, 55.0)):
        log.append(step, 1, {"a": value})
    log.append(6, 1, {"a": None, "b": 1})
    with log.path.open("a") as file:
        file.write('{"step": 7, "a": 7')
    series = read_series(log.path)
    assert series["a"].steps.tolist() == [1, 2, 3, 5]
    assert series["a"].values.tolist() == [1.0, 2.0, 30.0, 55.0]
    assert series["only_before"].steps.tolist() == [1, 2]  # step 3 and 4 of the abandoned run are gone
    assert set(series) == {"a", "only_before", "b"}
    assert plot_training(tmp_path) == []


def test_a_smoothed_line_has_no_hook_at_its_ends():
    values = np.tile([0.0, 2.0], 600)
    assert abs(_smooth(values) - 1).max() < 0.1
    assert _smooth(np.arange(5.0)).tolist() == [0.5, 1.0, 2.0, 3.0, 3.5]


def test_unwritable_plot_is_a_user_error(tmp_path):
    write_run(tmp_path, [1])
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(UserError, match="plots"):
        plot_training(tmp_path)


def colors(path):
    return {color for _, color in Image.open(path).getcolors(maxcolors=1 << 24)}


def test_contact_sheet_marks_right_and_wrong(tmp_path):
    picture = Image.new("RGBA", (40, 20), (10, 200, 250, 255))
    right, wrong, nothing = (
        contact_sheet([image], [None], ["cat"], [[(text, 0.9)]], tmp_path / f"{text}.png")
        for image, text in ((picture, "cat"), (picture, "dog"), (None, "bird"))
    )
    assert GREEN in colors(right)
    assert RED not in colors(right)
    assert RED in colors(wrong)
    assert GREEN not in colors(wrong)
    assert (10, 200, 250) in colors(right)
    grey = [(np.asarray(Image.open(path)) == GREY).all(axis=-1).mean() for path in (nothing, right)]
    assert grey[0] > grey[1] > 0


def test_contact_sheet_grid_and_long_texts(tmp_path):
    picture = Image.new("L", (900, 1200), 128)
    long = "supercalifragilistic" * 9 + " and more words" * 40
    texts = [long] * 6
    path = contact_sheet([picture] * 6, [long, None] * 3, texts, [[(long, -0.5)] * 5] * 6, tmp_path / "s.png")
    one = contact_sheet([picture], ["q"], [""], [[("x", 0.1)]], tmp_path / "one.png")
    assert Image.open(path).width > 3 * Image.open(one).width
    assert Image.open(path).height > 2 * Image.open(one).height - 100
    sheet = np.asarray(Image.open(path))
    assert (sheet[:, -20:] == sheet[0, 0]).all()  # nothing runs over the right margin


def test_contact_sheet_refuses_nothing_and_unequal_lists(tmp_path):
    with pytest.raises(ValueError, match="equally many"):
        contact_sheet([], [], [], [], tmp_path / "s.png")
    with pytest.raises(ValueError, match="equally many"):
        contact_sheet([None], [None, None], ["a"], [[]], tmp_path / "s.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        contact_sheet([None], [None], ["a"], [[]], tmp_path / "file" / "s.png")
