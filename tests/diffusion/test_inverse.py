"""Inverse problems against the closed form: Gaussian data with any covariance, a linear measurement, its posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, testing
from tests.diffusion.oracle import PATHS

KEY = jax.random.key(0)
RNG = np.random.default_rng(5)
D = 5
MEAN = RNG.normal(size=D)
FACTOR = RNG.normal(size=(D, D))
COVARIANCE = FACTOR @ FACTOR.T / D + 0.05 * np.eye(D)
MATRIX = RNG.normal(size=(2, D))
MASK = np.array([True, False, True, False, True])
OPERATORS = {
    "matrix": (lambda x: jnp.matmul(x, MATRIX.T, precision="highest"), MATRIX, 0.0),
    "mask": (lambda x: x * MASK, np.diag(MASK.astype(float)), 0.0),
    "columns": (lambda x: x[:, MASK], np.eye(D)[MASK], 0.0),
    "affine": (lambda x: 3.0 - 2.0 * jnp.matmul(x, MATRIX.T, precision="highest"), -2 * MATRIX, 3.0),
}
EDM = PATHS["edm"]


def closed_form(matrix, observation, noise_std):
    """Mean and covariance of N(MEAN, COVARIANCE) given matrix @ x0 + noise_std n = observation."""
    gain = COVARIANCE @ matrix.T @ np.linalg.pinv(matrix @ COVARIANCE @ matrix.T + noise_std**2 * np.eye(len(matrix)))
    mean = MEAN + (observation - MEAN @ matrix.T) @ gain.T
    return mean, COVARIANCE - gain @ matrix @ COVARIANCE


def exact_denoiser(path, mean, covariance, t):
    """E[x0 | x] = gain x + offset for data N(mean, covariance), in NumPy."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(D))
    return gain, mean - alpha * gain @ mean


def measure(operator, noise_std, batch):
    x0 = MEAN + RNG.normal(size=(batch, D)) @ np.linalg.cholesky(COVARIANCE).T
    y = operator(jnp.asarray(x0))
    return y + noise_std * RNG.normal(size=y.shape)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_guided_denoiser_is_the_posterior_denoiser(path, noise_std, name):
    operator, matrix, offset = OPERATORS[name]
    with jax.enable_x64(True):
        t = jnp.asarray(diffusion.time_at_ratio(path, np.geomspace(30.0, 0.03, 6)))
        observation = measure(operator, noise_std, 6)
        x = jnp.asarray(RNG.normal(size=(6, D)))
        denoise = testing.correlated_denoiser(path, MEAN, COVARIANCE)
        guided = diffusion.posterior_sampling(denoise, path, operator, observation, noise_std, iterations=D)
        got = jax.jit(guided)(x, t)
        for i in range(6):
            gain, constant = exact_denoiser(path, *closed_form(matrix, observation[i] - offset, noise_std), float(t[i]))
            np.testing.assert_allclose(got[i], gain @ x[i] + constant, rtol=1e-6, atol=1e-6)


def sampled_moments(path, table, mean, covariance):
    """What a one-slot table makes of N(0, sigma^2 I) with the exact denoiser of N(mean, covariance): an affine map a row."""
    m, c = np.zeros(D), path.sigma(table.times[0]) ** 2 * np.eye(D)
    for t, (per_x, per_d, std) in zip(table.times, table.weights[:, 0], strict=True):
        gain, constant = exact_denoiser(path, mean, covariance, t)
        step = per_x * np.eye(D) + per_d * gain
        m, c = step @ m + per_d * constant, step @ c @ step.T + std**2 * np.eye(D)
    return m, c


