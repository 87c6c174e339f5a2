"""All figures: what is in them fits, no legend lies over a line, and a colour means one thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mamba3_jepa.bench import parity
from mamba3_jepa.config import NO_FLOOR
from mamba3_jepa.data.confusion_plan import MADE_KINDS
from mamba3_jepa.evaluation import answer_plots, confusion_plots, figure, palette, plots
from mamba3_jepa.evaluation.confusion import evaluate_confusion
from mamba3_jepa.evaluation.injection import InjectionReport, Rates
from mamba3_jepa.evaluation.memory_floor import MemoryFloor
from mamba3_jepa.evaluation.selective import selective_reports
from mamba3_jepa.files.metrics_log import MetricsLog
from mamba3_jepa.settings.bench import ParitySettings

pytestmark = pytest.mark.usefixtures("real_figures")

LONG = "pneumonoultramicroscopicsilicovolcanoconiosis"
TYPES = {2: ["is_there", "what_color"], 16: [LONG, "is_there", *(f"what_{letter}" for letter in "abcdefghijklmn")]}
KINDS = ("clear", *MADE_KINDS, "wrong_answer", "given", "given_clear", "of a new version")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Every figure that is written, by the name of its file."""
    figures: dict[str, Figure] = {}

    def keep(made: Figure, path: Path) -> Path:
        made.draw_without_rendering()
        figures[path.stem] = made
        return path

    for module in (plots, answer_plots, confusion_plots, figure):
        monkeypatch.setattr(module, "save_figure", keep)
    return figures


def write_run(folder: Path, epochs: int, types: list[str]) -> Path:
    """What all three phases log, in one run of ten steps an epoch."""
    log = MetricsLog(folder / "metrics.jsonl")
    shares = ["image_to_text_r1", "image_to_text_r5", "image_to_text_r10", "text_to_image_r1", "answer_accuracy",
              "swap_accuracy", "exact_match", "led_exact_match", "caption_exact_match", "token_accuracy"]  # fmt: skip
    shares += [f"{name}_{kind}" for name in ("answer_accuracy", "exact_match") for kind in types]
    shares += [f"swap_accuracy_{kind}" for kind in ("colors", "shapes", "absent_color")]
    for step in range(1, 10 * epochs + 1):
        done = step / (10 * epochs)
        train = {"loss": 3 - 2 * done, "confusion_loss": 1 - 0.5 * done, "injection_loss": 0.02 - 0.01 * done,
                 "accuracy": done, "temperature": 0.07, "lr": 1e-3 * (1 - done), "grad_norm": 8.0 - done,
                 "samples_per_second": 12345.0, "token_accuracy": done, "gate_activity_0": 0.5}  # fmt: skip
        log.append(step, 1, {f"train/{name}": value for name, value in train.items()})
        if step % 10 == 0:
            values = dict.fromkeys(shares, done * 0.9)
            values |= {"loss": 3.0, "confusion_loss": 1.0, "injection_loss": 0.02, "perplexity": 20.0,
                       "bleu": 80 * done, "alignment": 1 - done / 2, "uniformity": -3 * done,
                       "effective_rank_predicted": 80 * done, "effective_rank_target": 90 * done}  # fmt: skip
            log.append(step, 1, {f"val/{name}": value for name, value in values.items()})
    return folder


def draw_others(folder: Path, n_types: int) -> None:
    """The pictures that are not drawn from a metrics.jsonl."""
    by_type = {f"what {number}": (1.0, 10**7 - number) for number in range(n_types)} | {f"{LONG} {LONG}": (0.5, 10**7)}
    answer_plots.plot_answers_by_type(folder / "generated.png", generated=by_type)
    answer_plots.plot_answers_by_type(folder / "both.png", generated=by_type, nearest=by_type)
    kinds = [kind for kind in (KINDS if n_types > 2 else KINDS[:2]) for _ in range(30)]
    confused = torch.tensor([kind not in ("clear", "given_clear") for kind in kinds])
    logits = torch.randn(len(kinds), generator=torch.Generator().manual_seed(0)) + 3 * confused
    report = evaluate_confusion(logits, confused, kinds, [f"what {i}" for i in range(len(kinds))])
    confusion_plots.plot_confusion(report, folder)
    rates = Rates(before=0.2, after=1.0, wrong=0.0 if n_types > 2 else None)
    many = dict.fromkeys(KINDS[1:], rates) if n_types > 2 else {}
    confusion_plots.plot_injection(
        InjectionReport(n_samples=123_456, n_without_wrong=n_types, retrieved=rates, generated=rates, by_kind=many,
                        by_form=dict.fromkeys(["answer", "sentence", "of a new version"], rates), judged={}),
        folder,
    )  # fmt: skip
    wrong = torch.arange(7 * n_types) % 5 == 0
    scores = {"": torch.linspace(0, 1, 7 * n_types), "_confidence": -torch.linspace(0, 1, 7 * n_types)}
    confusion_plots.plot_risk_coverage(selective_reports(scores, wrong), folder)
    right, wrong = (torch.linspace(low, 1, 7 * n_types) for low in (0.5, -0.2))
    floor = MemoryFloor(floor=0.6 if n_types > 2 else NO_FLOOR, right=right, wrong=wrong[: n_types - 2])
    confusion_plots.plot_memory_floor(floor, folder)
    settings = ParitySettings(output_dir=folder)
    result = parity.ParityResult(rotation=True, accuracy=dict.fromkeys(settings.test_lengths, 1.0))
    parity.write_results([result], settings)


