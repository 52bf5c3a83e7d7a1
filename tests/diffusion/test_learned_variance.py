"""Learned variances against Gaussian data, whose reverse steps are Gaussian and known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, testing
from tests.diffusion.oracle import MEAN, PATHS, STD

KEY = jax.random.key(4)
PATH = PATHS["cosine"]
TIMES = np.array([0.999, 0.7, 0.4, 0.1])
DRAWS = 60_000
X0 = jnp.asarray(MEAN + STD * np.random.default_rng(0).normal(size=(DRAWS, 3)), jnp.float32)


def reverse_steps(times):
    """Per step and element in float64: beta, beta~ and the variance of x_s given x_t, for N(MEAN, STD^2) data."""
    alpha, sigma = PATH.alpha(times)[:, None], PATH.sigma(times)[:, None]
    kept = alpha[:-1] / alpha[1:]
    beta = sigma[:-1] ** 2 - kept**2 * sigma[1:] ** 2
    posterior = beta * sigma[1:] ** 2 / sigma[:-1] ** 2
    marginal = (alpha * STD) ** 2 + sigma**2
    # Var(x_s | x_t) by Bayes, from x_t | x_s ~ N(kept x_s, beta)
    true = marginal[1:] * beta / marginal[:-1]
    return np.broadcast_to(beta, true.shape), np.broadcast_to(posterior, true.shape), true


def exact_network(times, *, prediction=diffusion.v, shift=0.0):
    """The exact denoiser, and the fraction at which Eq. 3 is the true variance."""
    beta, posterior, true = reverse_steps(times)
    if times[-1] == 0:
        posterior = np.concatenate([posterior[:-1], posterior[-2:-1]])
    fraction = np.log(true / posterior) / np.log(beta / posterior)
    denoise = testing.gaussian_denoiser(PATH, MEAN, STD)

    def net(x, t):
        c = diffusion.prediction.path_coefficients(PATH, t, x)
        x0 = denoise(x, t)
        row = jnp.argmin(jnp.abs(t[:, None] - times[:-1]), axis=1)
        output = prediction.target(c, x0, (x - c.alpha * x0) / c.sigma)
        return output, jnp.asarray(fraction, jnp.float32)[row] + shift

    return net


def bound(net, *, times=TIMES, x0=X0, key=KEY, prediction=diffusion.v):
    """The bound alone, per example: what one unit of weight adds."""
    losses = [
        diffusion.learned_variance_loss(PATH, prediction, net, x0, key, times=times, bound_weight=weight)
        for weight in (0.0, 1.0)
    ]
    return np.asarray(losses[1] - losses[0], np.float64)


def assert_mean(values, wanted):
    error = values.std() / np.sqrt(len(values))
    assert error < 0.02 * abs(wanted) + 1e-3, error
    assert abs(values.mean() - wanted) < 4.5 * error, (values.mean(), wanted, error)


@pytest.mark.parametrize("prediction", [diffusion.noise, diffusion.v], ids=["noise", "v"])
def test_the_bound_of_the_true_reverse_process(prediction):
    """E KL(q || p) = log(Sigma / beta~) / 2, where p is the true p(x_s | x_t) of variance Sigma."""
    _, posterior, true = reverse_steps(TIMES)
    wanted = 0.5 * np.log(true / posterior).mean(axis=1).sum()
    assert_mean(bound(exact_network(TIMES, prediction=prediction), prediction=prediction), wanted)


def test_the_bound_at_beta_tilde():
    """Sigma = beta~ leaves the squared distance of the means: E KL = (Sigma_true - beta~) / (2 beta~)."""
    _, posterior, true = reverse_steps(TIMES)
    net = exact_network(TIMES)
    wanted = 0.5 * (true / posterior - 1).mean(axis=1).sum()
    assert_mean(bound(lambda x, t: (net(x, t)[0], jnp.zeros_like(x))), wanted)


def test_a_grid_down_to_the_data_bounds_its_entropy():
    """Sum of KLs + E -log p(x0 | x_t) + KL(q(x_T) || prior) >= H(data); with the true steps the last is -log's mean."""
    times = np.append(TIMES, 0.0)
    _, posterior, true = reverse_steps(times)
    last = 0.5 * np.log(2 * np.pi * np.e * true[-1]).mean()
    wanted = 0.5 * np.log(true[:-1] / posterior[:-1]).mean(axis=1).sum() + last
    assert_mean(bound(exact_network(times), times=times), wanted)


