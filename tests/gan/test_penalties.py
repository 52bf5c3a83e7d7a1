"""Gradient penalties against closed forms and finite differences."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import gan, nets

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


class Discriminator(nn.Module):
    """Two convolutions and a projection on the label's vector (Miyato & Koyama 2018)."""

    @nn.compact
    def __call__(self, x, labels):
        for features in (4, 8):
            x = nn.leaky_relu(nets.Conv(features, 3, strides=2, padding=1)(x), 0.2)
        x = jnp.mean(jnp.tanh(x), axis=(1, 2))
        return nn.Dense(1)(x)[:, 0] + jnp.sum(x * nn.Embed(3, 8)(labels), axis=1)


REAL, FAKE = jax.random.normal(jax.random.key(3), (2, 8, 8, 8, 3))
LABELS = jnp.arange(8) % 3
PARAMS = Discriminator().init(jax.random.key(4), REAL, LABELS)


def together(params, real, fake, labels):
    return gan.scored(lambda x, labels: Discriminator().apply(params, x, labels), real, fake, labels)


def apart(params, real, fake, labels):
    def critic(x):
        return Discriminator().apply(params, x, labels)

    return gan.Scored(critic(real), critic(fake), gan.r1(critic, real), gan.r2(critic, fake))


def objective(form):
    def loss(params, real, fake, labels):
        scored = form(params, real, fake, labels)
        losses = gan.relativistic.discriminator(scored.real_logits, scored.fake_logits)
        return jnp.mean(losses + 0.3 * scored.r1 + 0.7 * scored.r2)

    return loss


def test_scored_is_logits_and_penalties_together():
    for values, expected in zip(
        jax.jit(together)(PARAMS, REAL, FAKE, LABELS), jax.jit(apart)(PARAMS, REAL, FAKE, LABELS), strict=True
    ):
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    gradients, expected = (jax.jit(jax.grad(objective(form)))(PARAMS, REAL, FAKE, LABELS) for form in (together, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected)


def test_scored_evaluates_the_critic_once_and_multiplies_once():
    """Two convolutions forwards, two backwards: of the two batches together, since each has twice the images."""
    calls = []

    def critic(x, labels):
        calls.append(x.shape)
        return Discriminator().apply(PARAMS, x, labels)

    program = jax.make_jaxpr(lambda real, fake: gan.scored(critic, real, fake, LABELS))(REAL, FAKE)
    assert calls == [(16, 8, 8, 3)]
    assert len(re.findall(r"= convolve\[", str(program))) == 2
    assert len(re.findall(r"= convolve_to_input\[", str(program))) == 2
    assert len(re.findall(r"= convolve", str(jax.make_jaxpr(apart)(PARAMS, REAL, FAKE, LABELS)))) == 12


def test_scored_moves_no_batch_that_is_split_over_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(jax.value_and_grad(objective(together)), in_shardings=(whole, rows, rows, rows))
    compiled = step.lower(PARAMS, REAL, FAKE, LABELS).compile().as_text()
    moves = re.findall(r"(all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(", compiled)
    assert set(moves) == {"all-reduce"}  # of the gradients


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
        (lambda: gan.scored(linear, X, X[:2]), ValueError, "`fake` must have the shape of `real`"),
        (lambda: gan.scored(linear, jnp.ones((2, 4, 3), int), X), TypeError, "`real` must be floating-point"),
        (lambda: gan.scored(linear, X, X, jnp.ones(3)), ValueError, r"`conditions` must have shape \[5\], got \[3\]"),
        (lambda: gan.scored(linear, X, X, 0.0), ValueError, r"`conditions` must have shape \[5\], got \[\]"),
        (lambda: gan.scored(lambda x: x, X, X), ValueError, r"`critic\(x\)` must have shape \[10\]"),
        (lambda: gan.r1(lambda x: linear(x) / linear(x).mean(), X), ValueError, "the logit of example 1 depends on"),
        (lambda: gan.gradient_penalty(linear, X, X[:2], KEY), ValueError, "`fake` must have the shape of `real`"),
        (lambda: gan.gradient_penalty(linear, X, X, 0), TypeError, "`key` must be a typed PRNG key"),
        (lambda: gan.lazy(lambda: X, 0, every=0), ValueError, "`every` must be an integer of at least 1"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
