"""Manifests and folder pairs: the record forms, every malformed line, paths, splits and their fallbacks."""

from __future__ import annotations

import gzip
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamba3_jepa.data.answers import common_answers
from mamba3_jepa.data.files import FolderSource, ManifestSource
from mamba3_jepa.data.images import BadSampleError
from mamba3_jepa.data.records import MAX_TEXT_BYTES, parse_record
from mamba3_jepa.data.sources import open_source, open_splits, source_texts
from mamba3_jepa.data.splits import split_by_hash, stable_hash
from mamba3_jepa.errors import UserError


def _write(root: Path, *lines: str | dict[str, Any], name: str = "manifest.jsonl") -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / name).write_text(text + "\n", encoding="utf-8")
    return root


def _image(path: Path, color: str = "red") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), color).save(path)
    return path.name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The three forms as the user's document has them, and variations."""
    _image(tmp_path / "images/001.jpg", "red")
    _image(tmp_path / "images/002.jpg", "blue")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions/001.txt").write_text("  a red picture\n", encoding="utf-8")
    return _write(
        tmp_path,
        '{"image": "images/001.jpg", "text": "captions/001.txt"}',
        '{"image": "images/002.jpg", "question": "What color?", "answer": "Blue"}',
        '{"image": null, "query": "Hello", "confused": false, "tool_used": null}',
        "",
        {"image": "images/002.jpg", "text": "see the file captions/001.txt or not"},
        {"image": None, "query": "Who?", "answer": "Me", "tool_used": "search", "knowledge": "It is me."},
        {"image": "images/001.jpg", "query": "Why?", "confused": True, "knowledge": [1, 0.5, -2e3]},
        {"image": "images/001.jpg", "question": "What is the star?", "confused": True},
    )


def test_the_three_forms(data: Path) -> None:
    source = ManifestSource(data)
    assert len(source) == 7
    caption, question, hello, inline, knowing, vector, unanswerable = (source.sample(i) for i in range(7))

    assert (caption.question, caption.target) == (None, "a red picture")
    assert caption.image is not None
    assert caption.image().getpixel((3, 3))[0] > 250
    assert (question.question, question.target) == ("What color?", "Blue")
    assert question.image is not None
    assert question.image().getpixel((3, 3))[2] > 250
    assert (hello.image, hello.question, hello.target, hello.confused) == (None, "Hello", None, False)
    assert inline.target == "see the file captions/001.txt or not"
    assert (knowing.target, knowing.tool_used, knowing.knowledge) == ("Me", "search", "It is me.")
    assert vector.knowledge == [1.0, 0.5, -2000.0]
    assert (unanswerable.question, unanswerable.target, unanswerable.confused) == (
        "What is the star?",
        None,
        True,
    )
    assert "manifest.jsonl line 5" in inline.meta["origin"], "blank lines count as lines"


def test_kinds_and_groups(data: Path) -> None:
    source = ManifestSource(data)
    kinds = {
        "all": [0, 1, 2, 3, 4, 5, 6],
        "target": [0, 1, 3],
        "caption": [0, 3],
        "question": [1],
        "confused": [2, 4, 5, 6],
        "confusing": [4, 5, 6],  # the fifth needed a tool
        "knowledge": [4, 5],
        "tool": [4],
    }
    for kind, expected in kinds.items():
        assert source.indices(kind).tolist() == expected, kind  # type: ignore[arg-type]
    assert [source.group(i) for i in (0, 1, 2, 6)] == [
        "images/001.jpg",
        "images/002.jpg",
        "Hello",
        "images/001.jpg",
    ]
    train, val = split_by_hash(source.group_hashes(), 0.5)
    hashes = source.group_hashes()
    assert hashes.tolist() == [stable_hash(source.group(i)) for i in range(7)]
    assert set(hashes[train]).isdisjoint(hashes[val])
    assert list(source_texts(source, [0, 1])) == ["a red picture", "What color?", "Blue"]