@pytest.mark.parametrize("build", [diffusion.ddim, diffusion.ddpm])
@pytest.mark.parametrize("path", ["edm", "rectified_flow"])
@pytest.mark.parametrize("name", ["matrix", "columns"])
def test_samples_have_the_posterior_mean_and_covariance(build, path, name):
    """To Monte-Carlo error with the moments that the sampler's own steps give; those tend to the closed form.

    On the rectified flow sampling starts at t = 1, where alpha is 0.
    """
    path, draws, noise_std = PATHS[path], 20_000, 0.3
    operator, matrix, _ = OPERATORS[name]
    observation = measure(operator, noise_std, 1)
    exact = closed_form(matrix, observation[0], noise_std)

    def table(steps):
        times = diffusion.time_at_ratio(path, np.geomspace(70.0, 0.01, steps))
        return build(path, np.concatenate([[] if path.scale is None else [1.0], times, [0.0]]))

    mean, covariance = sampled_moments(path, table(2000), *exact)
    np.testing.assert_allclose(mean, exact[0], atol=0.03)  # the start, noise alone, leaves out 1 / 70 of the mean
    np.testing.assert_allclose(covariance, exact[1], atol=0.01)

    guided = diffusion.posterior_sampling(
        testing.correlated_denoiser(path, MEAN, COVARIANCE),
        path,
        operator,
        jnp.broadcast_to(observation, (draws, observation.shape[1])),
        noise_std,
        iterations=3,
    )
    steps = table(30)
    x = diffusion.prior(KEY, path, steps.times[0], (draws, D))
    end = np.asarray(jax.jit(lambda x: diffusion.sample(KEY, guided, steps, x))(x), np.float64)
    mean, covariance = sampled_moments(path, steps, *exact)
    variances = np.diag(covariance)
    spread = np.sqrt((np.outer(variances, variances) + covariance**2) / draws)
    np.testing.assert_array_less(np.abs(end.mean(0) - mean), 5 * np.sqrt(variances / draws))
    np.testing.assert_array_less(np.abs(np.cov(end.T) - covariance), 5 * spread)


def test_where_alpha_is_0_the_denoiser_is_the_one_just_below():
    path = PATHS["rectified_flow"]
    operator, matrix, _ = OPERATORS["matrix"]
    observation = measure(operator, 0.3, 3)
    denoise = testing.correlated_denoiser(path, MEAN, COVARIANCE)
    guided = diffusion.posterior_sampling(denoise, path, operator, observation, 0.3, iterations=3)
    mean, _ = closed_form(matrix, observation, 0.3)
    np.testing.assert_allclose(guided(jnp.asarray(RNG.normal(size=(3, D)), jnp.float32), 1.0), mean, atol=0.02)


def test_observation_noise_and_parameters_are_data():
    traces = 0
    operator = OPERATORS["matrix"][0]

    @jax.jit
    def run(x, observation, noise_std, mean):
        nonlocal traces
        traces += 1
        denoise = testing.correlated_denoiser(EDM, mean, COVARIANCE)
        return diffusion.posterior_sampling(denoise, EDM, operator, observation, noise_std, iterations=2)(x, 2.0)

    x = jnp.asarray(RNG.normal(size=(3, D)), jnp.float32)
    for scale in (0.1, 1.0, 10.0):
        assert np.all(np.isfinite(run(x, scale * jnp.ones((3, 2)), scale, scale * MEAN)))
    assert traces == 1


def test_examples_do_not_see_each_other_and_stop_apart():
    """Conjugate gradients over a batch must not share step sizes, nor divide by 0 once an example is solved."""
    operator = OPERATORS["matrix"][0]
    observation = np.array(measure(operator, 0.1, 4), np.float32)
    x = jnp.asarray(RNG.normal(size=(4, D)), jnp.float32)
    t = jnp.array([0.1, 1.0, 10.0, 70.0])
    denoise = testing.correlated_denoiser(EDM, MEAN, COVARIANCE)
    observation[2] = operator(denoise(x, t))[2]  # nothing left to solve

    def guided(i, iterations):
        solver = diffusion.posterior_sampling(denoise, EDM, operator, observation[i], 0.1, iterations=iterations)
        return jax.jit(solver)(x[i], t[i])

    together = guided(slice(None), 1)
    for i in range(4):
        np.testing.assert_allclose(together[i : i + 1], guided(slice(i, i + 1), 1), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(together[2], denoise(x, t)[2], rtol=1e-5)
    np.testing.assert_allclose(guided(slice(None), 50), guided(slice(None), 2), rtol=1e-3, atol=1e-3)
    many = diffusion.posterior_sampling(denoise, EDM, operator, observation, 0.1, iterations=9)
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(many(x, t) ** 2)))(x)))


def test_negative_curvature_stops_the_solver():
    """A network's Jacobian need not be positive: then its own estimate stays."""
    guided = diffusion.posterior_sampling(lambda x, t: -x, EDM, lambda x: x, jnp.ones((2, 3)), 0.0, iterations=4)
    np.testing.assert_array_equal(guided(jnp.ones((2, 3)), 1.0), -jnp.ones((2, 3)))


