"""`mamba3-jepa bench step`: how fast a whole step of phase 1 is, what share of the device's arithmetic it uses, how
much memory it takes, and where the time goes.

A step is that of training, with real data: it waits for a batch of the loader, runs the model, contrasts, goes back,
clips and updates. Only the backward pass is cut where the parts meet: the contrast's gradient by the embeddings first,
then from each embedding on into its part. The gradients are the same, and each part has its own time. On a GPU times
are those between events on its stream, so that they add up to the step, what it waited for the CPU included.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mamba3_jepa.bench.data import epochs
from mamba3_jepa.bench.hardware import hardware, peak_memory, synchronizer, watch_memory
from mamba3_jepa.bench.operations import counted
from mamba3_jepa.bench.peak import Peak, arithmetic
from mamba3_jepa.config import preset
from mamba3_jepa.data.batch import Batch
from mamba3_jepa.data.images import normalize
from mamba3_jepa.data.loader import BatchLoader, build_loader
from mamba3_jepa.data.sample import Source, some_of, source_texts
from mamba3_jepa.data.sources import open_splits
from mamba3_jepa.data.tokenizer import TextTokenizer
from mamba3_jepa.device import checked_device
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.fused import demand_possible, fused
from mamba3_jepa.models.vljepa import Mamba3Jepa
from mamba3_jepa.settings.bench import StepBenchmarkSettings
from mamba3_jepa.settings.preset_defaults import PHASE1_DEFAULTS
from mamba3_jepa.settings.training import Phase1Settings
from mamba3_jepa.training.optim import build_optimizer
from mamba3_jepa.training.phase1_objective import Embedded, Keys, Phase1Objective
from mamba3_jepa.training.precision import autocast
from mamba3_jepa.training.session import spare_cores
from mamba3_jepa.training.start import compile_layers

logger = logging.getLogger(__name__)

_SCENES, _TOKENIZER_SAMPLES = 2000, 2000
WAITING, X_ENCODER, PREDICTOR, Y_ENCODER, LOSS, OPTIMIZER = SECTIONS = (
    "waiting for data", "X-Encoder", "Predictor", "Y-Encoder", "loss", "optimizer",
)  # fmt: skip
_COUNTED = {X_ENCODER: "x_encoder", PREDICTOR: "predictor", Y_ENCODER: "y_encoder"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """Part of a step, forward and backward: mean `seconds`, `share` of the step, and of those that are counted the mean
    `operations` and their rate as a share of the peak (`utilisation`)."""

    section: str
    seconds: float
    share: float
    operations: float | None
    utilisation: float | None


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """What was measured.

    samples_per_second, step_seconds: means over the steps.
    operations: of a step, in the mean; peak: what the device can do in a second, and peak_from: who says so;
        utilisation: operations / step_seconds / peak, often called MFU.
    peak_bytes: memory at most, on a GPU what torch took of its own, else that of the process; None where unknown.
    kernels: what became of the fused kernels.
    """

    settings: StepBenchmarkSettings
    hardware: str
    samples_per_second: float
    step_seconds: float
    operations: float
    peak: float
    peak_from: str
    utilisation: float
    peak_bytes: int | None
    kernels: str
    sections: list[Section]


def run_step_benchmark(settings: StepBenchmarkSettings) -> StepBenchmark:
    """Time steps of phase 1, after some that warm up.

    Raises:
        UserError: there is no such device, the data has no batch, or kernels are required where there are none.
    """
    device = checked_device(settings.device)
    in_bfloat16 = settings.precision == "bf16"
    demand_possible(settings.kernels, device, in_bfloat16)
    settings = dataclasses.replace(
        settings,
        device=str(device),
        batch_size=settings.batch_size or PHASE1_DEFAULTS[settings.preset]["batch_size"],
        workers=spare_cores() if settings.workers is None else settings.workers,
    )
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    fused.begin(settings.kernels)
    model, loader = _model_and_data(settings)
    step = _Step(model.to(device), settings)
    if settings.compile:
        compile_layers(model)
    try:
        if settings.kept_tokens:
            _keep_tokens(model, loader, settings)
        batches, peak = epochs(loader), Peak(device, arithmetic(device, in_bfloat16))
        for _ in range(settings.warm_up):
            step(batches, _Marks(device))
        watch_memory(device)
        seconds: Counter[str] = Counter()
        n_samples = 0
        with counted(model) as operations:
            for _ in range(settings.steps):
                marks = _Marks(device)
                n_samples += step(batches, marks)
                seconds.update(marks.seconds())
                peak.measure()
        peak_bytes = peak_memory(device)
    finally:
        loader.close()
    total, steps = sum(seconds.values()), settings.steps
    return StepBenchmark(
        settings=settings,
        hardware=hardware(device, settings.threads),
        samples_per_second=n_samples / total,
        step_seconds=total / steps,
        operations=operations.total() / steps,
        peak=peak.rate,
        peak_from=peak.source,
        utilisation=operations.total() / total / peak.rate,
        peak_bytes=peak_bytes,
        kernels=_kernels(settings),
        sections=[
            _section(name, seconds[name], total, operations.get(_COUNTED.get(name, "")), steps, peak.rate)
            for name in SECTIONS
        ],
    )


def report_rows(result: StepBenchmark) -> list[tuple[str, str, str, str, str]]:
    """(section, milliseconds, share of the step, 10^9 operations, share of the peak), the whole step last."""
    rows = [
        (s.section, f"{s.seconds * 1e3:,.1f} ms", f"{s.share:.1%}", _billions(s.operations), _percent(s.utilisation))
        for s in result.sections
    ]
    whole = ("the whole step", f"{result.step_seconds * 1e3:,.1f} ms", "100.0%")
    return [*rows, (*whole, _billions(result.operations), _percent(result.utilisation))]


def _billions(operations: float | None) -> str:
    return "" if operations is None else f"{operations / 1e9:,.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _section(name: str, seconds: float, total: float, operations: int | None, steps: int, rate: float) -> Section:
    return Section(
        section=name,
        seconds=seconds / steps,
        share=seconds / total,
        operations=None if operations is None else operations / steps,
        utilisation=None if operations is None or not seconds else operations / seconds / rate,
    )


def _kernels(settings: StepBenchmarkSettings) -> str:
    """What became of the kernels, in a few words."""
    if settings.kernels == "off":
        return "off"
    wrong = [said for said in fused.wrong.values() if said is not None]
    taken = len(fused.wrong) - len(wrong)
    if not fused.wrong:
        return "none taken: they need a CUDA GPU, bfloat16, sizes that fit, and mamba-ssm"
    return f"taken for {taken} shapes" + "".join(f"; {said}" for said in wrong)


class _Marks:
    """Where the sections of one step end."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._synchronize = synchronizer(device)
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._on_gpu:
            self._synchronize()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, section: str) -> None:
        """The section ends here, which began where the last one ended."""
        self._marks.append((section, self._now()))

    def seconds(self) -> Counter[str]:
        """Of each section, which may have several pieces."""
        self._synchronize()
        found: Counter[str] = Counter()
        for (_, start), (section, end) in itertools.pairwise(self._marks):
            found[section] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return found


