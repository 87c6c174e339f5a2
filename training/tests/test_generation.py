"""Generation: every method against the full forward, an exhaustive search, or the distribution it should follow."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3_jepa.config import BackboneConfig, Mamba3Config
from mamba3_jepa.errors import UserError
from mamba3_jepa.models.generation import Generated, _Beam, _score, generate, log_probabilities, sample_tokens
from mamba3_jepa.models.y_decoder import YDecoder
from mamba3_jepa.settings.inference import GenerationConfig

BOS, EOS, E = 1, 2, 8


def make_decoder(vocab_size: int, seed: int = 0, scale: float = 0.3) -> YDecoder:
    """Random weights, away from the initial values, so that the tokens depend on what was said before."""
    torch.manual_seed(seed)
    layer = Mamba3Config(d_model=16, d_state=8, headdim=8)
    decoder = YDecoder(BackboneConfig(n_layers=2, layer=layer), vocab_size, embed_dim=E, prefix_tokens=3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return decoder.eval()


@pytest.fixture(scope="module")
def decoder() -> YDecoder:
    return make_decoder(vocab_size=12)


@pytest.fixture(scope="module")
def embedding() -> Tensor:
    torch.manual_seed(1)
    return F.normalize(torch.randn(24, E), dim=-1)


def speak(decoder: YDecoder, embedding: Tensor, limit: int = 12, rows=None, **settings) -> list[Generated]:
    config = GenerationConfig(**settings)
    return generate(decoder, embedding, bos_id=BOS, eos_id=EOS, config=config, max_tokens=limit, rows=rows)


def by_full_forward(decoder: YDecoder, embedding: Tensor, max_tokens: int) -> Generated:
    """Greedy for one embedding (E,), running the whole forward again for every token."""
    said, log_probs = [BOS], []
    for _ in range(max_tokens):
        with torch.no_grad():
            logits = decoder(embedding[None], torch.tensor([said]))[0, -1]
        token = int(logits.argmax())
        log_probs.append(float(logits.log_softmax(-1)[token]))
        if token == EOS:
            return Generated(ids=said[1:], log_probs=log_probs, finished=True)
        said.append(token)
    return Generated(ids=said[1:], log_probs=log_probs, finished=False)


def same(left: list[Generated], right: list[Generated]) -> bool:
    """Equal tokens, and log-probabilities within rounding."""
    return [(a.ids, a.finished) for a in left] == [(a.ids, a.finished) for a in right] and all(
        a.log_probs == pytest.approx(b.log_probs, abs=1e-4) for a, b in zip(left, right, strict=True)
    )


def test_greedy_is_what_the_full_forward_would_choose(decoder: YDecoder, embedding: Tensor) -> None:
    answers = speak(decoder, embedding)
    assert same(answers, [by_full_forward(decoder, row, 12) for row in embedding])
    lengths = {len(answer.ids) for answer in answers}
    assert len(lengths) > 2, "the test needs answers that end at different steps"
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert EOS not in answer.ids
        assert len(answer.log_probs) == len(answer.ids) + answer.finished


def test_a_long_text_is_what_one_full_forward_would_choose(embedding: Tensor) -> None:
    """Several of the scan's chunks, and no rounding that adds up."""
    decoder = make_decoder(vocab_size=60, seed=4)
    with torch.no_grad():
        decoder.lm_head.weight[EOS] = 0
    answers = speak(decoder, embedding[:3], 200)
    assert [len(answer.ids) for answer in answers] == [200] * 3
    assert len(set(answers[0].ids)) > 10, "a text that repeats itself would show little"
    ids = torch.tensor([[BOS, *answer.ids[:-1]] for answer in answers])
    with torch.no_grad():
        log_probs = decoder(embedding[:3], ids).log_softmax(-1)
    said = torch.tensor([answer.ids for answer in answers])
    chosen = log_probs.gather(2, said[..., None])[..., 0]
    assert (log_probs.amax(-1) - chosen).max() < 1e-4
    torch.testing.assert_close(torch.tensor([answer.log_probs for answer in answers]), chosen, atol=1e-4, rtol=0)


def test_half_precision_weights_speak_too(embedding: Tensor) -> None:
    decoder = make_decoder(vocab_size=12).to(torch.bfloat16)
    for settings in ({}, {"method": "sample"}, {"method": "beam", "beams": 2}):
        answers = speak(decoder, embedding, **settings)
        assert all(log_prob <= 0 for answer in answers for log_prob in answer.log_probs)


