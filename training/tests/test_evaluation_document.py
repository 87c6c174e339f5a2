"""The commands of docs/evaluation.md, as they stand there, on small files in the published layouts."""

from __future__ import annotations

import glob
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.cli.main import main

DOCUMENT = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
IMAGES = {
    "coco": ("val2014/COCO_val2014_000000000001.jpg", "val2014/COCO_val2014_000000000002.jpg"),
    "coco/val2017": ("1.jpg",),
    "gqa": ("images/n1.jpg", "images/n2.jpg"),
    "tally": ("val2014/COCO_val2014_000000000001.jpg", "VG_100K_2/2.jpg"),
}


def commands(heading: str) -> list[list[str]]:
    """The commands of a section, split as a shell does it."""
    section = DOCUMENT.partition(f"### {heading}\n")[2].partition("\n#")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    return [[word for part in shlex.split(line) for word in sorted(glob.glob(part)) or [part]] for line in lines]


def run(heading: str) -> dict[str, Any]:
    """The numbers that the last command of a section writes."""
    prepare, evaluate = commands(heading)
    for program, *arguments in (prepare, evaluate):
        assert program == "mamba3-jepa"
        assert main(["2.pt" if word == "$CKPT" else word for word in arguments]) == 0
    return json.loads(Path(evaluate[evaluate.index("--output") + 1]).read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "2.pt", tiny_model(phase=2), 2)


