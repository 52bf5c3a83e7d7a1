"""Adversarial losses against closed forms: their optimum on a grid of densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import gan

LOSSES = {
    name: getattr(gan, name)
    for name in ("minimax", "nonsaturating", "least_squares", "hinge", "wasserstein", "relativistic")
}
GRID = np.linspace(-3, 3, 25)
P = np.exp(-0.5 * (GRID - 0.5) ** 2)
Q = np.exp(-0.5 * (GRID + 0.7) ** 2 / 1.5)
P, Q = P / P.sum(), Q / Q.sum()
BEST = {
    "minimax": np.log(P / Q),
    "nonsaturating": np.log(P / Q),
    "least_squares": P / (P + Q),
    "hinge": np.sign(P - Q),
    "relativistic": np.log(P / Q),
}


def expected(loss, logits):
    """The discriminator's loss for data of density P and independent samples of density Q, exactly."""
    x, y = np.divmod(np.arange(len(GRID) ** 2), len(GRID))
    return jnp.sum(P[x] * Q[y] * loss.discriminator(logits[x], logits[y]))


@pytest.mark.parametrize("name", BEST)
def test_the_best_discriminator_is_the_known_one(name):
    with jax.enable_x64(True):
        best = jnp.asarray(BEST[name])
        least = expected(LOSSES[name], best)
        noise = np.random.default_rng(0).normal(size=(20, len(GRID)))
        for size in (0.01, 0.3):
            assert all(expected(LOSSES[name], best + size * step) > least for step in noise)
        if name != "hinge":
            np.testing.assert_allclose(jax.grad(lambda d: expected(LOSSES[name], d))(best), 0, atol=1e-12)


def test_the_minimax_value_is_the_jensen_shannon_divergence():
    middle = (P + Q) / 2
    divergence = 0.5 * np.sum(P * np.log(P / middle) + Q * np.log(Q / middle))
    with jax.enable_x64(True):
        value = -expected(gan.minimax, jnp.asarray(BEST["minimax"]))
    np.testing.assert_allclose(value, 2 * divergence - np.log(4), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("minimax", 2 * np.log(2), -np.log(2)),
        ("nonsaturating", 2 * np.log(2), np.log(2)),
        ("least_squares", 0.5, 0.5),
        ("hinge", 2.0, 0.0),
        ("wasserstein", 0.0, 0.0),
        ("relativistic", np.log(2), np.log(2)),
    ],
)
def test_a_discriminator_that_knows_nothing(name, discriminator, generator):
    zeros = jnp.zeros(3)
    np.testing.assert_allclose(LOSSES[name].discriminator(zeros, zeros), discriminator, rtol=1e-6)
    np.testing.assert_allclose(LOSSES[name].generator(zeros, zeros), generator, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_generators_want_higher_logits_of_their_samples(loss):
    real, fake = jnp.array([0.3, -1.0]), jnp.array([-0.8, 0.2])
    assert np.all(jax.grad(lambda fake: loss.generator(real, fake).sum())(fake) < 0)


@pytest.mark.parametrize("name", ["minimax", "nonsaturating", "relativistic"])
def test_large_logits_stay_finite(name):
    far = jnp.array([1e4, -1e4])
    for loss in LOSSES[name]:
        value, slope = jax.value_and_grad(lambda fake, loss=loss: loss(-far, fake).sum())(far)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("side", ["discriminator", "generator"])
@pytest.mark.parametrize(
    ("real", "fake", "error", "message"),
    [
        (
            jnp.zeros(3),
            jnp.zeros(2),
            ValueError,
            r"`fake_logits` must have the shape of `real_logits`, \[3\], got \[2\]",
        ),
        (jnp.zeros((3, 1)), jnp.zeros((3, 1)), ValueError, r"`real_logits` must have shape \[any\], got \[3, 1\]"),
        (jnp.zeros(3), jnp.zeros((3, 1)), ValueError, r"`fake_logits` must have shape \[any\], got \[3, 1\]"),
        (jnp.zeros(3, int), jnp.zeros(3), TypeError, "`real_logits` must be floating-point"),
    ],
)
def test_bad_logits_are_refused(loss, side, real, fake, error, message):
    with pytest.raises(error, match=message):
        getattr(loss, side)(real, fake)