def test_the_limit_is_the_configured_one_or_the_models(decoder: YDecoder, embedding: Tensor) -> None:
    whole = speak(decoder, embedding)
    for answers in (speak(decoder, embedding, 3), speak(decoder, embedding, 12, max_tokens=3)):
        for answer, long in zip(answers, whole, strict=True):
            assert answer.ids == long.ids[:3]
            assert answer.finished == (long.finished and len(long.log_probs) <= 3)
            assert len(answer.log_probs) <= 3


@pytest.mark.parametrize("settings", [{}, {"method": "sample", "seed": 3}, {"method": "beam", "beams": 3}])
def test_a_sample_is_the_same_alone_and_in_a_batch(decoder: YDecoder, embedding: Tensor, settings: dict) -> None:
    together = speak(decoder, embedding, **settings)
    alone = [speak(decoder, embedding[i : i + 1], rows=[i], **settings)[0] for i in range(len(embedding))]
    assert same(together, alone)
    assert speak(decoder, embedding[:0], **settings) == []


def test_the_state_of_a_batch_shrinks_as_answers_end(decoder: YDecoder, embedding: Tensor, monkeypatch) -> None:
    sizes = []
    step = decoder.step

    def counted(ids, state):
        sizes.append(len(ids))
        assert all(len(tensor) == len(ids) for layer in state for tensor in layer)
        return step(ids, state)

    monkeypatch.setattr(decoder, "step", counted)
    answers = speak(decoder, embedding)
    assert sizes == [sum(len(answer.log_probs) > t for answer in answers) for t in range(len(sizes))]
    assert sizes[-1] < sizes[0] == len(embedding)


def test_one_beam_is_greedy(decoder: YDecoder, embedding: Tensor) -> None:
    for penalty in (0.0, 1.0, -1.0):
        assert same(
            speak(decoder, embedding, method="beam", beams=1, length_penalty=penalty), speak(decoder, embedding)
        )


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 3.0, -0.5])
def test_a_wide_enough_beam_finds_the_best_answer_of_all(embedding: Tensor, penalty: float) -> None:
    V, limit = 5, 4
    decoder = make_decoder(V, seed=5)
    answers = speak(decoder, embedding[:6], limit, method="beam", beams=V**limit, length_penalty=penalty)
    greedy = speak(decoder, embedding[:6], limit)
    ordinary = [token for token in range(V) if token != EOS]
    # Every answer that ends with eos within the limit; what follows its eos does not matter.
    said = [ids for length in range(limit) for ids in itertools.product(ordinary, repeat=length)]
    padded = torch.tensor([[*ids, EOS, *[0] * (limit - 1 - len(ids))] for ids in said])
    for answer, row in zip(answers, embedding, strict=False):
        with torch.no_grad():
            heard = torch.cat([torch.full((len(said), 1), BOS), padded[:, :-1]], dim=1)
            log_probs = decoder(row.expand(len(said), -1), heard).log_softmax(-1).gather(2, padded[..., None])[..., 0]
        scores = {
            ids: float(own[: len(ids) + 1].sum()) / (len(ids) + 1) ** penalty
            for ids, own in zip(said, log_probs, strict=True)
        }
        best = max(scores, key=scores.__getitem__)
        assert tuple(answer.ids) == best
        assert answer.finished
        assert sum(answer.log_probs) / len(answer.log_probs) ** penalty == pytest.approx(scores[best], abs=1e-4)
    assert any(answer.ids != other.ids for answer, other in zip(answers, greedy, strict=True))


def test_a_beam_takes_the_places_of_samples() -> None:
    wide = GenerationConfig(method="beam", beams=20)
    assert [wide.samples_at_once(size) for size in (1, 20, 59, 60)] == [1, 1, 2, 3]
    assert [GenerationConfig().samples_at_once(size) for size in (1, 20)] == [1, 20]


@pytest.mark.parametrize("settings", [{"method": "sample", "top_k": 9}, {"method": "beam", "beams": 9}])
def test_there_must_be_as_many_tokens_as_are_chosen_among(settings: dict) -> None:
    config = GenerationConfig(**settings)
    config.demand_choice(9)
    with pytest.raises(UserError, match=rf"{[*settings][1]} is 9, but the model has only 8 tokens to choose from"):
        config.demand_choice(8)


def test_a_wider_beam_finds_more_probable_answers(decoder: YDecoder, embedding: Tensor) -> None:
    totals = []
    for beams in (1, 2, 8, 64):
        answers = speak(decoder, embedding, 20, method="beam", beams=beams)
        totals.append(sum(sum(answer.log_probs) for answer in answers if answer.finished) / len(answers))
        assert beams == 1 or all(answer.finished for answer in answers)
    assert totals[1] < totals[3] + 1e-6
    for answer, row in zip(answers, embedding, strict=True):  # the reported log-probabilities are the tokens' own
        with torch.no_grad():
            log_probs = decoder(row[None], torch.tensor([[BOS, *answer.ids]]))[0].log_softmax(-1)
        tokens = torch.tensor([*answer.ids, EOS])
        assert answer.log_probs == pytest.approx(log_probs.gather(1, tokens[:, None])[:, 0].tolist(), abs=1e-4)


