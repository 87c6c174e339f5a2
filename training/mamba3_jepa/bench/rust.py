"""`mamba3-jepa bench rust`: the Rust crate and PyTorch on the same weights, beside each other.

A model with random weights is exported in float32 and in bfloat16. In every round PyTorch and the Rust command each
measure the same things, in turns as to which goes first, so that a busy machine slows both alike; the ratios are the
medians over the rounds of PyTorch's time / Rust's. `ask` is timed as a whole process, from its start to its end.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models

from mamba3_jepa.bench.hardware import hardware
from mamba3_jepa.config import PresetName, preset
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.errors import UserError
from mamba3_jepa.export.exporter import export_weights
from mamba3_jepa.files.checkpoint import Checkpoint, DataRecord, save_checkpoint
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.bench import RustBenchmarkSettings
from mamba3_jepa.settings.export import DtypeName, ExportSettings

logger = logging.getLogger(__name__)

DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16")
_EARLY, _LATE, _WINDOW = 20, 2000, 16
_REPEATS = 3  # within a round; their median counts
_ASKED = "what color is the circle?"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured on both sides: seconds (medians), and how many times as fast Rust is (median of ratios)."""

    what: str
    torch_seconds: float
    rust_seconds: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class RustBenchmark:
    """What `run_rust_benchmark` measured.

    Attributes:
        hardware, instructions: what it ran on, and the vector instructions the Rust command chose.
        rows: PyTorch beside Rust.
        late_over_early: time of token 2,000 / time of token 20, in Rust, by type of the weights.
        open_over_read: time to open the folder / time to read its bytes, float32.
        peak_over_weights: peak memory / bytes of the weights, by type.
    """

    hardware: str
    instructions: str
    rows: list[Row]
    late_over_early: dict[str, float]
    open_over_read: float
    peak_over_weights: dict[str, float]


def run_rust_benchmark(settings: RustBenchmarkSettings) -> RustBenchmark:
    """Measure.

    Raises:
        UserError: impossible settings, no room for the exported weights, or the Rust command failed.
    """
    settings.check()
    torch.set_num_threads(settings.threads)
    with _folder(settings) as folder:
        model, exports = _export(folder / settings.preset, settings.preset)
        rounds = [_round(settings, number, model, exports) for number in range(settings.rounds)]
        del model
        asked = _ask_cold(settings, folder / "mini")
    return _summary(settings, rounds, asked)


def report_rows(result: RustBenchmark) -> list[tuple[str, str, str, str]]:
    """(what, PyTorch's time, Rust's, times as fast)."""
    return [
        (row.what, f"{row.torch_seconds * 1e3:,.2f} ms", f"{row.rust_seconds * 1e3:,.2f} ms", f"{row.ratio:.2f}")
        for row in result.rows
    ]


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One round: PyTorch's seconds by name, and what the Rust command reported for each type."""

    torch: dict[str, float]
    rust: dict[str, dict[str, Any]]


def _round(settings: RustBenchmarkSettings, number: int, model: Mamba3Jepa, exports: dict[DtypeName, Path]) -> _Round:
    found: dict[str, Any] = {}
    sides: list[tuple[str, Callable[[], Any]]] = [
        ("torch", lambda: _torch_seconds(model, settings)),
        ("rust", lambda: {dtype: _rust_report(settings, path) for dtype, path in exports.items()}),
    ]
    for name, measure in sides if number % 2 == 0 else reversed(sides):
        found[name] = measure()
    logger.info("round %d of %d", number + 1, settings.rounds)
    return _Round(**found)


@torch.inference_mode()
def _torch_seconds(model: Mamba3Jepa, settings: RustBenchmarkSettings) -> dict[str, float]:
    config, decoder = model.config, model.y_decoder
    assert decoder is not None
    pixels = torch.randn(1, 3, config.vision.image_size, config.vision.image_size)
    has_image = torch.ones(1, dtype=torch.bool)
    ids = torch.arange(settings.question_tokens).unsqueeze(0) % config.vocab_size
    visual = model.x_encoder(pixels)
    embedding = model.predict(visual, has_image, ids, ids >= 0).embedding
    state = decoder.prefill(embedding)
    token = torch.zeros(1, dtype=torch.int64)

    def decode() -> None:
        nonlocal state, token
        for _ in range(_WINDOW):
            logits, state = decoder.step(token, state)
            token = logits.argmax(-1)

    return {
        "x_encoder_seconds": _timed(lambda: model.x_encoder(pixels)),
        "predictor_seconds": _timed(lambda: model.predict(visual, has_image, ids, ids >= 0)),
        "token_seconds_early": _timed(decode) / _WINDOW,
    }


