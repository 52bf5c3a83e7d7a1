"""Medians and intervals against SciPy's bootstrap and against what they promise."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.statistics import median_interval, quantile


def test_against_scipy():
    values = np.random.default_rng(0).lognormal(size=40)
    median, low, high = median_interval(values)
    expected = stats.bootstrap((values,), np.median, n_resamples=20_000, method="percentile", rng=1)
    assert median == np.median(values)
    # A resampled median is one of few numbers: two draws may end on neighbours.
    assert np.mean((values > low) & (values < expected.confidence_interval.low)) < 0.06
    assert np.mean((values < high) & (values > expected.confidence_interval.high)) < 0.06


def test_it_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = [
        low <= 1.0 <= high for _, low, high in (median_interval(rng.exponential(1 / np.log(2), 30)) for _ in range(200))
    ]
    assert 0.9 <= np.mean(held) <= 1.0


def test_it_is_the_same_every_time_and_scales():
    values = [3.0, 1.0, 2.0, 5.0]
    assert median_interval(values) == median_interval(values)
    np.testing.assert_allclose(median_interval([10 * v for v in values]), np.multiply(10, median_interval(values)))
    assert quantile(values, 0.5) == 2.5


def test_no_values():
    with pytest.raises(ValueError, match="`values` must hold at least 1 number"):
        median_interval([])
