"""What is written whole or not at all, and what must not be replaced by a file: links, pipes, devices."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, write_checkpoint

from mamba3_jepa.errors import UserError
from mamba3_jepa.evaluation.cards import draw_cards, text_rows
from mamba3_jepa.evaluation.figure import save_figure
from mamba3_jepa.files.checkpoint import load_checkpoint
from mamba3_jepa.files.json_file import write_json
from mamba3_jepa.files.metrics_log import MetricsLog
from mamba3_jepa.files.safetensors_file import write_safetensors
from mamba3_jepa.files.whole_file import demand_writable, whole_file, whole_folder
from mamba3_jepa.inference.embeddings import NamedEmbeddings, write_embeddings


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_folders_made_for_what_failed_are_gone_again(tmp_path: Path, whole: Callable[[Path], Any]) -> None:
    def fail(path: Path, besides: str | None = None) -> None:
        with contextlib.suppress(KeyboardInterrupt), whole(path):
            if besides is not None:
                (path.parent / besides).write_text("")
            raise KeyboardInterrupt

    fail(tmp_path / "a/b/c")
    assert list(tmp_path.iterdir()) == []
    fail(tmp_path / "a/b/c", besides="other")
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["other"], "what others put there stays"
    (tmp_path / "there").mkdir()
    fail(tmp_path / "there/c")
    assert (tmp_path / "there").is_dir(), "it was there before"


def write_npy(path: Path) -> None:
    write_embeddings(path, {"texts": NamedEmbeddings(names=["a"], embeddings=torch.ones(1, 2))})


def write_cards(path: Path) -> None:
    draw_cards([Image.new("RGB", (8, 8))], [text_rows("a")], path)


def write_figure(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    FigureCanvasAgg(figure)
    save_figure(figure, path)


def save_tiny_checkpoint(path: Path) -> None:
    write_checkpoint(path, tiny_model(phase=1), phase=1)


WRITERS: dict[str, Callable[[Path], object]] = {
    "x.npy": write_npy,
    "x.json": lambda path: write_json(path, {"a": 1}),
    "x.safetensors": lambda path: write_safetensors(path, {"a": torch.ones(3)}, {}),
    "x.pt": save_tiny_checkpoint,
    "cards.png": write_cards,
    "figure.png": write_figure,
}


def write_half(path: Path, error: BaseException) -> None:
    with whole_file(path) as file:
        file.write(b"half")
        raise error


def content(path: Path) -> bytes:
    with whole_file(path) as file:
        file.write(b"abc")
    return path.read_bytes()


def test_makes_the_folder_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x"
    assert content(path) == b"abc"
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")
    for error, expected, message in (
        (OSError(errno.ENOSPC, "No space left on device"), UserError, f"cannot write {path}: No space left"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ):
        with pytest.raises(expected, match=message):
            write_half(path, error)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    for leads_to in ("there", "elsewhere/not_yet"):
        target, link = tmp_path / leads_to, tmp_path / f"link_to_{Path(leads_to).name}"
        link.symlink_to(leads_to)
        assert content(link) == b"abc"
        assert link.is_symlink()
        assert target.read_bytes() == b"abc"
        assert list(target.parent.glob(".*")) == []


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_keeps_links_and_devices(name: str, tmp_path: Path) -> None:
    path, target = tmp_path / name, tmp_path / "target"
    path.symlink_to(target)
    WRITERS[name](path)
    assert path.is_symlink()
    assert target.stat().st_size > 0
    path.unlink()
    path.symlink_to("/dev/null")
    WRITERS[name](path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert path.is_symlink()


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_writes_into_a_pipe(name: str, tmp_path: Path) -> None:
    pipe, plain = tmp_path / "pipe" / name, tmp_path / "plain" / name
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    WRITERS[name](pipe)
    reader.join(timeout=30)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    WRITERS[name](plain)
    assert read == [plain.read_bytes()]


def test_a_full_device_is_said() -> None:
    with pytest.raises(UserError, match="cannot write /dev/full: No space left"):
        write_json(Path("/dev/full"), {"a": 1})
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder"):
        content(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    (tmp_path / "link").symlink_to("elsewhere")
    demand_writable(None, tmp_path / "new" / "newer" / "a.json", tmp_path / "file", tmp_path / "link")
    demand_writable(Path("a.json"), Path("/dev/stdout"))
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "file" / "a.json", "file is not a folder")):
        with pytest.raises(UserError, match=f"cannot write {path}: .*{reason}"):
            demand_writable(None, path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link"]


def test_own_output_is_not_replaced(tmp_path: Path) -> None:
    """`command --output /dev/stdout > file` keeps what else the command says."""
    program = (
        "import sys; from pathlib import Path; from mamba3_jepa.files.json_file import write_json\n"
        "print('before', flush=True); write_json(Path('/dev/stdout'), 1); print('after')"
    )
    output = tmp_path / "output"
    with output.open("wb") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
    assert output.read_text() == "before\n1\nafter\n"
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert piped.stdout == "before\n1\nafter\n"


def test_npy_is_what_numpy_reads(tmp_path: Path) -> None:
    embeddings = torch.arange(12.0).view(3, 4).T  # not contiguous
    write_embeddings(tmp_path / "x.npy", {"texts": NamedEmbeddings(names=list("abcd"), embeddings=embeddings)})
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), embeddings.numpy())


def test_metrics_may_be_a_link(tmp_path: Path) -> None:
    link, target = tmp_path / "metrics.jsonl", tmp_path / "target"
    link.symlink_to(target)
    log = MetricsLog(link)
    for step in (1, 2):
        log.append(step, 0, {"a": 1.0})
    log.truncate_after(1)
    assert link.is_symlink()
    assert len(target.read_text().splitlines()) == 1


def test_a_checkpoint_behind_a_link_opens(tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to(tmp_path / "target.pt")
    save_tiny_checkpoint(tmp_path / "link.pt")
    assert load_checkpoint(tmp_path / "target.pt").phase == 1
