"""Learned variances: a network that also says how wide each step of ancestral sampling is.

Nichol & Dhariwal 2021 (arXiv:2102.09672, section 3.1). Over a grid of times t_0 > t_1 > ... > t_n, each step from t to
the next time s samples from a Gaussian p(x_s | x_t) beside the posterior q(x_s | x_t, x0), with k = alpha / alpha_s:

    q = N(m(x_t, x0), beta~),    m = (k sigma_s^2 x_t + alpha_s beta x0) / sigma^2                           (1)
    beta = sigma^2 - k^2 sigma_s^2,    beta~ = beta sigma_s^2 / sigma^2                                      (2)
    p = N(m(x_t, x0_hat), Sigma),    log Sigma = f log beta + (1 - f) log beta~                              (3)

Besides x0_hat the network gives the fraction f of every element. beta~ is the variance if x0 were known, beta if it
were white noise. The bound on the data's likelihood is the sum over the steps of KL(q || p); a step onto the data
(s = 0) has -log p(x0 | x_t) in its place, and there, where beta~ is 0, that of the step before stands in Eq. 3. By

    KL(q || p) = gaussian_nll(m(x_t, x0), m(x_t, x0_hat), Sigma) + beta~ / (2 Sigma) - log(2 pi e beta~) / 2       (4)

both are one expression. It trains f alone: x0_hat enters Eq. 4 without gradient and learns from the simple loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks, random
from jaxgen.diffusion.losses import gaussian_nll
from jaxgen.diffusion.path import Path, beside
from jaxgen.diffusion.prediction import Prediction, path_coefficients
from jaxgen.diffusion.tables import grid
from jaxgen.typing import Array, ArrayLike, Key

VarianceNetwork = Callable[[Array, Array], tuple[Array, Array]]
"""``(x [batch, ...], t [batch]) -> (output, fraction)``, both of the shape of x."""


def learned_variance_loss(
    path: Path,
    prediction: Prediction,
    net: VarianceNetwork,
    x0: Array,
    key: Key,
    *,
    times: ArrayLike,
    bound_weight: float = 1e-3,
    axis_name: str | None = None,
) -> Array:
    """The paper's hybrid loss: the simple loss of the output plus ``bound_weight`` times the bound, Eq. 4.

    Args:
        path: the Gaussian path.
        prediction: what the network's output predicts.
        net: ``(x [batch, ...], t [batch]) -> (output, fraction)``, both of the shape of x; the paper halves an output
            of twice the channels, ``output, v = jnp.split(net(x, t), 2, axis=-1)``, and takes the fraction (v + 1) / 2.
        x0: [batch, ...] clean data, floating, scaled to about [-1, 1].
        key: a single key; example i draws its step and noise from ``fold_in(key, i)``.
        times: [n + 1] decreasing times, the grid that sampling will walk.
        bound_weight: the paper's lambda, at least 0.
        axis_name: the mapped axis over which the batch is split, under pmap or shard_map.

    Returns:
        [batch], in float32 at least: means over all other axes, of one step drawn uniformly; the bound counts n times
        that, in nats per element.

    Raises:
        ValueError: the network's outputs have another shape than ``x0``; ``times`` do not decrease or are out of range.
        TypeError: ``x0`` is not floating, or ``key`` not a typed key.
    """
    checks.floating("x0", x0)
    checks.rank_at_least("x0", x0, 2)
    checks.interval("bound_weight", bound_weight, 0.0, np.inf)
    table = _steps(path, times)
    n = len(table.time)
    keys = random.example_keys(key, x0.shape[0], axis_name=axis_name)
    clock = jnp.promote_types(x0.dtype, jnp.float32)
    index = jax.vmap(lambda key: jax.random.randint(key, (), 0, n))(random.fold(keys, 0))
    t = jnp.asarray(table.time, clock)[index]
    step = _Step(*(beside(jnp.asarray(column, clock)[index], x0) for column in table))
    eps = random.normal(random.fold(keys, 1), x0.shape[1:], dtype=x0.dtype)
    c = path_coefficients(path, t, x0)
    x = (c.alpha * x0 + c.sigma * eps).astype(x0.dtype)
    output, fraction = _outputs(net, x, t)
    simple = jnp.square(output.astype(clock) - prediction.target(c, x0, eps))
    estimate = jax.lax.stop_gradient(prediction.to_data(c, x, output))
    bound = _bound(step, step.per_x * x + step.per_x0 * x0, step.per_x * x + step.per_x0 * estimate, fraction)
    return (simple + bound_weight * n * bound).reshape(x0.shape[0], -1).mean(axis=1)


def learned_variance_sample(
    key: Key, path: Path, prediction: Prediction, net: VarianceNetwork, x: Array, *, times: ArrayLike
) -> Array:
    """Ancestral sampling with the network's own variances, Eq. 3, in one `jax.lax.scan`.

    A table's noise has one standard deviation for all elements, so this is no table; at fraction 0 it is `ddpm`'s. A
    step onto the data draws no noise.

    Args:
        key: a single key, or [batch] keys, one per example.
        path: the Gaussian path.
        prediction: what the network's output predicts.
        net: ``(x, t) -> (output, fraction)``, as in `learned_variance_loss`.
        x: [batch, ...], the state at ``times[0]``, such as `prior` draws; floating.
        times: [n + 1] decreasing times.

    Returns:
        The state at the last time, of the shape and dtype of ``x``. Example i depends on (key, i) and x[i] alone, if
        the network treats examples apart.

    Raises:
        ValueError: the network's outputs have another shape than ``x``; ``times`` do not decrease or are out of range.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.
    """
    checks.floating("x", x)
    checks.rank_at_least("x", x, 1)
    keys = random.keys_for(key, x.shape[0])
    clock = jnp.promote_types(x.dtype, jnp.float32)
    table = _steps(path, times)

    def walk(x: Array, row: tuple[Array, _Step]) -> tuple[Array, None]:
        index, step = row
        t = jnp.full(x.shape[:1], step.time)
        output, fraction = _outputs(net, x, t)
        estimate = prediction.to_data(path_coefficients(path, t, x), x, output)
        eps = random.normal(random.fold(keys, index + 1), x.shape[1:], dtype=x.dtype)
        std = jnp.where(step.last, 0.0, jnp.exp(0.5 * _log_variance(step, fraction)))
        return (step.per_x * x + step.per_x0 * estimate + std * eps).astype(x.dtype), None

    rows = (jnp.arange(len(table.time)), _Step(*(jnp.asarray(column, clock) for column in table)))
    return jax.lax.scan(walk, x, rows)[0]


class _Step(NamedTuple):
    """Eqs. 1 and 2, one value per step; ``last`` is 1 for a step onto the data."""

    time: Any
    per_x: Any
    per_x0: Any
    log_beta: Any
    log_posterior: Any
    last: Any


def _steps(path: Path, times: ArrayLike) -> _Step:
    """In float64, on the host."""
    times = grid(path, times)
    alpha, sigma = path.alpha(times), path.sigma(times)
    variance, variance_s = sigma[:-1] ** 2, sigma[1:] ** 2
    kept = alpha[:-1] / alpha[1:]
    beta = variance - kept**2 * variance_s
    posterior = beta * variance_s / variance
    last = posterior == 0
    if last[0]:
        raise ValueError("`times` must hold a time above 0 after the first, whose variance the last step borrows")
    posterior[-1] = posterior[-2] if last[-1] else posterior[-1]
    return _Step(
        times[:-1], kept * variance_s / variance, alpha[1:] * beta / variance, np.log(beta), np.log(posterior), last
    )


def _log_variance(step: _Step, fraction: Array) -> Array:
    return fraction * step.log_beta + (1 - fraction) * step.log_posterior


def _bound(step: _Step, wanted: Array, mean: Array, fraction: Array) -> Array:
    """Eq. 4, or -log p for a step onto the data."""
    variance = jnp.exp(_log_variance(step, fraction))
    posterior = jnp.exp(step.log_posterior)
    inner = 0.5 * (posterior / variance - jnp.log(2 * jnp.pi * jnp.e) - step.log_posterior)
    return gaussian_nll(wanted, mean, variance) + jnp.where(step.last, 0.0, inner)


def _outputs(net: VarianceNetwork, x: Array, t: Array) -> tuple[Array, Array]:
    output, fraction = net(x, t)
    checks.same_shape("net(x, t)[0]", output, "x", x)
    checks.same_shape("net(x, t)[1]", fraction, "x", x)
    return output, fraction.astype(jnp.promote_types(x.dtype, jnp.float32))