def legends(made: Figure) -> Iterator[tuple[object, object]]:
    for axes in made.axes:
        if (legend := axes.get_legend()) is not None:
            yield axes, legend


@pytest.mark.parametrize(("epochs", "n_types"), [(1, 2), (3, 2), (40, 16)])
def test_everything_fits_and_no_legend_lies_over_a_line(
    drawn: dict[str, Figure], tmp_path: Path, epochs: int, n_types: int
) -> None:
    plots.plot_training(write_run(tmp_path, epochs, TYPES[n_types]))
    draw_others(tmp_path, n_types if n_types == 2 else 40)
    assert len(drawn) == 6 + 2 + 3 + 1 + 1 + 1 + 1
    for name, made in drawn.items():
        box, (width, height) = made.get_tightbbox(), made.get_size_inches()
        assert box is not None
        assert (box.x0, box.y0) >= (-0.01, -0.01), name
        assert box.x1 <= width + 0.01, name
        assert box.y1 <= height + 0.01, name
        for axes, legend in legends(made):
            assert legend.get_window_extent().x0 >= axes.get_window_extent().x1, name  # type: ignore[attr-defined]
            assert axes.get_window_extent().width > 200, f"{name}: the legend leaves room for the lines"  # type: ignore[attr-defined]
    labels = [label.get_text() for label in drawn["generated"].axes[0].get_yticklabels()]
    assert max(map(len, labels)) <= 28
    assert any(label.endswith("…") for label in labels)


def colors(made: Figure) -> dict[str, set[str]]:
    """For each label, without its value, the colours of its lines."""
    found: dict[str, set[str]] = {}
    for axes in made.axes:
        for line in axes.get_lines():
            label = str(line.get_label()).split("   ")[0]
            if not label.startswith("_"):
                found.setdefault(label, set()).add(to_hex(line.get_color()))  # type: ignore[arg-type]
    return found


def test_the_same_thing_has_the_same_colour_in_all_pictures(drawn: dict[str, Figure], tmp_path: Path) -> None:
    plots.plot_training(write_run(tmp_path, 3, TYPES[16]))
    retrieval, answers, loss = (colors(drawn[name]) for name in ("retrieval", "answers", "loss"))
    types = {name.replace("_", " ") for name in TYPES[16]} & retrieval.keys() & answers.keys()
    assert len(types) == 9, "and a long one; the others are too rare"
    for name in types:
        assert retrieval[name] == answers[name], name
    assert len(set().union(*(answers[name] for name in types))) == len(types), "and no other has it"
    assert "6 rarer ones: metrics.jsonl" in answers
    assert loss == {"training": {palette.TRAINING.lower()}, "validation": {palette.VALIDATION.lower()}}
    titles = [axes.get_title(loc="left") for axes in drawn["loss"].axes]
    assert titles[:3] == ["Loss", "Confusion loss", "Injection loss"], "each on a scale of its own"


def test_no_colour_means_two_things() -> None:
    named = {name: value for name, value in vars(palette).items() if name.isupper() and isinstance(value, str)}
    assert named.pop("ALL") == named["INK"]
    several = [*palette.RECALL.values(), *palette._CONFUSION.values(), *palette._KINDS]
    used = [color.lower() for color in [*named.values(), *several]]
    assert len(used) == len(set(used))


def test_kinds_have_their_colour_in_whatever_order_they_come() -> None:
    names = [f"kind {number}" for number in range(palette.MAX_KINDS)]
    found = palette.kind_colors(names)
    assert len(set(found.values())) == palette.MAX_KINDS
    assert palette.kind_colors(reversed(names)) == found
    with pytest.raises(ValueError, match="more than 10 kinds"):
        palette.kind_colors([*names, "one more"])
    kinds = palette.confusion_colors(["new", "corrupted", "clear"])
    assert list(kinds) == ["clear", "corrupted", "new"]


def test_scores_of_all_kinds_are_on_one_scale(drawn: dict[str, Figure], tmp_path: Path) -> None:
    draw_others(tmp_path, 40)
    for name in ("confusion_histograms", "memory_floor"):
        panels = drawn[name].axes
        assert len({axes.get_ylim() for axes in panels}) == len({axes.get_xlim() for axes in panels}) == 1, name
    rows = [axes.get_title(loc="left").split("   ")[0] for axes in drawn["confusion_histograms"].axes]
    assert rows == ["clear", *MADE_KINDS, "wrong answer", "labelled confused", "labelled not confused",
                    "of a new version"]  # fmt: skip
    ticks = [float(tick.get_text().rstrip("%")) for tick in drawn["memory_floor"].axes[0].get_yticklabels()]
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], err_msg="no label is rounded to another number")
