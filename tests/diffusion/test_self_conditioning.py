"""Self-conditioning: what the network sees, when, and where the gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, testing
from tests.diffusion.oracle import MEAN, PATHS, STD

KEY = jax.random.key(2)
PATH = PATHS["cosine"]
X0 = jax.random.normal(jax.random.key(0), (400, 3))


def loss(net, x0=X0, key=KEY, **options):
    network = diffusion.self_conditioned(PATH, diffusion.v, net, key=key, **options)
    return diffusion.denoising_loss(PATH, diffusion.v, network, x0, key)


def test_a_network_that_ignores_the_estimate_has_the_plain_loss():
    plain = diffusion.denoising_loss(PATH, diffusion.v, lambda x, t: jnp.tanh(x), X0, KEY)
    np.testing.assert_array_equal(loss(lambda x, t, estimate: jnp.tanh(x)), plain)


@pytest.mark.parametrize("prediction", ["noise", "data", "v", "velocity", "score"])
def test_the_estimate_is_that_of_x0(prediction):
    """A network that knows the truth on its first pass is shown, as estimate, the exact denoiser's."""
    prediction, exact, seen = getattr(diffusion, prediction), testing.gaussian_denoiser(PATH, MEAN, STD), []

    def net(x, t, estimate):
        seen.append(estimate)
        c = diffusion.prediction.path_coefficients(PATH, t, x)
        x0 = exact(x, t)
        return prediction.target(c, x0, (x - c.alpha * x0) / c.sigma)

    x, t = X0[:6], jnp.linspace(0.2, 0.8, 6)
    diffusion.self_conditioned(PATH, prediction, net)(x, t)
    np.testing.assert_array_equal(seen[0], 0)
    np.testing.assert_allclose(seen[1], exact(x, t), rtol=1e-4, atol=1e-5)


def shown(key=KEY, batch=400, **options):
    """Which examples see an estimate, by a network that always says 1 of it."""
    seen = []

    def net(x, t, estimate):
        seen.append(estimate)
        return jnp.ones_like(x)

    network = diffusion.self_conditioned(PATH, diffusion.data, net, key=key, **options)
    network(X0[:batch], jnp.full(batch, 0.5))
    assert set(np.unique(seen[1])) <= {0.0, 1.0}
    assert np.all(seen[1] == seen[1][:, :1]), "one coin per example"
    return np.asarray(seen[1][:, 0])


def test_half_of_the_examples_see_their_estimate():
    assert abs(shown().mean() - 0.5) < 4 * 0.5 / 20
    assert abs(shown(probability=0.9).mean() - 0.9) < 4 * 0.3 / 20
    assert np.all(shown(key=None) == 1), "all in sampling"
    np.testing.assert_array_equal(shown()[:7], shown(batch=7))
    assert np.any(shown() != shown(key=jax.random.key(3)))


def test_coins_are_independent_of_times_and_noise():
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(400))
    for fold in (0, 1):
        uniform = jax.vmap(lambda key, fold=fold: jax.random.uniform(jax.random.fold_in(key, fold)))(keys)
        assert abs(np.corrcoef(uniform, shown())[0, 1]) < 4 / 20


def test_no_gradient_flows_through_the_first_pass():
    """d/da of mean (a x + b estimate - target)^2 with the estimate (a x turned into x0) held where it is."""

    def value(a, frozen):
        def net(x, t, estimate):
            first = jnp.all(estimate == 0)  # concrete: nothing is compiled here
            return (frozen if first else a) * x + 0.5 * estimate

        return loss(net, probability=1.0).mean()

    through, held = jax.grad(lambda a: value(a, a))(0.3), jax.grad(lambda a: value(a, 0.3))(0.3)
    np.testing.assert_allclose(through, held, rtol=1e-6)
    assert abs(held) > 1e-3


def test_sampling_is_the_two_pass_network_s():
    net = lambda x, t, estimate: 0.3 * x + 0.5 * estimate  # noqa: E731
    table = diffusion.ddim(PATH, diffusion.uniform_times(PATH, 5))
    by_hand = diffusion.denoiser(
        PATH, diffusion.v, lambda x, t: net(x, t, diffusion.denoiser(PATH, diffusion.v, lambda x, t: 0.3 * x)(x, t))
    )
    ours = diffusion.denoiser(PATH, diffusion.v, diffusion.self_conditioned(PATH, diffusion.v, net))
    got, wanted = (diffusion.sample(KEY, denoise, table, X0[:4]) for denoise in (ours, by_hand))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probability": 1.5}, ValueError, r"`probability` must lie in \[0, 1\], got 1.5"),
        ({"key": 3}, TypeError, "`key` must be a typed PRNG key"),
    ],
)
def test_bad_input_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        diffusion.self_conditioned(PATH, diffusion.v, lambda x, t, estimate: x, **options)