def test_images_in_half_precision_and_a_blur():
    def blur(x):
        return jax.lax.reduce_window(x, jnp.zeros((), x.dtype), jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4

    denoise = testing.gaussian_denoiser(EDM, 0.0, 1.0)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        x, y = jnp.zeros((2, 4, 4, 1), dtype), jnp.ones((2, 2, 2, 1), dtype)
        got = diffusion.posterior_sampling(denoise, EDM, blur, y, 0.0, iterations=2)(x, 1.0)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), 1.0, rtol=tolerance)


def test_inpainting_projects():
    x = jnp.ones((2, 3))
    known, mask = jnp.arange(6.0).reshape(2, 3), np.array([[True, False, True]])
    got = diffusion.inpaint(lambda x, t: -x, known, mask)(x, 0.5)
    np.testing.assert_array_equal(got, [[0, -1, 2], [3, -1, 5]])
    table = diffusion.ddpm(EDM, diffusion.karras_times(EDM, 20))
    start = diffusion.prior(KEY, EDM, table.times[0], (2, 3))
    end = diffusion.sample(KEY, diffusion.inpaint(testing.gaussian_denoiser(EDM, 0.0, 1.0), known, mask), table, start)
    np.testing.assert_allclose(end[:, ::2], known[:, ::2], rtol=1e-6)


def test_inpainting_is_biased_and_posterior_sampling_is_not():
    """Two strongly correlated elements, one known: the projection gets the other one wrong."""
    covariance = np.array([[1.0, 0.95], [0.95, 1.0]])
    denoise = testing.correlated_denoiser(EDM, np.zeros(2), covariance)
    y = jnp.full((4000, 1), 1.5)
    guided = {
        "projected": diffusion.inpaint(denoise, jnp.pad(y, ((0, 0), (0, 1))), np.array([True, False])),
        "posterior": diffusion.posterior_sampling(denoise, EDM, lambda x: x[:, :1], y, 0.0, iterations=1),
    }
    table = diffusion.heun(EDM, diffusion.karras_times(EDM, 40))
    start = diffusion.prior(KEY, EDM, table.times[0], (4000, 2))
    ends = {name: diffusion.sample(KEY, g, table, start)[:, 1] for name, g in guided.items()}
    assert float(ends["posterior"].mean()) == pytest.approx(0.95 * 1.5, abs=0.03)
    assert float(ends["posterior"].std()) == pytest.approx(np.sqrt(1 - 0.95**2), rel=0.05)
    assert abs(float(ends["projected"].mean()) - 0.95 * 1.5) > 0.05


def sampling(operator=lambda x: x, observation=None, noise_std=0.1, iterations=1):
    x = jnp.ones((2, 3))
    y = x if observation is None else observation
    return diffusion.posterior_sampling(lambda x, t: x, EDM, operator, y, noise_std, iterations=iterations)(x, 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampling(operator=lambda x: x[:, :2]), ValueError, r"`operator\(x\)` must have the shape of `observation`, \[2, 3\], got \[2, 2\]"),
        (lambda: sampling(observation=jnp.ones(3)), ValueError, r"`operator\(x\)` must have the shape of `observation`"),
        (lambda: sampling(operator=jnp.sin), ValueError, "`operator` must be a linear function of x"),
        (lambda: sampling(operator=lambda x: x * x), ValueError, "`operator` must be a linear function of x"),
        (lambda: sampling(operator=lambda x: jnp.clip(x, -1, 1)), ValueError, "`operator` must be a linear function of x"),
        (lambda: sampling(noise_std=-0.1), ValueError, r"`noise_std` must lie in \[0, inf\], got -0.1"),
        (lambda: sampling(noise_std=np.nan), ValueError, "`noise_std` must be finite, got nan"),
        (lambda: sampling(iterations=0), ValueError, "`iterations` must be an integer of at least 1, got 0"),
        (lambda: diffusion.inpaint(lambda x, t: x, 0.0, jnp.ones(3)), TypeError, "`mask` must be boolean, got dtype float32"),
        (lambda: diffusion.inpaint(lambda x, t: x, 0.0, np.ones(2, bool))(jnp.ones((2, 3)), 1.0), ValueError, r"`mask` must broadcast to the shape of `x`, \[2, 3\], got \[2\]"),
        (lambda: diffusion.inpaint(lambda x, t: x, np.ones((1, 2, 3)), np.ones(3, bool))(jnp.ones((2, 3)), 1.0), ValueError, "`known` must broadcast"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
