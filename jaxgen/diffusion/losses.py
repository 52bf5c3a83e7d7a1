"""Denoising losses: a squared error at a random time, with a weight.

    L = E_{t, eps} [ w(t) mean ||net(x_t, t) - target||^2 ],    x_t = alpha(t) x0 + sigma(t) eps          (1)

The time's distribution and the weight are functions, so published recipes are combinations of values:

    DDPM            noise,     uniform_time,      no weight         arXiv:2006.11239
    Min-SNR         any,       uniform_time,      min_snr           arXiv:2303.09556
    EDM             data,      log_normal_time,   edm_weight        arXiv:2206.00364
    SD3             velocity,  logit_normal_time, no weight         arXiv:2403.03206
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.diffusion.path import Path
from jaxgen.diffusion.prediction import Coefficients, Prediction, path_coefficients
from jaxgen.typing import Array, ArrayLike, Key, Network

TimeDraw = Callable[[Key], Array]
"""``key -> scalar``: draws the time of one example."""

NoiseDraw = Callable[[Key, Sequence[int], jnp.dtype], Array]
"""``(key, shape, dtype) -> noise of that shape``: draws the noise of one example, as `jax.random.normal` does."""

Weight = Callable[[Coefficients, Prediction], Array]
"""``(coefficients, prediction) -> factor of the squared error of the network's output``."""


def denoising_loss(
    path: Path,
    prediction: Prediction,
    net: Network,
    x0: Array,
    key: Key,
    *,
    draw_time: TimeDraw | None = None,
    draw_noise: NoiseDraw = jax.random.normal,
    weight: Weight | None = None,
    axis_name: str | None = None,
) -> Array:
    """The loss of Eq. 1, one value per example; its mean is what a diffusion model is trained on.

    Args:
        path: the Gaussian path.
        prediction: what the network predicts.
        net: ``(x_t [batch, ...], t [batch]) -> output [batch, ...]``, parameters and conditioning closed over.
        x0: [batch, ...] clean data, floating, scaled to about [-1, 1].
        key: a single key; example i draws its time and noise from ``fold_in(key, i)``.
        draw_time: the distribution of times; `uniform_time(path)` by default.
        draw_noise: the distribution of eps, such as `offset_noise(0.1)`; standard normal by default.
        weight: the factor w; none by default (the "simple" loss in the network's own terms).
        axis_name: the mapped axis over which the batch is split, under pmap or shard_map.

    Returns:
        [batch], in float32 at least: means over all other axes.

    Raises:
        ValueError: the network's output, or the noise drawn, has another shape than ``x0``; a time drawn is no scalar.
        TypeError: ``x0`` is not floating, or ``key`` not a typed key.

    >>> from jaxgen import diffusion
    >>> x0 = jnp.zeros((3, 2))
    >>> exact = lambda x, t: x / diffusion.linear_beta().sigma(t)[:, None]  # all data at 0: x is pure noise
    >>> diffusion.denoising_loss(diffusion.linear_beta(), diffusion.noise, exact, x0, jax.random.key(0)).shape
    (3,)
    """
    checks.floating("x0", x0)
    checks.rank_at_least("x0", x0, 2)
    draw_time = uniform_time(path) if draw_time is None else draw_time
    keys = random.example_keys(key, x0.shape[0], axis_name=axis_name)
    t = jax.vmap(draw_time)(random.fold(keys, 0)).astype(jnp.promote_types(x0.dtype, jnp.float32))
    checks.shape("draw_time(keys)", t, (x0.shape[0],))
    eps = random.draw(draw_noise, random.fold(keys, 1), x0.shape[1:], x0.dtype)
    checks.same_shape("draw_noise(keys)", eps, "x0", x0)
    c = path_coefficients(path, t, x0)
    output = net((c.alpha * x0 + c.sigma * eps).astype(x0.dtype), t)
    checks.same_shape("net(x, t)", output, "x0", x0)
    error = jnp.square(output.astype(t.dtype) - prediction.target(c, x0, eps))
    if weight is not None:
        error = weight(c, prediction) * error
    return error.reshape(x0.shape[0], -1).mean(axis=1)


def uniform_time(path: Path) -> TimeDraw:
    """Times uniform over [path.t_min, path.t_max]."""
    return lambda key: jax.random.uniform(key, (), minval=path.t_min, maxval=path.t_max)


