"""Phase 1's loss in pieces against the plain one, and what it holds in memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mamba3_jepa.models import contrast
from mamba3_jepa.models.contrast import Gather, info_nce_in_pieces
from mamba3_jepa.models.losses import info_nce

KEYS, HARD_KEYS = torch.tensor([1, 1, 2, 3, 2, 1, 4]), torch.tensor([2, 9, 1, 9])


def leaves(n_hard: int) -> list[torch.Tensor]:
    """Predicted, target and hard embeddings and the temperature."""
    generator = torch.Generator().manual_seed(0)
    unit = [F.normalize(torch.randn(n, 5, dtype=torch.float64, generator=generator), dim=-1) for n in (7, 7, n_hard)]
    return [each.requires_grad_() for each in (*unit, torch.tensor(0.2, dtype=torch.float64))]


@pytest.mark.parametrize("n_hard", [0, 4])
@pytest.mark.parametrize("piece", [1, 20, 2**22])
def test_loss_and_gradients_are_those_of_the_plain_loss(
    n_hard: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrast, "_PIECE", piece)
    results = []
    for function in (info_nce, info_nce_in_pieces):
        predicted, target, hard, temperature = leaves(n_hard)
        found = function(predicted, target, KEYS, temperature, hard, HARD_KEYS[:n_hard])
        (3 * found.loss).backward()
        hard_gradient = hard.grad if n_hard else torch.empty(0, 5, dtype=torch.float64)
        gradients = [predicted.grad, target.grad, hard_gradient, temperature.grad]
        results.append([found.loss.detach(), found.accuracy.double(), found.negatives.double(), *gradients])
    for plain, pieces in zip(*results, strict=True):
        assert plain.numel() == 0 or plain.abs().max() > 0
        torch.testing.assert_close(pieces, plain, atol=1e-12, rtol=1e-6 if plain.dim() == 0 else 1e-12)


def test_a_rank_has_its_share_and_the_whole_gradient_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks that take turns, one of them without a sample."""
    monkeypatch.setattr(contrast, "_PIECE", 20)
    rows = [slice(0, 3), slice(3, 3), slice(3, 7)]
    hard_rows = [slice(0, 1), slice(1, 1), slice(1, 4)]
    whole = leaves(4)
    plain = info_nce(whole[0], whole[1], KEYS, whole[3], whole[2], HARD_KEYS)
    plain.loss.backward()
    everyone = (whole[0].detach(), whole[1].detach(), KEYS, whole[2].detach(), HARD_KEYS)
    sums = _sums(*(each.detach() for each in whole))
    total = accuracy = of_temperature = 0.0
    for mine, my_hard in zip(rows, hard_rows, strict=True):
        asked = iter([(everyone, (mine.start, mine.start, mine.start, my_hard.start, my_hard.start)),
                      (sums, (mine.start, mine.start))])  # fmt: skip
        gather: Gather = lambda *_, asked=asked: next(asked)  # noqa: E731
        own = [each.detach().requires_grad_() for each in (whole[0][mine], whole[1][mine], whole[2][my_hard], whole[3])]
        share = info_nce_in_pieces(own[0], own[1], KEYS[mine], own[3], own[2], HARD_KEYS[my_hard], gather)
        share.loss.backward()
        total, accuracy = total + float(share.loss.detach()), accuracy + float(share.accuracy)
        of_temperature += float(own[3].grad)
        assert float(share.negatives) == pytest.approx(float(plain.negatives))
        for found, of, where in zip(own, whole, (mine, mine, my_hard), strict=False):
            torch.testing.assert_close(found.grad, of.grad[where], atol=1e-12, rtol=1e-12)
    assert total == pytest.approx(float(plain.loss.detach()), rel=1e-12)
    assert accuracy == pytest.approx(float(plain.accuracy))
    assert of_temperature == pytest.approx(float(whole[3].grad), rel=1e-12)


def _sums(predicted: torch.Tensor, target: torch.Tensor, hard: torch.Tensor, temperature: torch.Tensor) -> tuple:
    """For each row of both directions the logarithm of the sum of what it is compared with."""
    logits = predicted @ target.T / temperature
    logits = logits.masked_fill((KEYS[:, None] == KEYS) & ~torch.eye(7, dtype=torch.bool), -torch.inf)
    wrong = (predicted @ hard.T / temperature).masked_fill(KEYS[:, None] == HARD_KEYS, -torch.inf)
    return torch.cat([logits, wrong], dim=1).logsumexp(dim=1), logits.T.logsumexp(dim=1)


def test_an_empty_batch_teaches_nothing() -> None:
    predicted = torch.empty(0, 4, requires_grad=True)
    temperature = torch.tensor(0.07, requires_grad=True)
    found = info_nce_in_pieces(predicted, torch.empty(0, 4), torch.empty(0, dtype=torch.int64), temperature)
    found.loss.backward()
    assert float(found.loss.detach()) == float(found.negatives) == float(temperature.grad) == 0.0


def test_low_precision_does_not_reach_the_logits() -> None:
    torch.manual_seed(1)
    predicted, target = (F.normalize(torch.randn(16, 64), dim=-1) for _ in range(2))
    results = []
    for enabled in (False, True):
        leaf = predicted.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = info_nce_in_pieces(leaf, target, torch.arange(16), torch.tensor(0.01)).loss
            loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


_MEASURE = """
import resource, sys, torch
from mamba3_jepa.models.contrast import info_nce_in_pieces
from mamba3_jepa.models.losses import info_nce

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(function, n):
    predicted, target = (torch.nn.functional.normalize(torch.randn(n, 16), dim=-1) for _ in range(2))
    predicted.requires_grad_(), target.requires_grad_()
    before = peak()
    function(predicted, target, torch.arange(n), torch.tensor(0.07)).loss.backward()
    return peak() - before

function = {"pieces": info_nce_in_pieces, "plain": info_nce}[sys.argv[1]]
run(function, 64)
print(run(function, 8192))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_no_rank_ever_holds_all_scores() -> None:
    """8,192 x 8,192 scores are 256 MiB; a fresh process says how far its peak rises."""
    peaks = {}
    for name in ("pieces", "plain"):
        result = subprocess.run([sys.executable, "-c", _MEASURE, name], capture_output=True, text=True, check=True)
        peaks[name] = int(result.stdout) / 2**20
    assert peaks["plain"] > 2 * 256, "the measure sees what it should"
    assert peaks["pieces"] < 128
