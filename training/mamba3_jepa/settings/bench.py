"""Settings of `mamba3-jepa bench ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mamba3_jepa.config import MOST_LAYERS, PresetName
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.common import Device, Json, Kernels
from mamba3_jepa.settings.data import demand_data_dir
from mamba3_jepa.settings.limits import (
    BATCH,
    FROM_ZERO,
    PIXELS,
    PROCESSES,
    Batch,
    Checked,
    Count,
    Finite,
    Positive,
    Range,
    Seed,
    Threads,
    Tokens,
    Width,
)


@dataclass(frozen=True, kw_only=True)
class LayerBenchmarkSettings(Checked):
    """Time one Mamba-3 layer, forward and backward, beside its own two linear maps and other
    implementations."""

    d_model: Width = 1024
    """Width of the layer."""
    d_state: Width = 128
    """State size per head."""
    headdim: Width = 64
    """Size of a head."""
    batch: Batch = 2
    """Sequences at a time."""
    length: Tokens = 320
    """Tokens per sequence."""
    chunk_size: Tokens = 64
    """Tokens per chunk at most."""
    threads: Threads = 2
    """CPU threads of torch."""
    rounds: Count = 9
    """Rounds; in each every candidate runs once, and the median over the rounds counts."""
    device: Device = "auto"
    bfloat16: bool = False
    """Run under bfloat16 autocast, which on CUDA lets mamba-ssm's fused kernels in; float32 otherwise."""
    kernels: Kernels = "auto"
    compiled: bool = True
    """Also time the layer under torch.compile."""
    sequential: bool = True
    """Also time the token-by-token reference (slow)."""
    packages: bool = True
    """Also time mamba-ssm (CUDA only), mamba3-ssm and mamba3-jax, those of them that are installed."""
    scaling_lengths: tuple[Tokens, ...] = (1024, 2048, 4096, 8192)
    """Lengths at which to measure time and peak memory of one sequence; none leaves that out."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class DataBenchmarkSettings(Checked):
    """What `mamba3-jepa bench data` measures."""

    preset: PresetName = "mini"
    """Model whose image size, token limits and training step are used."""
    batch_size: Batch = 64
    """Samples per batch."""
    workers: tuple[Annotated[int, PROCESSES], ...] = (0, 1, 2)
    """Numbers of data-loading processes to compare."""
    jpeg_size: Annotated[int, Range(16, PIXELS.high)] = 256
    """Side of the JPEG files, in pixels."""
    n_images: Annotated[int, Range(1, 10_000_000)] = 512
    """Number of JPEG files."""
    seconds: Positive = 4.0
    """Time spent on each measurement of the loader alone."""
    steps: Annotated[int, FROM_ZERO] = 20
    """Training steps in each measurement of the waiting time; 0 leaves it out."""
    device: Device = "auto"
    json: Json = False

    def check(self) -> None:
        """Raises UserError for values that cannot be measured."""
        if not self.workers:
            raise UserError("`workers`: give at least one number")
        if self.n_images < self.batch_size:
            raise UserError(f"`n_images` {self.n_images} is less than one batch of {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class StepBenchmarkSettings(Checked):
    """Time whole steps of phase 1: samples per second, share of the device's arithmetic, memory, and where the time
    goes."""

    preset: PresetName = "mini"
    """Model size; the weights are random, which changes nothing about the time."""
    batch_size: Annotated[int | None, BATCH] = None
    """Samples per step; default: that of phase 1 for this preset."""
    steps: Count = 20
    """Steps to time."""
    warm_up: Annotated[int, FROM_ZERO] = 3
    """Steps before them, in which layers are compiled and kernels are checked and tuned."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass, as in training."""
    compile: bool = False
    """Compile the layers of X-Encoder and Mamba-3, as in training."""
    kernels: Kernels = "auto"
    kept_tokens: bool = False
    """Take the X-Encoder's outputs from memory, computed beforehand: what a step is like that has them from a cache."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Data as in training; default: synthetic scenes."""
    manifest: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Another manifest than the manifest.jsonl in --data-dir, as in training."""
    workers: Annotated[int | None, PROCESSES] = None
    """Data-loading processes; default: the CPU cores beyond two, at most 8."""
    threads: Threads = 2
    """CPU threads of torch."""
    device: Device = "auto"
    json: Json = False

    def __post_init__(self) -> None:
        super().__post_init__()
        demand_data_dir(self.manifest, self.data_dir, shard_cache=None)


@dataclass(frozen=True, kw_only=True)
class IndexBenchmarkSettings(Checked):
    """Open simulated shards from their kept index. 10,000 shards of 10,000 samples take 9 GB of disk meanwhile."""

    shards: Count = 10_000
    """Number of shards."""
    samples: Annotated[int, Range(1, 100_000)] = 10_000
    """Samples in each."""
    folder: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Where the index is written for as long as it takes; default: the system's temporary folder."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmarkSettings(Checked):
    """Time the Y-Decoder token by token, near the beginning of a text and far into it."""

    preset: PresetName = "small"
    """Model size; the weights are random, which changes nothing about the time."""
    batch: Batch = 1
    """Sequences at a time."""
    early: Tokens = 20
    """Position of the early token."""
    late: Tokens = 2000
    """Position of the late token."""
    window: Tokens = 32
    """Tokens to time around each position."""
    rounds: Count = 15
    """Rounds; in each both windows run, and the medians over the rounds count."""
    full_forward: bool = True
    """Also time what a model without a state would do: run all tokens so far again for the next one (slow)."""
    threads: Threads = 2
    """CPU threads of torch."""
    device: Device = "auto"
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class CacheBenchmarkSettings(Checked):
    """Time phase 2 with the frozen model's outputs from the disk, and with that model run in every step."""

    preset: PresetName = "mini"
    """Model size; the weights are random, which changes nothing about the time."""
    batches: Count = 24
    """Batches to time; each way takes one in turn, so that a busy machine slows all alike."""
    batch_size: Annotated[int | None, BATCH] = None
    """Samples per batch; default: that of phase 2 for this preset."""
    epoch_samples: Count = 24_000
    """Samples of the epoch that the times are extrapolated to."""
    threads: Threads = 2
    """CPU threads of torch."""
    device: Device = "auto"
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ParitySettings(Checked):
    """Train a small Mamba-3 stack on the parity of short bit strings, with rotation and without; test it on
    long ones."""

    n_layers: Annotated[int, Range(1, MOST_LAYERS)] = 1
    """Layers of the stack."""
    d_model: Width = 32
    """Width."""
    d_state: Width = 4
    """State size per head; 4 leaves one rotating pair, which cannot fit short strings with several slow turns."""
    headdim: Width = 64
    """Size of a head; 64 makes it one head."""
    a_activation: Literal["heavy_tail", "softplus"] = "softplus"
    """How the decay rate is made; softplus comes close to zero soon, where a state lasts."""
    initial_decay_logit: Finite = 8.0
    """How far below zero the argument of the activation starts, on average."""
    dt_min: Positive = 0.5
    """Smallest initial step size; the language default, at most 0.1, turns the state by a tenth of pi at
    most."""
    dt_max: Positive = 1.5
    """Largest initial step size."""
    train_length: Tokens = 40
    """Longest string in training."""
    test_lengths: tuple[Tokens, ...] = (16, 40, 64, 128, 256, 512)
    """Lengths of the strings to test on."""
    test_strings: Count = 2048
    """Fresh random strings per test length."""
    steps: Annotated[int, FROM_ZERO] = 1000
    """Training steps."""
    batch_size: Batch = 128
    """Strings per step."""
    lr: Positive = 5e-3
    """Highest learning rate of Adam."""
    warm_up: Annotated[int, FROM_ZERO] = 50
    """Steps of warm-up."""
    seed: Seed = 0
    """Decides weights and strings."""
    threads: Threads = 2
    """CPU threads of torch."""
    output_dir: Path = Path("outputs/parity")
    """Where parity.png and parity.json go."""
    json: Json = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt_min > self.dt_max:
            raise UserError(f"`dt_min` {self.dt_min}: must not be above `dt_max` {self.dt_max}")


@dataclass(frozen=True, kw_only=True)
class RustBenchmarkSettings(Checked):
    """Time the Rust crate and PyTorch on the same weights, in turns."""

    command: Path = Path("../rust/target/release/kore-vljepa")
    """The Rust command; `make rust` builds it."""
    preset: PresetName = "small"
    """Model size; the weights are random, which changes nothing about the time."""
    rounds: Count = 5
    """Rounds; in each both run, in turns as to which goes first, and the medians over the rounds count."""
    threads: Threads = 2
    """CPU threads of both."""
    question_tokens: Tokens = 16
    """Tokens of the question that the predictor reads behind the image."""
    folder: Path | None = None
    """Where to keep the exported weights (several GiB at small), for another time; default: a temporary folder."""
    json: Json = False

    def check(self) -> None:
        """Raise UserError for values that cannot be measured."""
        if not self.command.is_file():
            raise UserError(f"bench rust: {self.command}: there is no such command; `make rust` builds it")
