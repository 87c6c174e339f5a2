"""Text from the Y-Decoder or a language model, token by token: greedy, sampled, or by beam search.

Only `step` is used, from a state after what came before, so memory and time per token do not depend on how much has
been said. Sequences that have ended leave the batch.

Shape letters: B samples, E embedding width, V vocabulary, N sequences still being generated, K beams.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mamba3_jepa.data.splits import stable_hash
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.scan import Mamba3State
from mamba3_jepa.models.y_decoder import YDecoder
from mamba3_jepa.settings.inference import GenerationConfig

__all__ = [
    "DOUBT_FLOOR", "N_DOUBTS", "Generated", "GenerationConfig", "Speaker", "continued", "doubt", "generate",
    "log_probabilities",
]  # fmt: skip

N_DOUBTS = 2  # numbers of `doubt`
DOUBT_FLOOR = 1e-5  # nats

_FLOAT = torch.finfo(torch.float32)

T = TypeVar("T")
State = list[Mamba3State]
# (logits (N, V), the samples they belong to) -> tokens (N,)
Choice = Callable[[Tensor, Sequence[int]], Tensor]
# called with a sample and each of its tokens as it is chosen, the end mark excepted
Listener = Callable[[int, int], None]


class Speaker(Protocol):
    """What can say the next token."""

    def step(self, ids_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: ids (N,) -> next-token logits (N, V) and the next state."""


