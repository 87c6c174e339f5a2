"""Damaged weights: every command says which number is not finite, and in which file, instead of printing NaN."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main
from mamba3_jepa.cli.output import write_out
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.exporter import export_weights
from mamba3_jepa.export.reader import load_exported
from mamba3_jepa.files.checkpoint import load_checkpoint, save_checkpoint
from mamba3_jepa.files.json_file import json_line, write_json
from mamba3_jepa.inference.zero_shot import class_probabilities
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.export import ExportSettings

ANSWERS = ["red", "blue"]


def damaged(path: Path, phase: int, damage: Callable[[Mamba3Jepa], torch.Tensor], value: float = math.nan) -> Path:
    """A checkpoint whose tensor `damage` has one number that is `value`."""
    model = tiny_model(phase)
    with torch.no_grad():
        damage(model).view(-1)[0] = value
    return write_checkpoint(path, model, phase, ANSWERS)


def predictor(model: Mamba3Jepa) -> torch.Tensor:
    return model.predictor.pred_head.weight


def text_encoder(model: Mamba3Jepa) -> torch.Tensor:
    return model.y_encoder.projection.weight


def decoder(model: Mamba3Jepa) -> torch.Tensor:
    assert model.y_decoder is not None
    return model.y_decoder.embed_to_prefix.weight


def probe(model: Mamba3Jepa) -> torch.Tensor:
    assert model.recursion is not None
    return model.recursion.confusion_probe.hidden.weight


def injector(model: Mamba3Jepa) -> torch.Tensor:
    assert model.recursion is not None
    return model.recursion.injector.projection.weight


@pytest.mark.parametrize("phase", [1, 2, 3])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(predictor, "predictor.pred_head.weight"), (text_encoder, "y_encoder.projection.weight")],
)
def test_no_command_prints_nan(
    phase: int,
    damage: Callable[[Mamba3Jepa], torch.Tensor],
    message: str,
    images: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    checkpoint = damaged(tmp_path / "damaged.pt", phase, damage)
    model, red = ["--checkpoint", str(checkpoint)], str(images["red"])
    output = tmp_path / "numbers.json"
    text_or_image = ["--texts", "red"] if damage is text_encoder else ["--images", red]
    for arguments in (
        ["ask", *model, "What colour?", "--image", red, "--json"],
        ["embed", *model, *text_or_image, "--output", str(tmp_path / "x.npy")],
        ["search", *model, "red", "--images", red, "--json"],
        ["classify", *model, "--images", red, "--labels", *ANSWERS, "--json"],
        ["evaluate", *model, "--samples", "4", "--skip-generation", "--output", str(output)],
    ):
        assert main(arguments) == 2, arguments
        said = capfd.readouterr()
        assert said.out == ""
        last = said.err.splitlines()[-1]
        assert "embedding" in last
        assert "is not finite" in last
        assert str(checkpoint) in last
        assert message in last
    known_answers = set() if damage is text_encoder else {"damaged.answers.safetensors"}  # sound, and so kept
    assert {path.name for path in tmp_path.iterdir()} == {"damaged.pt"} | known_answers


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (decoder, [], "the Y-Decoder's outputs are not finite"),
        (probe, [], "the confusion for 'What colour?' is not finite: weights of"),
        (injector, ["--knowledge", "a square"], "the embedding with the knowledge for 'What colour?' is not finite"),
    ],
)
def test_ask_names_what_is_damaged(
    damage: Callable[[Mamba3Jepa], torch.Tensor],
    arguments: list[str],
    message: str,
    images: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    checkpoint = damaged(tmp_path / "damaged.pt", 3, damage)
    command = ["ask", "--checkpoint", str(checkpoint), "What colour?", "--image", str(images["red"]), *arguments]
    assert main(command) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert message in said.err
    assert str(checkpoint) in said.err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (decoder, "the Y-Decoder's outputs are not finite"),
        (probe, "the confusion for '{red}' is not finite: weights of"),
    ],
)
def test_search_and_classify_name_what_keeps_confusion_from_being_judged(
    damage: Callable[[Mamba3Jepa], torch.Tensor],
    message: str,
    images: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    checkpoint, red = damaged(tmp_path / "damaged.pt", 3, damage), str(images["red"])
    for command in (["search", "red"], ["classify", "--labels", *ANSWERS]):
        assert main([*command, "--checkpoint", str(checkpoint), "--images", red]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert message.format(red=red) in said.err
        assert str(checkpoint) in said.err


def test_knowledge_too_large_for_sound_weights(
    images: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    model = tiny_model(3)
    checkpoint = write_checkpoint(tmp_path / "sound.pt", model, 3, ANSWERS)
    vector = tmp_path / "vector.json"
    vector.write_text(json.dumps([3e38] * model.config.knowledge_dim))
    arguments = ["--image", str(images["red"]), "x?", "--knowledge-vector", str(vector)]
    assert main(["ask", "--checkpoint", str(checkpoint), *arguments]) == 2
    assert "are, but they or what they are given are too large" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("confusion_probe.temperature", 0.0),
        ("confusion_probe.temperature", -1.0),
        ("confusion_probe.temperature", math.inf),
        ("confusion_probe.threshold", math.nan),
        ("memory_floor", -math.inf),
    ],
)
def test_scalars_of_the_recursion(name: str, value: float, tmp_path: Path) -> None:
    sound = write_checkpoint(tmp_path / "sound.pt", tiny_model(3), 3)
    settings = ExportSettings(checkpoint=sound, output=tmp_path / "exported", x_encoder=True)
    export_weights(settings)
    assert load_exported(tmp_path / "exported").source == str(tmp_path / "exported")
    checkpoint = load_checkpoint(sound)
    checkpoint.model[f"recursion.{name}"] = torch.tensor(value)
    save_checkpoint(tmp_path / "damaged.pt", checkpoint)
    with pytest.raises(UserError, match=rf"damaged\.pt: recursion\.{name} is {value}, expected a finite number"):
        load_checkpoint(tmp_path / "damaged.pt")
    if math.isfinite(value):  # the exporter itself refuses the others
        model = tiny_model(3)
        model.get_buffer(f"recursion.{name}").fill_(value)
        damage_export(tmp_path / "exported", model)
        with pytest.raises(UserError, match=rf"recursion\.safetensors: recursion\.{name} is {value}"):
            load_exported(tmp_path / "exported")


def damage_export(folder: Path, model: Mamba3Jepa) -> None:
    """Write the recursion part of `model` into an exported folder, with the digest that belongs to it."""
    from mamba3_jepa.export.exporter import _entry
    from mamba3_jepa.export.writer import write_component

    path = folder / "recursion.safetensors"
    write_component(model, "recursion", path, phase=3, dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    config["files"][path.name] = _entry(path)
    write_json(folder / "config.json", config)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_json_is_strict(value: float, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values, expected = {"a": [1.5, (value, "b")], "c": {"d": value}}, {"a": [1.5, [None, "b"]], "c": {"d": None}}
    write_json(tmp_path / "x.json", values)
    write_out(values)
    for text in ((tmp_path / "x.json").read_text(), capsys.readouterr().out, json_line(values)):
        assert json.loads(text, parse_constant=pytest.fail) == expected
    assert json_line(values).count(b"\n") == 1


# JSON that nobody else reads: it is hashed, compared or parsed again at once; or of texts and whole numbers alone.
OWN_JSON = {
    "data/content.py", "data/published/parquet.py", "data/shard_index.py", "evaluation/annotations.py",
    "export/golden.py", "export/inspect.py", "export/writer.py", "files/safetensors_file.py", "inference/answerer.py",
    "inference/embeddings.py", "inference/digests.py", "inference/memory_file.py", "overrides.py",
    "training/frozen_key.py", "training/frozen_store.py", "training/start.py",
}  # fmt: skip


def test_json_is_made_in_one_place() -> None:
    """What Python's json writes of NaN is no JSON."""
    package = Path(__file__).parents[1] / "mamba3_jepa"
    calls = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\bjson\.dumps?\(", path.read_text(encoding="utf-8"))
    }
    assert calls == OWN_JSON | {"files/json_file.py"}