def test_the_true_variance_is_the_minimum():
    net = exact_network(TIMES)

    def at(shift):
        moved = lambda x, t: (net(x, t)[0], net(x, t)[1] + shift)  # noqa: E731
        return diffusion.learned_variance_loss(
            PATH, diffusion.v, moved, X0[:2000], KEY, times=TIMES, bound_weight=1.0
        ).mean()

    slope, curvature = jax.jit(jax.grad(at))(0.0), jax.jit(jax.grad(jax.grad(at)))(0.0)
    assert curvature > 0
    assert abs(slope / curvature) < 0.05
    assert abs(jax.jit(jax.grad(at))(0.3)) > 5 * abs(slope)


def test_the_bound_trains_the_variance_and_the_simple_loss_the_mean():
    net = exact_network(TIMES)

    def gradient(weight):
        def loss(theta):
            moved = lambda x, t: (net(x, t)[0] + theta[0], net(x, t)[1] + theta[1])  # noqa: E731
            return diffusion.learned_variance_loss(
                PATH, diffusion.v, moved, X0[:64], KEY, times=TIMES, bound_weight=weight
            ).mean()

        return jax.jit(jax.grad(loss))(jnp.array([0.3, 0.3]))

    without, plenty = gradient(0.0), gradient(10.0)
    np.testing.assert_allclose(plenty[0], without[0], rtol=1e-5)
    assert abs(without[0]) > 0.1
    assert without[1] == 0
    assert abs(plenty[1]) > 0.1


def test_three_steps_sample_the_exact_moments():
    """Ancestral sampling with the true variances is exact in any number of steps; with beta~ it is not."""
    alpha, sigma = PATH.alpha(TIMES), PATH.sigma(TIMES)
    eps = jax.random.normal(jax.random.key(8), (DRAWS, 3))
    x = jnp.asarray(alpha[0] * MEAN + np.sqrt((alpha[0] * STD) ** 2 + sigma[0] ** 2) * eps, jnp.float32)
    sampler = jax.jit(
        lambda net_shift: diffusion.learned_variance_sample(
            KEY, PATH, diffusion.v, exact_network(TIMES, shift=net_shift), x, times=TIMES
        )
    )
    got = np.asarray(sampler(0.0), np.float64)
    std = np.sqrt((alpha[-1] * STD) ** 2 + sigma[-1] ** 2)
    np.testing.assert_allclose(got.mean(axis=0), alpha[-1] * MEAN, atol=4.5 * std.max() / np.sqrt(DRAWS))
    np.testing.assert_allclose(got.std(axis=0), std, rtol=4.5 / np.sqrt(2 * DRAWS))
    assert np.all(np.asarray(sampler(0.3)).std(axis=0) > 1.02 * std)


def test_fraction_0_is_ddpm_step_by_step():
    times = diffusion.uniform_times(PATH, 4)[:-1] * 0.999
    net = exact_network(times)
    x = X0[:5]
    got = diffusion.learned_variance_sample(
        KEY, PATH, diffusion.v, lambda x, t: (net(x, t)[0], jnp.zeros_like(x)), x, times=times
    )
    denoise = diffusion.denoiser(PATH, diffusion.v, lambda x, t: net(x, t)[0])
    np.testing.assert_allclose(
        got, diffusion.sample(KEY, denoise, diffusion.ddpm(PATH, times), x), rtol=2e-4, atol=1e-5
    )


def test_the_last_step_onto_the_data_draws_no_noise():
    times = np.array([0.9, 0.5, 0.0])
    net = exact_network(times)
    x = X0[:5]
    got, other = (
        diffusion.learned_variance_sample(
            KEY,
            PATH,
            diffusion.v,
            lambda x, t, f=f: (net(x, t)[0], jnp.where(t < 0.6, f, 0.5)[:, None] + 0 * x),
            x,
            times=times,
        )
        for f in (0.0, 1.0)
    )
    np.testing.assert_array_equal(got, other)


def test_an_example_depends_on_its_index_alone():
    net = exact_network(TIMES)
    losses = [
        diffusion.learned_variance_loss(PATH, diffusion.v, net, X0[:n], KEY, times=TIMES) for n in (3, 7)
    ]  # fmt: skip
    np.testing.assert_allclose(losses[0], losses[1][:3], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": [0.5, 0.7]}, "`times` must decrease strictly"),
        ({"times": [0.5, 0.0]}, "`times` must hold a time above 0 after the first"),
        ({"bound_weight": -1.0}, r"`bound_weight` must lie in \[0, inf\]"),
        ({"net": lambda x, t: (x, x[:, :1])}, r"`net\(x, t\)\[1\]` must have the shape of `x`"),
    ],
)
def test_bad_input_is_refused_by_name(options, message):
    options = {"times": TIMES, "net": lambda x, t: (x, x)} | options
    with pytest.raises(ValueError, match=message):
        diffusion.learned_variance_loss(PATH, diffusion.v, options.pop("net"), X0[:4], KEY, **options)
