"""Large JSON files entry by entry, against the whole read at once."""

from __future__ import annotations

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mamba3_jepa.errors import UserError
from mamba3_jepa.files import json_stream
from mamba3_jepa.files.json_stream import json_entries, json_members

AWKWARD: list[Any] = [
    {}, [], "", 0, -12.5e3, 10**30, True, None, "a \"quoted\" \\ text", "é 猫 \U0001f408", {"b": [1, {"c": "]}"}]},
    [[[]]], "x" * 50, 123456789,
]  # fmt: skip


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_is_its_entries(tmp_path: Path, indent: int | None, encoding: str) -> None:
    path = write(tmp_path / "a.json", json.dumps(AWKWARD, indent=indent, ensure_ascii=False), encoding)
    found = list(json_entries(path))
    assert [entry.value for entry in found] == AWKWARD
    assert [entry.where for entry in found] == [f"{path}: entry {i + 1}" for i in range(len(AWKWARD))]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_is_its_members_and_the_entries_of_its_lists(tmp_path: Path, indent: int | None) -> None:
    whole = {"info": {"year": 2014}, "empty": [], "a": AWKWARD, "number": 7, "b": [{"x": 1}, 5]}
    path = write(tmp_path / "a.json", json.dumps(whole, indent=indent) + "\n")
    found = list(json_members(path))
    expected = [("info", {"year": 2014}), *(("a", each) for each in AWKWARD), ("number", 7), ("b", {"x": 1}), ("b", 5)]
    assert [(entry.key, entry.value) for entry in found] == expected
    assert found[0].where == f'{path}: "info"'
    assert found[-1].where == f'{path}: "b" entry 2'
    assert list(json_members(write(tmp_path / "b.json", " { } "))) == []


def test_values_one_a_line_are_entries_too(tmp_path: Path) -> None:
    records = [{"i": i, "text": "x" * i} for i in range(9)]
    path = write(tmp_path / "a.json", "\n".join(map(json.dumps, records)) + "\n\n")
    assert [entry.value for entry in json_entries(path)] == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"b": ]', r"not valid JSON after entry 1: .*unallowed token .*, in '\[{\"a\": 1}, {\"b\": \]'"),
        ('[{"a": 1}, {"b": 2}', "not valid JSON after entry 2: .*premature EOF"),
        ('[{"a": 1} {"b": 2}]', "not valid JSON after entry 1: .*I expect ',' or ']'"),
        ('[{"a": "never closed', "not valid JSON after the start: .*premature EOF"),
        ("[1] [2]", "there is more behind the end, after entry 1"),
        ("[1] x", "not valid JSON after entry 1: .*invalid char"),
        ("[" + "[" * 100_000, "more than 200 lists in each other after the start"),
        ("17", "expected a JSON list, .*found a number"),
        ("", "not valid JSON after the start: .*premature EOF"),
        ('{"a": 1}\n{"b"', "not valid JSON after entry 1: .*premature EOF"),
    ],
)
def test_what_is_no_list_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*({message})"):
        list(json_entries(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object, .* found a list"),
        ('{"a" 1}', "after the start: .*separated by a colon"),
        ("{1: 2}", "after the start: .*must be a string"),
        ('{"a": 1 "b": 2}', "after \"a\": .*I expect ',' or '}'"),
        ('{"a": [1, 2', 'after "a" entry 2: .*premature EOF'),
        ('{"a": 1} {"b": 2}', 'more behind the end, after "a"'),
    ],
)
def test_what_is_no_object_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*{message}"):
        list(json_members(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"[1]"))
    (tmp_path / "latin").write_bytes(b'["\xe9"]')
    for name, message in (("a.gz", "compressed with gzip"), ("latin", "not UTF-8 text"), ("nowhere", "cannot read it"),
                          (".", "cannot read it: Is a directory")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            list(json_entries(tmp_path / name))


def test_an_entry_that_never_ends_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_LONGEST", 5000)
    path = write(tmp_path / "a.json", '[1, "' + "x" * 1_000_000)
    with pytest.raises(UserError, match="more than 5,000 characters without an end after entry 1"):
        list(json_entries(path))


def test_a_long_list_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    dice = random.Random(0)
    entry = {"question": "".join(dice.choices("abc ", k=200)), "answers": [{"answer": "yes"}] * 10}
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write('{"info": 1, "annotations": [' + json.dumps(entry))
        for _ in range(40_000):
            file.write(", " + json.dumps(entry))
        file.write("]}")
    assert path.stat().st_size > 15e6
    tracemalloc.start()
    n = sum(1 for entry in json_members(path) if entry.key == "annotations")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 40_001
    assert peak < 8e6