def log_normal_time(mean: float = -1.2, std: float = 1.2) -> TimeDraw:
    """Times whose logarithm is normal: EDM's training noise levels (arXiv:2206.00364, table 1)."""
    checks.positive("std", std)
    return lambda key: jnp.exp(mean + std * jax.random.normal(key))


def logit_normal_time(mean: float = 0.0, std: float = 1.0) -> TimeDraw:
    """Times in (0, 1) whose log(t / (1 - t)) is normal: SD3's rectified flows (arXiv:2403.03206, section 3.1)."""
    checks.positive("std", std)
    return lambda key: jax.nn.sigmoid(mean + std * jax.random.normal(key))


def offset_noise(strength: float = 0.1) -> NoiseDraw:
    """Standard normal noise plus one number per channel (the last axis) of standard deviation ``strength``.

    Its covariance within a channel is I + strength^2 1 1^T. White noise all but spares an image's mean brightness, so a
    model trained on it alone hardly learns to move it: offset noise (Guttenberg 2023, "Diffusion with offset noise";
    discussed in arXiv:2305.08891) makes it.

    Args:
        strength: at least 0.

    Raises:
        ValueError: ``strength`` is negative.
    """
    checks.interval("strength", strength, 0.0, math.inf)

    def draw(key: Key, shape: Sequence[int], dtype: jnp.dtype) -> Array:
        offset = jax.random.normal(jax.random.fold_in(key, 1), (*(1 for _ in shape[:-1]), shape[-1]), dtype)
        return jax.random.normal(key, tuple(shape), dtype) + jnp.asarray(strength, dtype) * offset

    return draw


def min_snr(gamma: float = 5.0) -> Weight:
    """min(SNR, gamma) on the error of x0, whatever the network predicts (Hang et al. 2023, arXiv:2303.09556, Eq. 8).

    Args:
        gamma: the cap, above 0.

    Raises:
        ValueError: ``gamma`` is not above 0.
    """
    checks.positive("gamma", gamma)
    return lambda c, prediction: jnp.minimum((c.alpha / c.sigma) ** 2, gamma) / prediction.gain(c)


def edm_weight(sigma_data: float = 0.5) -> Weight:
    """EDM's weight on the error of x0, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (arXiv:2206.00364, table 1).

    On paths other than `edm`, sigma stands for the ratio sigma / alpha.

    Args:
        sigma_data: standard deviation of the data, above 0.

    Raises:
        ValueError: ``sigma_data`` is not above 0.
    """
    checks.positive("sigma_data", sigma_data)
    return lambda c, prediction: (1 / sigma_data**2 + (c.alpha / c.sigma) ** 2) / prediction.gain(c)


def adaptive(losses: Array, *, power: float = 1.0, offset: float = 1e-3) -> Array:
    """Losses whose gradients are scaled down where they are large: L / (L + offset)^power, the divisor held constant.

    Geng et al. 2025 (arXiv:2505.13447, Eq. 22). With L a squared error, power 1/2 has the gradients of the pseudo-Huber
    loss, of one size wherever the error is large; at power 1, MeanFlow's, large errors pull less than small ones.

    Args:
        losses: [batch], one value per example, at least 0.
        power: at least 0; 0 changes nothing.
        offset: above 0, so that examples without error stay finite.

    Returns:
        [batch].

    Raises:
        ValueError: an option is out of range.
    """
    checks.interval("power", power, 0.0, math.inf)
    checks.positive("offset", offset)
    return losses * jax.lax.stop_gradient((losses + offset) ** -power)


def gaussian_nll(x: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> Array:
    """Negative log-likelihood of x under N(mean, variance), in nats.

        0.5 (x - mean)^2 / variance + 0.5 log(2 pi variance)

    Args:
        x: any shape.
        mean: broadcastable to ``x``.
        variance: broadcastable to ``x``, above 0.

    Returns:
        One value per element: sum them for the likelihood of a vector, average them for a loss.

    >>> float(gaussian_nll(0.0, 0.0, 1.0))
    0.9189...
    """
    return 0.5 * (jnp.square(x - jnp.asarray(mean)) / variance + jnp.log(2 * jnp.pi * jnp.asarray(variance)))
