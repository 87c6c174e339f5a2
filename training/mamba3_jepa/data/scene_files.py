"""Synthetic scenes written as a data directory: pictures to look at, to ask about, and to try the formats with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.files.json_file import json_line
from mamba3_jepa.files.whole_file import whole_folder


def write_scenes(output_dir: str | Path, n_scenes: int, image_size: int, seed: int) -> int:
    """Writes `images/N.png` and `manifest.jsonl` with a caption and two questions of each scene, each with wrong texts.

    The scenes are those of the "test" split, which no training run on scenes sees, nor chooses its best checkpoint by.
    All of it appears at once: written beside `output_dir`, then renamed.

    Returns:
        The number of manifest lines.

    Raises:
        UserError: `output_dir` holds something already, or cannot be written.
    """
    source = SceneSource("test", n_scenes=n_scenes, seed=seed, image_size=image_size)
    with whole_folder(Path(output_dir)) as build:
        (build / "images").mkdir()
        records = []
        for i in source.indices("target").tolist():
            sample = source.sample(i)
            relative = f"images/{sample.meta['scene']:04d}.png"
            if sample.image is not None and not (build / relative).exists():
                sample.image().save(build / relative)
            record: dict[str, Any] = {"image": relative, "question": sample.question, "answer": sample.target}
            if sample.question is None:
                record = {"image": relative, "text": sample.target}
            record["negatives"] = {each.kind: [each.text] for each in sample.negatives}
            records.append(record)
        (build / "manifest.jsonl").write_bytes(b"".join(map(json_line, records)))
    return len(records)
