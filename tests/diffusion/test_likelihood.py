"""Likelihoods against closed forms: Gaussians and mixtures on every path, exact and by Hutchinson's probes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen import diffusion, random, testing
from tests.diffusion.oracle import MEAN, PATHS, STD

KEY = jax.random.key(0)
MEANS, WEIGHTS, MIXTURE_STD = np.array([[1.0, -0.5], [-1.0, 0.8]]), np.array([0.7, 0.3]), 0.4
EDM = PATHS["edm"]


def rising_times(path, steps, low=0.02, high=70.0):
    """From the data towards noise, uniform in the logarithm of sigma / alpha."""
    return diffusion.time_at_ratio(path, np.geomspace(low, high, steps + 1))


def marginal(path, t):
    """The closed form of log p_t for data N(MEAN, STD^2)."""
    mean, std = path.alpha(t) * MEAN, np.sqrt((path.alpha(t) * STD) ** 2 + path.sigma(t) ** 2)
    return lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, std), axis=1)


def gaussian_error(path, steps, prior=True):
    times = rising_times(path, steps)
    x = jnp.asarray(path.alpha(times[0]) * (MEAN + STD * np.random.default_rng(0).normal(size=(8, 3))))
    denoise = testing.gaussian_denoiser(path, MEAN, STD)
    got = diffusion.log_density(KEY, path, denoise, x, times, prior=marginal(path, times[-1]) if prior else None)
    assert got.dtype == jnp.float64
    return float(jnp.abs(got - marginal(path, times[0])(x)).max())


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_gaussian_data_to_fourth_order(path):
    with jax.enable_x64(True):
        coarse, fine = gaussian_error(path, 40), gaussian_error(path, 80)
    assert np.log2(coarse / fine) == pytest.approx(4, abs=0.3)
    assert fine < 1e-4


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_mixture_in_two_dimensions(path):
    with jax.enable_x64(True):
        density = testing.mixture_log_density(path, MEANS, MIXTURE_STD, WEIGHTS)
        denoise = testing.mixture_denoiser(path, MEANS, MIXTURE_STD, WEIGHTS)
        times = rising_times(path, 400)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)))
        prior = lambda x: density(x, times[-1])  # noqa: E731
        got = jax.jit(lambda x: diffusion.log_density(KEY, path, denoise, x, times, prior=prior))(x)
        np.testing.assert_allclose(got, density(x, times[0]), atol=2e-6)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_prior_is_noise_at_the_last_time(path):
    """What the default prior leaves out is of the order of alpha / sigma at the last time, here 1 / 70."""
    with jax.enable_x64(True):
        assert gaussian_error(path, 80, prior=False) < 0.1
        times = rising_times(path, 5)
        alone = diffusion.log_density(KEY, path, lambda x, t: 0 * x, jnp.zeros((1, 3)), times)  # all data at 0
    np.testing.assert_allclose(alone, 3 * stats.norm.logpdf(0, 0, path.sigma(times[0])), rtol=1e-9)


def test_the_rectified_flow_ends_at_pure_noise():
    """Where alpha is 0 the prior is exact."""
    path = PATHS["rectified_flow"]
    with jax.enable_x64(True):
        density = testing.mixture_log_density(path, MEANS, MIXTURE_STD, WEIGHTS)
        denoise = testing.mixture_denoiser(path, MEANS, MIXTURE_STD, WEIGHTS)
        times = np.append(rising_times(path, 200), 1.0)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)))
        got = diffusion.log_density(KEY, path, denoise, x, times)
        np.testing.assert_allclose(got, density(x, times[0]), atol=1e-4)


def test_densities_integrate_to_one():
    """In float32, on a grid over the plane."""
    denoise = testing.mixture_denoiser(EDM, MEANS, MIXTURE_STD, WEIGHTS)
    edges = np.linspace(-4, 4, 81)
    x = jnp.asarray(np.stack(np.meshgrid(edges, edges), -1).reshape(-1, 2), jnp.float32)
    times = diffusion.log_snr_times(EDM, 60)[-2::-1]
    nats = jax.jit(lambda x: diffusion.log_density(KEY, EDM, denoise, x, times))(x)
    assert nats.dtype == jnp.float32
    assert float(jnp.sum(jnp.exp(nats)) * (edges[1] - edges[0]) ** 2) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("draw", [jax.random.rademacher, jax.random.normal])
def test_hutchinson_in_64_dimensions_within_its_standard_error(draw):
    path, d, n = PATHS["cosine"], 64, 128
    factor = np.random.default_rng(2).normal(size=(d, d))
    covariance = factor @ factor.T / d
    x = np.random.default_rng(3).multivariate_normal(np.zeros(d), covariance).astype(np.float32)
    times = rising_times(path, 40, low=0.1)
    denoise = testing.correlated_denoiser(path, np.zeros(d), covariance)
    last, first = ((path.alpha(t) ** 2 * covariance + path.sigma(t) ** 2 * np.eye(d)) for t in times[[-1, 0]])
    prior = lambda x: jax.scipy.stats.multivariate_normal.logpdf(x, jnp.zeros(d), jnp.asarray(last, jnp.float32))  # noqa: E731
    closed = stats.multivariate_normal.logpdf(x, np.zeros(d), first)

    @jax.jit(static_argnums=(1, 2))
    def run(key, batch, probes):
        xs = jnp.broadcast_to(x, (batch, d))
        return diffusion.log_density(key, path, denoise, xs, times, probes=probes, draw=draw, prior=prior)

    exact = float(run(KEY, 1, None)[0])
    assert exact == pytest.approx(closed, abs=0.01)
    for probes in (1, 4):
        estimates = np.asarray(run(KEY, n, probes))
        error = estimates.std(ddof=1) / np.sqrt(n)
        assert abs(estimates.mean() - exact) < 4 * error
        # Tr: Var v^T J v is 2 ||J||_F^2 for normal probes, and 2 ||J||_F^2 - 2 ||diag J||^2 for signs.
        assert 0.05 < error * np.sqrt(n * probes) < 30
    single = np.asarray(run(KEY, n, 1)).std()
    assert np.asarray(run(KEY, n, 4)).std() == pytest.approx(single / 2, rel=0.3)


def swirl(x):
    return jnp.stack([x[:, 0] * x[:, 1] + x[:, 2] ** 3, jnp.sin(x[:, 1] * x[:, 2]), jnp.exp(x[:, 2] - x[:, 0])], axis=1)


def test_divergences():
    x = jax.random.normal(KEY, (5, 3))
    value, exact = jax.jit(lambda x: diffusion.divergence(KEY, swirl, x))(x)
    np.testing.assert_allclose(value, swirl(x), rtol=1e-6)
    jacobians = jax.vmap(jax.jacfwd(lambda x: swirl(x[None])[0]))(x)
    np.testing.assert_allclose(exact, jnp.trace(jacobians, axis1=1, axis2=2), rtol=1e-5, atol=1e-5)
    for draw in (jax.random.rademacher, jax.random.normal):
        estimate = jax.jit(lambda x, draw=draw: diffusion.divergence(KEY, swirl, x, probes=5_000, draw=draw)[1])(x)
        error = jnp.sqrt(2 * jnp.sum(jacobians**2, axis=(1, 2)) / 5_000)
        np.testing.assert_array_less(jnp.abs(estimate - exact), 5 * error)
    # Signs are exact for a diagonal Jacobian.
    signs = diffusion.divergence(KEY, jnp.square, x, probes=1)[1]
    np.testing.assert_allclose(signs, 2 * x.sum(1), rtol=1e-5)


def test_divergences_of_images_with_a_custom_gradient():
    """Reverse mode alone: functions with a custom_vjp have no other."""

    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    x = jax.random.normal(KEY, (2, 3, 4, 1))
    np.testing.assert_allclose(diffusion.divergence(KEY, square, x)[1], 2 * x.sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_probability_flow_is_the_velocity_of_the_exact_flow(path):
    with jax.enable_x64(True):
        t = jnp.asarray(rising_times(path, 7, high=15.0)) * 0.9987  # between linear_beta's kinks
        x = jnp.asarray(np.random.default_rng(4).normal(size=(8, 3)))
        flow = lambda end: testing.gaussian_flow(path, MEAN, STD, x, t, end)  # noqa: E731
        _, expected = jax.jvp(flow, (t,), (jnp.ones_like(t),))
        velocity = diffusion.probability_flow(path, testing.gaussian_denoiser(path, MEAN, STD))
        np.testing.assert_allclose(velocity(x, t), expected, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(velocity(x, t[3])[3], expected[3], rtol=1e-8)


def test_parameters_are_data_and_gradients_reach_them():
    traces = 0
    times = rising_times(EDM, 30)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)), jnp.float32)

    def nats(mean, x):
        nonlocal traces
        traces += 1
        denoise = testing.gaussian_denoiser(EDM, mean, 1.0)
        prior = lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, np.hypot(1, times[-1])), axis=1)  # noqa: E731
        return jnp.mean(diffusion.log_density(KEY, EDM, denoise, x, times, prior=prior))

    run = jax.jit(jax.value_and_grad(nats))
    for mean in (0.0, 0.5):
        _, slope = run(jnp.float32(mean), x)
        expected = (x - mean).sum(1).mean() / (1 + times[0] ** 2)
        assert float(slope) == pytest.approx(float(expected), rel=1e-3)
    assert traces == 1


@pytest.mark.parametrize("probes", [None, 2])
def test_an_example_depends_on_its_key_and_index_alone(probes):
    times = rising_times(EDM, 6)
    denoise = testing.mixture_denoiser(EDM, MEANS, MIXTURE_STD, WEIGHTS)
    x = jax.random.normal(KEY, (6, 2))
    run = jax.jit(lambda key, x: diffusion.log_density(key, EDM, denoise, x, times, probes=probes))
    together = run(KEY, x)
    np.testing.assert_allclose(together[:2], run(KEY, x[:2]), rtol=1e-5)
    np.testing.assert_allclose(together[4:], run(random.example_keys(KEY, 2, start=4), x[4:]), rtol=1e-5)
    other = run(jax.random.key(1), x)
    assert np.allclose(together, other) == (probes is None)


def test_bits_per_dimension():
    """Uniform over [-1, 1]^D carries log2(levels) bits, as a uniform image does."""
    for levels in (2, 32, 256):
        uniform = jnp.full((4,), -10 * np.log(2.0))
        np.testing.assert_allclose(diffusion.bits_per_dimension(uniform, 10, levels=levels), np.log2(levels), rtol=1e-6)
    # Densities that are constant over a bin: exactly the discrete entropy.
    share = np.array([0.5, 0.25, 0.25, 0.0])
    density = np.log(share[:3] * 2)  # bins of width 1/2
    bits = diffusion.bits_per_dimension(jnp.asarray(density), 1, levels=4)
    np.testing.assert_allclose(np.sum(share[:3] * np.asarray(bits)), 1.5, rtol=1e-6)


def test_dequantisation_fills_bins_uniformly():
    images = np.arange(256, dtype=np.uint8).repeat(200).reshape(256, 200)
    x = np.asarray(diffusion.dequantise(KEY, images), np.float64)
    assert x.min() >= -1
    assert x.max() <= 1
    inside = (x + 1) * 128 - images
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert stats.kstest(inside.ravel(), "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(x[:3], diffusion.dequantise(KEY, images[:3]))
    assert diffusion.dequantise(KEY, images).dtype == jnp.float32


def density(times=(0.1, 1.0), x=None, denoise=lambda x, t: x, path=EDM, **options):
    x = jnp.ones((2, 3)) if x is None else x
    return diffusion.log_density(KEY, path, denoise, x, times, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: density([1.0, 0.1]), ValueError, "`times` must increase strictly"),
        (lambda: density([0.0, 0.1]), ValueError, "`times` must be above 0 and finite, got values from 0 to 0.1"),
        (lambda: density([0.1, 81.0]), ValueError, r"`times` must lie in \[0, 80\], got values from 0.1 to 81"),
        (lambda: density([0.1]), ValueError, r"`times` must be a grid of at least 2 times, got shape \[1\]"),
        (lambda: jax.jit(density)(jnp.array([0.1, 1.0])), ValueError, "`times` must be known when tracing"),
        (lambda: density([0.1, 1.0], path=PATHS["rectified_flow"]._replace(scale=None)), ValueError, r"alpha is 0 at `times\[-1\]`"),
        (lambda: density(x=jnp.ones((2, 3), jnp.uint8)), TypeError, "`x` must be floating"),
        (lambda: density(x=jnp.ones(3)), ValueError, "`x` must have at least 2 axes"),
        (lambda: density(denoise=lambda x, t: x[:, :1]), ValueError, "must have the shape of `x`"),
        (lambda: density(probes=0), ValueError, "`probes` must be an integer of at least 1, got 0"),
        (lambda: density(prior=lambda x: x), ValueError, r"`prior\(x\)` must have shape \[2\], got \[2, 3\]"),
        (lambda: diffusion.log_density(0, EDM, lambda x, t: x, jnp.ones((2, 3)), [0.1, 1.0]), TypeError, "`key` must be a typed PRNG key"),
        (lambda: diffusion.divergence(KEY, lambda x: x[:1], jnp.ones((2, 3))), ValueError, r"`function\(x\)` must have the shape of `x`"),
        (lambda: diffusion.probability_flow(EDM, lambda x, t: x)(jnp.ones((2, 3)), 0.0), ValueError, "`t` must be above 0"),
        (lambda: diffusion.probability_flow(EDM, lambda x, t: x)(jnp.ones((2, 3)), 81.0), ValueError, r"`t` must lie in \[0, 80\]"),
        (lambda: diffusion.probability_flow(EDM, lambda x, t: x[:1])(jnp.ones((2, 3)), 1.0), ValueError, "must have the shape of `x`"),
        (lambda: diffusion.dequantise(KEY, jnp.ones((2, 3))), TypeError, "`images` must be uint8, got dtype float32"),
        (lambda: diffusion.bits_per_dimension(jnp.ones(2), 0), ValueError, "`dimensions` must be an integer of at least 1"),
        (lambda: diffusion.bits_per_dimension(jnp.ones(2), 3, levels=0), ValueError, "`levels` must be an integer of at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
