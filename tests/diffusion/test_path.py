"""Paths, grids of times and losses against closed forms and naive references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, random
from tests.diffusion.oracle import PATHS

KEY = jax.random.key(3)


def test_linear_beta_is_the_product_of_the_papers_betas():
    path = diffusion.linear_beta(1000, 1e-4, 0.02)
    t = np.arange(1001)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
    np.testing.assert_allclose(path.alpha(t) ** 2, alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(path.sigma(t) ** 2, 1 - alpha_bar, rtol=1e-9, atol=1e-15)


def test_cosine_is_the_papers():
    path, t = diffusion.cosine(0.008), np.linspace(0, 0.999, 50)
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(path.alpha(t) ** 2, f / f[0], rtol=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_path(path):
    t = np.linspace(0, path.t_max, 1001)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert alpha.dtype == sigma.dtype == np.float64
    assert (alpha[0], sigma[0]) == (1, 0)
    assert np.all(np.diff(diffusion.noise_ratio(path, t[:-1])) > 0)
    # the device, traced and in float32, agrees with the host in float64
    device = jax.jit(lambda t: (path.alpha(t), path.sigma(t)))(jnp.asarray(t))
    np.testing.assert_allclose(device, (alpha, sigma), rtol=2e-5, atol=2e-6)
    assert {leaf.dtype for leaf in device} == {jnp.dtype("float32")}


@pytest.mark.parametrize("path", [PATHS["linear_beta"], PATHS["cosine"]], ids=["linear_beta", "cosine"])
def test_variance_preserving(path):
    t = np.linspace(0, path.t_max, 101)
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1, atol=1e-7)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_grids(path):
    grids = [diffusion.uniform_times(path, 9)]
    if np.isfinite(diffusion.noise_ratio(path, path.t_max)):
        grids += [diffusion.karras_times(path, 9), diffusion.log_snr_times(path, 9)]
    for times in grids:
        assert times.shape == (10,)
        assert times.dtype == np.float64
        assert np.all(np.diff(times) < 0)
        assert (times[0], times[-1]) == (path.t_max, 0)


def test_karras_is_the_papers_equation_5():
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(diffusion.karras_times(diffusion.edm(), 18)[:-1], expected, rtol=1e-12)


@pytest.mark.parametrize("path", [PATHS["linear_beta"], PATHS["cosine"], PATHS["edm"]])
def test_log_snr_is_uniform(path):
    ratio = diffusion.noise_ratio(path, diffusion.log_snr_times(path, 12)[:-1])
    np.testing.assert_allclose(np.diff(np.log(ratio), 2), 0, atol=1e-8)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_diffuse_is_equation_1(path):
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
    t = rng.uniform(0, path.t_max, 4)
    got = diffusion.diffuse(path, jnp.asarray(x0), t, jnp.asarray(noise))
    for i in range(4):
        np.testing.assert_allclose(got[i], path.alpha(t[i]) * x0[i] + path.sigma(t[i]) * noise[i], rtol=1e-4, atol=1e-5)


def test_loss_against_a_naive_loop():
    path, batch = PATHS["cosine"], 5
    x0 = jax.random.normal(jax.random.key(0), (batch, 4, 2))
    net = lambda x, t: jnp.tanh(x) * t[:, None, None]  # noqa: E731
    got = diffusion.denoising_loss(path, diffusion.v, net, x0, KEY, weight=diffusion.min_snr(2.0))
    for i in range(batch):
        key = jax.random.fold_in(KEY, i)
        t = float(jax.random.uniform(jax.random.fold_in(key, 0), minval=path.t_min, maxval=path.t_max))
        eps = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (4, 2)), np.float64)
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = alpha * np.asarray(x0[i]) + sigma * eps
        x0_hat = alpha * x - sigma * np.tanh(x) * t
        error = min((alpha / sigma) ** 2, 2.0) * np.mean((x0_hat - x0[i]) ** 2)
        np.testing.assert_allclose(got[i], error, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["noise", "data", "v", "velocity", "score"])
@pytest.mark.parametrize(("name", "weight"), [("edm", diffusion.edm_weight(0.5)), ("snr", diffusion.min_snr(5.0))])
def test_weights_do_not_depend_on_the_prediction(prediction, name, weight):
    """Both weigh the error of x0: a network that implies the same x0 has the same loss whatever it predicts."""
    path, prediction = PATHS["cosine"], getattr(diffusion, prediction)
    x0 = jax.random.normal(jax.random.key(0), (6, 3))

    def net(x, t):
        c = diffusion.prediction.path_coefficients(path, t, x)
        x0_hat = 0.3 * x
        return prediction.target(c, x0_hat, (x - c.alpha * x0_hat) / c.sigma)

    draw = lambda key: jax.random.uniform(key, minval=0.2, maxval=0.8)  # noqa: E731
    losses = [
        diffusion.denoising_loss(path, p, n, x0, KEY, weight=weight, draw_time=draw)
        for p, n in ((prediction, net), (diffusion.data, lambda x, t: 0.3 * x))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_edm_preconditioning_is_the_optimum_of_a_silent_network():
    """With a zero network D = c_skip x, which is the exact denoiser of N(0, sigma_data^2) data."""
    x, t = jax.random.normal(jax.random.key(0), (7, 2)), jnp.geomspace(0.01, 50, 7)
    denoise = diffusion.edm_precondition(lambda x, c_noise: jnp.zeros_like(x), sigma_data=0.5)
    np.testing.assert_allclose(denoise(x, t), x * 0.25 / (0.25 + t[:, None] ** 2), rtol=1e-5)


def test_edm_preconditioning_feeds_unit_variance_and_asks_for_it():
    """Inputs have variance 1, and EDM's weighted loss of a silent network is 1 at every noise level (Karras 2022, section 5)."""
    seen = []

    def net(x, c_noise):
        seen.append((x, c_noise))
        return jnp.zeros_like(x)

    x0 = 0.5 * jax.random.normal(jax.random.key(0), (256, 256))
    for sigma in (0.02, 0.5, 20.0):
        losses = diffusion.denoising_loss(
            PATHS["edm"], diffusion.data, diffusion.edm_precondition(net), x0, KEY,
            draw_time=lambda key, sigma=sigma: jnp.asarray(sigma), weight=diffusion.edm_weight(0.5),
        )  # fmt: skip
        np.testing.assert_allclose(losses.mean(), 1, rtol=0.03)
        np.testing.assert_allclose(seen[-1][0].var(), 1, rtol=0.03)
        np.testing.assert_allclose(seen[-1][1], np.log(sigma) / 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("draw", "transform", "mean", "std"),
    [
        (diffusion.log_normal_time(-1.2, 1.2), np.log, -1.2, 1.2),
        (diffusion.logit_normal_time(0.3, 0.7), lambda t: np.log(t / (1 - t)), 0.3, 0.7),
        (diffusion.uniform_time(PATHS["linear_beta"]), lambda t: t, 500.5, 999 / np.sqrt(12)),
    ],
)
def test_distributions_of_times(draw, transform, mean, std):
    n = 20_000
    times = transform(np.asarray(jax.vmap(draw)(random.example_keys(KEY, n)), np.float64))
    np.testing.assert_allclose(times.mean(), mean, atol=4 * std / np.sqrt(n))
    np.testing.assert_allclose(times.std(), std, rtol=4 / np.sqrt(n))