def _timed(run: Callable[[], object]) -> float:
    """The median of a few runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _rust_report(settings: RustBenchmarkSettings, weights: Path) -> dict[str, Any]:
    values = {
        "weights": weights, "threads": settings.threads, "rounds": _REPEATS, "early": _EARLY, "late": _LATE,
        "window": _WINDOW, "question-tokens": settings.question_tokens,
    }  # fmt: skip
    arguments = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return json.loads(_run([str(settings.command), "bench", *arguments, "--json"]))


def _ask_cold(settings: RustBenchmarkSettings, folder: Path) -> list[tuple[float, float]]:
    """Whole processes that answer one question about one picture, Python's seconds and Rust's, once for each round."""
    _, exports = _export(folder, "mini", dtypes=("float32",))
    picture = folder / "picture.png"
    Image.effect_noise((200, 150), 80).convert("RGB").save(picture)
    question = ["--image", str(picture), _ASKED, "--json"]
    python = [sys.executable, "-m", "mamba3_jepa.cli.main", "ask", "--checkpoint", str(folder / "model.pt"), *question]
    rust = [str(settings.command), "ask", "--weights", str(exports["float32"]), *question]
    pairs = []
    for number in range(settings.rounds):
        seconds = {}
        for command in (python, rust) if number % 2 == 0 else (rust, python):
            start = time.perf_counter()
            _run(command)
            seconds[command[0]] = time.perf_counter() - start
        pairs.append((seconds[python[0]], seconds[rust[0]]))
    return pairs


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _export(
    folder: Path, size: PresetName, dtypes: Sequence[DtypeName] = DTYPES
) -> tuple[Mamba3Jepa, dict[DtypeName, Path]]:
    """A model of all three phases with random weights and words without meaning, and its exports below `folder`."""
    checkpoint = folder / "model.pt"
    if not checkpoint.exists():
        torch.manual_seed(0)
        config = preset(size)
        words = ["<pad>", "<bos>", "<eos>", *(f"word{i}" for i in range(3, config.vocab_size))]
        words_model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1])
        tokenizer = TextTokenizer(Tokenizer(words_model))
        model = Mamba3Jepa(config, tokenizer, with_decoder=True, with_recursion=True)
        data = DataRecord(source="random weights", synthetic=True, answers=["word3", "word4"])
        save_checkpoint(
            checkpoint,
            Checkpoint(
                phase=3,
                config=config,
                model=model.state_dict(),
                tokenizer=tokenizer.to_json(),
                data=data,
                run={"seed": 0},
            ),
        )
    exports: dict[DtypeName, Path] = {}
    for dtype in dtypes:
        exports[dtype] = folder / dtype
        if not (exports[dtype] / "config.json").exists():
            export_weights(ExportSettings(checkpoint=checkpoint, output=exports[dtype], dtype=dtype, x_encoder=True))
    return Mamba3Jepa.from_checkpoint(checkpoint), exports


@contextmanager
def _folder(settings: RustBenchmarkSettings) -> Iterator[Path]:
    if settings.folder is not None:
        yield settings.folder
        return
    with tempfile.TemporaryDirectory(prefix="bench-rust-") as folder:
        yield Path(folder)


def _summary(settings: RustBenchmarkSettings, rounds: list[_Round], asked: list[tuple[float, float]]) -> RustBenchmark:
    rows = [
        _row(what, [(round_.torch[name], round_.rust[dtype][name]) for round_ in rounds])
        for what, name, dtype in (
            ("X-Encoder, one image, float32", "x_encoder_seconds", "float32"),
            ("predictor, one image and its question, float32", "predictor_seconds", "float32"),
            ("a token, float32", "token_seconds_early", "float32"),
            ("a token, bfloat16 weights (PyTorch: float32)", "token_seconds_early", "bfloat16"),
        )
    ]
    rows.append(_row("ask from a cold process, mini", asked))
    reports = {dtype: [round_.rust[dtype] for round_ in rounds] for dtype in DTYPES}

    def median(dtype: DtypeName, over: str, under: str) -> float:
        return statistics.median(report[over] / report[under] for report in reports[dtype])

    return RustBenchmark(
        hardware=hardware(torch.device("cpu"), settings.threads),
        instructions=reports["float32"][0]["instruction_set"],
        rows=rows,
        late_over_early={dtype: median(dtype, "token_seconds_late", "token_seconds_early") for dtype in DTYPES},
        open_over_read=median("float32", "open_seconds", "read_seconds"),
        peak_over_weights={dtype: median(dtype, "peak_bytes", "weights_bytes") for dtype in DTYPES},
    )


def _row(what: str, pairs: list[tuple[float, float]]) -> Row:
    return Row(
        what=what,
        torch_seconds=statistics.median(torch_seconds for torch_seconds, _ in pairs),
        rust_seconds=statistics.median(rust_seconds for _, rust_seconds in pairs),
        ratio=statistics.median(torch_seconds / rust_seconds for torch_seconds, rust_seconds in pairs),
    )
