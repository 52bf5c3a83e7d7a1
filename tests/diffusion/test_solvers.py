"""Solvers against exact denoisers: observed order, moments, and independence of what the network predicts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, testing
from tests.diffusion.oracle import MEAN, ORDERS, PATHS, STD, interior_times

KEY = jax.random.key(0)


def flow_error(path, solver, steps):
    """Largest distance of the solver's end from the exact probability flow's, in float64."""
    times = interior_times(path, steps)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)) * path.sigma(times[0]))
    end = diffusion.sample(KEY, testing.gaussian_denoiser(path, MEAN, STD), solver(path, times), x)
    assert end.dtype == jnp.float64
    return float(jnp.abs(end - testing.gaussian_flow(path, MEAN, STD, x, times[0], times[-1])).max())


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("solver", ORDERS)
def test_observed_order(path, solver):
    build, nominal = ORDERS[solver]
    with jax.enable_x64(True):
        coarse, fine = flow_error(path, build, 160), flow_error(path, build, 320)
    assert np.log2(coarse / fine) == pytest.approx(nominal, abs=0.2)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_exact_moments_of_ddim(path, eta, steps):
    """For Gaussian data every row is an affine map plus noise, so mean and variance follow exactly, row by row."""
    times = diffusion.time_at_ratio(path, np.geomspace(20.0, 0.05, steps + 1))
    table = diffusion.ddim(path, times, eta=eta)
    mean, variance = np.zeros(3), np.full(3, path.sigma(times[0]) ** 2)
    for t, row in zip(table.times, table.weights[:, 0], strict=True):
        alpha, sigma = path.alpha(t), path.sigma(t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # d = mean + gain (x - alpha mean)
        per_x, per_d, std = row
        mean = (per_x + per_d * gain) * mean + per_d * (1 - gain * alpha) * MEAN
        variance = (per_x + per_d * gain) ** 2 * variance + std**2
    draws = 200_000
    x = diffusion.prior(KEY, path, times[0], (draws, 3))
    end = diffusion.sample(KEY, testing.gaussian_denoiser(path, MEAN, STD), table, x)
    np.testing.assert_allclose(end.mean(0), mean, atol=float(5 * np.sqrt(variance / draws).max()))
    np.testing.assert_allclose(end.var(0), variance, rtol=5 * np.sqrt(2 / draws))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_ddpm_reaches_the_data_distribution(path):
    """With many steps and an exact denoiser the ancestral sampler ends on the data's own moments."""
    high = diffusion.time_at_ratio(path, np.array([200.0]))[0]
    times = diffusion.log_snr_times(path, 400, t_max=float(high))
    x = diffusion.prior(KEY, path, times[0], (100_000, 3))
    end = diffusion.sample(KEY, testing.gaussian_denoiser(path, MEAN, STD), diffusion.ddpm(path, times), x)
    np.testing.assert_allclose(end.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(end.std(0), STD, rtol=0.02)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_ddpm_is_the_posterior(path):
    """The row equals q(x_s | x_t, x0) by Bayes' rule: the product of two Gaussians in x_s, in precisions."""
    times = interior_times(path, 7)
    table = diffusion.ddpm(path, times)
    for i, (per_x, per_d, std) in enumerate(table.weights[:, 0]):
        a_t, a_s = path.alpha(times[i]), path.alpha(times[i + 1])
        s_t, s_s = path.sigma(times[i]), path.sigma(times[i + 1])
        forward = s_t**2 - (a_t / a_s) ** 2 * s_s**2  # x_t | x_s ~ N(a_t / a_s x_s, forward)
        precision = 1 / s_s**2 + (a_t / a_s) ** 2 / forward
        np.testing.assert_allclose(per_x, a_t / a_s / forward / precision, rtol=1e-9)
        np.testing.assert_allclose(per_d, a_s / s_s**2 / precision, rtol=1e-9)
        np.testing.assert_allclose(std**2, 1 / precision, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("prediction", ["noise", "data", "v", "velocity", "score"])
def test_every_prediction_gives_the_same_sample(path, prediction):
    """A network that outputs its target for the exact denoiser's x0 must sample as the exact denoiser does."""
    prediction = getattr(diffusion, prediction)
    times = interior_times(path, 12)
    table = diffusion.dpmpp_2m(path, times)
    exact = testing.gaussian_denoiser(path, MEAN, STD)

    def net(x, t):
        c = diffusion.prediction.path_coefficients(path, t, x)
        x0 = exact(x, t)
        return prediction.target(c, x0, (x - c.alpha * x0) / c.sigma)

    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)) * path.sigma(times[0]))
        expected = diffusion.sample(KEY, exact, table, x)
        got = diffusion.sample(KEY, diffusion.denoiser(path, prediction, net), table, x)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "data", "v", "velocity", "score"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_target_and_to_data_are_inverse(path, prediction):
    prediction = getattr(diffusion, prediction)
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x0, eps = jnp.asarray(rng.normal(size=(2, 6, 3)))
        t = jnp.asarray(diffusion.time_at_ratio(path, np.geomspace(10, 0.1, 6)))
        c = diffusion.prediction.path_coefficients(path, t, x0)
        x = c.alpha * x0 + c.sigma * eps
        np.testing.assert_allclose(prediction.to_data(c, x, prediction.target(c, x0, eps)), x0, rtol=1e-9, atol=1e-9)
        # gain relates the two errors
        wrong = prediction.target(c, x0, eps) + 0.1
        ratio = (0.1 / (prediction.to_data(c, x, wrong) - x0)) ** 2
        np.testing.assert_allclose(ratio, jnp.broadcast_to(prediction.gain(c), ratio.shape), rtol=1e-6)


