"""Models whose answers are known in closed form, for testing samplers, losses and likelihoods against.

For data N(mean, std^2) the path's x_t is Gaussian, with variance

    V(t) = alpha(t)^2 std^2 + sigma(t)^2                                                       (1)

and everything follows: the best denoiser, and the probability flow, which carries each quantile of x_t to the same
quantile of x_s. All functions work in the dtype that they are given: run them in float64 (``jax.enable_x64``) to see a
solver's order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion.path import Path, coefficients
from jaxgen.typing import Array, ArrayLike, Denoiser


def gaussian_denoiser(path: Path, mean: ArrayLike, std: ArrayLike) -> Denoiser:
    """The exact denoiser E[x0 | x_t] of data N(mean, std^2), independent across elements.

    Args:
        path: the Gaussian path.
        mean: broadcastable to an example.
        std: broadcastable to an example, at least 0.

    Returns:
        A Denoiser.
    """

    def denoise(x: Array, t: Array) -> Array:
        alpha, sigma = coefficients(path, t, x)
        mean_, std_ = jnp.asarray(mean, x.dtype), jnp.asarray(std, x.dtype)
        gain = alpha * std_**2 / ((alpha * std_) ** 2 + sigma**2)
        return mean_ + gain * (x - alpha * mean_)

    return denoise


def gaussian_flow(path: Path, mean: ArrayLike, std: ArrayLike, x: Array, start: ArrayLike, end: ArrayLike) -> Array:
    """Carries x along the exact probability flow of data N(mean, std^2), from one time to another, by Eq. 1.

    Args:
        path: the Gaussian path.
        mean: broadcastable to an example.
        std: broadcastable to an example, at least 0.
        x: [batch, ...], the state at ``start``.
        start: time of ``x``, scalar or [batch].
        end: time wanted, scalar or [batch].

    Returns:
        The state at ``end``, of the shape of ``x``.
    """
    alpha, sigma = coefficients(path, start, x)
    alpha_end, sigma_end = coefficients(path, end, x)
    stretch = jnp.sqrt((jnp.square(alpha_end * std) + sigma_end**2) / (jnp.square(alpha * std) + sigma**2))
    return alpha_end * mean + stretch * (x - alpha * mean)


def mixture_denoiser(path: Path, means: Array, std: ArrayLike, weights: Array) -> Denoiser:
    """The exact denoiser of the mixture sum_k weights[k] N(means[k], std^2 I).

    Args:
        path: the Gaussian path.
        means: [components, features].
        std: one standard deviation for all, above 0.
        weights: [components], positive.

    Returns:
        A Denoiser of x [batch, features].
    """

    def denoise(x: Array, t: Array) -> Array:
        alpha, sigma = coefficients(path, t, x)
        alpha, sigma = jnp.reshape(alpha, (-1, 1, 1)), jnp.reshape(sigma, (-1, 1, 1))
        variance = (alpha * std) ** 2 + sigma**2
        offset = x[:, None, :] - alpha * means
        log_share = jnp.log(weights) - 0.5 * jnp.sum(offset**2 / variance, axis=-1)
        component = means + alpha * std**2 / variance * offset
        return jnp.sum(jax.nn.softmax(log_share, axis=-1)[..., None] * component, axis=1)

    return denoise


def mixture_log_density(path: Path, means: Array, std: ArrayLike, weights: Array) -> Callable[[Array, Array], Array]:
    """The log-density of x_t for data from the mixture sum_k weights[k] N(means[k], std^2 I), in nats.

        log p_t(x) = logsumexp_k [ log weights[k] + log N(x; alpha means[k], V I) ],    V of Eq. 1

    One component's less that of all is, up to a constant, the exact classifier of noised data.

    Args:
        path: the Gaussian path.
        means: [components, features].
        std: one standard deviation for all, above 0.
        weights: [components], positive, of sum 1.

    Returns:
        ``(x [batch, features], t [batch] or scalar) -> [batch]``.
    """

    def log_density(x: Array, t: Array) -> Array:
        alpha, sigma = (jnp.reshape(c, (-1, 1, 1)) for c in coefficients(path, t, x))
        variance = (alpha * std) ** 2 + sigma**2
        offset = x[:, None, :] - alpha * means
        each = -0.5 * jnp.sum(offset**2 / variance + jnp.log(2 * jnp.pi * variance), axis=-1)
        return jax.nn.logsumexp(each + jnp.log(weights), axis=-1)

    return log_density


def correlated_denoiser(path: Path, mean: ArrayLike, covariance: ArrayLike) -> Denoiser:
    """The exact denoiser of data N(mean, covariance) with any covariance U diag(variances) U^T.

        E[x0 | x] = mean + U diag(alpha variances / (alpha^2 variances + sigma^2)) U^T (x - alpha mean)

    Args:
        path: the Gaussian path.
        mean: [features].
        covariance: [features, features], symmetric and positive semi-definite; known, not traced.

    Returns:
        A Denoiser of x [batch, features].
    """
    variances, basis = np.linalg.eigh(np.asarray(covariance, np.float64))

    def denoise(x: Array, t: Array) -> Array:
        alpha, sigma = coefficients(path, t, x)
        mean_, variances_, basis_ = (jnp.asarray(a, x.dtype) for a in (mean, variances, basis))
        gain = alpha * variances_ / (alpha**2 * variances_ + sigma**2)
        along = jnp.matmul(x - alpha * mean_, basis_, precision="highest")
        return mean_ + jnp.matmul(gain * along, basis_.T, precision="highest")

    return denoise
