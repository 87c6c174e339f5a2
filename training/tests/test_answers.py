"""The most frequent answers of a data set, against counting them by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mamba3_jepa.data import answers
from mamba3_jepa.data.answers import common_answers
from mamba3_jepa.data.files import ManifestSource
from mamba3_jepa.data.scenes import SceneSource


def manifest(folder: Path, records: list[dict]) -> ManifestSource:
    (folder / "manifest.jsonl").write_text("".join(json.dumps({"image": None, **record}) + "\n" for record in records))
    return ManifestSource(folder)


def test_most_frequent_first_then_by_the_alphabet(tmp_path: Path) -> None:
    given = ["no", "red", "blue", "red ", "yes", "red", "yes", "blue"]
    source = manifest(tmp_path, [{"query": f"question {i}", "answer": answer} for i, answer in enumerate(given)])
    assert common_answers(source, range(8)) == ["red", "blue", "yes", "no"]
    assert common_answers(source, range(8), limit=2) == ["red", "blue"]
    assert common_answers(source, [0, 4, 6]) == ["yes", "no"]


def test_requests_without_answer_and_captions_do_not_count_beside_questions(tmp_path: Path) -> None:
    source = manifest(
        tmp_path,
        [
            {"query": "Hello", "confused": False},
            {"query": "What colour?", "answer": "green"},
        ],
    )
    assert common_answers(source, [0, 1]) == ["green"]
    assert common_answers(source, [0]) == []


def test_scenes() -> None:
    source = SceneSource("train", n_scenes=12, image_size=32)
    samples = [source.sample(int(i)) for i in source.indices("target")]
    counts = Counter(sample.target for sample in samples if sample.question is not None)
    found = common_answers(source, source.indices("target"))
    assert set(found) == set(counts)
    assert [counts[text] for text in found] == sorted(counts.values(), reverse=True)


def test_captions_where_there_is_no_question() -> None:
    source = SceneSource("train", n_scenes=5, image_size=32)
    captions = {source.sample(int(i)).target for i in source.indices("caption")}
    assert set(common_answers(source, source.indices("caption"))) == captions


def test_large_data_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_SAMPLES_READ", 5)
    source = manifest(tmp_path, [{"query": f"question {i}", "answer": str(i)} for i in range(9)])
    assert common_answers(source, range(9)) == ["0", "2", "4", "6", "8"]