def test_a_beam_cut_off_by_the_limit_gives_the_best_beginning(embedding: Tensor) -> None:
    decoder = make_decoder(6, seed=2)
    without_eos = torch.zeros(6)
    without_eos[EOS] = -1e9
    decoder.lm_head.register_forward_hook(lambda module, inputs, logits: logits + without_eos)
    for answer, row in zip(speak(decoder, embedding[:4], 2, method="beam", beams=5), embedding, strict=False):
        assert not answer.finished
        totals = {}
        for ids in itertools.product(range(6), repeat=2):
            with torch.no_grad():
                log_probs = decoder(row[None], torch.tensor([[BOS, ids[0]]]))[0].log_softmax(-1)
            totals[ids] = float(log_probs[0, ids[0]] + log_probs[1, ids[1]])
        assert sum(answer.log_probs) == pytest.approx(max(t for i, t in totals.items() if EOS not in i), abs=1e-4)


def test_an_extreme_length_penalty_is_no_exception(decoder: YDecoder, embedding: Tensor) -> None:
    """Powers beyond a float are infinite, and those below it 0, as everywhere in floating point."""
    for length, penalty, expected in ((2, 1e300, -0.0), (1, 1e300, -3.0), (2, -1e300, -math.inf), (2, 2.0, -0.75)):
        assert _score(-3.0, length, penalty) == expected
    assert math.isnan(_score(0.0, 2, -1e300))
    for penalty in (1e300, -1e300):
        for answer in speak(decoder, embedding, method="beam", beams=3, length_penalty=penalty):
            assert len(answer.log_probs) == len(answer.ids) + answer.finished


def test_an_answer_that_ends_takes_a_beam_for_good() -> None:
    beam = _Beam(width=3)
    beam.advance([(-1.0, 0, 7, -1.0), (-1.5, 0, EOS, -1.5), (-2.0, 0, 8, -2.0), (-2.5, 0, 9, -2.5)], EOS, 0.0)
    assert beam.totals == [-1.0, -2.0]
    assert (beam.best.ids, beam.best.log_probs, beam.best.finished) == ([], [-1.5], True)
    beam.advance([(-1.1, 0, 5, -0.1), (-2.1, 1, 6, -0.1), (-2.2, 1, 4, -0.2)], EOS, 0.0)
    assert beam.totals == [-1.1, -2.1], "the third continuation finds no place"
    assert [beam.answer(slot).ids for slot in range(2)] == [[7, 5], [8, 6]]
    assert beam.best.ids == []


@pytest.mark.parametrize(
    ("penalty", "best_score", "expected"),
    [
        (0.0, -1.5, True),  # -1 now, and nothing more lost, is better
        (0.0, -0.9, False),
        (1.0, -0.3, True),  # -1 / 3 is not, -1 / 4 is
        (1.0, -0.2, False),
        (-1.0, -2.5, True),  # longer answers are worse here: -2 at the next token
        (-1.0, -1.5, False),
    ],
)
def test_the_search_goes_on_while_a_better_answer_is_possible(
    penalty: float, best_score: float, expected: bool
) -> None:
    beam = _Beam(width=1, trace=[[(0, 7, -1.0)]], totals=[-1.0], best_score=best_score)
    assert beam.can_improve(4, penalty) is expected


def frequencies(logits: Tensor, config: GenerationConfig, n: int = 200_000) -> Tensor:
    """How often each token is picked by evenly spread numbers u."""
    u = (torch.arange(n) + 0.5) / n
    tokens = sample_tokens(logits.expand(n, -1), u, config)
    return torch.bincount(tokens, minlength=len(logits)) / n


def expected_distribution(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """In plain Python: the k best, then the fewest of them that have p together."""
    weights = {i: math.exp(value / temperature) for i, value in enumerate(logits.tolist())}
    ranked = sorted(weights, key=lambda i: -weights[i])[:top_k]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if top_p is not None and mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return torch.tensor([weights[i] / total if i in kept else 0.0 for i in weights])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (1, None), (None, 0.6), (5, 0.8), (99, 1e-9)])