@pytest.mark.parametrize("line", ['{"image": 3, "query": "Hello"}', '{"text": "a picture"}', "[1, 2, 3]"])
def test_a_line_that_was_changed_since_is_checked_like_any_other(tmp_path: Path, line: str) -> None:
    """Also where it is as long as what was there, so that nothing else moves."""
    before = json.dumps({"image": None, "query": "x" * 40, "answer": "a"})
    (tmp_path / "manifest.jsonl").write_text(f"{before}\n{before}\n")
    source = ManifestSource(tmp_path)
    (tmp_path / "manifest.jsonl").write_text(f"{line.ljust(len(before))}\n{before}\n")
    assert source.sample(1).question == "x" * 40
    with pytest.raises(UserError, match="line 1"):
        source.sample(0)


def test_a_source_pickles_small_and_notices_changes(data: Path) -> None:
    source = ManifestSource(data)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.sample(1).target == "Blue"
    assert ManifestSource(data).fingerprint == source.fingerprint
    with (data / "manifest.jsonl").open("a") as file:
        file.write('{"image": null, "query": "More"}\n')
    assert ManifestSource(data).fingerprint != source.fingerprint


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"image": null, "query": "a", "answer": "b"}\r\n{"image": null, "query": "c"}'
    (tmp_path / "manifest.jsonl").write_bytes(content)
    source = ManifestSource(tmp_path)
    assert [source.sample(i).question for i in range(2)] == ["a", "c"]


WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
AWKWARD = ["caf\u00e9 \U0001f600", "\u0a0a and \u0d0a: bytes of line ends", "\u2028 is no line end", "d"]


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_manifest_as_powershell_writes_it(tmp_path: Path, encoding: str, end: str) -> None:
    lines = [json.dumps({"image": None, "query": text, "answer": "b"}, ensure_ascii=False) for text in AWKWARD]
    (tmp_path / "manifest.jsonl").write_bytes(("\ufeff" + end.join([*lines[:2], "", *lines[2:]])).encode(encoding))
    source = pickle.loads(pickle.dumps(ManifestSource(tmp_path)))
    assert [source.sample(i).question for i in (3, 0, 2, 1)] == [AWKWARD[i] for i in (3, 0, 2, 1)]
    assert "line 4" in source.sample(2).meta["origin"], "blank lines count as lines"
    (tmp_path / "utf8").mkdir()
    _write(tmp_path / "utf8", *lines)
    assert ManifestSource(tmp_path / "utf8").group_hashes().tolist() == source.group_hashes().tolist()


def test_utf_16_without_its_mark_is_known_by_its_first_brace(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "manifest.jsonl").write_bytes('{"image": null, "query": "\u00e9"}\n'.encode(encoding))
        assert ManifestSource(tmp_path).sample(0).question == "\u00e9"


