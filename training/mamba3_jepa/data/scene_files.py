"""Synthetic scenes written as a data directory: pictures to look at, to ask about, and to try the formats with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mamba3_jepa.data.sample import Sample
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.files.json_file import json_line
from mamba3_jepa.files.whole_file import whole_folder


def write_scenes(output_dir: str | Path, n_scenes: int, image_size: int, seed: int) -> int:
    """Writes `images/N.png`, `manifest.jsonl` with a caption and two questions of each scene, each with wrong texts,
    and `demonstrations.jsonl` with two questions for each scene, one that the picture answers, and one that a tool
    does, with what it says.

    The scenes are those of the "test" split, which no training run on scenes sees, nor chooses its best checkpoint by.
    All of it appears at once: written beside `output_dir`, then renamed.

    Returns:
        The number of lines of `manifest.jsonl`.

    Raises:
        UserError: `output_dir` holds something already, or cannot be written.
    """
    source = SceneSource("test", n_scenes=n_scenes, seed=seed, image_size=image_size)
    with whole_folder(Path(output_dir)) as build:
        (build / "images").mkdir()
        records = []
        for i in source.indices("target").tolist():
            sample = source.sample(i)
            relative = _name(sample)
            if sample.image is not None and not (build / relative).exists():
                sample.image().save(build / relative)
            record: dict[str, Any] = {"image": relative, "question": sample.question, "answer": sample.target}
            if sample.question is None:
                record = {"image": relative, "text": sample.target}
            record["negatives"] = {each.kind: [each.text] for each in sample.negatives}
            records.append(record)
        (build / "manifest.jsonl").write_bytes(b"".join(map(json_line, records)))
        asked = source.indices("question").tolist()[::2]
        demonstrations = [made for i in asked for made in (source.sample(i), source.demonstration(i))]
        (build / "demonstrations.jsonl").write_bytes(b"".join(map(json_line, map(_demonstration, demonstrations))))
    return len(records)


def _demonstration(sample: Sample) -> dict[str, Any]:
    return {
        "image": None if sample.image is None else _name(sample),
        "question": sample.question,
        "answer": sample.target,
        "confused": sample.confused,
        "tool_used": sample.tool_used,
        "knowledge": sample.knowledge,
    }


def _name(sample: Sample) -> str:
    return f"images/{sample.meta['scene']:04d}.png"
