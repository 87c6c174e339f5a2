"""The documents say what is so: the recipes run as they stand, and the map of the code names what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mamba3_jepa.files.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
MAP = (ROOT / "README.md").read_text(encoding="utf-8").split("## The map", 1)[1].split("\n## ", 1)[0]


@pytest.fixture
def run_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs the program of a recipe in an empty folder; returns what it defined."""
    monkeypatch.chdir(tmp_path)

    def run(title: str) -> dict[str, object]:
        section = RECIPES.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
        (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        namespace: dict[str, object] = {"__name__": "recipe"}
        exec(compile(program, title, "exec"), namespace)
        return namespace

    return run


def logged(folder: str, name: str) -> list[float]:
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def test_change_the_architecture(run_recipe) -> None:  # type: ignore[no-untyped-def]
    made = run_recipe("Change the architecture")
    model = made["model"]
    assert type(model.predictor) is made["LargestPredictor"]
    pooled = model.observe([None], ["red"]).pooled[0]
    ids, mask, _ = model.tokenizer.encode(["red"], 32)
    tokens = model.predictor.query_proj(model.y_encoder.embed_tokens(ids))
    assert mask.all()
    assert pooled.allclose(model.predictor.backbone(tokens)[0].amax(dim=0), atol=1e-6)


def test_add_a_data_source(run_recipe) -> None:  # type: ignore[no-untyped-def]
    run_recipe("Add a data source")
    checkpoint = load_checkpoint("gradients/phase1_best.pt")
    assert checkpoint.data.source == "gradients"
    assert sorted(checkpoint.data.answers) == [f"level {i}" for i in range(6)]
    assert checkpoint.data.train_samples + checkpoint.data.val_samples == 96


def test_add_a_loss(run_recipe) -> None:  # type: ignore[no-untyped-def]
    run_recipe("Add a loss")
    alignment = logged("aligned", "train/alignment")
    loss, contrast = logged("aligned", "train/loss"), logged("aligned", "train/info_nce")
    assert alignment
    for total, first, second in zip(loss, contrast, alignment, strict=True):
        assert total == pytest.approx(first + 0.1 * second, rel=1e-5)


def test_add_a_metric(run_recipe) -> None:  # type: ignore[no-untyped-def]
    run_recipe("Add a metric")
    values = logged("measured", "val/median_cosine")
    assert values
    assert all(-1 <= value <= 1 for value in values)
    assert load_checkpoint("measured/phase1_last.pt").metrics["val/median_cosine"] == values[-1]


def test_the_map_names_every_folder_and_only_what_is_there() -> None:
    package = ROOT / "training" / "mamba3_jepa"
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(re.findall(r"^\s+(\w+)/ ", MAP, re.MULTILINE))
    read = re.findall(r"^\d\. `([^`]+)`", MAP, re.MULTILINE)
    assert len(read) == 6
    for path in read:
        assert (package / path).is_file(), path


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "training" / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document}: {target}"