@pytest.mark.parametrize("solver", [diffusion.ddim, diffusion.ddpm, diffusion.heun, diffusion.dpmpp_2m])
def test_a_rectified_flow_may_start_at_one(solver):
    """alpha is exactly 0 there: nothing may divide by it."""
    path = diffusion.rectified_flow()
    table = solver(path, diffusion.uniform_times(path, 10))
    assert np.all(np.isfinite(table.weights))
    x = diffusion.prior(KEY, path, 1.0, (8, 3))
    end = diffusion.sample(KEY, lambda x, t: jnp.full_like(x, 0.7), table, x)
    np.testing.assert_allclose(end, 0.7, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("solver", [diffusion.ddim, diffusion.ddpm, diffusion.heun, diffusion.dpmpp_2m])
def test_tables_end_on_the_denoiser(path, steps, solver):
    """One data point: any solver, any number of steps, ends on it exactly."""
    table = solver(path, diffusion.uniform_times(path, steps))
    x = diffusion.prior(KEY, path, table.times[0], (4, 2))
    end = diffusion.sample(KEY, lambda x, t: jnp.full_like(x, -0.25), table, x)
    np.testing.assert_allclose(end, -0.25, rtol=1e-4)


def test_heun_on_rectified_flow_averages_velocities():
    """In the flow's own time, Heun is x + dt/2 (v1 + v2) with v = (x - x0) / t."""
    path = diffusion.rectified_flow()
    times = np.array([1.0, 0.6, 0.3])
    denoise = testing.gaussian_denoiser(path, MEAN, STD)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3)))
        got = diffusion.sample(KEY, denoise, diffusion.heun(path, times), x)
        for t, s in itertools.pairwise(times):
            v1 = (x - denoise(x, t)) / t
            v2 = (x + (s - t) * v1 - denoise(x + (s - t) * v1, s)) / s
            x = x + 0.5 * (s - t) * (v1 + v2)
    np.testing.assert_allclose(got, x, rtol=1e-12)


def test_evaluation_counts():
    path = diffusion.edm()
    times = diffusion.karras_times(path, 18)
    assert len(diffusion.heun(path, times).times) == 35  # the paper's count for 18 steps
    assert len(diffusion.dpmpp_2m(path, times).times) == 18
    assert len(diffusion.heun(path, times[:-1]).times) == 34


@pytest.mark.parametrize("solver", [diffusion.ddim, diffusion.ddpm, diffusion.heun, diffusion.dpmpp_2m])
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 1.0], "decrease"),
        ([1.0, 1.0, 0.0], "decrease"),
        ([1.0], "at least 2"),
        ([81.0, 1.0], r"lie in \[0, 80\]"),
        ([1.0, -0.5], r"lie in \[0, 80\]"),
        ([np.nan, 0.0], "not finite"),
        ([[1.0, 0.0]], "at least 2"),
    ],
)
def test_bad_times_are_refused(solver, times, message):
    with pytest.raises(ValueError, match=r"`times`.*" + message):
        solver(diffusion.edm(), times)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta_is_refused(eta):
    with pytest.raises(ValueError, match=r"`eta` must lie in \[0, 1\], got"):
        diffusion.ddim(diffusion.edm(), [1.0, 0.0], eta=eta)