def test_loss_of_an_example_depends_on_its_index_alone():
    x0 = jax.random.normal(jax.random.key(0), (6, 3))
    loss = lambda x0: diffusion.denoising_loss(PATHS["edm"], diffusion.data, lambda x, t: x, x0, KEY)  # noqa: E731
    np.testing.assert_allclose(loss(x0)[:2], loss(x0[:2]), rtol=1e-6)


def test_gaussian_nll_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    got = diffusion.gaussian_nll(jnp.array([0.3, -2.0]), 0.5, jnp.array([0.1, 4.0]))
    np.testing.assert_allclose(got, -stats.norm.logpdf([0.3, -2.0], 0.5, np.sqrt([0.1, 4.0])), rtol=1e-6)


X = jnp.ones((2, 3))
EDM = PATHS["edm"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diffusion.diffuse(EDM, X, jnp.ones(3), X), ValueError, r"`t` must have shape \[2\], got \[3\]"),
        (lambda: diffusion.diffuse(EDM, X, jnp.array([1.0, -1.0]), X), ValueError, r"`t` must lie in \[0, 80\], got values from -1 to 1"),
        (lambda: diffusion.diffuse(EDM, X, 1.0, X[:1]), ValueError, r"`noise` must have the shape of `x0`, \[2, 3\], got \[1, 3\]"),
        (lambda: diffusion.diffuse(EDM, X.astype(jnp.uint8), 1.0, X), TypeError, r"`x0` must be floating.*uint8"),
        (lambda: diffusion.denoising_loss(EDM, diffusion.data, lambda x, t: x[:, :1], X, KEY), ValueError, r"`net\(x, t\)` must have the shape"),
        (lambda: diffusion.denoising_loss(EDM, diffusion.data, lambda x, t: x, jnp.ones(3), KEY), ValueError, "`x0` must have at least 2 axes"),
        (lambda: diffusion.denoiser(EDM, diffusion.data, lambda x, t: x)(X, jnp.array([1.0, 90.0])), ValueError, "`t` must lie"),
        (lambda: diffusion.linear_beta(0), ValueError, "`steps` must be an integer of at least 1, got 0"),
        (lambda: diffusion.linear_beta(10, 0.5, 0.1), ValueError, "beta_first <= beta_last"),
        (lambda: diffusion.cosine(0.0), ValueError, r"`offset` must lie in \(0, 1\)"),
        (lambda: diffusion.edm(1.0, 0.5), ValueError, "sigma_min < sigma_max"),
        (lambda: diffusion.min_snr(0.0), ValueError, "`gamma` must be above 0"),
        (lambda: diffusion.edm_weight(-1.0), ValueError, "`sigma_data` must be above 0"),
        (lambda: diffusion.edm_precondition(lambda x, t: x, sigma_data=0.0), ValueError, "`sigma_data` must be above 0"),
        (lambda: diffusion.log_normal_time(std=0.0), ValueError, "`std` must be above 0"),
        (lambda: diffusion.karras_times(diffusion.rectified_flow(), 5), ValueError, "`t_max` is 1, where this path's alpha is 0"),
        (lambda: diffusion.karras_times(EDM, 5, rho=0.0), ValueError, "`rho` must be above 0"),
        (lambda: diffusion.log_snr_times(EDM, 5, t_min=3.0, t_max=2.0), ValueError, "0 < t_min < t_max"),
        (lambda: diffusion.uniform_times(EDM, 2.5), ValueError, "`steps` must be an integer"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