def test_a_manifest_that_is_no_text_says_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes('\ufeff{"image": null'.encode("utf-16-le") + b"\x00\xd8\x41")
    with pytest.raises(UserError, match=r"manifest.jsonl: not UTF-16 text .*; save it as UTF-8"):
        ManifestSource(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_a_manifest_in_an_encoding_of_windows_is_to_be_saved_as_utf_8(tmp_path: Path, encoding: str) -> None:
    lines = [f'{{"image": null, "query": "{text}", "answer": "b"}}\n' for text in ("a", "caf\u00e9 noir")]
    (tmp_path / "manifest.jsonl").write_bytes("".join(lines).encode(encoding))
    with pytest.raises(UserError, match=r"line 2: not UTF-8 text \(.* at byte 29\); save it as UTF-8$"):
        ManifestSource(tmp_path)


def test_a_compressed_manifest_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(gzip.compress(b'{"image": null, "query": "a", "answer": "b"}\n'))
    with pytest.raises(UserError, match=r"manifest.jsonl: compressed with gzip; .* unpack it first$"):
        ManifestSource(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", *WIDE])
def test_manifests_with_marks_written_one_behind_the_other(tmp_path: Path, encoding: str) -> None:
    lines = [json.dumps({"image": None, "query": text, "answer": "b"}, ensure_ascii=False) for text in AWKWARD]
    text = "".join(f"\ufeff{line}\n" for line in lines)
    (tmp_path / "manifest.jsonl").write_bytes(text.encode(encoding))
    source = ManifestSource(tmp_path)
    assert [source.sample(i).question for i in (3, 0, 2, 1)] == [AWKWARD[i] for i in (3, 0, 2, 1)]
    (tmp_path / "one").mkdir()
    _write(tmp_path / "one", *lines)
    assert ManifestSource(tmp_path / "one").fingerprint == source.fingerprint


def test_a_caption_in_utf_16(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("\ufeffein Foto, \u00fcber\r\n".encode("utf-16-le"))
    assert FolderSource(tmp_path).sample(0).target == "ein Foto, \u00fcber"


def test_paths_of_windows(tmp_path: Path) -> None:
    _image(tmp_path / "images/a/001.jpg", "red")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions/001.txt").write_text("a red picture")
    _write(
        tmp_path,
        {"image": "images\\a\\001.jpg", "text": "captions\\001.txt"},
        {"image": ".\\images\\a/001.jpg", "question": "Red?", "answer": "yes\\no"},
        {"image": "images/a/001.jpg", "text": "a C:\\path in a text"},
    )
    source = ManifestSource(tmp_path)
    assert [source.sample(i).target for i in range(3)] == ["a red picture", "yes\\no", "a C:\\path in a text"]
    first = source.sample(0).image
    assert first is not None
    assert first().getpixel((3, 3))[0] > 250
    assert [source.group(i) for i in range(3)] == ["images/a/001.jpg"] * 3, "one picture, on one side of the split"
    assert len(set(source.group_hashes().tolist())) == 1


def test_a_backslash_in_a_name_that_is_there_is_a_backslash(tmp_path: Path) -> None:
    for name, colour in (("a\\b.png", "red"), ("a/b.png", "blue")):
        _image(tmp_path / name, colour)
    _write(tmp_path, {"image": "a\\b.png", "text": "x"})
    image = ManifestSource(tmp_path).sample(0).image
    assert image is not None
    assert image().getpixel((3, 3)) == (255, 0, 0)


def test_id_and_meta_are_kept_and_used_for_nothing(tmp_path: Path) -> None:
    given: list[Any] = [7, "x", None, {"source": ["a", {"b": 1.5}], "ok": True}]
    plain = {"image": None, "query": "Who?", "answer": "Me"}
    _write(tmp_path, *({**plain, "id": value, "meta": value} for value in given))
    source = ManifestSource(tmp_path)
    assert [source.record(i).id for i in range(4)] == [source.record(i).meta for i in range(4)] == given
    assert source.sample(3).meta["meta"] == given[3]
    assert len(set(source.group_hashes().tolist())) == 1


@pytest.mark.parametrize(
    ("field", "meant"),
    [("Image", "image"), ("img", "image"), ("file_name", "image"), ("caption", "text"), ("texts", "text"),
     ("anwser", "answer"), ("answers_", "answers"), ("caption_s", "captions"), ("label", "answer"),
     ("questions", "question"), ("prompt", "query"),
     ("metadata", "meta"), ("confuse", "confused"), ("tool", "tool_used"), ("ID", "id")],
)  # fmt: skip
def test_an_unknown_field_near_a_known_one_is_answered_with_that(field: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf'm line 2: unknown field "{field}" \(is "{meant}" meant\?\); the fields are'):
        parse_record(json.dumps({field: "x", "query": "x"}), "m line 2")


def test_an_unknown_field_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(UserError, match='unknown field "width"; the fields are image, text'):
        parse_record('{"width": 3}', "m line 2")


MALFORMED = [
    ('{"image": "..\\\\a.png", "text": "x"}', r"line 2: .*leaves the data directory"),
    ('{"image": "C:\\\\data\\\\a.png", "text": "x"}', r"line 2: .*is an absolute path of Windows"),
    ('{"image": "\\\\\\\\host\\\\a.png", "text": "x"}', r"line 2: .*is an absolute path of Windows"),
    ('{"image": "gone\\\\a.png", "text": "x"}', r'line 2: field "image": there is no file .*gone/a\.png'),
    ('{"image": "a.png", "text": "x"', r"line 2: not valid JSON"),
    ('{"image": "a.png", "text": "x"} trailing', r"line 2: not valid JSON"),
    ('["a.png", "x"]', r"line 2: expected a JSON object"),
    ("42", r"line 2: expected a JSON object"),
    ('{"text": "x"}', r'line 2: field "image" is missing: expected a path'),
    ('{"image": 5, "text": "x"}', r'line 2: field "image": expected a path.* found int 5'),
    ('{"image": "a.png", "text": ["x"]}', r'line 2: field "text": expected .* found list'),
    ('{"image": "a.png", "question": "x", "answer": 3}', r'line 2: field "answer": .*found int 3'),
    ('{"image": "a.png", "caption": "x"}', r'line 2: unknown field "caption".*knowledge'),
    ('{"image": "a.png"}', r'line 2: one of the fields "text", "captions", "question" or "query"'),
    ('{"image": "a.png", "question": "x"}', r'line 2: field "answer" is missing'),
    ('{"image": "a.png", "answer": "x"}', r'line 2: one of the fields "text", "captions", "question" or "query"'),
    ('{"image": "a.png", "text": "x", "question": "y"}', r'line 2: fields "text" and "question" exclude'),
    ('{"image": "a.png", "query": "x", "question": "y", "answer": "z"}', r'"question" and "query" exclude'),
    ('{"image": "a.png", "text": "x", "answer": "y"}', r'line 2: field "answer" does not go with "text"'),
    ('{"image": null, "text": "x"}', r'line 2: field "image"'),
    ('{"image": "a.png", "captions": "x"}', r'line 2: field "captions": expected a list of captions, found str'),
    ('{"image": "a.png", "captions": ["x", 3]}', r'line 2: field "captions" entry 2: expected a text, found int 3'),
    ('{"image": "a.png", "captions": []}', r'line 2: field "captions" is empty: expected a list'),
    ('{"image": "a.png", "captions": ["x", "y", " "]}', r'line 2: field "captions" entry 3 is empty'),
    ('{"image": "a.png", "captions": ["manifest.jsonl"], "text": "x"}', r'"text" and "captions" exclude'),
    ('{"image": null, "captions": ["x"]}', r'line 2: field "image": "captions" describes an image'),
    ('{"image": "a.png", "captions": ["x"], "answers": ["y"]}', r'"answers" does not go with "captions"'),
    ('{"image": "a.png", "captions": ["x", "note.txt"]}', r"""field "captions": 'note.txt' is a file; captions are"""),
    ('{"image": "a.png", "question": "x", "answers": {"y": 1}}', r'field "answers": expected a list of texts'),
    ('{"image": "a.png", "question": "x", "answers": ["y", null]}', r'field "answers" entry 2: expected a text'),
    ('{"image": "a.png", "question": "x", "answers": []}', r'line 2: field "answers" is empty'),
    ('{"image": "a.png", "question": "x", "answers": ["", " "]}', r'field "answers" has nothing but empty texts'),
    ('{"image": "a.png", "text": "x", "answers": ["y"]}', r'field "answers" does not go with "text"'),
    ('{"image": "a.png", "text": ""}', r'line 2: field "text" is empty'),
    ('{"image": "a.png", "text": " \\n"}', r'line 2: field "text" is empty'),
    ('{"image": "", "text": "x"}', r'line 2: field "image" is empty'),
    ('{"image": null, "query": "", "answer": "x"}', r'line 2: field "query" is empty'),
    ('{"image": null, "query": "x", "confused": "yes"}', r'field "confused": expected true, false or null'),
    ('{"image": null, "query": "x", "confused": 1}', r'field "confused": expected true, false or null'),
    ('{"image": null, "query": "x", "tool_used": true}', r'field "tool_used"'),
    ('{"image": null, "query": "x", "knowledge": []}', r'line 2: field "knowledge" is empty'),
    ('{"image": null, "query": "x", "knowledge": [1, "2"]}', r'line 2: field "knowledge"'),
    ('{"image": null, "query": "x", "knowledge": [1, NaN]}', r"line 2: .*knowledge"),
    ('{"image": null, "query": "x", "knowledge": {"a": 1}}', r'line 2: field "knowledge"'),
    ('{"image": "/etc/passwd", "text": "x"}', r"line 2: .*leaves the data directory"),
    ('{"image": "../a.png", "text": "x"}', r"line 2: .*leaves the data directory"),
    ('{"image": "b/../../a.png", "text": "x"}', r"line 2: .*leaves the data directory"),
    ('{"image": "a.png", "text": "../secret.txt"}', r'line 2: field "text": .*leaves the data directory'),
    ('{"image": "a.png\\u0000", "text": "x"}', r"line 2: .*leaves the data directory"),
    ('{"image": "gone.png", "text": "x"}', r'line 2: field "image": there is no file .*gone\.png'),
    ('{"image": "a.png", "text": "gone.txt"}', r'line 2: field "text": there is no file .*gone\.txt'),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_malformed_lines(tmp_path: Path, line: str, message: str) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "note.txt").write_text("a note")
    _write(tmp_path, {"image": "a.png", "text": "fine"}, line, {"image": "a.png", "text": "fine"})
    with pytest.raises(UserError, match=message) as caught:
        ManifestSource(tmp_path)
    assert str(tmp_path / "manifest.jsonl") in str(caught.value)


def test_a_path_inside_may_go_up_and_down(tmp_path: Path) -> None:
    _image(tmp_path / "images/a.png")
    source = ManifestSource(_write(tmp_path, {"image": "images/../images/a.png", "text": "x"}))
    image = source.sample(0).image
    assert image is not None
    assert image().size == (12, 10)


def test_not_utf8_and_empty_manifests(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(b'{"image": null, "query": "\xff\xfe"}\n')
    with pytest.raises(UserError, match=r"manifest\.jsonl line 1"):
        ManifestSource(tmp_path)
    for content in ("", "\n  \n"):
        (tmp_path / "manifest.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.jsonl: the manifest has no records"):
            ManifestSource(tmp_path)
    with pytest.raises(UserError, match=r"test\.jsonl: cannot read"):
        ManifestSource(tmp_path, "test.jsonl")


def test_symbolic_links_that_leave_are_refused(tmp_path: Path) -> None:
    _image(tmp_path / "outside/secret.png")
    (tmp_path / "outside/secret.txt").write_text("secret")
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to(tmp_path / "outside")
    (data / "inside").mkdir()
    _image(data / "inside/a.png")
    (data / "alias.png").symlink_to(data / "inside/a.png")
    _write(
        data,
        {"image": "link/secret.png", "text": "x"},
        {"image": "alias.png", "text": "link/secret.txt"},
        {"image": "alias.png", "text": "fine"},
    )
    source = ManifestSource(data)
    secret = source.sample(0).image
    assert secret is not None
    with pytest.raises(UserError, match=r"line 1: 'link/secret\.png' leads out of the data directory"):
        secret()
    with pytest.raises(UserError, match=r"line 2: 'link/secret\.txt' leads out of the data directory"):
        source.sample(1)
    fine = source.sample(2).image
    assert fine is not None
    assert fine().size == (12, 10)


def test_unreadable_texts_and_images_name_line_and_path(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "huge.txt").write_bytes(b"x" * (MAX_TEXT_BYTES + 1))
    lines = [{"image": "a.png", "text": f"{name}.txt"} for name in ("empty", "latin", "huge")]
    source = ManifestSource(_write(tmp_path, *lines, {"image": "broken.png", "text": "x"}))
    for i, message in enumerate(["empty.txt: the text is empty", "latin.txt: .*UTF-8", "huge.txt: .*longer"]):
        with pytest.raises(BadSampleError, match=f"line {i + 1}: .*{message}"):
            source.sample(i)
    image = source.sample(3).image
    assert image is not None
    with pytest.raises(BadSampleError, match=r"line 4: .*broken\.png: not a readable image"):
        image()


def test_missing_files_wait_for_the_loader_when_bad_samples_are_skipped(tmp_path: Path) -> None:
    _write(tmp_path, {"image": "gone.png", "text": "x"})
    image = ManifestSource(tmp_path, on_bad_sample="skip").sample(0).image
    assert image is not None
    with pytest.raises(BadSampleError, match=r"gone\.png: there is no such image"):
        image()


def test_a_line_of_a_query_without_image_groups_by_its_text() -> None:
    assert parse_record('{"image": null, "query": "Hi"}', "here").group == "Hi"


def test_folder_pairs(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a.png", "b/1.jpeg", "c/x.webp"):
        _image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}")
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource)
    assert [source.group(i) for i in range(4)] == ["a.png", "b/1.jpeg", "b/2.JPG", "c/x.webp"]
    assert [source.sample(i).target for i in range(4)] == [f"caption of {source.group(i)}" for i in range(4)]
    assert source.indices("question").tolist() == []
    image = source.sample(2).image
    assert image is not None
    assert image().size == (12, 10)

    _image(tmp_path / "b/lonely.png")
    with pytest.raises(UserError, match=r"b/lonely\.png: the image has no text file lonely\.txt"):
        FolderSource(tmp_path)
    skipping = FolderSource(tmp_path, on_bad_sample="skip")
    assert (len(skipping), skipping.n_left_out) == (4, 1)
    assert skipping.fingerprint == source.fingerprint


def hashes_of(groups: list[str]) -> np.ndarray:
    return np.array([stable_hash(group) for group in groups], dtype=np.uint64)


def test_the_split_is_by_group_stable_and_close_to_the_fraction() -> None:
    groups = [f"images/{i // 3}.jpg" for i in range(9000)]
    train, val = split_by_hash(hashes_of(groups), 0.2)
    assert sorted([*train, *val]) == list(range(9000))
    assert {groups[i] for i in train}.isdisjoint(groups[i] for i in val)
    assert abs(len(val) / 9000 - 0.2) < 0.03
    more = [*groups, *(f"new/{i}.jpg" for i in range(1000))]
    assert set(split_by_hash(hashes_of(more), 0.2)[1]) >= set(val), "new data moves nothing"
    assert set(split_by_hash(hashes_of(groups), 0.3)[1]) >= set(val)
    code = (
        "import numpy as np; from mamba3_jepa.data.splits import split_by_hash, stable_hash;"
        "hashes = np.array([stable_hash(f'images/{i // 3}.jpg') for i in range(9000)], dtype=np.uint64);"
        "print(*split_by_hash(hashes, 0.2)[1])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.split() == [str(i) for i in val]
    with pytest.raises(UserError, match="`val_fraction`"):
        split_by_hash(hashes_of(groups), 1.0)


def test_open_splits_of_a_manifest(tmp_path: Path) -> None:
    lines = [{"image": None, "query": f"q{i}", "answer": "a"} for i in range(200)]
    _write(tmp_path, *lines, {"image": None, "query": "no answer"})
    splits = open_splits(tmp_path, image_size=32, val_fraction=0.1)
    assert splits.train is splits.val
    assert not splits.synthetic
    everything = np.sort(np.concatenate([splits.train_indices, splits.val_indices]))
    assert everything.tolist() == list(range(200)), "the record without answer is left out"
    assert 8 <= len(splits.val_indices) <= 35


def test_lines_labelled_as_confused_have_no_right_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever answer they carry: phases 1 and 2 neither train on them nor measure with them; phase 3 uses them."""
    lines = [
        {"image": None, "query": f"q{i}", "answer": f"a{i % 2}", "confused": [True, False, None][i % 3]}
        for i in range(60)
    ]
    _write(tmp_path, *lines, {"image": None, "query": "no answer"}, {"image": None, "query": "?", "confused": True})
    right = [i for i in range(60) if i % 3]
    splits = open_splits(tmp_path, image_size=32, val_fraction=0.3)
    assert sorted([*splits.train_indices.tolist(), *splits.val_indices.tolist()]) == right
    assert '22 of 62 samples left out: 1 without an answer or a text, 21 with "confused": true' in caplog.text
    everything = open_splits(tmp_path, image_size=32, val_fraction=0.3, kind="all")
    assert len(everything.train_indices) + len(everything.val_indices) == 62
    _write(tmp_path, *lines[:3])
    three = ManifestSource(tmp_path)
    assert common_answers(three, range(3)) == ["a0", "a1"]
    assert common_answers(three, [0, 1]) == ["a1"]

    caplog.clear()
    _write(tmp_path, *lines)
    _write(tmp_path, *lines[:6], name="val.jsonl")
    assert open_splits(tmp_path, image_size=32).val_indices.tolist() == [1, 2, 4, 5]
    assert '2 of 6 samples left out: 2 with "confused": true' in caplog.text
    _write(tmp_path, lines[0])
    with pytest.raises(UserError, match=r"none of the 1 samples has an answer or a text \(but for 1 with \"confused\""):
        open_splits(tmp_path, image_size=32)


def test_val_jsonl_overrides_the_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, *({"image": None, "query": f"q{i}", "answer": "a"} for i in range(20)))
    _write(tmp_path, *({"image": None, "query": f"v{i}", "answer": "a"} for i in range(3)), name="val.jsonl")
    splits = open_splits(tmp_path, image_size=32)
    assert splits.train_indices.tolist() == list(range(20))
    assert [splits.val.sample(i).question for i in splits.val_indices] == ["v0", "v1", "v2"]
    assert not caplog.records
    _write(tmp_path, {"image": None, "query": "q7", "answer": "a"}, name="val.jsonl")
    open_splits(tmp_path, image_size=32)
    assert "1 images or queries" in caplog.text


def test_empty_sides_are_errors_that_name_the_flag(tmp_path: Path) -> None:
    _write(tmp_path, {"image": None, "query": "q", "answer": "a"})
    with pytest.raises(UserError, match=r"training side.*lower `val_fraction`|validation side.*raise `val_fraction`"):
        open_splits(tmp_path, image_size=32, val_fraction=0.5)
    with pytest.raises(UserError, match=r"validation side.*raise `val_fraction`"):
        open_splits(tmp_path, image_size=32, val_fraction=0.0)
    _write(tmp_path, {"image": None, "query": "q"})
    with pytest.raises(UserError, match="none of the 1 samples has an answer or a text"):
        open_splits(tmp_path, image_size=32)


def test_the_synthetic_fallback_is_loud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    splits = open_splits(None, image_size=32, n_scenes=5, n_val_scenes=4)
    assert splits.synthetic
    assert "SYNTHETIC" in caplog.text
    assert (len(splits.train_indices), len(splits.val_indices)) == (15, 12)
    caplog.clear()
    (tmp_path / "readme.md").write_text("nothing here")
    assert open_source(tmp_path) is None
    assert open_splits(tmp_path, image_size=32, n_scenes=5, n_val_scenes=4).synthetic
    assert str(tmp_path) in caplog.text
    assert "manifest.jsonl" in caplog.text
    with pytest.raises(UserError, match="there is no such directory"):
        open_splits(tmp_path / "typo", image_size=32)


def test_another_manifest_by_name(data: Path) -> None:
    _write(data, {"image": None, "query": "only in test"}, name="test.jsonl")
    source = open_source(data, manifest="test.jsonl")
    assert source is not None
    assert source.sample(0).question == "only in test"


def test_lines_that_are_no_samples_are_left_out_and_said_where_bad_samples_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = b'{"image": null, "query": "%d", "answer": "a"}'
    bad = [
        b'{"image": null, "query": "x", "answer": "\\ud800"}',
        b'{"image": null, "query": "x", "answer": ""}',
        b'{"image": "../x.png", "text": "a"}',
        b"not JSON",
        b'{"image": null, "query": "\xe9", "answer": "a"}',
        b'{"image": "x.png", "caption": "a"}',
    ]
    lines = [line for i, each in enumerate(bad) for line in (good % i, each)]
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join(lines))
    source = open_source(tmp_path, on_bad_sample="skip")
    assert source is not None
    assert [source.sample(i).question for i in range(len(source))] == [str(i) for i in range(len(bad))]
    assert f"{len(bad)} lines left out, the first: {tmp_path / 'manifest.jsonl'} line 2: " in caplog.text
    with pytest.raises(UserError, match="line 2: "):
        open_source(tmp_path)
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join(bad))
    with pytest.raises(UserError, match=rf"no records; .*the first of {len(bad)} lines: .*line 1: "):
        open_source(tmp_path, on_bad_sample="skip")
