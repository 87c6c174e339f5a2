"""The benchmark of the cache runs, and its three ways train on the same inputs."""

import numpy as np
import pytest
import torch

from mamba3_jepa.bench import cache
from mamba3_jepa.errors import UserError
from mamba3_jepa.settings.bench import CacheBenchmarkSettings
from mamba3_jepa.training.frozen import frozen_outputs


def test_it_measures_and_reports():
    result = cache.run_cache_benchmark(CacheBenchmarkSettings(preset="tiny", batches=3, batch_size=6, threads=1))
    assert min(result.cached, result.shuffled, result.same_batches, result.fill_per_sample) > 0
    assert result.ratio == pytest.approx(result.shuffled / result.cached)
    rows = cache.report_rows(result)
    assert [row[3] for row in rows] == ["1.00", f"{result.ratio:.2f}", f"{result.ratio_same_batches:.2f}"]


def test_both_ways_give_the_same_inputs():
    model, source = cache._model(CacheBenchmarkSettings(preset="tiny", batches=1), 9)
    indices = source.indices("target")
    outputs = frozen_outputs(model, source, indices, cache_dir=None, batch_size=4)
    rows = np.array([7, 0, 4, 3])
    for kept, computed in zip(
        cache._from_disk(outputs, rows), cache._computed(model, source, indices[rows]), strict=True
    ):
        torch.testing.assert_close(kept, computed, atol=1e-6, rtol=1e-5)


def test_impossible_settings():
    with pytest.raises(UserError, match="`batch_size` 0"):
        cache.run_cache_benchmark(CacheBenchmarkSettings(batch_size=0))