def test_sampling_follows_the_distribution(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9, -5.0, 1.7])
    config = GenerationConfig(method="sample", temperature=temperature, top_k=top_k, top_p=top_p)
    wanted = expected_distribution(logits, temperature, top_k, top_p)
    found = frequencies(logits, config)
    assert (found[wanted == 0] == 0).all(), "a token outside the set was picked"
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


def test_sampling_at_the_ends_of_the_interval_and_with_extreme_logits() -> None:
    logits = torch.tensor([[0.0, 1000.0, -torch.inf, 999.0, 0.0]]).expand(3, -1)
    for settings in ({"temperature": 1e-30}, {"temperature": 5e-324}, {"top_k": 1}):
        config = GenerationConfig(method="sample", **settings)
        assert sample_tokens(logits, torch.tensor([0.0, 0.5, 1.0]), config).tolist() == [1, 1, 1]
    assert sample_tokens(logits, torch.tensor([0.0, 0.5, 1.0]), GenerationConfig(method="sample")).tolist() == [1, 1, 3]
    flat = frequencies(torch.tensor([0.0, 50.0, -50.0, 1.0]), GenerationConfig(method="sample", temperature=1e300))
    torch.testing.assert_close(flat, torch.full((4,), 0.25), atol=2e-4, rtol=0)


def test_a_temperature_towards_zero_is_greedy(decoder: YDecoder, embedding: Tensor) -> None:
    greedy = speak(decoder, embedding)
    for temperature in (0.0, 1e-6, 1e-40, 1e-46, 5e-324):  # float32 cannot divide by the last ones
        assert same(speak(decoder, embedding, method="sample", temperature=temperature), greedy)
    assert same(speak(decoder, embedding, method="sample", top_k=1), greedy)


def test_sampled_answers_follow_the_decoder_and_the_seed(decoder: YDecoder, embedding: Tensor) -> None:
    n = 3000
    many = embedding[:1].expand(n, -1)
    answers = speak(decoder, many, 2, method="sample")
    assert same(answers, speak(decoder, many, 2, method="sample"))
    assert not same(answers, speak(decoder, many, 2, method="sample", seed=1))
    with torch.no_grad():
        first = decoder(embedding[:1], torch.tensor([[BOS]]))[0, 0]
    said = torch.tensor([answer.ids[0] if answer.ids else EOS for answer in answers])
    found = torch.bincount(said, minlength=12) / n
    torch.testing.assert_close(found, first.softmax(-1), atol=4 * (0.25 / n) ** 0.5, rtol=0)
    for answer, token in zip(answers[:50], said.tolist(), strict=False):
        assert answer.log_probs[0] == pytest.approx(float(first.log_softmax(-1)[token]), abs=1e-4)


def test_bad_settings_name_what_is_wrong() -> None:
    for settings, message in (
        ({"method": "best"}, "method is 'best'"),
        ({"method": "sample", "temperature": -1.0}, "temperature is -1.0, it must be finite and at least 0"),
        ({"method": "sample", "temperature": math.nan}, "temperature is nan"),
        ({"method": "sample", "top_k": 0}, "top_k is 0"),
        ({"method": "sample", "top_p": 0.0}, "top_p is 0.0"),
        ({"method": "sample", "top_p": 1.5}, "top_p is 1.5"),
        ({"method": "beam", "beams": 0}, "beams is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": 0.5}, "temperature has no effect with greedy; choose method sample"),
        ({"method": "sample", "beams": 2}, "beams has no effect with sample; choose method beam"),
    ):
        with pytest.raises(UserError, match=message):
            GenerationConfig(**settings)


@pytest.mark.parametrize("settings", [{}, {"method": "sample"}, {"method": "beam", "beams": 2}])
def test_damaged_weights_are_an_error_and_not_an_answer(embedding: Tensor, settings: dict) -> None:
    decoder = make_decoder(12)
    with torch.no_grad():
        decoder.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        speak(decoder, embedding, **settings)


def test_wrong_shapes(decoder: YDecoder, embedding: Tensor) -> None:
    with pytest.raises(ValueError, match="expected \\(B, 8\\)"):
        speak(decoder, embedding[:, :4])
    with pytest.raises(ValueError, match="2 row numbers for 24"):
        speak(decoder, embedding, rows=[0, 1])


def test_log_probabilities_of_what_is_almost_certain_have_all_their_digits() -> None:
    logits = torch.tensor([[18.0, 3.0, 0.0], [0.0, 0.0, -math.inf], [-1.0, 25.0, 2.0]])
    found = log_probabilities(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logits.double().log_softmax(-1), rtol=1e-6, atol=0)
    assert float(logits.log_softmax(-1)[0, 0]) != pytest.approx(float(found[0, 0]), rel=1e-3)  # why it is here
