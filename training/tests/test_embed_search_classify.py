"""`mamba3-jepa embed`, `search` and `classify` through their entry point, against the model called directly."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import tiny_model, write_checkpoint, write_images

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import preset
from mamba3_jepa.inference.answerer import Answer, Answerer
from mamba3_jepa.inference.confusion import Confusion
from mamba3_jepa.inference.embeddings import embed_images, find_images
from mamba3_jepa.inference.zero_shot import Found, class_probabilities, classify, search_images, search_sheet
from mamba3_jepa.models.vljepa import Mamba3Jepa

LABELS = ["red", "blue", "green", "a red circle above a blue square"]


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return tiny_model(phase=1)


@pytest.fixture(scope="module")
def checkpoint(model: Mamba3Jepa, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "phase1_best.pt", model, phase=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in the folder and in one below it, beside files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    paths = write_images(folder)
    (folder / "below").mkdir()
    paths["white"].rename(folder / "below" / "white.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def names(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("below/white.PNG", "blue.png", "green.png", "red.png")]


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_find_images_sorts_and_looks_below(folder: Path) -> None:
    assert [str(path) for path in find_images([Path("first.png")], folder)] == ["first.png", *names(folder)]


def test_embed_images_does_not_depend_on_the_batch(model: Mamba3Jepa, folder: Path) -> None:
    paths = [Path(name) for name in names(folder)]
    expected = model.observe(paths, ["Is there a square?"] * 4)
    for batch_size in (1, 3, 4):
        found = embed_images(model, paths, "Is there a square?", batch_size=batch_size)
        assert found.names == names(folder)
        torch.testing.assert_close(found.embeddings, expected.embedding, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-5, atol=1e-5)


def test_embed_to_safetensors(checkpoint: str, model: Mamba3Jepa, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "all.safetensors"
    arguments = ["--checkpoint", checkpoint, "--image-dir", str(folder), "--texts", "red", "a blue square"]
    assert main(["embed", *arguments, "--output", str(output)]) == 0
    tensors, metadata = tensors_of(output)
    assert json.loads(metadata["images"]) == names(folder)
    assert json.loads(metadata["texts"]) == ["red", "a blue square"]
    torch.testing.assert_close(tensors["images"], model.embed(names(folder), [None] * 4))
    torch.testing.assert_close(tensors["texts"], model.embed_text(["red", "a blue square"]))
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_embed_to_npy(checkpoint: str, model: Mamba3Jepa, folder: Path, tmp_path: Path) -> None:
    texts, output = tmp_path / "texts.txt", tmp_path / "texts.npy"
    texts.write_text("red\na blue square\n")
    assert main(["embed", "--checkpoint", checkpoint, "--texts", str(texts), "--output", str(output)]) == 0
    np.testing.assert_allclose(np.load(output), model.embed_text(["red", "a blue square"]).numpy(), atol=1e-6)
    assert json.loads((tmp_path / "texts.json").read_text()) == {"texts": ["red", "a blue square"]}
    images = names(folder)[1:3]
    arguments = ["--images", *images, "--question", "Is there a square?", "--output", str(tmp_path / "images.npy")]
    assert main(["embed", "--checkpoint", checkpoint, *arguments]) == 0
    expected = model.embed(images, ["Is there a square?"] * 2).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, atol=1e-6)


def test_search_ranks_by_cosine(
    checkpoint: str, model: Mamba3Jepa, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = ["search", "--checkpoint", checkpoint, "--image-dir", str(folder), "a red circle", "--top", "3"]
    assert main([*arguments, "--json", "--contact-sheet", str(sheet)]) == 0
    found = json.loads(capsys.readouterr().out)
    cosines = model.embed(names(folder), [None] * 4) @ model.embed_text(["a red circle"])[0]
    order = cosines.argsort(descending=True)[:3].tolist()
    assert [result["image"] for result in found["results"]] == [names(folder)[i] for i in order]
    assert [result["cosine"] for result in found["results"]] == pytest.approx(cosines[order].tolist(), abs=1e-6)
    assert found["images_searched"] == 4
    with Image.open(sheet) as picture:
        assert picture.width > 3 * 600
    assert main(arguments) == 0
    assert "cosine" in capsys.readouterr().out


def test_class_probabilities() -> None:
    embeddings, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = 1 / (1 + np.exp(-1 / 0.5))
    assert class_probabilities(embeddings, labels, 0.5)[0].tolist() == pytest.approx([expected, 1 - expected])


def test_classify(
    checkpoint: str, model: Mamba3Jepa, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    question = ["--question", "Is there a square?"]
    arguments = ["classify", "--checkpoint", checkpoint, "--image-dir", str(folder), "--temperature", "0.2"]
    cosines = model.embed(names(folder), [question[1]] * 4) @ model.embed_text([f"it is {x}" for x in LABELS]).T
    expected = (cosines / 0.2).softmax(-1)
    for given in (LABELS, [str(labels)]):
        assert main([*arguments, *question, "--template", "it is {}", "--labels", *given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [item["image"] for item in found] == names(folder)
        for row, item in zip(expected, found, strict=True):
            assert [entry["label"] for entry in item["labels"]] == [LABELS[i] for i in row.argsort(descending=True)]
            shares = [entry["probability"] for entry in item["labels"]]
            assert shares == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-5)
    assert main([*arguments, "--labels", *LABELS, "--top", "1"]) == 0
    assert "probability" in capsys.readouterr().out


QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module", params=[True, False], ids=["hears the answer", "hears no answer"])
def doubtful(request: pytest.FixtureRequest) -> Mamba3Jepa:
    """A model of phase 3."""
    return tiny_model(3, recursion=dataclasses.replace(preset("tiny").recursion, hears_answer=request.param))


def asked(model: Mamba3Jepa, folder: Path, question: str | None) -> dict[str, Answer]:
    """The answers about every image, by its name, with a threshold that leaves the model confused by two of them."""
    assert model.recursion is not None
    probe = model.recursion.confusion_probe

    def ask() -> dict[str, Answer]:
        return {name: Answerer(model).ask(name, question) for name in names(folder)}

    scores = sorted(answer.confusion or 0.0 for answer in ask().values())
    assert scores[1] < scores[2]
    probe.threshold.fill_((scores[1] + scores[2]) / 2)
    answers = ask()
    assert sum(bool(answer.confused) for answer in answers.values()) == 2
    return answers


def assert_judged_alike(values: dict[str, Any], threshold: float | None, answer: Answer) -> None:
    assert values["confusion"] == pytest.approx(answer.confusion, abs=1e-5)
    assert (values["confused"], values["signal"], threshold) == (answer.confused, answer.signal, answer.threshold)


def test_classify_is_confused_by_what_ask_is(
    doubtful: Mamba3Jepa, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = asked(doubtful, folder, QUESTION)
    checkpoint = write_checkpoint(tmp_path / "x.pt", doubtful, phase=3)
    command = ["classify", "--checkpoint", str(checkpoint), "--image-dir", str(folder), "--question", QUESTION]
    command += ["--labels", "red", "blue", "--batch-size", "3"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["image"] for each in found] == list(answers)
    for each in found:
        assert list(each) == ["image", "labels", "threshold", "confusion", "confused", "signal"]
        assert_judged_alike(each, each["threshold"], answers[each["image"]])
    monkeypatch.setenv("COLUMNS", "300")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["image", "label", "probability", "confusion"]
    lines = [line.strip() for line in printed.splitlines()[3:]]
    for place, (name, answer) in enumerate(answers.items()):
        verdict = ("not", "sure") if answer.confused else ()
        best, other = found[place]["labels"]
        assert lines[2 * place].split() == [
            name, best["label"], f"{best['probability']:.3f}", *verdict, f"{answer.confusion:.3f}",
        ]  # fmt: skip
        assert lines[2 * place + 1].split() == [other["label"], f"{other['probability']:.3f}"]
    threshold = next(iter(answers.values())).threshold
    assert lines[8:] == ["", f"confused about 2 of the 4 shown (confusion over the threshold {threshold:.3f})"]


def test_search_is_confused_by_what_ask_is(
    doubtful: Mamba3Jepa, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = asked(doubtful, folder, None)
    checkpoint = write_checkpoint(tmp_path / "x.pt", doubtful, phase=3)
    command = ["search", "--checkpoint", str(checkpoint), "--image-dir", str(folder), "red", "--top", "3"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["text", "images_searched", "results", "threshold"]
    cosines = doubtful.embed(list(answers), [None] * 4) @ doubtful.embed_text(["red"])[0]
    ranked = [list(answers)[i] for i in cosines.argsort(descending=True)]
    assert [each["image"] for each in found["results"]] == ranked[:3], "confusion moves no image"
    for each in found["results"]:
        assert list(each) == ["image", "cosine", "confusion", "confused", "signal"]
        assert_judged_alike(each, found["threshold"], answers[each["image"]])
    monkeypatch.setenv("COLUMNS", "300")
    assert main(command) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[2].split() == ["image", "cosine", "confusion"]
    for line, each in zip(lines[4:7], found["results"], strict=True):
        verdict = ("not", "sure") if each["confused"] else ()
        assert line.split() == [each["image"], f"{each['cosine']:.3f}", *verdict, f"{each['confusion']:.3f}"]
    count = sum(bool(answers[name].confused) for name in ranked[:3])
    line = f"confused about {count} of the 3 shown (confusion over the threshold {found['threshold']:.3f})"
    assert lines[7:] == ["", line]


def test_without_recursion_nothing_is_known_of_confusion(
    checkpoint: str, model: Mamba3Jepa, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    images = embed_images(model, [Path(name) for name in names(folder)])
    assert [each.confusion for each in search_images(model, "red", images, 2)] == [None] * 2
    assert [each.confusion for each in classify(model, images, ["a", "b"], temperature=1.0)] == [None] * 4
    unknown = {"confusion": None, "confused": None, "signal": None}
    for command in (["search", "red"], ["classify", "--labels", "a", "b"]):
        command = [*command, "--checkpoint", checkpoint, "--image-dir", str(folder)]
        assert main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        rows = found["results"] if command[0] == "search" else found
        assert len(rows) == 4
        assert all(row.items() >= unknown.items() for row in rows)
        assert (found if command[0] == "search" else rows[0])["threshold"] is None
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert "confus" not in printed
        assert "not sure" not in printed


def test_the_contact_sheet_marks_what_confuses(folder: Path, tmp_path: Path) -> None:
    sheets = {}
    for score in (0.2, 0.5, 0.8):
        confusion = Confusion(score=score, threshold=0.5, cause="state")
        found = [Found(name=name, cosine=0.5, confusion=confusion) for name in names(folder)[:2]]
        with Image.open(search_sheet("red", found, tmp_path / f"{score}.png")) as sheet:
            sheets[score] = sheet.copy()
    unknown = [Found(name=name, cosine=0.5, confusion=None) for name in names(folder)[:2]]
    with Image.open(search_sheet("red", unknown, tmp_path / "unknown.png")) as sheet:
        assert sheet.tobytes() == sheets[0.2].tobytes() == sheets[0.5].tobytes()
    assert sheets[0.8].height > sheets[0.2].height, "it has another line"


def test_file_names_that_are_not_utf8(
    checkpoint: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    for name in (b"gr\xfcn.png", "grün.png".encode()):
        (strange / os.fsdecode(name)).write_bytes((folder / "red.png").read_bytes())
    shown = [f"{strange}/grün.png", rf"{strange}/gr\xfcn.png"]
    images = ["--checkpoint", checkpoint, "--image-dir", str(strange)]
    sheet, output = tmp_path / "sheet.png", tmp_path / "x.safetensors"
    assert main(["search", *images, "red", "--contact-sheet", str(sheet), "--json"]) == 0
    assert sorted(result["image"] for result in json.loads(capfd.readouterr().out)["results"]) == sorted(shown)
    assert sheet.exists()
    assert main(["classify", *images, "--labels", "a", "b"]) == 0
    assert r"gr\xfcn.png" in capfd.readouterr().out.replace("\n", "")
    assert main(["embed", *images, "--output", str(output)]) == 0
    assert json.loads(tensors_of(output)[1]["images"]) == shown
    assert main(["embed", *images, "--output", str(tmp_path / os.fsdecode(b"\xff.npy"))]) == 0
    assert capfd.readouterr().out.endswith(rf"{tmp_path}/\xff.npy, {tmp_path}/\xff.json" + "\n")
    assert main(["embed", *images, "--output", str(tmp_path / "x.npy")]) == 0
    assert (tmp_path / "x.json").read_bytes() == f'{{\n  "images": [\n    "{shown[0]}",\n    '.encode() + (
        json.dumps(shown[1]) + "\n  ]\n}\n"
    ).encode()
    capfd.readouterr()
    assert main(["search", *images[:2], "red", "--images", os.fsdecode(b"\xff.png")]) == 2
    assert capfd.readouterr().err == "error: \\xff.png: there is no such image file\n"
    (strange / os.fsdecode(b"\xfe.png")).write_text("no picture")
    assert main(["search", *images, "red", "--on-bad-sample", "skip"]) == 0
    assert r"\xfe.png: not a readable image" in caplog.text


def test_all_values_of_a_repeated_option_count(checkpoint: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    first, second, third = names(folder)[:3]
    twice = ["--checkpoint", checkpoint, "--images", first, "--top", "3", "--images", second, third]
    for arguments in (["search", "red", *twice, "--json"], ["search", "--json", *twice, "red"]):
        assert main(arguments) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["text"] == "red"
        assert {result["image"] for result in found["results"]} == {first, second, third}
    labels = ["--labels", "red", "blue", "--labels=green", "white"]
    assert main(["classify", "--checkpoint", checkpoint, "--images", first, *labels, "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)[0]["labels"]
    assert {share["label"] for share in shares} == {"red", "blue", "green", "white"}
    assert (
        main(["embed", "--checkpoint", checkpoint, "--texts", "a", "--output", str(folder / "x.npy"), "--texts=b"]) == 0
    )
    assert "2 texts" in capsys.readouterr().out


def test_what_is_asked_for_is_printed_as_it_is(checkpoint: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["search", "--checkpoint", checkpoint, "--image-dir", str(folder), ":red_circle: [red]\x1b"]) == 0
    assert capsys.readouterr().out.startswith(":red_circle: [red]\ufffd   (4 images)\n")


def test_bad_images_are_errors_or_left_out(
    checkpoint: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    broken, good = tmp_path / "broken.png", folder / "red.png"
    broken.write_bytes(good.read_bytes()[:40])
    arguments = ["search", "--checkpoint", checkpoint, "red", "--images", str(broken)]
    assert main([*arguments, str(good)]) == 2
    assert "broken.png: not a readable image" in capfd.readouterr().err
    assert main([*arguments, str(good), "--on-bad-sample", "skip", "--json"]) == 0
    assert [result["image"] for result in json.loads(capfd.readouterr().out)["results"]] == [str(good)]
    assert "1 of 2 images left out" in caplog.text
    assert main([*arguments, "--on-bad-sample", "skip"]) == 2
    assert "none of the images can be read" in capfd.readouterr().err


def test_bad_input(checkpoint: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    empty, labels = tmp_path / "empty", tmp_path / "labels.txt"
    empty.mkdir()
    labels.write_text("")
    model, images = ["--checkpoint", checkpoint], ["--image-dir", str(folder)]
    output = ["--output", str(tmp_path / "x.npy")]
    for arguments, message in (
        (["embed", *model, *output], "nothing to embed"),
        (["embed", *model, "--texts", "red", "--output", "x.pt"], "must end in .npy or .safetensors"),
        (["embed", *model, *images, "--texts", "red", *output], "one array holds images or texts"),
        (["embed", *model, "--texts", "red", "--question", "x?", *output], "there are none"),
        (["embed", *model, "--texts", " ", *output], "is empty"),
        (["embed", *model, *images, "--question", "", *output], "is empty"),
        (["embed", *model, *images, "--batch-size", "0", *output], "--batch-size 0"),
        (["embed", *model, "--texts", "red", "--output", "/proc/nowhere/x.npy"], "cannot write"),
        (["embed", *model, "--texts", "red", "--output", "/proc/nowhere/x.safetensors"], "cannot write"),
        (["embed", "--checkpoint", str(tmp_path / "no.pt"), "--texts", "red", *output], "no checkpoint at"),
        (["search", *model, "red"], "no images: give --images or --image-dir"),
        (["search", *model, "red", "--image-dir", str(empty)], "no image in it"),
        (["search", *model, "red", "--image-dir", str(tmp_path / "no")], "there is no such folder"),
        (["search", *model, " ", *images], "is empty"),
        (["search", *model, "red", *images, "--device", "toaster"], "--device toaster: not available here"),
        (["search", *model, "red", *images, "--contact-sheet", "/proc/nowhere/x.png"], "cannot write"),
        (["classify", *model, *images, "--labels", "red"], "at least two different labels"),
        (["classify", *model, *images, "--labels", "red", "red "], "at least two different labels"),
        (["classify", *model, *images, "--labels", str(labels)], "has no text"),
        (["classify", *model, *images, "--labels", "red", "blue", "--template", "it"], "must contain {} once"),
        (["classify", *model, *images, "--labels", "red", "blue", "--temperature", "0"], "greater than 0"),
    ):
        assert main(arguments) == 2, arguments
        assert message in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "labels.txt"]
