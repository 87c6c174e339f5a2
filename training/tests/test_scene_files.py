"""Scenes as a data directory."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.sources import ManifestSource


def test_the_written_scenes_are_those_of_the_source(tmp_path: Path) -> None:
    output = tmp_path / "scenes"
    assert main(["prepare", "scenes", "--output", str(output), "--scenes", "5", "--seed", "3"]) == 0
    scenes, written = SceneSource("test", n_scenes=5, seed=3, image_size=64), ManifestSource(output)
    assert len(list((output / "images").iterdir())) == 5
    assert len(written) == len(scenes) == 15
    for i in range(15):
        ours, theirs = written.sample(i), scenes.sample(i)
        assert (ours.question, ours.target) == (theirs.question, theirs.target)
        assert ours.image is not None
        assert theirs.image is not None
        np.testing.assert_array_equal(np.asarray(ours.image()), np.asarray(theirs.image()))
    assert Image.open(output / "images" / "0004.png").size == (64, 64)
    written = ManifestSource(output, "demonstrations.jsonl")
    assert len(written) == 10
    asked = scenes.indices("question").tolist()[::2]
    expected = [made for i in asked for made in (scenes.sample(i), scenes.demonstration(i))]
    for ours, theirs in zip(map(written.sample, range(10)), expected, strict=True):
        assert (ours.question, ours.target, ours.confused) == (theirs.question, theirs.target, theirs.confused)
        assert (ours.tool_used, ours.knowledge) == (theirs.tool_used, theirs.knowledge)
        assert (ours.image is None) == (theirs.image is None)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["prepare", "scenes", "--output", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "scenes"
    target.mkdir(parents=True)
    link.symlink_to(target)
    assert main(["prepare", "scenes", "--output", str(link), "--scenes", "1"]) == 0
    assert link.is_symlink()
    assert (target / "manifest.jsonl").is_file()
    assert [path.name for path in target.parent.iterdir()] == ["scenes"]
