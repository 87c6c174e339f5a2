"""What `evaluate` says of phase 3 on a small manifest, against what the model says when it is asked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_checkpoint, write_images

from mamba3_jepa.cli.main import main
from mamba3_jepa.config import preset
from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.evaluate import evaluate_checkpoint, results
from mamba3_jepa.inference.answerer import Answerer
from mamba3_jepa.settings.inference import EvaluateSettings


def test_a_manifest_by_hand(tmp_path: Path) -> None:
    model = tiny_model(3)
    assert model.recursion is not None
    write_images(tmp_path)
    rows = [("red.png", "what?", True), ("blue.png", "who?", False), ("green.png", "why?", True),
            ("white.png", "when?", False), ("red.png", "is it?", None), ("blue.png", "are they?", None)]  # fmt: skip
    asked = [(tmp_path / image, question) for image, question, _ in rows]
    scores = [Answerer(model).ask(*each).confusion or 0.0 for each in asked]
    model.recursion.confusion_probe.threshold.fill_(sorted(scores)[2] + 1e-6)
    said = [Answerer(model).ask(*each) for each in asked]
    lines = [{"image": image, "question": question, "answer": "red"} | ({} if label is None else {"confused": label})
             for image, question, label in rows]  # fmt: skip
    lines[4]["answer"] = said[4].text  # a right answer and a wrong one of the model's own
    lines[5]["answer"] = "never said"
    lines[3]["answer"] = said[3].text
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = write_checkpoint(tmp_path / "3.pt", model, 3)
    settings = EvaluateSettings(
        checkpoint=checkpoint, data_dir=tmp_path, manifest=Path("m.jsonl"), confusion_kinds=(), device="cpu"
    )
    found = results(settings, evaluate_checkpoint(settings))["recursion"]
    kinds = found["confusion"]["kinds"]
    rates = {"given": [0, 2], "given_clear": [1, 3], "clear": [4], "wrong_answer": [5]}
    assert {kind: values["samples"] for kind, values in kinds.items()} == {k: len(v) for k, v in rates.items()}
    for kind, places in rates.items():
        assert kinds[kind]["judged_confused"] == sum(bool(said[i].confused) for i in places) / len(places)
    pairs = [(scores[i], scores[j]) for i in (0, 2) for j in (1, 3)]
    assert kinds["given"]["auroc"] == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / 4)
    # What is labelled as not confused is answered too, rightly once.
    assert (found["wrong_answers"]["answers"], found["wrong_answers"]["accuracy"]) == (4, 0.5)
    assert found["wrong_answers"]["scores"]["chance"]["aurc"] == 0.5
    assert found["kept"]["answers"] >= 2
    assert found["wrong_answers"].pop("as_it_is") == found["wrong_answers"]  # nothing was made
    assert found["confusion"]["threshold"] == float(torch.tensor(sorted(scores)[2] + 1e-6))


def test_a_manifest_of_confused_lines_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(3)
    assert model.recursion is not None
    write_images(tmp_path)
    rows = [("red.png", "what?", {"confused": True}), ("blue.png", "who?", {"tool_used": "abacus", "knowledge": "two"})]
    lines = [{"image": image, "question": question, "answer": "red"} | label for image, question, label in rows]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model.recursion.confusion_probe.threshold.fill_(
        sum(Answerer(model).ask(tmp_path / image, question).confusion or 0.0 for image, question, _ in rows) / 2
    )
    command = ["evaluate", "--data-dir", str(tmp_path), "--manifest", "m.jsonl", "--device", "cpu", "--checkpoint"]
    checkpoint = str(write_checkpoint(tmp_path / "3.pt", model, 3))
    assert main([*command, checkpoint, "--json", "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads(capfd.readouterr().out)
    assert "all 2 samples are labelled as confused" in caplog.text
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert (found["answers_from"], found["recursion"]["wrong_answers"], found["recursion"]["kept"]) == (None,) * 3
    given = found["recursion"]["confusion"]["kinds"]["given"]
    assert (given["samples"], given["judged_confused"]) == (2, 0.5)
    assert main([*command, checkpoint]) == 0
    assert "given" in capfd.readouterr().out
    assert main([*command, checkpoint, "--predictions", str(tmp_path / "p.jsonl")]) == 2
    assert "--predictions is about what the model should answer" in " ".join(capfd.readouterr().err.split())
    # A folder that cannot be made is said before anything is measured.
    assert main([*command, checkpoint, "--samples", "1", "--recursion-plots", str(tmp_path / "m.jsonl")]) == 2
    assert "m.jsonl is not a folder" in " ".join(capfd.readouterr().err.split())
    (tmp_path / "u.jsonl").write_text(json.dumps({"image": "red.png", "question": "what?", "confused": False}) + "\n")
    assert main([*command[:4], "u.jsonl", *command[5:], checkpoint, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["recursion"]["confusion"]["kinds"]["given_clear"]["samples"] == 1
    assert "all 1 samples are labelled as confused, or have no answer: only confusion is measured" in caplog.text
    assert main([*command, str(write_checkpoint(tmp_path / "2.pt", tiny_model(2), 2))]) == 2
    assert 'but for 2 with "confused": true' in " ".join(capfd.readouterr().err.split())


def test_what_is_believed_by_hand(tmp_path: Path) -> None:
    model = tiny_model(3)
    assert model.recursion is not None
    write_images(tmp_path)
    rows = [("red.png", "what?", "it is red"), ("blue.png", "who?", "nobody"), ("green.png", "why?", "because")]
    lines = [{"image": image, "question": question, "answer": "red", "knowledge": knowledge, "confused": True}
             for image, question, knowledge in rows]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model.recursion.confusion_probe.threshold.fill_(-1.0)  # confused by everything
    told = [Answerer(model).ask(tmp_path / image, question, knowledge) for image, question, knowledge in rows]
    after = sorted(each.confusion_after or 0.0 for each in told)
    model.recursion.confusion_probe.threshold.fill_(after[0] + 1e-6)
    assert after[0] + 1e-6 < min(each.confusion or 0.0 for each in told)
    assert after[0] + 1e-5 < after[1]
    settings = EvaluateSettings(
        checkpoint=write_checkpoint(tmp_path / "3.pt", model, 3), data_dir=tmp_path, manifest=Path("m.jsonl"),
        confusion_kinds=(), device="cpu",
    )  # fmt: skip
    found = results(settings, evaluate_checkpoint(settings))["recursion"]
    assert found["belief"]["forms"]["given"] == {"told": 3, "sure": pytest.approx(1 / 3)}
    assert found["belief"]["forms"]["foreign"]["told"] == 3
    assert found["knowledge"]["judged"] == found["knowledge"]["forms"]


def test_what_measures_confusion_needs_it(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    checkpoint = write_checkpoint(tmp_path / "2.pt", tiny_model(2), 2)
    (tmp_path / "q.txt").write_text("who?\n")
    command = ["evaluate", "--checkpoint", str(checkpoint), "--foreign-questions", str(tmp_path / "q.txt")]
    assert main(command) == 2
    assert "phase 3 trains it" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UserError, match="cannot go with `skip_recursion`"):
        EvaluateSettings(checkpoint=checkpoint, recursion_plots=tmp_path, skip_recursion=True).check()


def test_what_is_told_and_a_list_of_questions_by_hand(tmp_path: Path) -> None:
    model = tiny_model(3)
    assert model.recursion is not None
    torch.manual_seed(1)
    torch.nn.init.normal_(model.recursion.injector.projection.weight)
    model.recursion.confusion_probe.threshold.fill_(-1.0)  # confused by everything
    write_images(tmp_path)
    rows = [("red.png", "what?", "it is red"), ("blue.png", "who?", "nobody"), ("green.png", "why?", "because")]
    before = [Answerer(model).ask(tmp_path / image, question).text for image, question, _ in rows]
    after = [Answerer(model).ask(tmp_path / image, question, knowledge).text for image, question, knowledge in rows]
    assert after[1] not in (before[1], "never said")
    answers = [before[0], after[1], "never said"]
    lines = [{"image": image, "question": question, "answer": answer, "knowledge": knowledge, "confused": True}
             for (image, question, knowledge), answer in zip(rows, answers, strict=True)]  # fmt: skip
    lines.append(
        {"image": "white.png", "question": "where?", "answer": "there"}
    )  # whose picture the list is asked about
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listed = ("who is king?", "wie spät ist es?")
    (tmp_path / "listed.txt").write_text("\n".join(listed))
    scores = [Answerer(model).ask(tmp_path / "white.png", text).confusion or 0.0 for text in listed]
    threshold = sum(scores) / 2
    model.recursion.confusion_probe.threshold.fill_(threshold)
    settings = EvaluateSettings(
        checkpoint=write_checkpoint(tmp_path / "3.pt", model, 3), data_dir=tmp_path, manifest=Path("m.jsonl"),
        confusion_kinds=(), foreign_questions=tmp_path / "listed.txt", device="cpu",
    )  # fmt: skip
    found = results(settings, evaluate_checkpoint(settings))["recursion"]
    given = found["knowledge"]["forms"]["given"]
    assert given["before"] == sum(a == b for a, b in zip(before, answers, strict=True)) / 3
    assert given["after"] == sum(a == b for a, b in zip(after, answers, strict=True)) / 3
    foreign = found["confusion"]["kinds"]["listed"]
    assert (foreign["samples"], foreign["judged_confused"]) == (10, 0.5)


@pytest.mark.parametrize(("knowledge", "message"), [([0.5, 1.0], "vector of length 2"), ("red", "is a text")])
def test_knowledge_that_does_not_fit_names_the_line_and_the_way_out(
    tmp_path: Path, knowledge: str | list[float], message: str
) -> None:
    write_images(tmp_path)
    line = {"image": "red.png", "question": "what?", "answer": "red", "knowledge": knowledge}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n")
    recursion = dataclasses.replace(preset("tiny").recursion, knowledge_dim=7)
    checkpoint = write_checkpoint(tmp_path / "3.pt", tiny_model(3, recursion=recursion), 3)
    settings = EvaluateSettings(checkpoint=checkpoint, data_dir=tmp_path, manifest=Path("m.jsonl"), device="cpu")
    with pytest.raises(UserError, match=rf"m\.jsonl.*1.*{message}.*`skip_recursion`"):
        evaluate_checkpoint(settings)
    assert evaluate_checkpoint(dataclasses.replace(settings, skip_recursion=True)).recursion is None
