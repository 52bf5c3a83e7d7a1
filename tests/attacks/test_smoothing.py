"""Randomised smoothing against the linear classifier, whose certificate is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen import diffusion, place, random, testing
from jaxgen.attacks.smoothing import denoised, smooth, smooth_certify, smooth_predict, smooth_votes

KEY = jax.random.key(0)
WEIGHT = np.array([0.6, -0.8, 0.5], np.float32)
BIAS = 0.3
# At distances 0.05 to 3 of the plane, on both sides.
DISTANCES = np.array([0.05, -0.3, 0.7, 1.5, -3.0])
X = jnp.asarray(DISTANCES[:, None] * WEIGHT / np.linalg.norm(WEIGHT) - BIAS * WEIGHT / np.sum(WEIGHT**2), jnp.float32)


def linear(x):
    margin = x @ WEIGHT + BIAS
    return jnp.stack([-margin, margin], axis=1)


def test_votes_are_binomial_with_the_linear_classifiers_probability():
    draws = 4000
    votes = smooth_votes(KEY, linear, X, sigma=0.5, draws=draws, chunk=500)
    assert votes.dtype == jnp.int32
    assert votes.shape == (5, 2)
    np.testing.assert_array_equal(votes.sum(1), draws)
    p = stats.norm.cdf(DISTANCES / 0.5)
    np.testing.assert_allclose(votes[:, 1] / draws, p, atol=5 * np.sqrt(np.max(p * (1 - p)) / draws))


def test_certificates_are_below_the_true_radius_and_near_it():
    result = jax.jit(lambda x: smooth(KEY, linear, x, sigma=1.0, draws=20_000, chunk=1000))(X[1:])
    np.testing.assert_array_equal(result.certified, [0, 1, 1, 0])
    np.testing.assert_array_equal(result.prediction, result.certified)
    truth = np.abs(DISTANCES[1:])
    assert np.all(result.radius < truth)
    assert np.all(result.radius[:3] > truth[:3] - 0.07)
    # Further out than draws can tell.
    assert truth[3] - 0.3 < result.radius[3]
    assert np.all(result.radius <= stats.norm.ppf(0.001 ** (1 / 20_000)) * 1.00001)


@pytest.mark.slow
def test_certificates_are_wrong_as_rarely_as_promised():
    # 2,000 certificates of one point, each of 200 draws at alpha = 0.05.
    x = jnp.tile(X[2], (2000, 1))
    radius = smooth(KEY, linear, x, sigma=1.0, draws=200, alpha=0.05, chunk=50).radius
    wrong = np.mean(radius > DISTANCES[2])
    m = np.arange(201)
    doubt = stats.beta.isf(0.05, m + 1, np.maximum(200 - m, 1e-9))
    exact = stats.binom.pmf(m, 200, stats.norm.cdf(-DISTANCES[2]))[stats.norm.isf(doubt) > DISTANCES[2]].sum()
    assert exact <= 0.05
    np.testing.assert_allclose(wrong, exact, atol=4 * math.sqrt(exact / 2000))


def test_certify_against_scipy():
    votes = np.array([[700, 200, 100], [3, 990, 7], [450, 300, 250], [0, 0, 1000]])
    selection = np.array([[9, 1, 0], [0, 9, 1], [5, 3, 2], [9, 1, 0]])
    label, radius = smooth_certify(selection, votes, sigma=0.25, alpha=0.01)
    lower = stats.beta.ppf(0.01, [700, 990], [301, 11])
    np.testing.assert_array_equal(label, [0, 1, -1, -1])
    np.testing.assert_allclose(radius, [*(0.25 * stats.norm.ppf(lower)), 0, 0], rtol=1e-5)


def test_predict_is_the_binomial_test():
    rng = np.random.default_rng(0)
    votes = np.concatenate([rng.multinomial(60, p, 40) for p in ([0.5, 0.4, 0.1], [0.3, 0.1, 0.6], [0.1, 0.7, 0.2])])
    expected = []
    for row in votes:
        second, first = np.sort(row)[-2:]
        sure = stats.binomtest(first, first + second, 0.5).pvalue <= 0.05
        expected.append(np.argmax(row) if sure else -1)
    assert {-1, 0, 1, 2} <= set(expected)
    np.testing.assert_array_equal(smooth_predict(votes, alpha=0.05), expected)


def test_votes_depend_on_the_example_its_key_and_the_draws_number_alone():
    def votes(x, **options):
        return smooth_votes(KEY, linear, x, **{"sigma": 0.5, "draws": 100, **options})

    whole = votes(X)
    for chunk in (7, 100, 1000):
        np.testing.assert_array_equal(votes(X, chunk=chunk), whole)
    np.testing.assert_array_equal(votes(X[:2]), whole[:2])
    np.testing.assert_array_equal(smooth_votes(random.example_keys(KEY, 5), linear, X, sigma=0.5, draws=100), whole)
    np.testing.assert_array_equal(votes(X, draws=30) + votes(X, draws=70, start=30, chunk=11), whole)
    tied = votes(jnp.tile(X[:1], (5, 1)))
    assert len({tuple(row) for row in np.asarray(tied)}) > 1


def test_the_draws_that_select_do_not_certify():
    seen = []

    def spy(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return linear(x)

    smooth(KEY, spy, X[:1], sigma=1.0, draws=30, selection=10, chunk=10)
    jax.effects_barrier()
    drawn = np.concatenate(seen)
    assert len(np.unique(drawn[:, 0])) == len(drawn) == 40


def test_eight_devices_are_one():
    keys = random.example_keys(KEY, 8)
    x = jnp.tile(X[:4], (2, 1))

    def count(sigma, rows, **options):
        return smooth_votes(rows[0], linear, rows[1], sigma=sigma, chunk=10, **{"draws": 80, **options})

    one = count(0.5, (keys, x))
    np.testing.assert_array_equal(place.rows(count, place.mesh())(0.5, (keys, x)), one)

    def shares(shared, starts):
        return jax.vmap(lambda start: count(0.5, shared, draws=10, start=start))(starts)

    shared = place.rows(shares, place.mesh())((keys, x), 10 * jnp.arange(8))
    assert len(shared.sharding.device_set) == 8
    np.testing.assert_array_equal(shared.sum(0), one)


def test_memory_is_that_of_a_chunk():
    def temporary(draws, chunk):
        x = jnp.zeros((2, 3))
        compiled = (
            jax.jit(lambda x: smooth_votes(KEY, linear, x, sigma=1.0, draws=draws, chunk=chunk)).lower(x).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    small = temporary(1000, 10)
    assert temporary(100_000, 10) < small + 8 * 100_000 / 10
    assert temporary(1000, 1000) > 10 * small


@pytest.mark.parametrize("path", [diffusion.linear_beta(), diffusion.edm(), diffusion.rectified_flow()])
def test_denoised_smoothing_of_gaussian_data(path):
    # E[x0 | x] of data N(0, s^2) shrinks towards 0, and the sign of w . x stays: the radius is the linear classifier's.
    sigma, std = 0.8, 1.3
    time = diffusion.time_at_ratio(path, sigma)
    np.testing.assert_allclose(diffusion.noise_ratio(path, time), sigma, rtol=1e-6)
    seen = {}

    def spied(x):
        seen["clean"] = x
        return jnp.stack([-x @ WEIGHT, x @ WEIGHT], axis=1)

    denoise = testing.gaussian_denoiser(path, 0.0, std)
    base = denoised(spied, denoise, time=time, alpha=path.alpha(time))
    noised = X + sigma * jax.random.normal(KEY, X.shape)
    base(noised)
    np.testing.assert_allclose(seen["clean"], noised * std**2 / (std**2 + sigma**2), rtol=1e-4)

    with_bias = X + BIAS * WEIGHT / np.sum(WEIGHT**2)
    result = smooth(KEY, base, with_bias[2:3], sigma=sigma, draws=5000, chunk=500)
    assert DISTANCES[2] - 0.1 < result.radius[0] < DISTANCES[2]
    assert result.certified[0] == 1


def test_other_precisions_and_traced_sigma():
    wide = smooth_votes(KEY, linear, np.asarray(X, np.float64), sigma=0.5, draws=9)
    np.testing.assert_array_equal(wide, smooth_votes(KEY, linear, X, sigma=0.5, draws=9))
    count = jax.jit(lambda sigma: smooth_votes(KEY, linear, X.astype(jnp.bfloat16), sigma=sigma, draws=50))
    np.testing.assert_array_equal(count(0.0), 50 * np.stack([DISTANCES < 0, DISTANCES > 0], axis=1))
    assert count(2.0)[4, 1] > 0
    assert count._cache_size() == 1


VOTES = jnp.ones((2, 3), int)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: smooth(KEY, linear, X, sigma=0.0), ValueError, "`sigma` must be above 0"),
        (lambda: smooth(KEY, linear, X, sigma=1.0, draws=0), ValueError, "`draws` must be an integer of at least 1"),
        (lambda: smooth(KEY, linear, X, sigma=1.0, selection=0), ValueError, "`selection` must be an integer of at least 1"),
        (lambda: smooth(KEY, None, X, sigma=1.0, alpha=0.0), ValueError, r"`alpha` must lie in \(0, 1\), got 0"),  # at once
        (lambda: smooth(KEY, linear, X, sigma=1.0, chunk=0), ValueError, "`chunk` must be an integer of at least 1"),
        (lambda: smooth(KEY, linear, X, sigma=1.0, draws=9, alpha=2.0), ValueError, r"`alpha` must lie in \(0, 1\), got 2"),
        (lambda: smooth_certify(VOTES, VOTES, sigma=1.0, alpha=0.0), ValueError, r"`alpha` must lie in \(0, 1\), got 0"),
        (lambda: smooth_predict(VOTES, alpha=1.5), ValueError, r"`alpha` must lie in \[0, 1\], got 1.5"),
        (lambda: smooth(KEY, linear, jnp.ones((2, 3), int), sigma=1.0), TypeError, "`x` must be floating-point"),
        (lambda: smooth(0, linear, X, sigma=1.0), TypeError, "`key` must be a typed PRNG key"),
        (lambda: smooth_votes(KEY, linear, X, sigma=jnp.ones(5), draws=9), ValueError, r"`sigma` must have shape \[\]"),
        (lambda: smooth_votes(KEY, linear, X, sigma=-1.0, draws=9), ValueError, r"`sigma` must lie in \[0, inf\]"),
        (lambda: smooth_votes(KEY, lambda x: x[:, 0], X, sigma=1.0, draws=9), ValueError, r"`apply\(x\)` must have shape"),
        (lambda: smooth_certify(VOTES[:1], VOTES, sigma=1.0), ValueError, "`selection` must have the shape of `votes`"),
        (lambda: smooth_certify(VOTES, VOTES * 1.0, sigma=1.0), TypeError, "`votes` must be integers"),
        (lambda: smooth_predict(VOTES[:, :1]), ValueError, "`votes` must be of at least 2 classes"),
        (lambda: smooth_predict(VOTES[0]), ValueError, r"`votes` must have shape \[any, any\]"),
        (lambda: denoised(linear, lambda x, t: x, time=1.0, alpha=0.0), ValueError, "`alpha` must be above 0"),
        (lambda: denoised(linear, lambda x, t: x, time=X, alpha=1.0), ValueError, r"`time` must have shape \[\]"),
        (lambda: denoised(linear, lambda x, t: x[0], time=1.0, alpha=1.0)(X), ValueError, r"`denoise\(x, t\)` must have"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
