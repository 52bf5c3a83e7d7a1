"""The default game, relativistic with R1 and R2, finds every mode of a ring of Gaussians, and each equally often."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxgen import gan, nets, random, train

MODES, STD = 8, 0.1
CENTRES = np.stack([np.cos(2 * np.pi * np.arange(MODES) / MODES), np.sin(2 * np.pi * np.arange(MODES) / MODES)], axis=1)
BATCH, LATENT = 256, 4


class Dense(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.leaky_relu(nn.Dense(128, kernel_init=nets.variance_scaling(2.0))(x), 0.2)
        return nn.Dense(self.features, kernel_init=nets.variance_scaling())(x)


GENERATOR, DISCRIMINATOR = Dense(2), Dense(1)


def points(key, n):
    """Data, [n, 2]."""
    mode_key, noise_key = jax.random.split(key)
    modes = jax.random.randint(mode_key, (n,), 0, MODES)
    return jnp.asarray(CENTRES, jnp.float32)[modes] + STD * jax.random.normal(noise_key, (n, 2))


def samples(params, key, n):
    return GENERATOR.apply(params, random.normal(random.example_keys(key, n), (LATENT,)))


def game(loss, gamma):
    def critic(params):
        return lambda x: DISCRIMINATOR.apply(params, x)[:, 0]

    def discriminator_loss(params, opponent, batch, key, carried):
        data_key, sample_key = jax.random.split(key)
        scores = gan.scored(critic(params), points(data_key, BATCH), samples(opponent, sample_key, BATCH))
        losses = loss.discriminator(scores.real_logits, scores.fake_logits)
        return jnp.mean(losses + gamma / 2 * (scores.r1 + scores.r2)), {}

    def generator_loss(params, opponent, batch, key, carried):
        data_key, sample_key = jax.random.split(key)
        real, fake = points(data_key, BATCH), samples(params, sample_key, BATCH)
        return loss.generator(critic(opponent)(real), critic(opponent)(fake)).mean(), {}

    optimiser = optax.adam(1e-3, b1=0.0, b2=0.99)
    return train.alternate(
        train.Player(discriminator_loss, optimiser, lambda key: nets.init(DISCRIMINATOR, key, jnp.zeros((1, 2)))),
        train.Player(generator_loss, optimiser, lambda key: nets.init(GENERATOR, key, jnp.zeros((1, LATENT)))),
        average=train.ema(0.99),
    )


def trained(loss, gamma, seed, steps):
    method = game(loss, gamma)

    @jax.jit
    def run(key):
        init_key, step_key, sample_key = jax.random.split(key, 3)
        step = lambda state, _: method.step(state, jnp.zeros(1), step_key)  # noqa: E731
        state, _ = jax.lax.scan(step, method.init(init_key), length=steps)
        return samples(state.average, sample_key, 4000)

    return np.asarray(run(jax.random.key(seed)))


def coverage(x):
    """The share of samples near some centre, and of those the share of each mode."""
    distances = np.linalg.norm(x[:, None] - CENTRES, axis=-1)
    near = distances.min(1) < 3 * STD
    return near.mean(), np.bincount(distances.argmin(1)[near], minlength=MODES) / near.sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_covers_all_modes(seed):
    good, shares = coverage(trained(gan.relativistic, 0.1, seed, 1000))
    assert good > 0.7
    assert 0.09 < shares.min() < shares.max() < 0.16  # without penalties some seeds give a mode 0.04, or 0.23
