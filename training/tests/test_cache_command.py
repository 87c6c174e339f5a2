"""`mamba3-jepa cache`: what is kept of frozen models, and what of it may go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_model

from mamba3_jepa.cli.main import main
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.files.folder_lock import LOCK_NAME, FolderLock, fcntl
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.training import frozen_cache
from mamba3_jepa.training.frozen import FrozenOutputs, frozen_outputs


@pytest.fixture(scope="module")
def model() -> Mamba3Jepa:
    return tiny_model(1)


def compute(model: Mamba3Jepa, cache_dir: Path, seed: int = 0) -> FrozenOutputs:
    source = SceneSource("train", n_scenes=4, seed=seed, image_size=32)
    return frozen_outputs(model, source, range(len(source)), cache_dir=cache_dir, batch_size=4)


def listed(cache_dir: Path, capsys: pytest.CaptureFixture) -> list[dict]:
    capsys.readouterr()
    assert main(["cache", "list", "--cache-dir", str(cache_dir), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def clean(cache_dir: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["cache", "clean", "--cache-dir", str(cache_dir), *arguments]) == 0
    return capsys.readouterr().out


def change_about(folder: Path, **values: object) -> None:
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | values))


def age(folder: Path, days: float) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - days * 86_400,) * 2)


@pytest.fixture
def cache(model: Mamba3Jepa, tmp_path: Path) -> Path:
    """Two keys of this version, and what does not belong there."""
    folder = tmp_path / "frozen_outputs"
    for seed in (0, 1):
        compute(model, folder, seed)
    (folder / "notes").mkdir()
    (folder / "notes" / "part-00000.safetensors").write_text("mine")
    (folder / "read me").write_text("mine")
    return folder


def keys(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if len(path.name) == 32)


def test_what_is_listed(cache: Path, capsys: pytest.CaptureFixture) -> None:
    found = listed(cache, capsys)
    assert {entry["key"] for entry in found} == {path.name for path in keys(cache)}
    for entry in found:
        folder = cache / entry["key"]
        assert entry["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        assert (entry["parts"], entry["all_parts"], entry["samples"]) == (1, 1, 12)
        assert (entry["in_use"], entry["outdated"], entry["temporary_files"]) == (False, None, 0)
        assert 0 <= entry["unused_days"] < 0.1
    assert main(["cache", "list", "--cache-dir", str(cache)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("1 of 1") == shown.count("of use") == 2
    assert f"{cache}: 2 keys, " in shown


def test_what_is_of_use_stays(cache: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(path for path in cache.rglob("*"))
    assert clean(cache, capsys) == f"{cache}: 0 bytes removed\n"
    assert clean(cache, capsys, "--unused-days", "1") == f"{cache}: 0 bytes removed\n"
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("made_by", [None, "torch"])
def test_what_another_version_made_goes(
    cache: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, made_by: str | None
) -> None:
    old, new = keys(cache)
    versions = None if made_by is None else frozen_cache.made_by() | {"torch": "1.2.3"}
    change_about(old, made_by=versions)
    expected = "made by an earlier version" if made_by is None else "made by torch 1.2.3"
    assert sorted(entry["outdated"] or "" for entry in listed(cache, capsys)) == ["", expected]
    size = sum(path.stat().st_size for path in old.iterdir())
    would = clean(cache, capsys, "--dry-run")
    assert f"{old.name[:8]}, synthetic scenes (train): frozen outputs would be removed" in would
    assert expected in would
    assert old.exists()
    removed = clean(cache, capsys)
    assert removed == would.replace("would be removed", "removed")
    assert f"{size / 1024:,.1f} KiB removed" in removed
    assert not old.exists()
    assert keys(cache) == [new]


def test_what_was_not_used_for_long_goes(cache: Path, model: Mamba3Jepa, capsys: pytest.CaptureFixture) -> None:
    for folder in keys(cache):
        age(folder, 40)
    compute(model, cache, seed=1)  # and so one of them is of use again
    output = clean(cache, capsys, "--unused-days", "30")
    assert "not used for 40 days" in output
    assert len(keys(cache)) == 1
    assert listed(cache, capsys)[0]["unused_days"] < 0.1


def test_temporary_files_of_killed_writers_go(cache: Path, capsys: pytest.CaptureFixture) -> None:
    folder = keys(cache)[0]
    (folder / ".part-00000.safetensors.123-abc.tmp").write_bytes(b"half")
    assert sorted(entry["temporary_files"] for entry in listed(cache, capsys)) == [0, 1]
    assert "temporary files removed, 4 bytes: their writers are gone" in clean(cache, capsys)
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "part-00000.safetensors"]


@pytest.mark.skipif(fcntl is None, reason="no locks on this system")
def test_what_is_in_use_stays(cache: Path, model: Mamba3Jepa, capsys: pytest.CaptureFixture) -> None:
    used = compute(model, cache, seed=1)
    assert sorted(entry["in_use"] for entry in listed(cache, capsys)) == [False, True]
    clean(cache, capsys, "--all")
    (kept,) = keys(cache)
    assert used.held is not None
    assert used.held.folder == kept
    (kept / ".part-00001.safetensors.9-0.tmp").write_bytes(b"being written")
    assert clean(cache, capsys, "--all") == f"{cache}: 0 bytes removed\n"
    assert len(used.embedding[used.index]) == 12
    del used
    clean(cache, capsys, "--all")
    assert keys(cache) == []
    assert (cache / "notes" / "part-00000.safetensors").read_text() == (cache / "read me").read_text() == "mine"


@pytest.mark.skipif(fcntl is None, reason="no locks on this system")
def test_another_process_that_uses_it_is_seen(cache: Path, capsys: pytest.CaptureFixture) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from mamba3_jepa.files.folder_lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1]), shared=True):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", script, str(keys(cache)[0])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "held\n"
        clean(cache, capsys, "--all")
        assert len(keys(cache)) == 1
        user.communicate("\n")
    clean(cache, capsys, "--all")
    assert keys(cache) == []


def test_where_there_are_no_locks_what_is_new_stays(
    cache: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderLock, "take", lambda self: None)
    clean(cache, capsys, "--all")
    assert len(keys(cache)) == 2
    age(keys(cache)[0], 2)
    clean(cache, capsys, "--all")
    assert len(keys(cache)) == 1


def test_what_is_not_ours_in_a_key_stays(cache: Path, capsys: pytest.CaptureFixture) -> None:
    folder = keys(cache)[0]
    (folder / "notes.txt").write_text("mine")
    clean(cache, capsys, "--all")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert not list(cache.rglob(LOCK_NAME))


def test_a_folder_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for command in ("list", "clean"):
        assert main(["cache", command, "--cache-dir", str(tmp_path / "none")]) == 2
        assert capfd.readouterr().err == f"error: --cache-dir {tmp_path / 'none'}: there is no such directory\n"
    assert main(["cache", "clean", "--unused-days", "-1"]) == 2
    assert capfd.readouterr().err == "error: --unused-days -1.0: must be finite and at least 0\n"


def test_empty_and_damaged_keys(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, about in enumerate((None, "{", "[]", '{"source": [1], "parts": "x", "made_by": 3}')):
        folder = tmp_path / f"{number:032x}"
        folder.mkdir()
        if about is not None:
            (folder / "about.json").write_text(about)
    assert [entry["outdated"] for entry in listed(tmp_path, capsys)] == ["made by an earlier version"] * 4
    assert main(["cache", "list", "--cache-dir", str(tmp_path)]) == 0
    clean(tmp_path, capsys)
    assert list(tmp_path.iterdir()) == []