@pytest.fixture(autouse=True)
def here(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a checkpoint and the images."""
    monkeypatch.chdir(tmp_path)
    Path("2.pt").symlink_to(checkpoint)
    for root, names in IMAGES.items():
        for number, name in enumerate(names):
            Path(root, name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (200 * number, 90, 30)).save(Path(root, name))


def write(name: str, values: Any) -> None:
    Path(name).write_text(json.dumps(values), encoding="utf-8")


def test_vqav2() -> None:
    asked = [(1001, 1, "Is it red?"), (1002, 1, "How many?"), (2001, 2, "What is it?")]
    questions = [{"question_id": number, "image_id": image, "question": text} for number, image, text in asked]
    write("v2_OpenEnded_mscoco_val2014_questions.json",
          {"data_type": "mscoco", "data_subtype": "val2014", "questions": questions})  # fmt: skip
    said = [
        ("yes/no", "is it", ["yes"] * 9 + ["no"]),
        ("number", "how many", ["2"] * 10),
        ("other", "what", ["cat"] * 10),
    ]
    annotations = [
        {
            "question_id": number,
            "image_id": image,
            "answer_type": kind,
            "question_type": begin,
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(answers)],
        }
        for (number, image, _), (kind, begin, answers) in zip(asked, said, strict=True)
    ]
    write("v2_mscoco_val2014_annotations.json", {"data_subtype": "val2014", "annotations": annotations})
    report = run("VQA v2")["benchmarks"]["vqav2"]
    assert (report["scores"]["questions"], report["odd_counts"]) == (3, 0)
    assert set(report["scores"]["by_way"]) == {"nearest", "generated"}
    assert set(report["groups"]["answer type"]) == {"yes/no", "number", "other"}
    assert set(report["groups"]["question type"]) == {"is it", "how many", "what"}


def test_gqa() -> None:
    def question(image: str, answer: str, structural: str) -> dict[str, Any]:
        types = {"structural": structural, "semantic": "obj", "detailed": "existC"}
        return {"imageId": image, "question": "Is it?", "answer": answer, "isBalanced": True, "types": types}

    write(
        "testdev_balanced_questions.json", {"01": question("n1", "yes", "verify"), "02": question("n2", "cat", "query")}
    )
    report = run("GQA")["benchmarks"]["gqa"]
    assert report["scores"]["questions"] == 2
    assert set(report["groups"]["answer"]) == {"binary", "open"}
    assert set(report["groups"]["structural"]) == {"verify", "query"}
    assert set(report["groups"]["semantic"]) == {"obj"}


def test_tallyqa() -> None:
    write("test.json", [
        {"question_id": number, "image": image, "image_id": number, "question": "How many?", "answer": number,
         "issimple": number == 1, "data_source": "amt"}
        for number, image in enumerate(IMAGES["tally"], start=1)
    ])  # fmt: skip
    report = run("TallyQA")["benchmarks"]["tallyqa"]
    assert report["scores"]["questions"] == 2
    assert set(report["groups"]["complexity"]) == {"simple", "complex"}


def test_pope(caplog: pytest.LogCaptureFixture) -> None:
    for category in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": number, "image": f"COCO_val2014_00000000000{number}.jpg", "text": "Is there a cat?",
             "label": label}
            for number, label in ((1, "yes"), (2, "no"))
        ]  # fmt: skip
        Path(f"coco_pope_{category}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = run("POPE")
    report = numbers["benchmarks"]["pope"]
    assert report["scores"]["questions"] == 6
    assert set(report["groups"]["category"]) == {"random", "popular", "adversarial"}
    assert set(report["scores"]["by_way"]["nearest"]) == {"accuracy", "precision", "recall", "f1", "yes"}
    assert "id of an earlier" not in caplog.text


def captions(texts: Sequence[str], number: int, split: str) -> dict[str, Any]:
    sentences = [{"raw": text, "tokens": text.split(), "imgid": number, "sentid": i} for i, text in enumerate(texts)]
    name = f"COCO_val2014_00000000000{number}.jpg"
    return {"filepath": "val2014", "filename": name, "cocoid": number, "imgid": number, "split": split,
            "sentids": list(range(len(texts))), "sentences": sentences}  # fmt: skip


def test_retrieval() -> None:
    texts = [
        [f"a picture {word}" for word in words.split()] for words in ("of it all in red", "so very green but dark too")
    ]
    write(
        "dataset_coco.json",
        {"dataset": "coco", "images": [captions(texts[0], 1, "test"), captions(texts[1], 2, "test")]},
    )
    numbers = run("Retrieval on COCO and Flickr30K")
    assert (numbers["test/gallery_images"], numbers["test/gallery_texts"]) == (2, 11)
    assert {f"test/{name}_r{k}" for name in ("image_to_text", "text_to_image") for k in (1, 5, 10)} <= set(numbers)


def test_zero_shot() -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    Path("imagenette").mkdir()
    content = [Path("coco", name).read_bytes() for name in IMAGES["coco"]]
    images = [{"bytes": each, "path": f"{number}.jpg"} for number, each in enumerate(content)]
    parquet.write_table(pa.table({"image": images, "label": ["cat", "dog"]}), "imagenette/train-00000-of-00001.parquet")
    Path("classes.txt").write_text("cat\ndog\nbird\n")
    Path("templates.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
    numbers = run("Zero-shot classification")
    assert (numbers["test/zero_shot_samples"], numbers["test/zero_shot_labels"]) == (2, 3)
    assert numbers["test/zero_shot_templates"] == 2
    assert numbers["test/zero_shot_top5"] == 1


def test_sugarcrepe() -> None:
    Path("sugar-crepe").mkdir()
    for kind, wrong in (("swap_att", ["a blue cat on red grass", "an owl"]), ("add_obj", ["a cat and a dog"])):
        pairs = [{"filename": "1.jpg", "caption": "a red cat", "negative_caption": text} for text in wrong]
        write(f"sugar-crepe/{kind}.json", dict(enumerate(pairs)))
    section = DOCUMENT.partition("### SugarCrepe\n")[2].partition("\n## ")[0]
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], {})
    ((program, *arguments),) = commands("SugarCrepe")
    assert program == "mamba3-jepa"
    assert main(["2.pt" if word == "$CKPT" else word for word in arguments]) == 0
    swaps = json.loads(Path("sugarcrepe.json").read_text())["swaps"]
    assert {kind: row["samples"] for kind, row in swaps.items()} == {"all": 3, "swap_att": 2, "add_obj": 1}
    assert {row["chance"] for row in swaps.values()} == {0.5}
