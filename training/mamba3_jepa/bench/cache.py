"""`mamba3-jepa bench cache`: what keeping the frozen model's outputs is worth in phase 2.

Three ways to train on the same samples (synthetic scenes), batch by batch in turn: from the disk; without, in
shuffled batches as phase 1 reads them; and without, in the very batches that the first way takes (they are grouped
by answer length, which is known before the epoch only because the outputs are kept). Each way has a decoder and an
optimizer of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba3_jepa.bench.hardware import hardware, synchronizer
from mamba3_jepa.config import preset
from mamba3_jepa.data.length_batches import length_batches
from mamba3_jepa.data.loader import build_loader
from mamba3_jepa.data.sample import source_texts
from mamba3_jepa.data.scenes import SceneSource
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.device import checked_device
from mamba3_jepa.models.losses import score_tokens
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.bench import CacheBenchmarkSettings
from mamba3_jepa.settings.training import Phase2Settings
from mamba3_jepa.training.frozen import FrozenOutputs, frozen_outputs
from mamba3_jepa.training.optim import build_optimizer

_SAMPLES_PER_SCENE = 3
_TOKENIZER_SAMPLES = 3000

# embeddings (B, E), ids (B, La), mask (B, La)
Inputs = tuple[Tensor, Tensor, Tensor]
Step = Callable[[Inputs], None]


@dataclass(frozen=True, kw_only=True)
class CacheBenchmark:
    """Seconds per batch, means over all batches, and what the pass that fills the cache took per sample.

    cached: from the disk; shuffled: without, shuffled; same_batches: without, in the batches of `cached`.
    """

    settings: CacheBenchmarkSettings
    hardware: str
    batch_size: int
    cached: float
    shuffled: float
    same_batches: float
    fill_per_sample: float

    @property
    def ratio(self) -> float:
        """How many times longer an epoch without the cache takes."""
        return self.shuffled / self.cached

    @property
    def ratio_same_batches(self) -> float:
        """The same, where the epoch without could take the same batches."""
        return self.same_batches / self.cached


def run_cache_benchmark(settings: CacheBenchmarkSettings) -> CacheBenchmark:
    """Measure all three ways.

    Raises:
        UserError: impossible settings, or a device that is not there.
    """
    device = checked_device(settings.device)
    settings = dataclasses.replace(settings, device=str(device))
    torch.set_num_threads(settings.threads)
    batch_size = settings.batch_size or Phase2Settings().resolved(settings.preset).batch_size or 1
    model, source = _model(settings, batch_size)
    model.to(device)
    indices = source.indices("target")[: settings.batches * batch_size]
    synchronize = synchronizer(device)
    with tempfile.TemporaryDirectory(prefix="mamba3-jepa-bench-") as folder:
        started = time.perf_counter()
        frozen_outputs(model, source, indices, cache_dir=Path(folder), batch_size=64)
        fill = (time.perf_counter() - started) / len(indices)
        outputs = frozen_outputs(model, source, indices, cache_dir=Path(folder), batch_size=64)  # from the disk
        plan = length_batches(outputs.target_lengths.numpy(), batch_size, seed=0, epoch=0)
        shuffled = np.random.default_rng(0).permutation(len(indices)).reshape(plan.shape)
        ways = [
            (plan, lambda rows: _from_disk(outputs, rows), _training_step(model)),
            (shuffled, lambda rows: _computed(model, source, indices[rows]), _training_step(model)),
            (plan, lambda rows: _computed(model, source, indices[rows]), _training_step(model)),
        ]
        seconds = _interleaved(ways, device, synchronize)
    return CacheBenchmark(
        settings=settings,
        hardware=hardware(device, settings.threads),
        batch_size=batch_size,
        cached=seconds[0],
        shuffled=seconds[1],
        same_batches=seconds[2],
        fill_per_sample=fill,
    )


def report_rows(result: CacheBenchmark) -> list[tuple[str, str, str, str]]:
    """(way, time of a batch, of an epoch, ratio to the cached one)."""
    batches = result.settings.epoch_samples / result.batch_size
    return [
        (name, f"{seconds * 1e3:,.1f} ms", f"{seconds * batches:,.1f} s", f"{seconds / result.cached:.2f}")
        for name, seconds in (
            ("from the disk", result.cached),
            ("computed in every step", result.shuffled),
            ("computed, in the same batches", result.same_batches),
        )
    ]


def _interleaved(
    ways: list[tuple[NDArray[np.int64], Callable[[NDArray[np.int64]], Inputs], Step]],
    device: torch.device,
    synchronize: Callable[[], None],
) -> list[float]:
    """Mean seconds per batch of each way; one untimed batch each comes first."""
    for blocks, inputs, step in ways:
        step(_on(device, inputs(blocks[0])))
    seconds = [0.0] * len(ways)
    n_batches = len(ways[0][0])
    for number in range(n_batches):
        for shift in range(len(ways)):
            which = (number + shift) % len(ways)
            blocks, inputs, step = ways[which]
            synchronize()
            started = time.perf_counter()
            step(_on(device, inputs(blocks[number])))
            synchronize()
            seconds[which] += time.perf_counter() - started
    return [total / n_batches for total in seconds]


def _on(device: torch.device, inputs: Inputs) -> Inputs:
    embedding, ids, mask = inputs
    return embedding.to(device), ids.to(device), mask.to(device)


def _model(settings: CacheBenchmarkSettings, batch_size: int) -> tuple[Mamba3Jepa, SceneSource]:
    config = preset(settings.preset)
    n_scenes = -(-settings.batches * batch_size // _SAMPLES_PER_SCENE)
    source = SceneSource(n_scenes=n_scenes, image_size=config.vision.image_size)
    texts = SceneSource(n_scenes=_TOKENIZER_SAMPLES // _SAMPLES_PER_SCENE, image_size=config.vision.image_size)
    tokenizer = TextTokenizer.train(source_texts(texts, range(len(texts))), config.vocab_size)
    torch.manual_seed(0)
    model = Mamba3Jepa(config.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    return model.requires_grad_(False).eval(), source


def _from_disk(outputs: FrozenOutputs, rows: NDArray[np.int64]) -> Inputs:
    wanted = torch.from_numpy(rows)
    return outputs.embedding[wanted], *outputs.targets(wanted)


@torch.no_grad()
def _computed(model: Mamba3Jepa, source: SceneSource, indices: NDArray[np.int64]) -> Inputs:
    """The images decoded, the texts tokenised, the frozen model run."""
    loader = build_loader(
        source, indices, model.tokenizer, model.config, len(indices), shuffle=False, seed=0, drop_last=False
    )
    batch = next(iter(loader)).to(model.device)
    return model(*batch.inputs()).embedding, batch.target_ids, batch.target_mask


def _training_step(model: Mamba3Jepa) -> Step:
    """One optimizer step of a new decoder."""
    decoder = model.add_decoder().requires_grad_(True)
    optimizer = build_optimizer(decoder, lr=1e-4, weight_decay=0.05)

    def step(inputs: Inputs) -> None:
        optimizer.zero_grad()
        scores = score_tokens(decoder, *inputs)
        (scores.nll / scores.tokens).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()

    return step
