"""Published data sets in their own layouts: what becomes of every field, what is refused, and that they train."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.published import manifest as published_manifest
from mamba3_jepa.data.sources import open_source
from mamba3_jepa.evaluation.vqa_accuracy import vqa_accuracy

N = 12  # images


def picture(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (i * 20, 255 - i * 20, 40)).save(path)


def as_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def as_lines(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


# --- the layouts ---


def vqav2(root: Path) -> list[str]:
    """Two questions about each image; the annotations are in another order."""
    for i in range(N):
        picture(root / f"images/train2014/COCO_train2014_{9 + i:012}.jpg", i)
    head = {
        "info": {"description": "This is Balanced Binary VQA", "url": "", "version": "2.0", "year": 2017},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"url": "", "name": ""},
        "data_subtype": "train2014",
    }
    asked = [
        {"image_id": 9 + i, "question": f"What is in {q} of {i}?", "question_id": (9 + i) * 1000 + q}
        for i in range(N)
        for q in range(2)
    ]
    annotations = [
        {
            "question_type": "what is in",
            "multiple_choice_answer": f"net {question['question_id'] % 5}",
            "answers": [
                {"answer": "netting" if k == 3 else f"net {question['question_id'] % 5}",
                 "answer_confidence": ("yes", "maybe", "no")[k % 3], "answer_id": k + 1}
                for k in range(10)
            ],
            "image_id": question["image_id"],
            "answer_type": "other",
            "question_id": question["question_id"],
        }
        for question in reversed(asked)
    ]  # fmt: skip
    questions = as_json(root / "v2_OpenEnded_mscoco_train2014_questions.json", {**head, "questions": asked})
    notes = as_json(root / "v2_mscoco_train2014_annotations.json", {**head, "annotations": annotations})
    return ["vqav2", "--questions", str(questions), "--annotations", str(notes)]


def coco_captions(root: Path) -> list[str]:
    """Five captions of each image, not together."""
    for i in range(N):
        picture(root / f"images/val2014/COCO_val2014_{i:012}.jpg", i)
    images = [
        {"license": 5, "file_name": f"COCO_val2014_{i:012}.jpg", "height": 16, "width": 20, "id": i,
         "coco_url": f"http://images.cocodataset.org/val2014/COCO_val2014_{i:012}.jpg", "date_captured": ""}
        for i in reversed(range(N))
    ]  # fmt: skip
    annotations = [
        {"image_id": i, "id": 100 * k + i, "caption": f"Caption {k} of the image {i}.\n"}
        for k in range(5)
        for i in range(N)
    ]
    value = {"info": {"year": 2014}, "images": images, "licenses": [{"id": 5}], "annotations": annotations}
    return ["coco-captions", "--captions", str(as_json(root / "annotations/captions_val2014.json", value))]


def karpathy(root: Path) -> list[str]:
    for i in range(N):
        picture(root / f"images/val2014/COCO_val2014_{i:012}.jpg", i)
    images = [
        {
            "filepath": "val2014",
            "sentids": [10 * i + k for k in range(5)],
            "filename": f"COCO_val2014_{i:012}.jpg",
            "imgid": i,
            "split": "test" if i < 10 else "val",
            "sentences": [
                {"tokens": ["a", str(i)], "raw": f"A {k} of {i}.", "imgid": i, "sentid": 10 * i + k} for k in range(5)
            ],
            "cocoid": 500 + i,
        }
        for i in range(N)
    ]
    path = as_json(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return ["coco-captions", "--captions", str(path), "--splits", "test"]


def gqa(root: Path) -> list[str]:
    for i in range(N):
        picture(root / f"images/images/{2354780 + i}.jpg", i)
    value = {
        f"0773695{i}": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
            "entailed": [f"0773696{i}"],
            "equivalent": [f"0773695{i}"],
            "question": f"Is it overcast in {i}?",
            "imageId": f"{2354780 + i}",
            "isBalanced": True,
            "groups": {"global": None, "local": "13-cloudy_overcast"},
            "answer": ("no", "yes")[i % 2],
            "semanticStr": "select: scene->verify weather: overcast [0]",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "weatherVerifyC", "semantic": "global", "structural": "verify"},
            "fullAnswer": "No, it is clear.",
        }
        for i in range(N)
    }
    return ["gqa", "--questions", str(as_json(root / "questions1.2/train_balanced_questions.json", value))]


def tallyqa(root: Path) -> list[str]:
    names = [f"VG_100K_2/{i}.jpg" if i % 2 else f"train2014/COCO_train2014_{i:012}.jpg" for i in range(N)]
    for i, name in enumerate(names):
        picture(root / "images" / name, i)
    value = [
        {"answer": i % 4, "data_source": "imported_genome", "image": name, "image_id": 92410400 + i,
         "issimple": bool(i % 3), "question": f"How many headlights does bus {i} have?", "question_id": 30095770 + i}
        for i, name in enumerate(names)
    ]  # fmt: skip
    return ["tallyqa", "--questions", str(as_json(root / "test.json", value))]


def pope(root: Path) -> list[str]:
    command = ["pope", "--questions"]
    for i in range(N):
        picture(root / f"images/val2014/COCO_val2014_{i:012}.jpg", i)
    for category in ("random", "adversarial"):
        lines = [
            {"question_id": i + 1, "image": f"COCO_val2014_{i:012}.jpg", "text": f"Is there a {category} {i} in it?",
             "label": ("yes", "no")[i % 2]}
            for i in range(N)
        ]  # fmt: skip
        command.append(str(as_lines(root / f"coco_pope_{category}.json", lines)))
    return command


def llava(root: Path) -> list[str]:
    """Two exchanges about each image, one without image, and one conversation that only captions."""
    for i in range(N):
        picture(root / f"images/coco/train2017/{i:012}.jpg", i)
    value: list[dict[str, Any]] = [
        {
            "id": f"{i:012}",
            "image": f"coco/train2017/{i:012}.jpg",
            "conversations": [
                {
                    "from": "human",
                    "value": "<image>\nWhat are the colors?" if i % 2 else "What are the colors?\n<image>",
                },
                {"from": "gpt", "value": f"They are {i}."},
                {"from": "human", "value": "And how many?"},
                {"from": "gpt", "value": f"There are {i} of them.\n"},
            ],
        }
        for i in range(N)
    ]
    value.append(
        {"id": "talk", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}
    )
    value.append(
        {"id": "cap", "image": value[0]["image"],
         "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a caption, not note.txt"}]}
    )  # fmt: skip
    return ["llava", "--conversations", str(as_json(root / "llava_v1_5_mix665k.json", value))]


LAYOUTS: list[Callable[[Path], list[str]]] = [vqav2, coco_captions, karpathy, gqa, tallyqa, pope, llava]


def prepared(command: list[str], root: Path) -> ManifestSource:
    """What `prepare` makes of it."""
    data_dir, output = root / "images", root / "out/some.jsonl"
    assert main(["prepare", *command, "--data-dir", str(data_dir), "--output", str(output)]) == 0
    source = open_source(data_dir, manifest=output)
    assert isinstance(source, ManifestSource)
    return source


# --- what becomes of the fields ---


def test_vqav2_keeps_ten_answers_types_and_numbers(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source = prepared(vqav2(tmp_path), tmp_path)
    assert len(source) == 2 * N
    sample = source.sample(0)
    assert (sample.question, sample.target) == (f"What is in 1 of {N - 1}?", "net 1")
    assert sample.answers == ("net 1", "net 1", "net 1", "netting", *["net 1"] * 6)
    assert sample.meta["image"] == f"train2014/COCO_train2014_{8 + N:012}.jpg"
    assert sample.meta["id"] == (8 + N) * 1000 + 1
    assert sample.meta["meta"] == {
        "dataset": "vqav2", "image_id": 8 + N, "question_type": "what is in", "answer_type": "other",
        "split": "train2014",
    }  # fmt: skip
    assert f"some.jsonl: {2 * N} lines about {N} images\n" in capfd.readouterr().out
    assert not list((tmp_path / "out").glob(".*"))


def test_coco_captions_are_one_line_an_image(tmp_path: Path) -> None:
    source = prepared(coco_captions(tmp_path), tmp_path)
    assert len(source) == N
    sample = source.sample(1)
    assert sample.captions == tuple(f"Caption {k} of the image {N - 2}." for k in range(5))
    assert (sample.question, sample.target) == (None, sample.captions[0])
    assert (sample.meta["image"], sample.meta["id"]) == (f"val2014/COCO_val2014_{N - 2:012}.jpg", N - 2)
    assert sample.meta["meta"] == {
        "dataset": "coco-captions",
        "caption_ids": [100 * k + N - 2 for k in range(5)],
        "split": "val2014",
    }


def test_karpathys_splits_are_chosen_from(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = karpathy(tmp_path)
    source = prepared(command, tmp_path)
    assert len(source) == 10
    sample = source.sample(3)
    assert sample.captions == tuple(f"A {k} of 3." for k in range(5))
    assert sample.meta["id"] == 503
    assert sample.meta["meta"] == {
        "dataset": "coco-captions",
        "cocoid": 503,
        "imgid": 3,
        "split": "test",
        "sentids": [30, 31, 32, 33, 34],
    }
    elsewhere = ["--data-dir", str(tmp_path / "images"), "--output", str(tmp_path / "other.jsonl")]
    assert main(["prepare", *command, "train", *elsewhere]) == 2
    assert "no image is of the --splits train; there are test, val" in capfd.readouterr().err
    assert main(["prepare", *coco_captions(tmp_path), "--splits", "test", *elsewhere]) == 2
    assert "no image is of the --splits test; the file has no splits: leave that out" in capfd.readouterr().err
    assert not (tmp_path / "other.jsonl").exists()
    assert main(["prepare", *command[:-2], *elsewhere]) == 0
    assert "12 lines about 12 images" in capfd.readouterr().out


def test_gqa_keeps_what_its_evaluation_reads(tmp_path: Path) -> None:
    source = prepared(gqa(tmp_path), tmp_path)
    assert len(source) == N
    sample = source.sample(1)
    assert (sample.question, sample.target, sample.meta["id"]) == ("Is it overcast in 1?", "yes", "07736951")
    assert sample.meta["image"] == "images/2354781.jpg"
    assert sample.meta["meta"] == {
        "dataset": "gqa",
        "imageId": "2354781",
        "types": {"detailed": "weatherVerifyC", "semantic": "global", "structural": "verify"},
        "groups": {"global": None, "local": "13-cloudy_overcast"},
        "isBalanced": True,
        "fullAnswer": "No, it is clear.",
        "entailed": ["07736961"],
        "equivalent": ["07736951"],
        "split": "train",
    }


def test_tallyqa_counts_in_words_of_digits(tmp_path: Path) -> None:
    source = prepared(tallyqa(tmp_path), tmp_path)
    sample = source.sample(3)
    assert (sample.target, sample.meta["image"], sample.meta["id"]) == ("3", "VG_100K_2/3.jpg", 30095773)
    assert sample.meta["meta"] == {
        "dataset": "tallyqa", "image_id": 92410403, "data_source": "imported_genome", "issimple": False, "split": "test"
    }  # fmt: skip


def test_pope_keeps_how_the_objects_were_chosen(tmp_path: Path) -> None:
    source = prepared(pope(tmp_path), tmp_path)
    assert len(source) == 2 * N
    first, last = source.sample(0), source.sample(2 * N - 1)
    assert (first.question, first.target, first.meta["id"]) == ("Is there a random 0 in it?", "yes", 1)
    assert first.meta["meta"] == {"dataset": "pope", "category": "random", "file": "coco_pope_random.json"}
    assert (last.target, last.meta["meta"]["category"]) == ("no", "adversarial")
    assert last.meta["image"] == f"val2014/COCO_val2014_{N - 1:012}.jpg"


def test_llava_is_a_line_for_each_answer(tmp_path: Path) -> None:
    source = prepared(llava(tmp_path), tmp_path)
    assert len(source) == 2 * N + 2
    samples = [source.sample(i) for i in (0, 1, 2, 2 * N, 2 * N + 1)]
    assert [sample.question for sample in samples] == [
        "What are the colors?", "And how many?", "What are the colors?", "Hello", None
    ]  # fmt: skip
    assert [sample.target for sample in samples] == [
        "They are 0.", "There are 0 of them.", "They are 1.", "Hi.", "a caption, not note.txt"
    ]  # fmt: skip
    assert [sample.meta["meta"] for sample in samples[:2]] == [{"dataset": "llava", "turn": turn} for turn in (1, 2)]
    assert [sample.meta["id"] for sample in samples] == ["000000000000"] * 2 + ["000000000001", "talk", "cap"]
    assert samples[3].image is None
    assert samples[4].meta["image"] == "coco/train2017/000000000000.jpg"


# --- that they train ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_as_it_is(layout: Callable[[Path], list[str]], tmp_path: Path) -> None:
    prepared(layout(tmp_path), tmp_path)
    data = ["--data-dir", str(tmp_path / "images"), "--manifest", str(tmp_path / "out/some.jsonl")]
    command = ["train-jepa", *data, "--tiny", "--cpu", "--workers", "0", "--batch-size", "4", "--max-steps", "1",
               "--val-fraction", "0.3"]  # fmt: skip
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 0


# --- what is missing ---


def test_images_that_are_not_there_are_counted_and_said(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = vqav2(tmp_path)
    gone = sorted((tmp_path / "images/train2014").iterdir())[1:4]
    for path in gone:
        path.unlink()
    source = prepared(command, tmp_path)
    assert len(source) == 2 * (N - 3)
    out = capfd.readouterr().out
    assert f'left out: 6 lines without their image, the first: {command[-1]}: "annotations" entry' in out
    assert f"(3 images; there is no {gone[-1]} nor {tmp_path / 'images' / gone[-1].name})" in out


def test_images_right_in_the_data_directory_are_found(tmp_path: Path) -> None:
    for layout, folder in ((vqav2, "train2014"), (coco_captions, "val2014"), (gqa, "images"), (pope, "val2014")):
        root = tmp_path / layout.__name__
        command = layout(root)
        (root / "images" / folder).rename(root / "flat")
        (root / "images").rmdir()
        (root / "flat").rename(root / "images")
        source = prepared(command, root)
        assert "/" not in source.sample(0).meta["image"]


def test_questions_and_annotations_of_two_splits_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = vqav2(tmp_path)
    whole = json.loads(Path(command[-1]).read_text())
    rest = ["--data-dir", str(tmp_path / "images"), "--output", str(tmp_path / "out.jsonl")]

    def refused(annotations: list[dict[str, Any]]) -> str:
        as_json(Path(command[-1]), whole | {"annotations": annotations})
        assert main(["prepare", *command, *rest]) == 2
        assert not (tmp_path / "out.jsonl").exists()
        return capfd.readouterr().err

    first = whole["annotations"][0]
    other = refused([first, first | {"question_id": 5}])
    assert (
        f'{command[-1]}: "annotations" entry 2: "question_id" 5 is not in {command[2]}: give two files of one' in other
    )
    assert f'entry 1: "image_id" 7 is {8 + N} in {command[2]}' in refused([first | {"image_id": 7}])
    assert 'no "annotations"; expected an annotations file of VQA v2' in refused([])


def test_empty_answers_count_and_questions_without_any_are_said(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = vqav2(tmp_path)
    whole = json.loads(Path(command[-1]).read_text())
    whole["annotations"] = whole["annotations"][2:]
    whole["annotations"][0]["answers"][4]["answer"] = " "
    for answer in whole["annotations"][1]["answers"]:
        answer["answer"] = ""
    as_json(Path(command[-1]), whole)
    source = prepared(command, tmp_path)
    assert len(source) == 2 * N - 3
    assert source.sample(0).answers.count("") == 1
    assert len(source.sample(0).answers) == 10
    # as the official code has it: of three 3 / 3 and 2 / 3, six and an empty one
    answers = [{"answer": answer} for answer in ["red"] * 3 + ["blue"] * 6 + [""]]
    as_json(Path(command[-1]), whole | {"annotations": [whole["annotations"][2] | {"answers": answers}]})
    (tmp_path / "out/some.jsonl").unlink()
    assert vqa_accuracy("red", prepared(command, tmp_path).sample(0).answers) == pytest.approx(0.9)
    out = capfd.readouterr().out
    assert f'2 questions without annotation, the first: {command[2]}: "question_id" {(8 + N) * 1000}\n' in out
    assert "1 questions with empty answers only, the first:" in out


@pytest.mark.parametrize("layout", [coco_captions, karpathy])
def test_images_that_are_repeated_are_one_line(
    layout: Callable[[Path], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = layout(tmp_path)
    whole = json.loads(Path(command[2]).read_text())
    images = whole["images"]
    as_json(Path(command[2]), whole | {"images": [*images[:2], images[0], *images[2:], images[1]]})
    source = prepared(command, tmp_path)
    assert len(source) == (N if layout is coco_captions else 10)
    assert len({source.sample(i).meta["id"] for i in range(len(source))}) == len(source)
    assert f"left out: 2 images whose number an earlier one has, the first: {command[2]}: " in capfd.readouterr().out


def test_annotations_that_are_repeated_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = vqav2(tmp_path)
    whole = json.loads(Path(command[-1]).read_text())
    again = whole["annotations"][0] | {"multiple_choice_answer": "another"}
    as_json(Path(command[-1]), whole | {"annotations": [*whole["annotations"], again]})
    source = prepared(command, tmp_path)
    assert len(source) == 2 * N
    assert source.sample(0).target == "net 1"
    where = f'{command[-1]}: "annotations" entry {2 * N + 1}'
    assert f"1 annotations of a question that has one already, the first: {where}\n" in capfd.readouterr().out


def test_the_test_split_of_gqa_has_no_answers(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = gqa(tmp_path)
    whole = json.loads(Path(command[-1]).read_text())
    del whole["07736950"]["answer"]
    as_json(Path(command[-1]), whole)
    rest = ["--data-dir", str(tmp_path / "images"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["prepare", *command, *rest]) == 2
    assert f'{command[-1]}: "07736950": field "answer" is missing: expected a text' in capfd.readouterr().err


WRONG: list[tuple[Callable[[Path], list[str]], Callable[[Any], Any], str]] = [
    (vqav2, lambda value: {"annotations": [3]}, '"annotations" entry 1: expected an object, {...}, found int 3'),
    (vqav2, lambda value: {"annotations": [{"question_id": "1"}]}, 'field "question_id": expected a whole number'),
    (coco_captions, lambda value: {**value, "annotations": []}, 'no "images" or no "annotations"'),
    (coco_captions, lambda value: {**value, "images": value["images"][1:]}, '"image_id" 11 is not among the "images"'),
    (coco_captions, lambda value: {**value, "images": [{"id": 2**70}]}, 'field "id": expected a whole number of'),
    (coco_captions, lambda value: [value], "expected a JSON object, {...}, found"),
    (gqa, lambda value: {"1": {"question": 5}}, '"1": field "imageId" is missing: expected a text'),
    (tallyqa, lambda value: [{**value[0], "answer": "two"}], 'entry 1: field "answer": expected a whole number'),
    (tallyqa, lambda value: [{**value[0], "question": " "}], 'entry 1: field "question" is empty'),
    (tallyqa, lambda value: [{**value[0], "image": "../../x.jpg"}], "'../../x.jpg' is no path inside --data-dir"),
    (tallyqa, lambda value: [], "nothing to write: the files hold no entries"),
    (pope, lambda value: [{**value, "label": "maybe"}], "field \"label\": expected yes or no, found 'maybe'"),
    (llava, lambda value: [{**value[0], "conversations": {}}], 'field "conversations": expected a list, found dict {}'),
    (llava, lambda value: [{"conversations": [{"from": "me", "value": "x"}]}],
     '"conversations" entry 1: field "from": expected human, gpt, system, found \'me\''),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "message"), WRONG)
def test_another_layout_names_file_and_field(
    layout: Callable[[Path], list[str]], change: Callable[[Any], Any], message: str, tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    command = layout(tmp_path)
    path = Path(command[-1])
    text = path.read_text()
    as_json(path, change(json.loads(text.partition("\n")[0] if layout is pope else text)))
    rest = ["--data-dir", str(tmp_path / "images"), "--output", str(tmp_path / "out/some.jsonl")]
    assert main(["prepare", *command, *rest]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert str(path) in error or "nothing to write" in error
    assert not (tmp_path / "out").exists()


def test_what_is_no_json_names_the_place(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = tallyqa(tmp_path)
    Path(command[-1]).write_text('[{"answer": 1, "image"]')
    rest = ["--data-dir", str(tmp_path / "images"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["prepare", *command, *rest]) == 2
    assert f"{command[-1]}: not valid JSON after the start: " in capfd.readouterr().err


def test_turns_of_llava_that_are_no_exchange_are_said(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = llava(tmp_path)
    value = json.loads(Path(command[-1]).read_text())
    human, gpt = value[0]["conversations"][:2]
    value[0]["conversations"] = [gpt, human, human, gpt, gpt, human]
    value[1]["image"] = [value[0]["image"], value[1]["image"]]
    value[2]["conversations"][1]["value"] = " "
    as_json(Path(command[-1]), value)
    source = prepared(command, tmp_path)
    assert len(source) == 1 + 1 + 2 * (N - 3) + 2
    out = capfd.readouterr().out
    assert "1 conversations about several images" in out
    assert "6 turns without question or answer, the first:" in out


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_conversation_with_an_empty_image_is_one_without(tmp_path: Path, nothing: str | None) -> None:
    command = llava(tmp_path)
    value = json.loads(Path(command[-1]).read_text())
    value[-2]["image"] = nothing
    as_json(Path(command[-1]), value)
    sample = prepared(command, tmp_path).sample(2 * N)
    assert (sample.image, sample.question, sample.target) == (None, "Hello", "Hi.")


def pack_zip(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("questions.json", content)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("program", "pack"),
    [
        ("gzip", gzip.compress),
        ("zip", pack_zip),
        ("bzip2", bz2.compress),
        ("xz", lzma.compress),
        ("zstd", lambda content: b"\x28\xb5\x2f\xfd" + content),
    ],
)
def test_files_as_they_are_downloaded_are_to_be_unpacked(
    tmp_path: Path, capfd: pytest.CaptureFixture, program: str, pack: Callable[[bytes], bytes]
) -> None:
    command = tallyqa(tmp_path)
    packed = Path(command[-1])
    packed.write_bytes(pack(packed.read_bytes()))
    rest = ["--data-dir", str(tmp_path / "images"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["prepare", *command, *rest]) == 2
    assert f"{packed}: compressed with {program}; what is read here is plain text" in capfd.readouterr().err


def test_nothing_is_overwritten_and_the_folder_must_be_there(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = tallyqa(tmp_path)
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    assert main(["prepare", *command, "--data-dir", str(tmp_path / "images"), "--output", str(output)]) == 2
    assert f"{output} exists: choose another --output" in capfd.readouterr().err
    assert output.read_text() == "mine"
    other = ["--output", str(tmp_path / "other.jsonl")]
    assert main(["prepare", *command, "--data-dir", str(tmp_path / "typo"), *other]) == 2
    assert f"--data-dir {tmp_path / 'typo'}: there is no such directory" in capfd.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["prepare", *command, "--data-dir", str(tmp_path / "empty"), *other]) == 2
    assert f"none of {N} images is there; there is no {tmp_path}/empty/train2014/COCO_train" in capfd.readouterr().err
    assert not (tmp_path / "other.jsonl").exists()


def test_images_behind_a_link_out_of_the_data_directory_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = vqav2(tmp_path)
    real = tmp_path / "images/train2014"
    real.rename(tmp_path / "elsewhere")
    real.symlink_to(tmp_path / "elsewhere")
    name = f"train2014/COCO_train2014_{8 + N:012}.jpg"
    rest = ["--data-dir", str(tmp_path / "images"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["prepare", *command, *rest]) == 2
    said = f"{command[-1]}: \"annotations\" entry 1: '{name}' leads out of the data directory to {tmp_path}/elsewhere/"
    assert said in (err := capfd.readouterr().err)
    assert "copy the files in, or give the real directory as --data-dir" in err
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "images/inside")
    real.unlink()
    real.symlink_to("inside")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    rest[1] = str(tmp_path / "link")
    assert main(["prepare", *command, *rest]) == 0, "links inside it, and to it, are followed"


def test_interrupted_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tallyqa(tmp_path)
    check, seen = published_manifest.parse_record, []

    def stopping(line: bytes, where: str) -> Any:
        seen.append(where)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(line, where)

    monkeypatch.setattr(published_manifest, "parse_record", stopping)
    output = tmp_path / "out/some.jsonl"
    rest = ["--data-dir", str(tmp_path / "images"), "--output", str(output)]
    assert main(["prepare", *command, *rest]) == 128 + signal.SIGTERM
    assert not output.parent.exists()