class _Step:
    """One step of phase 1, as `training.loop` does it."""

    def __init__(self, model: Mamba3Jepa, settings: StepBenchmarkSettings) -> None:
        self._model, self._settings = model, settings
        self._objective = Phase1Objective(model).to(model.device).train()
        defaults = Phase1Settings()
        self._optimizer = build_optimizer(
            self._objective, PHASE1_DEFAULTS[settings.preset]["lr"], defaults.weight_decay
        )
        self._max_norm = defaults.max_grad_norm

    def __call__(self, batches: Iterator[Batch], marks: _Marks) -> int:
        """Returns how many samples were in it."""
        model, objective, device = self._model, self._objective, self._model.device
        batch = next(batches).to(device)
        marks.end(WAITING)
        self._optimizer.zero_grad()
        marks.end(OPTIMIZER)
        with autocast(device, self._settings.precision):
            pixels, has_image, query_ids, query_mask, picture, _ = batch.inputs()
            visual = model.encode_images(pixels, has_image, picture)
            marks.end(X_ENCODER)
            predicted = model.predict(visual, has_image, query_ids, query_mask).embedding
            marks.end(PREDICTOR)
            texts = model.y_encoder.forward_distinct(*batch.texts())
            marks.end(Y_ENCODER)
            ends = [x.detach().requires_grad_() for x in (predicted, texts)]
            embedded = Embedded(ends[0], ends[1][: len(batch)], ends[1][len(batch) :])
            keys = Keys(batch.target_hash, batch.negative_hash)
            loss = objective.contrast(embedded, keys, objective.log_temperature).loss
        _demand_finite(loss)
        loss.backward()
        marks.end(LOSS)
        texts.backward(ends[1].grad)
        marks.end(Y_ENCODER)
        predicted.backward(ends[0].grad)
        marks.end(PREDICTOR)
        _demand_finite(nn.utils.clip_grad_norm_(objective.parameters(), self._max_norm))
        self._optimizer.step()
        objective.clamp_temperature()
        objective.negatives.clear()
        marks.end(OPTIMIZER)
        return len(batch)


