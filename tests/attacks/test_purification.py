"""Purification with the exact denoiser of Gaussian data, whose mean and Jacobian are known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, random, testing
from jaxgen.attacks.expectation import expected
from jaxgen.attacks.objectives import cross_entropy
from jaxgen.attacks.pgd import pgd
from jaxgen.attacks.purification import purify
from jaxgen.attacks.threat import ThreatModel, project

KEY = jax.random.key(0)
MEAN, STD = 0.4, 0.7
PATHS = {
    "linear_beta": (diffusion.linear_beta(), 300.0),
    "edm": (diffusion.edm(), 0.8),
    "rectified_flow": (diffusion.rectified_flow(), 0.4),
}
X = jax.random.normal(jax.random.key(1), (5, 3))


def sampler(path, table):
    denoise = testing.gaussian_denoiser(path, MEAN, STD)
    return lambda keys, x: diffusion.sample(keys, denoise, table, x, path=path)


def noise(path, t):
    return {"alpha": path.alpha(t), "sigma": path.sigma(t)}


def flow_gain(path, t):
    return STD / np.sqrt((path.alpha(t) * STD) ** 2 + path.sigma(t) ** 2)


@pytest.mark.parametrize("name", PATHS)
def test_by_the_probability_flow_mean_variance_and_jacobian(name):
    path, t = PATHS[name]
    table = diffusion.dpmpp_2m(path, t * np.linspace(1, 0, 41))
    clean = jax.jit(lambda key, x: purify(key, sampler(path, table), x, **noise(path, t)))
    gain, alpha, sigma = flow_gain(path, t), path.alpha(t), path.sigma(t)

    # One noise for the example and its neighbour: what is between them is the Jacobian's alone.
    jacobian = jax.jit(jax.jacobian(lambda x: clean(KEY, x).sum(0)))(X)
    each = np.stack([np.diag(np.full(3, alpha * gain))] * 5, axis=1)
    np.testing.assert_allclose(jacobian, each, rtol=0.01, atol=1e-6)

    many = np.asarray(clean(KEY, jnp.tile(X[:1], (4000, 1))))
    deviation = gain * sigma
    np.testing.assert_allclose(many.mean(0), MEAN + gain * alpha * (X[0] - MEAN), atol=4 * deviation / math.sqrt(4000))
    np.testing.assert_allclose(many.std(0), deviation, rtol=0.05)


def test_in_one_step_it_is_the_denoisers_answer_exactly():
    path, t = PATHS["linear_beta"]
    sample = sampler(path, diffusion.ddim(path, np.array([t, 0.0])))
    alpha, sigma = path.alpha(t), path.sigma(t)
    gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
    eps = random.normal(random.fold(random.example_keys(KEY, 5), 0), (3,))
    clean = purify(KEY, sample, X, alpha=alpha, sigma=sigma)
    np.testing.assert_allclose(clean, MEAN + gain * (alpha * X + sigma * eps - alpha * MEAN), rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda x: purify(KEY, sample, x, alpha=alpha, sigma=sigma).sum())(X)
    np.testing.assert_allclose(slope, np.full((5, 3), gain * alpha), rtol=1e-4)


def test_a_stochastic_sampler_draws_apart_from_the_noise_and_has_a_gradient():
    # Reverse diffusion in many steps draws from the posterior: variance STD^2 sigma^2 / V beside that of the noise.
    path, t = PATHS["edm"]
    sample = sampler(path, diffusion.ddpm(path, t * np.linspace(1, 0, 101) ** 2))
    clean = jax.jit(lambda key, x: purify(key, sample, x, **noise(path, t)))
    share = STD**2 / (STD**2 + t**2)
    many = np.asarray(clean(KEY, jnp.tile(X[:1], (4000, 1))))
    np.testing.assert_allclose(many.mean(0), MEAN + share * (X[0] - MEAN), atol=0.05)
    np.testing.assert_allclose(many.std(0), math.sqrt((share * t) ** 2 + share * t**2), rtol=0.05)
    slope = jax.jit(jax.grad(lambda x: clean(KEY, x).sum()))(X)
    np.testing.assert_allclose(slope, share, rtol=0.03)


def test_with_one_key_it_is_one_function_of_each_example():
    path, t = PATHS["edm"]
    sample = sampler(path, diffusion.ddpm(path, t * np.linspace(1, 0, 5)))
    clean = purify(KEY, sample, X, **noise(path, t))
    np.testing.assert_array_equal(purify(KEY, sample, X, **noise(path, t)), clean)
    np.testing.assert_allclose(purify(KEY, sample, X[:2], **noise(path, t)), clean[:2], rtol=1e-5)
    keys = random.example_keys(KEY, 5)
    np.testing.assert_array_equal(purify(keys, sample, X, **noise(path, t)), clean)
    assert np.all(np.asarray(purify(jax.random.key(7), sample, X, **noise(path, t))) != clean)
    own = {"alpha": np.ones(5), "sigma": np.full(5, t)}  # a noise for each example
    np.testing.assert_allclose(purify(KEY, sample, X, **own), clean, rtol=1e-6)
    half = purify(KEY, sample, X.astype(jnp.bfloat16), **noise(path, t))
    assert half.dtype == jnp.bfloat16


@pytest.mark.slow
def test_both_honest_attacks_raise_the_loss():
    path, t = PATHS["edm"]
    sample = sampler(path, diffusion.ddim(path, np.array([t, 0.0])))
    labels = jnp.array([0, 1, 0, 1, 0])
    threat = ThreatModel(2, eps=0.5, low=-5.0, high=5.0)
    slope = jnp.array([1.0, -2.0, 0.5])

    def defended(keys, x):
        margin = purify(keys, sample, x, **noise(path, t)) @ slope
        return jnp.stack([-margin, margin], axis=1)

    # Of a linear chain the strongest perturbation is known, whatever the noise.
    signs = (1 - 2 * labels)[:, None]
    best = project(threat, X + 0.5 * signs * slope / jnp.linalg.norm(slope), X)
    fixed = cross_entropy(functools.partial(defended, KEY), labels)
    guessed = expected(cross_entropy, defended, labels, jax.random.split(KEY, 4))
    for objective in (fixed, guessed):
        attacked = jax.jit(lambda x, objective=objective: pgd(KEY, objective, x, threat, random_start=False))(X)
        np.testing.assert_allclose(attacked, best, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: purify(KEY, f, X, alpha=1.0, sigma=-1.0), ValueError, r"`sigma` must lie in \[0, inf\]"),
        (lambda f: purify(KEY, f, X, alpha=np.ones(4), sigma=1.0), ValueError, r"`alpha` must have shape \[5\]"),
        (
            lambda f: purify(KEY, f, jnp.ones((2, 2), int), alpha=1.0, sigma=1.0),
            TypeError,
            "`x` must be floating-point",
        ),
        (lambda f: purify(0, f, X, alpha=1.0, sigma=1.0), TypeError, "`key` must be a typed PRNG key"),
        (
            lambda f: purify(KEY, lambda k, x: x[0], X, alpha=1.0, sigma=1.0),
            ValueError,
            r"`sample\(keys, x\)` must have",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(lambda keys, x: x)
