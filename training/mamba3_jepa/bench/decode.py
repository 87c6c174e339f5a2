"""`mamba3-jepa bench decode`: does the time per generated token depend on how much was said before?

The decoder generates greedily once, up to the later position, and its state is kept where each window of tokens
begins. Then, in every round, both windows are generated again from their kept states, in turns as to which goes
first, so that a busy machine slows both alike; the ratio is the median over the rounds of late / early.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mamba3_jepa.bench.hardware import hardware, synchronizer
from mamba3_jepa.config import preset
from mamba3_jepa.device import checked_device
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.scan import Mamba3State
from mamba3_jepa.models.y_decoder import YDecoder
from mamba3_jepa.settings.bench import DecodeBenchmarkSettings

_WARM_UP_RUNS = 2
_FULL_FORWARD_RUNS = 3
Kept = tuple[Tensor, list[Mamba3State]]


@dataclass(frozen=True, kw_only=True)
class Position:
    """One place in the text.

    seconds: of one token with `step`, the median over the rounds.
    state_bytes: what is kept between two tokens.
    full_forward_seconds: of the forward over all tokens so far, which gives the same token; None if not measured.
    """

    position: int
    seconds: float
    state_bytes: int
    full_forward_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmark:
    """What `run_decode_benchmark` measured; `ratio`: time per token at the late position / at the early one."""

    settings: DecodeBenchmarkSettings
    hardware: str
    early: Position
    late: Position
    ratio: float


@torch.no_grad()
def run_decode_benchmark(settings: DecodeBenchmarkSettings) -> DecodeBenchmark:
    """Measure both positions.

    Raises:
        UserError: positions and a window that do not fit, or a device that is not there.
    """
    _check(settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    device = checked_device(settings.device)
    settings = dataclasses.replace(settings, device=str(device))
    decoder, embedding = _decoder(settings, device)
    synchronize = synchronizer(device)
    kept, said = _generate(decoder, embedding, settings)

    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_WARM_UP_RUNS):
        for start in kept:
            _window(decoder, start, settings.window)
    for number in range(settings.rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            run = partial(_window, decoder, kept[which], settings.window)
            seconds[which].append(_timed(run, synchronize) / settings.window)

    def position(which: int, number: int) -> Position:
        full = None
        if settings.full_forward:
            ids = said[:, :number]
            run = partial(decoder, embedding, ids)
            full = statistics.median(_timed(run, synchronize) for _ in range(_FULL_FORWARD_RUNS))
        return Position(
            position=number,
            seconds=statistics.median(seconds[which]),
            state_bytes=_state_bytes(kept[which][1]),
            full_forward_seconds=full,
        )

    return DecodeBenchmark(
        settings=settings,
        hardware=hardware(device, settings.threads),
        early=position(0, settings.early),
        late=position(1, settings.late),
        ratio=statistics.median(late / early for early, late in zip(*seconds, strict=True)),
    )


def report_rows(result: DecodeBenchmark) -> list[tuple[str, str, str, str]]:
    """(token, time with `step`, state, time of the full forward)."""
    rows = []
    for place in (result.early, result.late):
        full = "not measured" if place.full_forward_seconds is None else f"{place.full_forward_seconds * 1e3:,.2f} ms"
        state = f"{place.state_bytes / 2**20:.2f} MiB"
        rows.append((f"{place.position:,}", f"{place.seconds * 1e3:.3f} ms", state, full))
    return rows


def _check(settings: DecodeBenchmarkSettings) -> None:
    for name in ("batch", "window", "rounds", "threads"):
        if getattr(settings, name) < 1:
            raise UserError(f"bench decode: {name} is {getattr(settings, name)}, it must be at least 1")
    if settings.early < settings.window // 2:
        raise UserError(
            f"bench decode: a window of {settings.window} tokens around token {settings.early} starts before the "
            "text; choose a smaller `window` or a later `early`"
        )
    if settings.late <= settings.early:
        raise UserError(f"bench decode: `late` {settings.late} must come after `early` {settings.early}")


def _decoder(settings: DecodeBenchmarkSettings, device: torch.device) -> tuple[YDecoder, Tensor]:
    """A decoder with random weights, and embeddings (B, E) for it."""
    config = preset(settings.preset)
    decoder = YDecoder(config.y_decoder, config.vocab_size, config.embed_dim, config.prefix_tokens)
    embedding = torch.nn.functional.normalize(torch.randn(settings.batch, config.embed_dim), dim=-1)
    return decoder.eval().to(device), embedding.to(device)


def _generate(
    decoder: YDecoder, embedding: Tensor, settings: DecodeBenchmarkSettings
) -> tuple[tuple[Kept, Kept], Tensor]:
    """Generate up to the late window.

    Returns:
        what each window starts from, and the tokens (B, L) heard by the decoder.
    """
    starts = [position - settings.window // 2 for position in (settings.early, settings.late)]
    kept: list[Kept] = []
    ids = torch.zeros(settings.batch, dtype=torch.int64, device=embedding.device)
    state = decoder.prefill(embedding)
    said = []
    for number in range(settings.late):
        if number in starts:
            kept.append((ids, state))
        said.append(ids)
        logits, state = decoder.step(ids, state)
        ids = logits.argmax(-1)
    return (kept[0], kept[1]), torch.stack(said, dim=1)


def _window(decoder: YDecoder, start: Kept, length: int) -> None:
    ids, state = start
    for _ in range(length):
        logits, state = decoder.step(ids, state)
        ids = logits.argmax(-1)


def _timed(run: Callable[[], object], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def _state_bytes(state: list[Mamba3State]) -> int:
    """Memory the state holds on to; a view keeps all of what it is a view of."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for layer in state for tensor in layer
    }
    return sum(storages.values())