def _demand_finite(value: Tensor) -> None:
    """Waits for the device, as training does."""
    if not bool(torch.isfinite(value)):
        raise UserError(f"the step is not finite ({float(value.detach())}): give `precision` fp32, or report it")


def _model_and_data(settings: StepBenchmarkSettings) -> tuple[Mamba3Jepa, BatchLoader]:
    """The preset's model with random weights, and batches as phase 1 reads them."""
    config, batch_size = preset(settings.preset), settings.batch_size or 1
    data = open_splits(
        settings.data_dir, manifest=settings.manifest, image_size=config.vision.image_size, n_scenes=_SCENES
    )
    source: Source = data.train
    if len(data.train_indices) < batch_size:
        raise UserError(f"{source.name}: `batch_size` {batch_size} is more than its {len(data.train_indices)} samples")
    some = some_of(source, data.train_indices, _TOKENIZER_SAMPLES)
    tokenizer = TextTokenizer.train([config.query_prompt, *source_texts(source, some)], config.vocab_size)
    config = config.replace(vocab_size=tokenizer.vocab_size)
    loader = build_loader(
        source,
        data.train_indices,
        tokenizer,
        config,
        batch_size,
        shuffle=True,
        seed=0,
        drop_last=True,
        workers=settings.workers or 0,
        draw_captions=True,
        hard_negatives=Phase1Settings().hard_negatives,
    )
    return Mamba3Jepa(config, tokenizer), loader


class _KeptTokens(nn.Module):
    """In the place of the X-Encoder: gives what it has given before, from the CPU's memory."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self._kept = iter(kept)

    def forward(self, pixels: Tensor) -> Tensor:
        return next(self._kept).to(pixels.device, non_blocking=True)


def _keep_tokens(model: Mamba3Jepa, loader: BatchLoader, settings: StepBenchmarkSettings) -> None:
    """Let the X-Encoder see all pictures of the steps now, and none later."""
    kept = []
    for batch in itertools.islice(epochs(loader), settings.warm_up + settings.steps):
        if len(batch.pixels):
            with autocast(model.device, settings.precision):
                tokens = model.x_encoder(normalize(batch.pixels.to(model.device))).cpu()
            kept.append(tokens.pin_memory() if model.device.type == "cuda" else tokens)
    model.x_encoder = cast(Any, _KeptTokens(kept))