def test_predictions_of_lines_whose_id_is_no_number(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "sound.pt", tiny_model(1), 1)
    lines = [f'{{"image": null, "query": "{name}?", "answer": "red", "id": {name}}}\n' for name in ("NaN", "-Infinity")]
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    written = tmp_path / "predictions.jsonl"
    data = ["--data-dir", str(tmp_path), "--manifest", "manifest.jsonl"]
    assert main(["evaluate", "--checkpoint", str(checkpoint), *data, "--predictions", str(written)]) == 0
    found = [json.loads(line, parse_constant=pytest.fail) for line in written.read_text().splitlines()]
    assert [line["id"] for line in found] == [None, None]


def test_undefined_measures_are_null(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One sample has no uniformity; what a checkpoint says of a loss that overflowed is infinite."""
    path = write_checkpoint(tmp_path / "sound.pt", tiny_model(1), 1)
    output = tmp_path / "numbers.json"
    assert main(["evaluate", "--checkpoint", str(path), "--samples", "1", "--output", str(output)]) == 0
    assert json.loads(output.read_text(), parse_constant=pytest.fail)["test/uniformity"] is None
    checkpoint = load_checkpoint(path)
    checkpoint.metrics = {"val/perplexity": math.inf}
    save_checkpoint(path, checkpoint)
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["metrics"] == {"val/perplexity": None}


def test_tiny_temperatures_are_no_division_by_zero() -> None:
    embeddings, labels = torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    for temperature in (1e-45, 1e-40, 1e-20):
        shares = class_probabilities(embeddings, labels, temperature)
        assert shares.tolist() == [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]


def test_temperatures_that_float32_cannot_hold(
    images: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    checkpoint = write_checkpoint(tmp_path / "sound.pt", tiny_model(1), 1)
    arguments = ["--checkpoint", str(checkpoint), "--images", str(images["red"]), "--labels", *ANSWERS, "--json"]
    for given in ("1e-46", "1e+39", "nan", "inf", "-1.0"):
        assert main(["classify", *arguments, "--temperature", given]) == 2
        assert f"--temperature {given}: must be finite and greater than 0" in capfd.readouterr().err
    assert main(["classify", *arguments, "--temperature", "1e-45"]) == 0
    (found,) = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    assert [label["probability"] for label in found["labels"]] == [1.0, 0.0]
