"""`mamba3-jepa bench layer`: how fast the Mamba-3 layer is, and how time and memory grow with the length.

The floor is the layer's own two linear maps alone, forward and backward, at the same shapes: no
implementation of the layer can be faster. Every candidate computes the gradients of sum(output * g) for the
input and all parameters; the candidates take turns within each round, so that a busy machine slows all of
them alike, and a ratio is the median over the rounds of time / floor.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mamba3_jepa.bench.hardware import hardware, peak_memory, synchronizer, watch_memory
from mamba3_jepa.device import checked_device
from mamba3_jepa.models import mamba3
from mamba3_jepa.models.fused import demand_possible, fused
from mamba3_jepa.models.mamba3 import Mamba3
from mamba3_jepa.models.scan import sequential_scan
from mamba3_jepa.settings.bench import LayerBenchmarkSettings

FLOOR = "two linear maps (floor)"
WARM_UP_RUNS = 2
Candidate = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One candidate: `ratio` to the floor, and the median `seconds` of a forward and backward pass."""

    name: str
    ratio: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """One sequence of `length` tokens: `seconds` and `peak_bytes` above the idle layer (None where
    unknown)."""

    length: int
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class LayerBenchmark:
    """What `run_layer_benchmark` measured."""

    settings: LayerBenchmarkSettings
    hardware: str
    timings: list[Timing]
    scaling: list[Scaling]


def run_layer_benchmark(settings: LayerBenchmarkSettings) -> LayerBenchmark:
    """Measure every candidate that is there, then the scaling with length.

    Raises:
        UserError: there is no such device, or the sizes do not go together.
    """
    device = checked_device(settings.device)
    settings = dataclasses.replace(settings, device=str(device))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    demand_possible(settings.kernels, device, settings.bfloat16)
    fused.begin(settings.kernels)
    candidates = dict(_candidates(settings))
    synchronize = synchronizer(device)
    for run in candidates.values():
        for _ in range(WARM_UP_RUNS):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(settings.rounds):
        for name, run in candidates.items():
            seconds[name].append(_timed(run, synchronize))
    timings = [
        Timing(
            name=name,
            ratio=statistics.median(t / floor for t, floor in zip(times, seconds[FLOOR], strict=True)),
            seconds=statistics.median(times),
        )
        for name, times in seconds.items()
    ]
    return LayerBenchmark(
        settings=settings,
        hardware=hardware(device, settings.threads),
        timings=timings,
        scaling=_measure_scaling(settings),
    )


def report_rows(result: LayerBenchmark) -> list[tuple[str, str, str]]:
    """(candidate, ratio to the floor, milliseconds), the floor first."""
    return [(t.name, f"{t.ratio:.2f}", f"{t.seconds * 1e3:.1f} ms") for t in result.timings]


def scaling_rows(result: LayerBenchmark) -> list[tuple[str, str, str]]:
    """(length, time and peak memory as multiples of those at the shortest length, with their bare values)."""
    rows = []
    for row in result.scaling:
        first = result.scaling[0]
        memory = "not measured here"
        if row.peak_bytes is not None and first.peak_bytes:
            memory = f"{row.peak_bytes / first.peak_bytes:.2f} x  ({row.peak_bytes / 2**20:.0f} MiB)"
        rows.append((f"{row.length:,}", f"{row.seconds / first.seconds:.2f} x  ({row.seconds:.3f} s)", memory))
    return rows


def _candidates(settings: LayerBenchmarkSettings) -> Iterator[tuple[str, Candidate]]:
    layer = _layer(settings)
    u = torch.randn(settings.batch, settings.length, settings.d_model, device=settings.device)
    g = torch.randn_like(u)
    yield FLOOR, _floor(layer, u, g, settings)
    yield "Mamba3, eager", _gradients_of(layer, u, g, settings)
    if settings.compiled:
        yield "Mamba3, compiled", _gradients_of(_compiled(layer), u, g, settings)
    if settings.sequential:
        reference = _gradients_of(_layer(settings), u, g, settings)
        yield "Mamba3, sequential reference", _with_sequential_scan(reference)
    if not settings.packages:
        return
    sizes = {"d_state": settings.d_state, "headdim": settings.headdim}
    if settings.device.startswith("cuda") and _installed("mamba_ssm"):
        from mamba_ssm.modules.mamba3 import Mamba3 as Reference

        module = Reference(settings.d_model, chunk_size=settings.chunk_size, **sizes).to(settings.device)
        yield "mamba-ssm", _gradients_of(module, u, g, settings)
    if _installed("mamba3_ssm"):
        from mamba3_ssm import Mamba3 as OtherMamba3

        module = OtherMamba3(settings.d_model, **sizes).to(settings.device)
        yield "mamba3-ssm", _gradients_of(module, u, g, settings)
    if _installed("mamba3_jax") and settings.device == "cpu":
        yield "mamba3-jax, jitted", _jax_gradients(settings)


