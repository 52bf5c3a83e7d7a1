"""Gradient penalties against closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import gan

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 4, 3))
WEIGHT = jax.random.normal(jax.random.key(2), (4, 3))


def linear(x):
    return jnp.sum(x * WEIGHT, axis=(1, 2))


def curved(x):
    return jnp.sum(jnp.sin(x * WEIGHT) * jnp.roll(x, 1, axis=1), axis=(1, 2))


@pytest.mark.parametrize("penalty", [gan.r1, gan.r2])
def test_of_linear_and_quadratic_critics(penalty):
    np.testing.assert_allclose(penalty(linear, X), np.full(5, jnp.sum(WEIGHT**2)), rtol=1e-6)
    square = penalty(lambda x: 0.5 * jnp.sum(WEIGHT * x**2, axis=(1, 2)), X)
    np.testing.assert_allclose(square, jnp.sum((WEIGHT * X) ** 2, axis=(1, 2)), rtol=1e-6)


@pytest.mark.parametrize("penalty", [gan.r1, gan.r2])
def test_against_finite_differences(penalty):
    with jax.enable_x64(True):
        x, h = jnp.asarray(X, jnp.float64), 1e-6
        steps = h * jnp.eye(12, dtype=jnp.float64).reshape(12, 1, 4, 3)
        slopes = jax.vmap(lambda step: (curved(x + step) - curved(x - step)) / (2 * h))(steps)
        np.testing.assert_allclose(penalty(curved, x), jnp.sum(slopes**2, axis=0), rtol=1e-7)


def test_loss_and_penalties_share_an_evaluation_and_change_nothing():
    """Value and gradient by parameters are those of the separate forms; the critic is called once a batch."""
    calls = []

    def loss(scale, shared):
        def critic(x):
            calls.append(1)
            return curved(scale * x)

        if shared:
            (real, r1), (fake, r2) = gan.penalised(critic, X), gan.penalised(critic, -X)
        else:
            real, fake, r1, r2 = critic(X), critic(-X), gan.r1(critic, X), gan.r2(critic, -X)
        return jnp.mean(gan.relativistic.discriminator(real, fake) + 0.5 * (r1 + r2))

    together = jax.value_and_grad(loss)(0.7, True)
    assert len(calls) == 2
    apart = jax.value_and_grad(loss)(0.7, False)
    assert len(calls) == 6
    np.testing.assert_allclose(together, apart, rtol=1e-6)


def test_gradient_penalty_of_a_critic_of_slope_one_is_zero():
    direction = WEIGHT / jnp.linalg.norm(WEIGHT)
    penalty = gan.gradient_penalty(lambda x: jnp.sum(x * direction, axis=(1, 2)), X, -X, KEY)
    np.testing.assert_allclose(penalty, 0, atol=1e-10)
    penalty = gan.gradient_penalty(lambda x: 3 * jnp.sum(x * direction, axis=(1, 2)), X, -X, KEY)
    np.testing.assert_allclose(penalty, 4, rtol=1e-5)


def test_gradient_penalty_looks_between_data_and_samples():
    """Of |x|^2 / 2 the gradient is x itself: the points are read off, uniform along each segment."""

    def penalty(n):
        return gan.gradient_penalty(lambda x: 0.5 * jnp.sum(x**2, axis=1), 3 * jnp.ones((n, 4)), jnp.ones((n, 4)), KEY)

    where = (np.sqrt(penalty(4000)) + 1) / 2  # norms of points from (1, 1, 1, 1) to (3, 3, 3, 3)
    np.testing.assert_allclose(np.quantile(where, [0.1, 0.5, 0.9]), [1.2, 2.0, 2.8], atol=0.06)
    np.testing.assert_allclose(penalty(7), penalty(4000)[:7], rtol=1e-6)


def test_gradient_penalty_of_a_flat_critic_has_a_gradient():
    slope = jax.grad(lambda w: gan.gradient_penalty(lambda x: w * jnp.sum(x, axis=(1, 2)), X, -X, KEY).sum())(0.0)
    assert np.isfinite(slope)


def test_a_lazy_penalty_is_skipped_and_weighs_the_same():
    calls = []

    def penalty():
        jax.debug.callback(lambda: calls.append(1))
        return jnp.full(3, 0.5)

    run = jax.jit(lambda step: gan.lazy(penalty, step, every=4))
    values = [np.asarray(run(step)) for step in range(8)]
    jax.effects_barrier()
    assert len(calls) == 2
    np.testing.assert_allclose(np.mean(values, axis=0), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gan.r1(lambda x: x, X), ValueError, r"`critic\(x\)` must have shape \[5\], got \[5, 4, 3\]"),
        (lambda: gan.r2(lambda x: x.sum(), X), ValueError, r"`critic\(x\)` must have shape \[5\], got \[\]"),
        (lambda: gan.r1(linear, jnp.ones((2, 4, 3), int)), TypeError, "`x` must be floating-point"),
        (lambda: gan.gradient_penalty(linear, X, X[:2], KEY), ValueError, "`fake` must have the shape of `real`"),
        (lambda: gan.gradient_penalty(linear, X, X, 0), TypeError, "`key` must be a typed PRNG key"),
        (lambda: gan.lazy(lambda: X, 0, every=0), ValueError, "`every` must be an integer of at least 1"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
