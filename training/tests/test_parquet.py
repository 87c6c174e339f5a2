"""Parquet files as the Hugging Face hub stores them: what becomes of rows and images, and what is refused."""

from __future__ import annotations

import datetime
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.files import ManifestSource

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ANSWERS = pa.list_(pa.struct([("answer", pa.string()), ("answer_confidence", pa.string()), ("answer_id", pa.int64())]))
N = 12


def picture(i: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (i * 20, 255 - i * 20, 40)).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    """In row groups smaller than what is read at once; `features` as the library `datasets` notes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=5)
    return path


def images(cells: list[dict[str, Any] | None]) -> Any:
    return pa.array(cells, IMAGE)


def vqa(path: Path) -> Path:
    """As lmms-lab/VQAv2: the picture again for each of two questions."""
    return write(path, {
        "question_type": ["what is"] * 2 * N,
        "multiple_choice_answer": [f"net {i}" for i in range(2 * N)],
        "answers": pa.array(
            [[{"answer": f"net {i}", "answer_confidence": "yes", "answer_id": k} for k in range(10)]
             for i in range(2 * N)], ANSWERS),
        "image_id": list(range(2 * N)),
        "answer_type": ["other"] * 2 * N,
        "question_id": [1000 + i for i in range(2 * N)],
        "question": [f"What is {i}?" for i in range(2 * N)],
        "image": images([{"bytes": picture(i // 2, "JPEG"), "path": f"{i // 2}.jpg"} for i in range(2 * N)]),
    })  # fmt: skip


def flickr(path: Path) -> Path:
    """As nlphuji/flickr30k: a list of captions."""
    return write(path, {
        "image": images([{"bytes": picture(i), "path": None} for i in range(N)]),
        "caption": [[f"A {k} of {i}." for k in range(5)] for i in range(N)],
        "sentids": [[f"{5 * i + k}" for k in range(5)] for i in range(N)],
        "split": ["test"] * N,
        "filename": [f"{i}.jpg" for i in range(N)],
    })  # fmt: skip


def classes(path: Path) -> Path:
    """As cifar10: numbers of classes whose names are in the metadata."""
    features = {"img": {"_type": "Image"}, "label": {"names": ["air plane", "bird"], "_type": "ClassLabel"}}
    pictures = images([{"bytes": picture(i), "path": None} for i in range(N)])
    return write(path, {"img": pictures, "label": [i % 2 for i in range(N)]}, features)


def prepare(*arguments: str, root: Path) -> ManifestSource:
    assert main(["prepare", "parquet", "--files", *arguments, "--output", str(root / "data")]) == 0
    return ManifestSource(root / "data")


def test_questions_with_all_their_answers(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source = prepare(str(vqa(tmp_path / "validation-00000-of-00068.parquet")), root=tmp_path)
    assert f"manifest.jsonl: {2 * N} lines about {N} images\n" in capfd.readouterr().out
    sample = source.sample(7)
    assert (sample.question, sample.target, sample.answers) == ("What is 7?", "net 7", ("net 7",) * 10)
    assert sample.meta["id"] == 1007
    assert sample.meta["meta"] == {
        "split": "validation", "question_type": "what is", "image_id": 7, "answer_type": "other", "question_id": 1007
    }  # fmt: skip
    assert sample.image is not None
    assert sample.meta["image"].endswith(".jpg")
    assert (tmp_path / "data" / sample.meta["image"]).read_bytes() == picture(3, "JPEG")
    assert len(list((tmp_path / "data/images").rglob("*.jpg"))) == N, "each once"
    assert source.sample(6).meta["image"] == sample.meta["image"]


def test_captions_and_several_files(tmp_path: Path) -> None:
    files = [str(flickr(tmp_path / f"{name}.parquet")) for name in ("a", "b")]
    source = prepare(*files, root=tmp_path)
    assert len(source) == 2 * N
    sample = source.sample(3)
    assert sample.captions == tuple(f"A {k} of 3." for k in range(5))
    assert sample.meta["meta"] == {"sentids": ["15", "16", "17", "18", "19"], "split": "test", "filename": "3.jpg"}


def test_classes_are_called_by_their_names(tmp_path: Path) -> None:
    source = prepare(str(classes(tmp_path / "train-00000-of-00001.parquet")), root=tmp_path)
    assert [source.sample(i).target for i in range(3)] == ["air plane", "bird", "air plane"]
    assert source.sample(0).meta["meta"] == {"split": "train"}


def test_a_usual_name_can_be_declined(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {
        "image": images([{"bytes": picture(i), "path": None} for i in range(N)]),
        "question": ["Please describe the picture."] * N,
        "answer": [[f"A {k} of {i}." for k in range(5)] for i in range(N)],
    })  # fmt: skip
    source = prepare(str(path), "--question-column", "none", "--captions-column", "answer", root=tmp_path)
    sample = source.sample(2)
    assert (sample.question, sample.captions) == (None, tuple(f"A {k} of 2." for k in range(5)))
    assert sample.meta["meta"] == {"question": "Please describe the picture."}


@pytest.mark.parametrize("kind", ["Sequence", "List", "LargeList", None])
def test_classes_in_lists_are_called_by_their_names(tmp_path: Path, kind: str | None) -> None:
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "other": [],  # of a kind that says nothing of the labels
                "label": [label] if kind is None else {"feature": label, "_type": kind}}  # fmt: skip
    pictures = images([{"bytes": picture(i), "path": None} for i in range(2)])
    path = write(tmp_path / "x.parquet", {"image": pictures, "label": [[0, 1], [1]], "other": [1, 2]}, features)
    source = prepare(str(path), root=tmp_path)
    assert [source.sample(i).captions for i in range(2)] == [("cat", "dog"), ("dog",)]


def test_columns_can_be_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "x.parquet", {
        "photo": [picture(i) for i in range(N)],  # bytes alone
        "mask": [b"\0"] * N,
        "coded": pa.array([b"\0"] * N).dictionary_encode(),
        "ask": [f"Is it {i}?" for i in range(N)],
        "truth": [i % 2 == 0 for i in range(N)],
        "when": [datetime.date(2020, 1, 1)] * N,
        "score": [float("nan")] * N,
        "caption": ["not asked for"] * N,
    })  # fmt: skip
    named = ["--image-column", "photo", "--question-column", "ask", "--answer-column", "truth"]
    source = prepare(str(path), *named, root=tmp_path)
    assert [source.sample(i).target for i in range(2)] == ["yes", "no"]
    assert source.sample(1).question == "Is it 1?"
    assert source.sample(0).meta["meta"] == {"when": "2020-01-01", "score": None}
    assert f"2 columns of bytes beside the images, the first: {path}: coded" in capfd.readouterr().out


def test_numbers_are_answers(tmp_path: Path) -> None:
    values = [1.5, 2.0, float("nan"), None, -3.0]
    path = write(tmp_path / "x.parquet", {
        "image": images([{"bytes": picture(i), "path": None} for i in range(5)]),
        "question": ["q"] * 5, "answer": values,
    })  # fmt: skip
    source = prepare(str(path), root=tmp_path)
    assert [source.sample(i).target for i in range(len(source))] == ["1.5", "2", "-3"]


def test_a_list_of_one_image_is_that_image(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    cells = [{"bytes": picture(i), "path": None} for i in range(3)]
    path = write(tmp_path / "x.parquet", {
        "image": pa.array([[cells[0]], cells[1:], [], [cells[2]]], pa.list_(IMAGE)), "text": list("abcd"),
    })  # fmt: skip
    source = prepare(str(path), root=tmp_path)
    assert [source.sample(i).target for i in range(len(source))] == ["a", "d"]
    assert (tmp_path / "data" / source.sample(1).meta["image"]).read_bytes() == picture(2)
    out = capfd.readouterr().out
    assert f"left out: 1 rows with several images, the first: {path}: row 2\n" in out
    assert f"1 rows without the bytes of their image, the first: {path}: row 3\n" in out


def test_empty_answers_of_several_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {
        "image": images([{"bytes": picture(i), "path": None} for i in range(3)]),
        "question": ["q"] * 3,
        "answers": pa.array([[{"answer": each} for each in ("", " ", "red")], [{"answer": ""}],
                             [{"answer": "blue"}]], ANSWERS),
    })  # fmt: skip
    source = prepare(str(path), root=tmp_path)
    assert [(source.sample(i).target, source.sample(i).answers) for i in range(len(source))] == [
        ("red", ("", "", "red")), ("blue", ("blue",))
    ]  # fmt: skip


def test_numbers_of_fewer_bits_keep_their_digits(tmp_path: Path) -> None:
    values = [0.1, -2.7, 1e-7, 3.0, 1 / 3]
    for kind, expected in (
        (pa.float64(), ["0.1", "-2.7", "1e-07", "3", "0.3333333333333333"]),
        (pa.float32(), ["0.1", "-2.7", "1e-07", "3", "0.33333334"]),
        (pa.float16(), ["0.1", "-2.7", "1e-07", "3", "0.3333"]),
    ):
        path = write(tmp_path / f"{kind}.parquet", {
            "image": images([{"bytes": picture(i), "path": None} for i in range(5)]), "question": ["q"] * 5,
            "answer": pa.array([np.float16(v) for v in values] if kind == pa.float16() else values, kind),
        })  # fmt: skip
        source = prepare(str(path), root=tmp_path / str(kind))
        assert [source.sample(i).target for i in range(5)] == expected


def test_each_of_several_questions_has_its_own_number(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {
        "image": images([{"bytes": picture(i), "path": None} for i in range(3)]),
        "question": [["q1", "q2"], ["q3"], ["q4", "q5"]],
        "answer": [["a1", "a2"], ["a3"], ["a4", "a5"]],
        "question_id": [[11, 12], [13], [14]],
    })  # fmt: skip
    source = prepare(str(path), root=tmp_path)
    assert [source.sample(i).meta["id"] for i in range(5)] == [11, 12, 13, 14, [14]]


def test_a_list_of_questions_is_a_line_for_each(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "x.parquet", {
        "image": images([{"bytes": picture(i), "path": None} for i in range(6)]),
        "question": [["q1", "q2"], ["q3"], ["q4", " "], ["q5", "q6"], ["q7", "q8"], ["q9", "q10"]],
        "answer": [["a1", "a2"], ["a3", "b3"], ["a4", "b4"], ["a5", "b5", "c5"], None, ["a9", None]],
        "caption": ["not an answer"] * 6,
        "question_id": list(range(6)),
    })  # fmt: skip
    source = prepare(str(path), root=tmp_path)
    samples = [source.sample(i) for i in range(len(source))]
    assert [(sample.question, sample.target, sample.answers) for sample in samples] == [
        ("q1", "a1", ()), ("q2", "a2", ()), ("q3", "a3", ("a3", "b3")), ("q4", "a4", ()), ("q9", "a9", ())
    ]  # fmt: skip
    assert [sample.meta["meta"].get("question_number") for sample in samples] == [1, 2, None, 1, 1]
    assert [sample.meta["id"] for sample in samples] == [0, 0, 1, 2, 5]
    out = capfd.readouterr().out
    several = "rows with several questions and not as many answers (question, answer)"
    assert f"left out: 2 {several}, the first: {path}: row 4\n" in out
    assert f"2 questions of several in a row without a text or an answer, the first: {path}: row 3\n" in out


@pytest.mark.parametrize("layout", [vqa, flickr, classes])
def test_it_trains_as_it_is(layout: Any, tmp_path: Path) -> None:
    prepare(str(layout(tmp_path / "a.parquet")), root=tmp_path)
    command = ["train-jepa", "--data-dir", str(tmp_path / "data"), "--tiny", "--cpu", "--workers", "0",
               "--batch-size", "4", "--max-steps", "1", "--val-fraction", "0.3"]  # fmt: skip
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 0


def test_rows_that_lack_something_are_counted_and_said(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    cells: list[dict[str, Any] | None] = [{"bytes": picture(i), "path": None} for i in range(8)]
    cells[1], cells[2] = None, {"bytes": None, "path": "elsewhere.jpg"}
    cells[3] = {"bytes": b"II*\0 a TIFF", "path": None}
    texts = [f"t {i}" for i in range(8)]
    texts[5], texts[6] = None, " "  # type: ignore[call-overload]
    path = write(tmp_path / "x.parquet", {"image": images(cells), "text": texts})
    source = prepare(str(path), root=tmp_path)
    assert [source.sample(i).target for i in range(3)] == ["t 0", "t 4", "t 7"]
    out = capfd.readouterr().out
    assert f"left out: 2 rows without the bytes of their image, the first: {path}: row 2\n" in out
    assert f"1 rows whose image is none of JPEG, PNG, WebP, GIF and BMP, the first: {path}: row 4\n" in out
    assert f"2 rows without an answer or a caption, the first: {path}: row 6\n" in out


def test_what_cannot_be_used_is_named_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "torn.parquet").write_bytes(vqa(tmp_path / "vqa.parquet").read_bytes()[:-20])
    damaged = bytearray(classes(tmp_path / "damaged.parquet").read_bytes())
    damaged[4:400] = bytes(396)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    write(tmp_path / "texts.parquet", {"text": ["a"]})
    write(tmp_path / "bare.parquet", {"image": images([{"bytes": picture(1), "path": None}]), "size": [3]})
    write(tmp_path / "names.parquet", {"image": ["a.jpg"], "text": ["a"]})
    write(tmp_path / "empty.parquet", {"image": images([None]), "text": ["a"]})
    for arguments, message in (
        (["torn.parquet"], "torn.parquet: not a parquet file"),
        (["damaged.parquet"], "damaged.parquet: damaged: "),
        (["nowhere.parquet"], "nowhere.parquet: cannot read it"),
        (["texts.parquet"], "no column of images; there are text: name it, --image-column"),
        (["bare.parquet"], "no column of answers or captions; there are image, size: name it, --answer-column"),
        (["vqa.parquet", "--answer-column", "reply"], "--answer-column reply: the columns are question_type,"),
        (["names.parquet"], "row 1: column image: expected the bytes of an image, or a struct with them, found str"),
        (["empty.parquet"], "nothing to write: 1 rows without the bytes of their image"),
    ):
        output = tmp_path / "out/data"
        rest = ["--output", str(output), *arguments[1:]]
        assert main(["prepare", "parquet", "--files", str(tmp_path / arguments[0]), *rest]) == 2, arguments
        assert message in capfd.readouterr().err
        assert not output.parent.exists()


def test_a_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    cells = [{"bytes": b"BM" + bytes([i % 16]) * 10_000, "path": None} for i in range(4096)]
    table = pa.table({"image": images(cells), "caption": ["c"] * len(cells)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4096, use_dictionary=False, compression="none")
    code = (
        "import sys, pyarrow; from mamba3_jepa.cli.main import main; status = main(sys.argv[1:]);"
        "print(pyarrow.default_memory_pool().max_memory()); sys.exit(status)"
    )
    command = ["prepare", "parquet", "--files", str(tmp_path / "x.parquet"), "--output", str(tmp_path / "data")]
    ran = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert int(ran.stdout.splitlines()[-1]) < 30e6, "of 41 MB"


def test_nothing_is_overwritten_and_pyarrow_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    path = classes(tmp_path / "a.parquet")
    prepare(str(path), root=tmp_path)
    command = ["prepare", "parquet", "--files", str(path), "--output", str(tmp_path / "data")]
    assert main(command) == 2
    assert "exists and is not empty: choose another --output" in capfd.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(command) == 2
    assert "pip install pyarrow" in capfd.readouterr().err
