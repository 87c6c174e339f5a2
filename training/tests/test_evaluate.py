"""`mamba3-jepa evaluate` on scenes and on manifests, against the numbers taken by hand from the model's own outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import tiny_model, write_checkpoint, write_images

from mamba3_jepa.cli.main import main
from mamba3_jepa.evaluation.evaluate import evaluate_checkpoint, zero_shot
from mamba3_jepa.evaluation.retrieval import label_recall
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.inference import EvaluateSettings

RECORDS = [
    {"image": "red.png", "question": "What colour is it?", "answer": "red"},
    {"image": "blue.png", "question": "What colour is it?", "answer": "Blue"},
    {"image": "green.png", "question": "Is there a square?", "answer": "no"},
    {"image": None, "query": "Is there a circle?", "answer": "yes"},
    {"image": "white.png", "text": "a white picture"},
    {"image": "red.png", "text": "a red picture"},
]


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return tiny_model(phase=2)


@pytest.fixture(scope="module")
def checkpoints(model: Mamba3Jepa, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {1: tiny_model(1), 2: model, 3: tiny_model(3)}
    return {phase: str(write_checkpoint(folder / f"{phase}.pt", made[phase], phase)) for phase in made}


@pytest.fixture(scope="module")
def data(model: Mamba3Jepa, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory whose test.jsonl has one question that the model answers right by generation."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    said = Answerer(model).ask(folder / "green.png", "Is there a square?").text
    records = [record | ({"answer": f"  {said.upper()}"} if record.get("answer") == "no" else {}) for record in RECORDS]
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_generated_and_nearest_answers(
    checkpoints: dict[int, str], model: Mamba3Jepa, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output, sheet, plot = tmp_path / "numbers.json", tmp_path / "new" / "sheet.png", tmp_path / "plot.png"
    arguments = ["--checkpoint", checkpoints[2], "--data-dir", str(data), "--manifest", "test.jsonl"]
    pictures = ["--answer-sheet", str(sheet), "--answers-plot", str(plot)]
    assert main(["evaluate", *arguments, "--batch-size", "4", "--output", str(output), *pictures]) == 0
    numbers = json.loads(output.read_text())
    assert (numbers["test/samples"], numbers["test/questions"]) == (6, 4)
    assert (numbers["test/exact_match"], numbers["test/caption_exact_match"]) == (0.25, 0.0)
    assert numbers["test/all_exact_match"] == pytest.approx(1 / 6)

    records = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()][:4]
    expected = [record["answer"] for record in records]
    pictures_of = [None if record["image"] is None else data / record["image"] for record in records]
    questions = [record.get("question") or record["query"] for record in records]
    cosines = model.embed(pictures_of, questions) @ model.embed_text(expected).T
    right = (cosines.argmax(dim=1) == torch.arange(4)).tolist()
    assert numbers["test/answer_accuracy"] == sum(right) / 4
    assert numbers["by_type"] == {
        "is there": {"questions": 2, "nearest": sum(right[2:]) / 2, "generated": 0.5},
        "what colour": {"questions": 2, "nearest": sum(right[:2]) / 2, "generated": 0.0},
    }
    shown = capsys.readouterr().out
    assert "exact_match" in shown
    assert "what colour" in shown
    for path in (sheet, plot):
        with Image.open(path) as picture:
            assert picture.format == "PNG"


def test_an_answer_that_training_did_not_know_is_wrong(
    model: Mamba3Jepa, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Chosen from the right answers of the measured questions, the only one would always be right."""
    checkpoint = str(write_checkpoint(tmp_path / "2.pt", model, 2, answers=["blue", "red", "two"]))

    def measured(*records: dict[str, object]) -> dict[str, float]:
        (data / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        output, sheet = tmp_path / "numbers.json", tmp_path / "sheet.png"
        arguments = ["--checkpoint", checkpoint, "--data-dir", str(data), "--manifest", "asked.jsonl"]
        files = ["--output", str(output), "--contact-sheet", str(sheet), "--predictions", str(tmp_path / "said.jsonl")]
        assert main(["evaluate", *arguments, *files, "--skip-generation"]) == 0
        return json.loads(output.read_text())

    elephant = {"image": "red.png", "question": "What animal is it?", "answer": "elephant"}
    numbers = measured(elephant)
    assert numbers["test/answer_accuracy"] == numbers["test/answers_known"] == 0
    assert (numbers["test/gallery_answers"], numbers["test/answers_unknown"]) == (3, 1)
    assert numbers["answers_from"] == "checkpoint"
    said = json.loads((tmp_path / "said.jsonl").read_text())["nearest"]
    assert said in ("blue", "red", "two")
    assert "of 1 of 1 questions no right answer is among the 3" in caplog.text
    caplog.clear()
    several = elephant | {"answers": ["elephant", f" {said.upper()}"]}
    numbers = measured(elephant | {"answer": said}, several, {"image": "red.png", "text": "a red picture"})
    assert (numbers["test/answers_unknown"], numbers["test/answers_known"]) == (0, 1)
    assert numbers["test/answer_accuracy"] == 0.5, "of several answers the first is what is trained on"
    assert numbers["test/several_answers_accuracy_nearest"] == 0.5, "one of two people said it"
    assert numbers["test/gallery_texts"] == 3, "captions are found among all texts of the samples, as before"
    assert "no right answer" not in caplog.text


def test_a_checkpoint_that_keeps_no_answers_says_so(
    checkpoints: dict[int, str], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--checkpoint", checkpoints[1], "--data-dir", str(data), "--manifest", "test.jsonl"]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "numbers.json")]) == 0
    assert "keeps no answers that it was trained on" in caplog.text
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["answers_from"] == "measured questions"
    assert (numbers["test/gallery_answers"], numbers["test/answers_unknown"]) == (4, 0)


def test_a_line_labelled_as_confused_is_not_measured(
    checkpoints: dict[int, str], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it carries as its answer is not what the model should say to what it sees."""
    confused = {"image": "white.png", "question": "What colour is it?", "answer": "red", "confused": True}
    both = data / "both.jsonl"
    both.write_text((data / "test.jsonl").read_text() + json.dumps(confused) + "\n")
    numbers = []
    for name in ("test.jsonl", both.name):
        output = tmp_path / f"{name}.json"
        arguments = ["--checkpoint", checkpoints[3], "--data-dir", str(data), "--manifest", name, "--skip-generation"]
        assert main(["evaluate", *arguments, "--output", str(output)]) == 0
        numbers.append(json.loads(output.read_text()))
    assert {**numbers[0], "data": ""} == {**numbers[1], "data": ""}
    assert '1 of 7 samples left out: 1 with "confused": true' in caplog.text


def test_without_generation(checkpoints: dict[int, str], data: Path, tmp_path: Path) -> None:
    """Phase 1 has no Y-Decoder; --skip-generation acts as if there were none."""
    outputs = []
    for phase, extra in ((1, []), (2, ["--skip-generation"])):
        output = tmp_path / f"{phase}.json"
        arguments = ["--checkpoint", checkpoints[phase], "--data-dir", str(data), "--manifest", "test.jsonl", *extra]
        plot = tmp_path / f"{phase}.png"
        assert main(["evaluate", *arguments, "--output", str(output), "--answers-plot", str(plot)]) == 0
        outputs.append(json.loads(output.read_text()))
        assert plot.is_file()
    for numbers in outputs:
        assert "test/answer_accuracy" in numbers
        assert "test/exact_match" not in numbers
        assert all(set(values) == {"questions", "nearest"} for values in numbers["by_type"].values())


@pytest.mark.parametrize(("beams", "largest"), [(4, 2), (9, 1)])
def test_beams_take_the_places_of_samples(
    beams: int, largest: int, checkpoints: dict[int, str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mamba3_jepa.inference import answerer
    from mamba3_jepa.models import generation, vljepa

    sizes: list[int] = []

    def generate(decoder: torch.nn.Module, embedding: torch.Tensor, **options: object) -> list:
        sizes.append(len(embedding))
        return generation.generate(decoder, embedding, **options)

    monkeypatch.setattr(vljepa, "generate", generate)
    wide = generation.GenerationConfig(method="beam", beams=beams)
    arguments = ["--data-dir", str(data), "--manifest", "test.jsonl", "--batch-size", "8"]
    assert (
        main(["evaluate", "--checkpoint", checkpoints[2], *arguments, "--method", "beam", "--beams", str(beams)]) == 0
    )
    assert (max(sizes), sum(sizes)) == (largest, 6)
    sizes.clear()
    asked = answerer.Answerer(tiny_model(2), generation=wide).ask_many([None] * 5, ["what?"] * 5, batch_size=8)
    assert (max(sizes), sum(sizes), len(asked)) == (largest, 5, 5)


def test_generation_settings_reach_the_decoder(checkpoints: dict[int, str], data: Path) -> None:
    from mamba3_jepa.settings.inference import GenerationConfig

    def run(**values: object) -> float | None:
        generation = GenerationConfig(**values)  # type: ignore[arg-type]
        settings = EvaluateSettings(
            checkpoint=Path(checkpoints[3]), data_dir=data, manifest=Path("test.jsonl"), generation=generation
        )
        answers = evaluate_checkpoint(settings).answers
        return None if answers is None else answers.unfinished

    assert run(max_tokens=1) == 1.0


def test_scenes_with_a_phase_3_checkpoint(checkpoints: dict[int, str], tmp_path: Path) -> None:
    output = tmp_path / "numbers.json"
    arguments = ["--checkpoint", checkpoints[3], "--samples", "30", "--max-tokens", "2", "--output", str(output)]
    assert main(["evaluate", *arguments]) == 0
    numbers = json.loads(output.read_text())
    assert numbers["test/samples"] == 30
    assert numbers["test/unfinished"] > 0
    assert sum(values["questions"] for values in numbers["by_type"].values()) == numbers["test/questions"]


def test_zero_shot_classification(checkpoints: dict[int, str], model: Mamba3Jepa, data: Path, tmp_path: Path) -> None:
    labels, output = tmp_path / "labels.txt", tmp_path / "numbers.json"
    labels.write_text("green\nblue\nRED\nyes\nRed\n")  # twice the same class
    arguments = [
        "--checkpoint",
        checkpoints[2],
        "--data-dir",
        str(data),
        "--manifest",
        "test.jsonl",
        "--skip-generation",
    ]
    extra = ["--labels", str(labels), "--label-template", "it is {}", "--output", str(output)]
    assert main(["evaluate", *arguments, *extra]) == 0
    numbers = json.loads(output.read_text())
    asked = ["What colour is it?", "What colour is it?", "Is there a circle?"]
    predicted = model.embed([data / "red.png", data / "blue.png", None], asked)
    cosines = predicted @ model.embed_text([f"it is {label}" for label in ("green", "blue", "RED", "yes")]).T
    right = (cosines.argmax(dim=1) == torch.tensor([2, 1, 3])).float().mean()
    assert (numbers["test/zero_shot_samples"], numbers["test/zero_shot_labels"]) == (3, 4)
    assert numbers["test/zero_shot_top1"] == pytest.approx(float(right))
    assert numbers["test/zero_shot_top5"] == 1.0


def test_zero_shot_counts_only_samples_with_a_label() -> None:
    embeddings = torch.eye(4)
    report = zero_shot(embeddings, ["a", "other", " C ", "b"], ["a", "b", "c"], torch.eye(4)[[0, 3, 1]])
    assert report is not None
    assert (report.n_samples, report.n_labels, report.recall[1]) == (3, 3, pytest.approx(2 / 3))
    assert zero_shot(embeddings, ["w", "x", "y", "z"], ["a", "b"], torch.eye(4)[:2]) is None


def test_label_recall_counts_ties_as_misses() -> None:
    predicted, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert label_recall(predicted, labels, [1, 2]) == {1: 0.5, 5: 1.0, 10: 1.0}


def test_bad_input(checkpoints: dict[int, str], data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    labels, captions = tmp_path / "labels.txt", data / "captions.jsonl"
    labels.write_text("cat\ndog\n")
    captions.write_text(json.dumps(RECORDS[4]) + "\n" + json.dumps(RECORDS[5]) + "\n")
    (data / "broken.png").write_bytes(b"\x89PNG nothing")
    (data / "broken.jsonl").write_text(json.dumps({"image": "broken.png", "text": "x"}) + "\n")
    test = ["--data-dir", str(data), "--manifest", "test.jsonl", "--skip-generation"]
    on_captions = ["--data-dir", str(data), "--manifest", "captions.jsonl", "--skip-generation"]
    for phase, arguments, message in (
        (2, [*test, "--labels", str(labels)], "none of the 6 samples has one of these 2 labels"),
        (2, [*test, "--labels", str(tmp_path / "nowhere.txt")], "cannot read it"),
        (2, [*test, "--label-template", "it"], "must contain {} once"),
        (2, [*test, "--answer-sheet", str(tmp_path / "x.png")], "cannot go with --skip-generation"),
        (1, [*test[:-1], "--answer-sheet", str(tmp_path / "x.png")], "has no Y-Decoder yet"),
        (2, [*on_captions, "--answers-plot", str(tmp_path / "x.png")], "has no questions to draw"),
        (2, [*test, "--answers-plot", "/proc/nowhere/x.png"], "cannot write"),
        (2, [*test, "--samples", "0"], "--samples 0: must be at least 1"),
        (2, ["--manifest", "test.jsonl"], "--manifest test.jsonl: its images lie in --data-dir; give that too"),
        (2, ["--data-dir", str(data), "--manifest", "broken.jsonl"], "not a readable image"),
        (2, [*test, "--device", "toaster"], "--device toaster: not available here"),
        (2, [*test, "--method", "beam", "--beams", "999"], "beams is 999, but the model has only"),
    ):
        assert main(["evaluate", "--checkpoint", checkpoints[phase], *arguments]) == 2, arguments
        assert message in capfd.readouterr().err