def _layer(settings: LayerBenchmarkSettings) -> Mamba3:
    layer = Mamba3(
        settings.d_model,
        d_state=settings.d_state,
        headdim=settings.headdim,
        chunk_size=settings.chunk_size,
    )
    return layer.to(settings.device)


def _compiled(layer: Mamba3) -> nn.Module:
    return torch.compile(layer)  # type: ignore[return-value]


def _autocast(settings: LayerBenchmarkSettings) -> torch.autocast:
    return torch.autocast(torch.device(settings.device).type, torch.bfloat16, enabled=settings.bfloat16)


def _gradients_of(module: nn.Module, u: Tensor, g: Tensor, settings: LayerBenchmarkSettings) -> Candidate:
    wanted = [u.clone().requires_grad_(), *module.parameters()]

    def run() -> None:
        with _autocast(settings):
            y = module(wanted[0])
        torch.autograd.grad(y, wanted, g.to(y.dtype))

    return run


def _floor(layer: Mamba3, u: Tensor, g: Tensor, settings: LayerBenchmarkSettings) -> Candidate:
    u = u.clone().requires_grad_()
    y = torch.randn(*u.shape[:2], layer.d_inner, device=u.device, requires_grad=True)
    g_in = torch.randn(*u.shape[:2], layer.in_proj.out_features, device=u.device)
    wanted = [u, layer.in_proj.weight, y, layer.out_proj.weight]

    def run() -> None:
        with _autocast(settings):
            outputs = [layer.in_proj(u), layer.out_proj(y)]
        grads = [x.to(o.dtype) for x, o in zip((g_in, g), outputs, strict=True)]
        torch.autograd.grad(outputs, wanted, grads)

    return run


def _with_sequential_scan(run: Candidate) -> Candidate:
    """The same layer with the reference in the place of the chunked scan."""

    def scan(inputs: Any, state: Any, chunk_size: int, z: Tensor | None, return_state: bool) -> Any:
        y, state = sequential_scan(inputs, state)
        return (y if z is None else y * nn.functional.silu(z).unsqueeze(2)), state

    def run_sequential() -> None:
        with mock.patch.object(mamba3, "chunked_scan", scan), mock.patch.object(fused, "use", "off"):
            run()

    return run_sequential


def _jax_gradients(settings: LayerBenchmarkSettings) -> Candidate:
    import jax
    from flax import nnx
    from mamba3_jax import Mamba3Config, Mamba3Mixer

    config = Mamba3Config(hidden_size=settings.d_model, state_size=settings.d_state, head_dim=settings.headdim)
    graph, parameters, rest = nnx.split(Mamba3Mixer(config, 0, rngs=nnx.Rngs(0)), nnx.Param, ...)
    shape = (settings.batch, settings.length, settings.d_model)
    u, g = (jax.random.normal(jax.random.key(i), shape) for i in range(2))

    def loss(parameters: Any, u: Any) -> Any:
        return (nnx.merge(graph, parameters, rest)(u)[0] * g).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(gradients(parameters, u))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _timed(run: Candidate, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def _measure_scaling(settings: LayerBenchmarkSettings) -> list[Scaling]:
    """Each length in a process of its own, whose peak memory is that length's alone."""
    rows = []
    for length in settings.scaling_lengths:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            one = dataclasses.replace(settings, batch=1, length=length)
            rows.append(pool.apply(_measure_length, (one,)))
    return rows


def _measure_length(settings: LayerBenchmarkSettings) -> Scaling:
    torch.set_num_threads(settings.threads)
    fused.begin(settings.kernels)
    torch.manual_seed(0)
    layer = _layer(settings)
    short = torch.randn(1, settings.chunk_size, settings.d_model, device=settings.device)
    _gradients_of(layer, short, torch.randn_like(short), settings)()
    u = torch.randn(1, settings.length, settings.d_model, device=settings.device)
    run = _gradients_of(layer, u, torch.randn_like(u), settings)
    device = torch.device(settings.device)
    idle = watch_memory(device)
    run()
    peak = peak_memory(device)
    seconds = statistics.median(_timed(run, synchronizer(device)) for _ in range(3))
    above = None if peak is None or idle is None else peak - idle
    return Scaling(length=settings.length, seconds=seconds, peak_bytes=above)
