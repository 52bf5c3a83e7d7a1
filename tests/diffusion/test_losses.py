"""Losses: their minimiser is the exact denoiser, whatever the recipe; offset noise; adaptive weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, testing
from tests.diffusion.oracle import MEAN, PATHS, STD

KEY = jax.random.key(5)
X0 = jnp.asarray(MEAN + STD * np.random.default_rng(0).normal(size=(20_000, 3)), jnp.float32)


def edm_network(theta, exact):
    """The raw network at which `edm_precondition` is ``exact``, made wrong by ``theta``."""

    def net(scaled, c_noise):
        t = jnp.exp(4 * c_noise)
        variance = t[:, None] ** 2 + 0.25
        x = scaled * jnp.sqrt(variance)
        right = (exact(x, t) - 0.25 / variance * x) * jnp.sqrt(variance) / (0.5 * t[:, None])
        return right * (1 + theta[0]) + theta[1] + theta[2] * scaled

    return diffusion.edm_precondition(net)


def recipe(name, path, theta):
    """A loss per example whose network is exact at theta = 0 and affine in theta: an intercept and two gains."""
    exact = testing.gaussian_denoiser(path, MEAN, STD)
    options = {}
    if name == "edm":
        net, prediction = edm_network(theta, exact), diffusion.data
        options = {"draw_time": diffusion.log_normal_time(), "weight": diffusion.edm_weight(0.5)}
    else:
        prediction = getattr(diffusion, name.split()[0])
        if "logit" in name:
            options["draw_time"] = diffusion.logit_normal_time()
        if "snr" in name:
            options["weight"] = diffusion.min_snr(5.0)

        def net(x, t):
            c = diffusion.prediction.path_coefficients(path, t, x)
            silent, one = (prediction.to_data(c, x, value) for value in (jnp.zeros_like(x), jnp.ones_like(x)))
            right = (exact(x, t) - silent) / (one - silent)  # the output that `denoiser` turns into the exact estimate
            return right * (1 + theta[0]) + theta[1] + theta[2] * x

    return diffusion.denoising_loss(path, prediction, net, X0, KEY, **options)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("noise", "linear_beta"),
        ("data min-snr", "cosine"),
        ("v", "cosine"),
        ("v min-snr", "linear_beta"),
        ("velocity", "rectified_flow"),
        ("velocity logit-normal", "rectified_flow"),
        ("edm", "edm"),
    ],
)
def test_the_minimiser_is_the_exact_denoiser(name, path):
    """Least squares in closed form: one Newton step from the exact network stays where it is, to the sampling error."""
    losses = lambda theta: recipe(name, PATHS[path], theta)  # noqa: E731
    zero = jnp.zeros(3)
    gradients = np.asarray(jax.jit(jax.jacfwd(losses))(zero), np.float64)
    hessian = np.asarray(jax.jit(jax.hessian(lambda theta: losses(theta).mean()))(zero), np.float64)
    step = np.linalg.solve(hessian, gradients.mean(axis=0))
    spread = np.linalg.solve(hessian, np.cov(gradients.T) / len(gradients))
    error = np.sqrt(np.diag(np.linalg.solve(hessian, spread.T)))
    assert np.all(error < 0.03), error
    assert np.all(np.abs(step) < 4.5 * error), (step, error)


def test_offset_noise_has_its_covariance():
    draws, strength = 40_000, 0.7
    keys = jax.random.split(KEY, draws)
    eps = jax.vmap(lambda key: diffusion.offset_noise(strength)(key, (2, 2, 2), jnp.float32))(keys)
    eps = np.asarray(eps, np.float64).reshape(draws, 4, 2)
    for channel in range(2):
        covariance = np.cov(eps[:, :, channel].T)
        np.testing.assert_allclose(covariance, np.eye(4) + strength**2, atol=5 * 1.5 * np.sqrt(2 / draws))
    between = eps[:, :, 0].T @ eps[:, :, 1] / draws
    np.testing.assert_allclose(between, 0, atol=5 * 1.5 / np.sqrt(draws))


def test_offset_noise_of_strength_0_is_the_default():
    losses = [
        diffusion.denoising_loss(PATHS["edm"], diffusion.noise, lambda x, t: x, X0[:9], KEY, **options)
        for options in ({}, {"draw_noise": diffusion.offset_noise(0.0)}, {"draw_noise": diffusion.offset_noise(0.5)})
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert np.all(losses[2] != losses[0])


def test_adaptive_divides_the_gradient_by_the_loss():
    x = jnp.array([0.0, 0.1, 30.0])
    gradients = [
        jax.grad(lambda x, p=power: diffusion.adaptive(x**2, power=p, offset=1e-3).sum())(x) for power in (0, 0.5, 1)
    ]
    np.testing.assert_allclose(gradients[0], 2 * x, rtol=1e-6)
    np.testing.assert_allclose(gradients[1], 2 * x / np.sqrt(x**2 + 1e-3), rtol=1e-5)
    np.testing.assert_allclose(gradients[2], 2 * x / (x**2 + 1e-3), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusion.offset_noise(-0.1), r"`strength` must lie in \[0, inf\], got -0.1"),
        (lambda: diffusion.adaptive(jnp.ones(2), power=-1.0), r"`power` must lie in \[0, inf\]"),
        (lambda: diffusion.adaptive(jnp.ones(2), offset=0.0), "`offset` must be above 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
