"""`mamba3-jepa evaluate` on data with several answers and captions, and with prompt templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, write_checkpoint, write_images
from torchmetrics.functional.classification import multiclass_accuracy

from mamba3_jepa.cli.main import main
from mamba3_jepa.evaluation.retrieval import label_recall
from mamba3_jepa.evaluation.vqa_accuracy import vqa_accuracy
from mamba3_jepa.evaluation.zero_shot import class_embeddings
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.models.vljepa import Mamba3Jepa

COLOUR, THERE = "What colour is it?", "Is there a square?"


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return tiny_model(phase=2)


@pytest.fixture(scope="module")
def checkpoint(model: Mamba3Jepa, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "2.pt", model, 2))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_images(tmp_path / "data")
    return tmp_path / "data"


def evaluate(checkpoint: str, data: Path, records: list[dict[str, Any]], *arguments: str) -> dict[str, Any]:
    """The numbers that the command writes of these records."""
    (data / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = data / "numbers.json"
    measured = ["--checkpoint", checkpoint, "--data-dir", str(data), "--manifest", "test.jsonl"]
    assert main(["evaluate", *measured, "--output", str(output), *arguments]) == 0
    return json.loads(output.read_text())


def vqa(image: str, question: str, answers: list[str], kind: str, number: int = 0) -> dict[str, Any]:
    meta = {"dataset": "vqav2", "answer_type": kind, "question_type": question.lower()[:8]}
    return {"image": image, "question": question, "answers": answers, "id": number, "meta": meta}


def test_vqa_accuracy_of_both_ways_of_answering(
    checkpoint: str, model: Mamba3Jepa, data: Path, capsys: pytest.CaptureFixture
) -> None:
    said = Answerer(model).ask(data / "green.png", THERE).text
    records = [
        vqa("red.png", COLOUR, ["red"] * 5 + ["crimson"] * 5, "other", 1),
        vqa("blue.png", COLOUR, ["blue"] * 10, "other", 2),
        vqa("green.png", THERE, ["no"] * 8 + [said] * 2, "yes/no", 3),
    ]
    written = data / "answers.jsonl"
    numbers = evaluate(checkpoint, data, records, "--predictions", str(written))
    expected = ["red", "blue", "no"]  # the most frequent of each; of equally frequent ones the first
    predicted = model.embed([data / record["image"] for record in records], [record["question"] for record in records])
    nearest = (predicted @ model.embed_text(expected).T).argmax(dim=1).tolist()
    shares = [vqa_accuracy(expected[i], record["answers"]) for i, record in zip(nearest, records, strict=True)]
    scores = numbers["benchmarks"]["vqav2"]["scores"]
    assert scores["questions"] == numbers["test/vqav2_questions"] == 3
    assert scores["by_way"]["nearest"]["accuracy"] == pytest.approx(sum(shares) / 3)
    assert scores["by_way"]["generated"]["accuracy"] == pytest.approx(0.6 / 3)
    assert numbers["test/vqav2_accuracy_generated"] == pytest.approx(0.6 / 3)
    kinds = numbers["benchmarks"]["vqav2"]["groups"]["answer type"]
    assert kinds["yes/no"]["by_way"] == {
        "nearest": {"accuracy": pytest.approx(shares[2])},
        "generated": {"accuracy": pytest.approx(0.6)},
    }
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["id"] for line in lines] == [1, 2, 3]
    assert [line["nearest"] for line in lines] == [expected[i] for i in nearest]
    assert lines[2] == lines[2] | {"question": THERE, "right": records[2]["answers"], "generated": said}
    shown = capsys.readouterr().out
    assert "answer type: yes/no" in shown
    assert "0.2000" in shown


def test_without_a_decoder_only_the_nearest_answers_are_measured(checkpoint: str, data: Path) -> None:
    records = [{"image": "red.png", "question": THERE, "answer": "yes", "meta": {"dataset": "pope"}}]
    numbers = evaluate(checkpoint, data, records, "--skip-generation")
    assert set(numbers["benchmarks"]["pope"]["scores"]["by_way"]) == {"nearest"}
    assert numbers["test/pope_accuracy_nearest"] == numbers["test/pope_yes_nearest"] == 1
    del records[0]["meta"]
    assert evaluate(checkpoint, data, records, "--skip-generation")["benchmarks"] == {}
    named = evaluate(checkpoint, data, records, "--skip-generation", "--benchmark", "pope")
    assert named["benchmarks"] == numbers["benchmarks"]


def test_what_is_odd_about_questions_is_said(checkpoint: str, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        vqa("red.png", COLOUR, ["red"] * 10, "other", 7),
        vqa("blue.png", COLOUR, ["blue"] * 2, "other", 7),
        vqa("blue.png", THERE, ["no"] * 10, "yes/no", 7),  # another file may count from the beginning again
    ]
    numbers = evaluate(checkpoint, data, records, "--skip-generation")
    assert numbers["benchmarks"]["vqav2"]["odd_counts"] == 1
    assert "1 of 3 questions do not have 10 answers" in caplog.text
    assert "1 questions have the id of an earlier one" in caplog.text
    caplog.clear()
    evaluate(checkpoint, data, records[:1], "--skip-generation")
    assert "do not have" not in caplog.text
    assert "id" not in caplog.text.split()


def test_fewer_samples_than_there_are_is_said(checkpoint: str, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [vqa("red.png", COLOUR, ["red"] * 10, "other", number) for number in range(3)]
    evaluate(checkpoint, data, records, "--skip-generation", "--samples", "2")
    assert "2 of 3 samples are measured" in caplog.text


def test_answers_to_choose_from(checkpoint: str, model: Mamba3Jepa, data: Path) -> None:
    """A right answer that is not among them cannot be given; how many questions that concerns is said."""
    known = data / "answers.txt"
    known.write_text("green\nBlue\nno\n")
    records = [
        vqa("red.png", COLOUR, ["red"] * 10, "other", 1),
        vqa("blue.png", COLOUR, ["navy"] * 6 + ["blue"] * 4, "other", 2),
    ]
    numbers = evaluate(checkpoint, data, records, "--skip-generation", "--answers", str(known))
    predicted = model.embed([data / "red.png", data / "blue.png"], [COLOUR] * 2)
    texts = ["green", "Blue", "no"]
    nearest = [texts[i] for i in (predicted @ model.embed_text(texts).T).argmax(dim=1).tolist()]
    shares = [vqa_accuracy(text, record["answers"]) for text, record in zip(nearest, records, strict=True)]
    assert (numbers["test/answers_known"], numbers["test/answers_unknown"]) == (0.5, 1)
    assert (numbers["answers_from"], numbers["test/gallery_answers"]) == ("file", 3)
    assert numbers["test/answer_accuracy"] == 0  # "red" and "navy" are not among them
    assert numbers["test/vqav2_accuracy_nearest"] == pytest.approx(sum(shares) / 2)


def test_empty_generated_answers_are_wrong_and_counted(
    checkpoint: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [("Red.", True), ("", True), (" ", False)]
    monkeypatch.setattr("mamba3_jepa.evaluation.evaluate.generate_texts", lambda *_, **__: said)
    answers = ["red"] * 9 + ["pink"]
    numbers = evaluate(checkpoint, data, [vqa("red.png", COLOUR, answers, "other", number) for number in range(3)])
    assert numbers["test/empty"] == pytest.approx(2 / 3)
    assert numbers["test/vqav2_accuracy_generated"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("in_one_line", [True, False])
def test_retrieval_takes_every_caption(checkpoint: str, model: Mamba3Jepa, data: Path, in_one_line: bool) -> None:
    captions = {
        "red.png": ["a red picture", "red it is", "a warm colour"],
        "blue.png": ["a blue picture", "the sea"],
        "green.png": ["a green picture"],
    }
    records: list[dict[str, Any]] = [{"image": name, "captions": texts} for name, texts in captions.items()]
    if not in_one_line:
        records = [{"image": name, "text": text} for name, texts in captions.items() for text in texts]
    records.append({"image": "white.png", "question": COLOUR, "answer": "white"})
    numbers = evaluate(checkpoint, data, records, "--skip-generation")
    assert (numbers["test/gallery_images"], numbers["test/gallery_texts"]) == (3, 6)
    texts = [text for group in captions.values() for text in group]
    image_of = torch.tensor([0, 0, 0, 1, 1, 2])
    cosines = model.embed([data / name for name in captions], [None] * 3) @ model.embed_text(texts).T
    to_text = image_of[cosines.argmax(dim=1)] == torch.arange(3)
    to_image = cosines.argmax(dim=0) == image_of
    assert numbers["test/image_to_text_r1"] == pytest.approx(to_text.double().mean().item())
    assert numbers["test/text_to_image_r1"] == pytest.approx(to_image.double().mean().item())


def test_any_caption_of_an_image_may_be_generated(checkpoint: str, model: Mamba3Jepa, data: Path) -> None:
    said = Answerer(model).ask(data / "red.png", None).text
    together = [{"image": "red.png", "captions": ["a red picture", said]}]
    for records in (together, [{"image": "red.png", "text": text} for text in ("a red picture", said)]):
        numbers = evaluate(checkpoint, data, records)
        assert numbers["test/caption_exact_match"] == 1
        assert numbers["test/bleu"] == pytest.approx(100)


def test_templates_are_averaged_in_embedding_space(checkpoint: str, model: Mamba3Jepa, data: Path) -> None:
    labels, templates = ["green", "blue", "red", "yes"], ["it is {}", "a {} picture", "{}"]
    texts = [[template.replace("{}", label) for template in templates] for label in labels]
    mean = torch.stack([model.embed_text(group).mean(dim=0) for group in texts])
    expected = torch.nn.functional.normalize(mean, dim=1)
    assert torch.allclose(class_embeddings(model, labels, templates), expected, atol=1e-6)

    (data / "labels.txt").write_text("\n".join(labels))
    (data / "templates.txt").write_text("\n".join(templates))
    records = [{"image": f"{name}.png", "question": COLOUR, "answer": name} for name in ("red", "blue", "green")]
    arguments = ["--skip-generation", "--labels", str(data / "labels.txt"), "--label-template"]
    given = [evaluate(checkpoint, data, records, *arguments, *each) for each in
             (templates, [str(data / "templates.txt")])]  # fmt: skip
    assert given[0] == given[1]
    predicted = model.embed([data / record["image"] for record in records], [COLOUR] * 3)
    right = (predicted @ expected.T).argmax(dim=1) == torch.tensor([2, 1, 0])
    assert given[0]["test/zero_shot_top1"] == pytest.approx(right.double().mean().item())
    assert given[0]["test/zero_shot_templates"] == 3


def test_top_1_and_top_5_are_those_of_torchmetrics() -> None:
    torch.manual_seed(0)
    classes, right = torch.randn(12, 6), torch.randint(12, (83,))
    predicted = classes[right] + 2 * torch.randn(83, 6)
    recall = label_recall(predicted, classes, right.tolist())
    scores = torch.nn.functional.normalize(predicted, dim=1) @ torch.nn.functional.normalize(classes, dim=1).T
    for k in (1, 5):
        expected = multiclass_accuracy(scores, right, num_classes=12, top_k=k, average="micro")
        assert recall[k] == pytest.approx(float(expected))
    assert 0 < recall[1] < recall[5] < 1
