"""Each metric against its formula in numpy or a case worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mamba3_jepa.evaluation import embedding_metrics as module
from mamba3_jepa.evaluation.embedding_metrics import (
    alignment,
    collapse_warning,
    effective_rank,
    spread,
    uniformity,
)


def unit(n, size, seed=0):
    return F.normalize(torch.randn(n, size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_alignment_by_hand():
    predicted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert alignment(predicted, target) == pytest.approx((0 + 2 + 4) / 3)
    with pytest.raises(ValueError, match="N > 0"):
        alignment(predicted, target[:2])


def test_uniformity_matches_numpy():
    x = unit(17, 5).double()
    pairs = [np.sum((x[i] - x[j]).numpy() ** 2) for i in range(17) for j in range(i)]
    assert uniformity(x) == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(pairs)))), abs=1e-12)


def test_uniformity_by_hand():
    assert uniformity(torch.ones(6, 1)) == 0.0
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8.0)
    assert math.isnan(uniformity(torch.ones(1, 3)))


def test_uniformity_of_many_is_that_of_an_even_choice(monkeypatch):
    monkeypatch.setattr(module, "MAX_UNIFORMITY_SAMPLES", 5)
    x = unit(13, 4)
    assert uniformity(x) == uniformity(x[[0, 3, 6, 9, 12]])


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (9, 9)])
def test_effective_rank_matches_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, shape[1])
    values = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(axis=0), compute_uv=False)
    p = values / values.sum()
    p = p[p > 1e-14]
    assert effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


def test_effective_rank_by_hand():
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    assert effective_rank(axes) == pytest.approx(4.0)
    assert effective_rank(torch.tensor([[1.0, 2.0], [-3.0, -6.0], [2.0, 4.0]])) == pytest.approx(1.0, abs=1e-5)
    assert effective_rank(torch.ones(5, 3) * 0.3) == 0.0
    assert math.isnan(effective_rank(torch.full((3, 2), torch.inf)))


def test_spread_of_unit_vectors_is_one_minus_the_squared_mean():
    x = unit(11, 6).double()
    assert spread(x) == pytest.approx(1 - x.mean(dim=0).square().sum().item())


def test_healthy_embeddings_do_not_warn():
    assert collapse_warning(unit(200, 32), "predicted") is None
    # Two hundred samples of thirteen answers span twelve directions and are healthy.
    clusters = unit(13, 128)[torch.arange(200) % 13]
    assert collapse_warning(clusters, "predicted", n_distinct=13) is None
    # Captions of three attributes with eight, six and four values have a rank near fifteen, whatever E is.
    draw = torch.Generator().manual_seed(0)
    values = [unit(n, 512, seed=n)[torch.randint(n, (256,), generator=draw)] for n in (8, 6, 4)]
    assert collapse_warning(F.normalize(sum(values), dim=-1), "target") is None
    assert collapse_warning(unit(1, 8), "predicted") is None


def test_collapse_is_said_aloud():
    point = F.normalize(unit(1, 32) + 1e-3 * unit(200, 32, seed=2), dim=-1)
    assert "predicted embeddings have collapsed to one point" in (collapse_warning(point, "predicted") or "")
    line = unit(1, 32) * torch.linspace(-1, 1, 200)[:, None].sign()
    assert "few directions" in (collapse_warning(line, "target") or "")
    plane = F.normalize(torch.randn(300, 3), dim=-1) @ unit(3, 256)
    assert "of at most 256" in (collapse_warning(F.normalize(plane, dim=-1), "target") or "")
    assert "not finite" in (collapse_warning(torch.full((9, 4), torch.nan), "target") or "")