@dataclass(kw_only=True)
class Generated:
    """One generated answer.

    ids: the tokens, without bos and eos.
    log_probs: the natural logarithm of the probability the decoder gave to each token when it was chosen, that of eos
        last if it was; temperature, top-k and top-p do not enter.
    finished: whether it ended with eos, rather than by the limit.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False


def doubt(answers: Sequence[Generated]) -> Tensor:
    """How improbable the decoder found what it said itself: (B, `N_DOUBTS`) float32.

    Two numbers of each of B answers: log(`DOUBT_FLOOR` - mean of the tokens' log-probabilities), and the same of the
    least probable token. The floor keeps what rounding makes of a sure answer from mattering.
    """
    numbers = [(sum(each.log_probs) / len(each.log_probs), min(each.log_probs)) for each in answers]
    return torch.log(DOUBT_FLOOR - torch.tensor(numbers, dtype=torch.float32).clamp(max=0))


def mean_log_probability(doubts: Tensor) -> Tensor:
    """The mean log-probabilities (B,) of the tokens, back from `doubt` (B, `N_DOUBTS`)."""
    return DOUBT_FLOOR - doubts[:, 0].exp()


def log_probabilities(logits: Tensor) -> Tensor:
    """log_softmax of logits (..., V) in float32, of which all digits count near 0, where torch's has the rounding of 1:
    `doubt` is measured by them."""
    logits = logits.float()
    largest, place = logits.max(-1, keepdim=True)
    others = (logits - largest).exp().scatter(-1, place, 0).sum(-1, keepdim=True)
    return logits - largest - others.log1p()


def generate(
    decoder: YDecoder,
    embedding: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    config: GenerationConfig,
    max_tokens: int,
    rows: Sequence[int] | None = None,
    source: str = "the model",
) -> list[Generated]:
    """Let the decoder speak each of B embeddings (B, E).

    A sample's tokens do not depend on the others in the batch.

    Args:
        max_tokens: tokens to generate at most, eos included, where `config.max_tokens` does not say; a model
            trained on answers of at most `max_answer_tokens` (bos and eos included) never saw more than one fewer.
        rows: B numbers; sampling draws from a random stream of its own for each (`config.seed`, number). Default:
            the positions in the batch.
        source: names the model in messages.

    Raises:
        UserError: the decoder's outputs are not finite.
        ValueError: an embedding that is not (B, E), or not B row numbers.
    """
    if embedding.ndim != 2 or embedding.shape[1] != decoder.embed_to_prefix.in_features:
        raise ValueError(
            f"embedding has shape {tuple(embedding.shape)}, expected (B, {decoder.embed_to_prefix.in_features})"
        )
    if len(embedding) == 0:
        return []
    with torch.no_grad():
        state = decoder.prefill(embedding.to(decoder.lm_head.weight))
    first = torch.full((len(embedding),), bos_id, device=decoder.lm_head.weight.device)
    return continued(
        decoder,
        first,
        state,
        eos_id=eos_id,
        config=config,
        limit=config.max_tokens or max_tokens,
        rows=rows,
        source=f"{source}: the Y-Decoder's outputs",
    )


@torch.no_grad()
def continued(
    speaker: Speaker,
    first: Tensor,
    state: State,
    *,
    eos_id: int,
    config: GenerationConfig,
    limit: int,
    rows: Sequence[int] | None = None,
    source: str = "the model's outputs",
    listener: Listener | None = None,
) -> list[Generated]:
    """Let a model go on from the last tokens `first` (B,) of B texts and the state before them.

    Args:
        limit: tokens to generate at most, eos included.
        rows: as for `generate`.
        source: names the outputs in messages.
        listener: hears every token at once; not with beams, which decide at the end.

    Raises:
        UserError: the outputs are not finite.
        ValueError: not B row numbers.
    """
    rows = range(len(first)) if rows is None else rows
    if len(rows) != len(first):
        raise ValueError(f"{len(rows)} row numbers for {len(first)} texts")
    if config.method == "beam":
        answers = _beam_search(speaker, first, state, eos_id, config, limit)
    else:
        answers = _one_each(speaker, first, state, eos_id, _choice(config, rows), limit, listener)
    if any(math.isnan(log_prob) for answer in answers for log_prob in answer.log_probs):
        raise UserError(f"{source} are not finite: its weights or the embeddings are damaged")
    return answers


def _one_each(
    speaker: Speaker,
    ids: Tensor,
    state: State,
    eos_id: int,
    choice: Choice,
    limit: int,
    listener: Listener | None,
) -> list[Generated]:
    answers = [Generated() for _ in ids]
    live = list(range(len(answers)))
    for _ in range(limit):
        logits, state = speaker.step(ids, state)
        ids = choice(logits, live)
        log_probs = log_probabilities(logits).gather(-1, ids[:, None])[:, 0]
        for sample, token, log_prob in zip(live, ids.tolist(), log_probs.tolist(), strict=True):
            answers[sample].log_probs.append(log_prob)
            if token == eos_id:
                answers[sample].finished = True
                continue
            answers[sample].ids.append(token)
            if listener is not None:
                listener(sample, token)
        stay = [row for row, sample in enumerate(live) if not answers[sample].finished]
        if not stay:
            break
        if len(stay) < len(live):
            live = [live[row] for row in stay]
            kept = torch.tensor(stay, device=ids.device)
            ids, state = ids[kept], _select(state, kept)
    return answers


def _choice(config: GenerationConfig, rows: Sequence[int]) -> Choice:
    """How to choose the next tokens."""
    if config.method == "greedy" or config.temperature == 0:
        return lambda logits, live: logits.argmax(-1)
    streams = [random.Random(stable_hash(f"{config.seed}/{row}")) for row in rows]

    def draw(logits: Tensor, live: Sequence[int]) -> Tensor:
        u = torch.tensor([streams[sample].random() for sample in live], dtype=torch.float32, device=logits.device)
        return sample_tokens(logits, u, config)

    return draw


def sample_tokens(logits: Tensor, u: Tensor, config: GenerationConfig) -> Tensor:
    """The tokens that uniform numbers u (N,) in [0, 1) pick from logits (N, V): int64 (N,).

    Temperature first, then the `top_k` most probable tokens, then the fewest of those whose share of what is left
    reaches `top_p`.
    """
    # Sorted stably: among equal tokens the first is the most probable, as for argmax.
    sorted_logits, tokens = logits.float().sort(dim=-1, descending=True, stable=True)
    temperature = min(max(config.temperature, _FLOAT.tiny), _FLOAT.max)  # one that float32 can divide by
    scaled = (sorted_logits - sorted_logits[:, :1]) / temperature
    if config.top_k is not None:
        scaled = scaled[:, : config.top_k]
    probability = scaled.softmax(-1)
    mass = probability.cumsum(-1)
    if config.top_p is not None:
        probability = probability.masked_fill(mass - probability >= config.top_p, 0)
        mass = probability.cumsum(-1)
    # The last token with any mass is where the sum ends, whatever rounding made of that sum.
    last = ((probability > 0).sum(-1) - 1).clamp(min=0)
    position = (mass <= u[:, None] * mass[:, -1:]).sum(-1).minimum(last)
    return tokens.gather(-1, position[:, None])[:, 0]


@dataclass(kw_only=True)
class _Beam:
    """The search for one sample's answer.

    Of `width` places, every answer that ends takes one for good; the search is over when none is left.

    Attributes:
        trace: for each step and sequence (the sequence it continues, its token, the token's log-probability).
        totals: log-probability of each sequence that goes on, best first.
    """

    width: int
    trace: list[list[tuple[int, int, float]]] = field(default_factory=list)
    totals: list[float] = field(default_factory=lambda: [0.0])
    best: Generated = field(default_factory=Generated)
    best_score: float = -math.inf

    def advance(self, candidates: Iterable[tuple[float, int, int, float]], eos_id: int, penalty: float) -> None:
        """Take the best continuations: (total, sequence, token, the token's log-probability), best first."""
        step, self.totals = [], []
        for total, slot, token, log_prob in list(candidates)[: self.width]:
            if total == -math.inf:  # a continuation of a place that holds no sequence
                break
            if token != eos_id:
                step.append((slot, token, log_prob))
                self.totals.append(total)
                continue
            answer = self.answer(slot)
            answer.log_probs.append(log_prob)
            answer.finished = True
            self.finish(answer, penalty)
            self.width -= 1
        self.trace.append(step)

    def answer(self, slot: int) -> Generated:
        """What sequence `slot` says so far."""
        answer = Generated()
        for step in reversed(self.trace):
            slot, token, log_prob = step[slot]
            answer.ids.append(token)
            answer.log_probs.append(log_prob)
        answer.ids.reverse()
        answer.log_probs.reverse()
        return answer

    def finish(self, answer: Generated, penalty: float) -> None:
        """Keep the answer if it is the best so far."""
        score = _score(sum(answer.log_probs), len(answer.log_probs), penalty)
        if score > self.best_score or not self.best.log_probs:
            self.best, self.best_score = answer, score

    def can_improve(self, limit: int, penalty: float) -> bool:
        """Whether a sequence that goes on could still end better than the best answer: its total can only fall,
        so its score is greatest with nothing more lost, at the next token or at the limit.
        """
        if not self.totals or not self.width:
            return False
        lengths = (len(self.trace) + 1, limit)
        return any(_score(self.totals[0], length, penalty) > self.best_score for length in lengths)


def _score(total: float, length: int, penalty: float) -> float:
    """total / length^penalty as IEEE 754 has it: a power may be infinite or 0, where Python's own raise exceptions."""
    with np.errstate(all="ignore"):
        return float(np.float64(total) / np.float64(length) ** penalty)


def _beam_search(
    speaker: Speaker, first: Tensor, state: State, eos_id: int, config: GenerationConfig, limit: int
) -> list[Generated]:
    """Every sample has K rows of the batch; those that hold no sequence have a total of -inf."""
    K, penalty, device = config.beams, config.length_penalty, first.device
    beams = [_Beam(width=K) for _ in first]
    live = list(beams)
    state = _select(state, torch.arange(len(live), device=device).repeat_interleave(K))
    ids = first.repeat_interleave(K)
    for _ in range(limit):
        logits, state = speaker.step(ids, state)
        V = logits.shape[-1]
        log_probs = log_probabilities(logits).unflatten(0, (len(live), K))
        totals = torch.tensor([_padded(beam.totals, K, -math.inf) for beam in live], device=device)
        best, places = (totals[..., None] + log_probs).flatten(1).topk(K)
        found = (best, places // V, places % V, log_probs.flatten(1).gather(1, places))
        for beam, *candidates in zip(live, *(tensor.tolist() for tensor in found), strict=True):
            beam.advance(zip(*candidates, strict=True), eos_id, penalty)
        numbers = [i for i, beam in enumerate(live) if beam.can_improve(limit, penalty)]
        if not numbers:
            break
        rows = [row for i in numbers for row in _padded([i * K + slot for slot, _, _ in live[i].trace[-1]], K, i * K)]
        live = [live[i] for i in numbers]
        ids = torch.tensor([_padded([token for _, token, _ in beam.trace[-1]], K, eos_id) for beam in live])
        ids, state = ids.flatten().to(device), _select(state, torch.tensor(rows, device=device))
    for beam in beams:
        if not beam.best.finished:
            for slot in range(len(beam.totals)):
                beam.finish(beam.answer(slot), penalty)
    return [beam.best for beam in beams]


def _padded(values: list[T], length: int, filler: T) -> list[T]:
    return values + [filler] * (length - len(values))


def _select(state: State, rows: Tensor) -> State:
    """The given rows of every tensor of every layer's state."""
    return [Mamba3State(*(tensor.index_select(0, rows) for tensor in layer)) for layer in state]
