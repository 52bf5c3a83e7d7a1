"""Clopper and Pearson's bound against SciPy's in float64, and its coverage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen.attacks.binomial import upper_bound


@pytest.mark.parametrize("trials", [1, 7, 100, 100_000, 1_000_000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_against_scipy(trials, alpha):
    rng = np.random.default_rng(0)
    some = rng.integers(0, trials, 50)
    m = np.unique(np.concatenate([np.arange(min(trials, 50)), some, [trials // 2, trials - 1]]))
    expected = stats.beta.isf(alpha, m + 1, trials - m)
    bound = jax.jit(lambda m: upper_bound(m, trials, alpha=alpha))(m)
    assert bound.dtype == jnp.float32
    np.testing.assert_allclose(bound, expected, rtol=2e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(upper_bound(m, trials, alpha=alpha), expected, rtol=1e-10)


def test_every_trial_and_none():
    assert upper_bound(5, 5, alpha=0.01) == 1
    assert upper_bound(0, 0, alpha=0.01) == 1
    np.testing.assert_allclose(
        upper_bound(0, [10, 100_000], alpha=0.01), -np.expm1(np.log(0.01) / [10, 1e5]), rtol=1e-6
    )


@pytest.mark.parametrize("trials", [1, 10, 60])
def test_the_true_probability_exceeds_it_as_rarely_as_promised(trials):
    m, alpha = np.arange(trials + 1), 0.05
    bounds = np.asarray(upper_bound(m, trials, alpha=alpha), np.float64)
    # Coverage jumps where a bound lies: right above each it is at its least.
    for q in np.concatenate([np.linspace(0.001, 0.999, 97), 1 - (1 - bounds[:-1]) * (1 - 1e-4)]):
        missed = stats.binom.pmf(m, trials, q)[bounds < q].sum()
        assert missed <= alpha * (1 + 1e-5)
    np.testing.assert_allclose(stats.binom.cdf(m[:-1], trials, bounds[:-1]), alpha, rtol=1e-4)


def test_numbers_of_trials_and_levels_are_data():
    m, n, alpha = np.array([[1], [3]]), np.array([8, 9, 20]), np.array([[0.5], [0.1]])
    bounds = jax.jit(lambda m, n, alpha: upper_bound(m, n, alpha=alpha))(m, n, alpha)
    np.testing.assert_allclose(bounds, stats.beta.isf(alpha, m + 1, n - m), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, np.nan])
def test_bad_levels_are_refused(alpha):
    with pytest.raises(ValueError, match=r"`alpha` must lie in \(0, 1\), got"):
        upper_bound(1, 2, alpha=alpha)
