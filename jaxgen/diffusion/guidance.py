"""Guidance: functions from denoisers to a denoiser, so that they compose and samplers need not know.

A denoiser is the score in other words (Tweedie's formula): on x = alpha x0 + sigma eps

    E[x0 | x] = (x + sigma^2 grad log p_t(x)) / alpha                                                     (1)

Extrapolating scores by a factor w is therefore extrapolating estimates of x0, whatever a network predicts:

    d = d_bad + w (d_good - d_bad)                                                                        (2)

with d_good the conditional and d_bad the unconditional denoiser in classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598), and a worse version of d_good itself in autoguidance (Karras et al. 2024, arXiv:2406.02507, Eq. 3).
A classifier's score is added, by Bayes' rule grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x) (Dhariwal &
Nichol 2021, arXiv:2105.05233, section 4), which in Eq. 1 is

    d = d_unconditional + w sigma^2 / alpha grad_x log p_t(y | x)                                         (3)

All of these treat examples apart, and all scales are data: another value does not recompile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks
from jaxgen.diffusion.path import Path, beside, coefficients, informative_times
from jaxgen.typing import Array, ArrayLike, Denoiser

LogProbability = Callable[[Array, Array], Array]
"""``(x [batch, ...], t [batch]) -> [batch]``: a classifier's log p_t(y | x) of the classes wanted."""


def cfg(conditional: Denoiser, unconditional: Denoiser, scale: ArrayLike) -> Denoiser:
    """Classifier-free guidance, Eq. 2: unconditional + scale (conditional - unconditional).

    Ho & Salimans 2022 (arXiv:2207.12598). Guiding estimates of x0 equals guiding noise, velocity or score, since each
    is affine in the others.

    Args:
        conditional: the denoiser that knows the condition.
        unconditional: the one that does not.
        scale: 1 is the conditional denoiser, 0 the unconditional one, above 1 is what makes samples look typical of
            their condition (the paper's 1 + w). A finite number, or an array that broadcasts against x; it may be
            traced.

    Returns:
        A Denoiser that evaluates both.

    Raises:
        ValueError: a scale that is known is not finite.

    >>> import jax.numpy as jnp
    >>> cfg(lambda x, t: x + 1, lambda x, t: x, 3.0)(jnp.zeros((1, 1)), jnp.ones((1,)))
    Array([[3.]], dtype=float32)
    """
    checks.finite("scale", scale)

    def denoise(x: Array, t: Array) -> Array:
        return _extrapolate(conditional(x, t), unconditional(x, t), scale)

    return denoise


def cfg_interval(
    conditional: Denoiser, unconditional: Denoiser, scale: ArrayLike, *, low: ArrayLike, high: ArrayLike
) -> Denoiser:
    """Classifier-free guidance at the times in [low, high], the conditional denoiser elsewhere.

    Kynkäänniemi et al. 2024 (arXiv:2404.07724, Eq. 5): guidance harms at high noise and is useless at low. Where no
    example's time is in the interval the unconditional denoiser is not evaluated (but under `jax.vmap`, which makes a
    select of every condition).

    Args:
        conditional: the denoiser that knows the condition.
        unconditional: the one that does not.
        scale: as in `cfg`.
        low: where guidance ends, in the path's own time; a number, which may be traced. Published intervals of noise
            levels sigma / alpha become times by `time_at_ratio`.
        high: where it begins, at least ``low``.

    Returns:
        A Denoiser.

    Raises:
        ValueError: a scale that is known is not finite, or ``low`` is known to exceed ``high``.

    >>> denoise = cfg_interval(lambda x, t: x + 1, lambda x, t: x, 3.0, low=0.2, high=0.8)
    >>> denoise(jnp.zeros((2, 1)), jnp.array([0.1, 0.5])).tolist()
    [[1.0], [3.0]]
    """
    checks.finite("scale", scale)
    _ordered(low, high)

    def denoise(x: Array, t: Array) -> Array:
        inside = jnp.broadcast_to((low <= jnp.asarray(t)) & (jnp.asarray(t) <= high), x.shape[:1])
        good = conditional(x, t)
        guided = jax.lax.cond(jnp.any(inside), lambda: _extrapolate(good, unconditional(x, t), scale), lambda: good)
        return jnp.where(beside(inside, x), guided, good)

    return denoise


def autoguidance(good: Denoiser, bad: Denoiser, scale: ArrayLike) -> Denoiser:
    """Guides a denoiser by a worse version of itself, Eq. 2: bad + scale (good - bad).

    Karras et al. 2024 (arXiv:2406.02507, Eq. 3): a smaller or less trained network under the same condition errs where
    the good one does, only more, so that the difference points away from the errors and variety is kept.

    Args:
        good: the denoiser to improve.
        bad: the worse one, trained on the same data and condition.
        scale: as in `cfg`; 1 is ``good``.

    Returns:
        A Denoiser that evaluates both.

    Raises:
        ValueError: a scale that is known is not finite.
    """
    return cfg(good, bad, scale)


def classifier_guidance(denoise: Denoiser, path: Path, log_probability: LogProbability, scale: ArrayLike) -> Denoiser:
    """Guides by the gradient of a classifier of noised data, Eq. 3.

    Dhariwal & Nichol 2021 (arXiv:2105.05233). With the exact classifier, scale 1 is the exact conditional denoiser.
    Where alpha is 0 (`rectified_flow` at t = 1) Eq. 3 is 0 times infinity, and both functions are evaluated just below.

    Args:
        denoise: the denoiser that does not know the condition.
        path: the Gaussian path.
        log_probability: ``(x [batch, ...], t [batch]) -> [batch]``, the classifier's log p_t(y | x), differentiable by
            x; that of an example must depend on that example alone.
        scale: 0 is ``denoise``; a finite number, or an array that broadcasts against x; it may be traced.

    Returns:
        A Denoiser that evaluates the classifier and its gradient. It raises ValueError where ``log_probability`` gives
        another shape than [batch].

    Raises:
        ValueError: a scale that is known is not finite.
    """
    checks.finite("scale", scale)

    def guided(x: Array, t: Array) -> Array:
        t = jnp.broadcast_to(informative_times(path, t, x), x.shape[:1])
        alpha, sigma = coefficients(path, t, x)

        def total(x: Array) -> Array:
            values = log_probability(x, t)
            checks.shape("log_probability(x, t)", values, x.shape[:1])
            return jnp.sum(values)

        return (denoise(x, t) + scale * sigma**2 / alpha * jax.grad(total)(x)).astype(x.dtype)

    return guided


def clip_data(denoise: Denoiser, low: ArrayLike, high: ArrayLike) -> Denoiser:
    """Clips estimates of x0 to the range of the data, as DDPM's sampler does (arXiv:2006.11239).

    Args:
        denoise: the denoiser.
        low: least value of the data, such as -1; broadcasts against x.
        high: largest value of the data.

    Returns:
        A Denoiser.

    Raises:
        ValueError: ``low`` is known to exceed ``high``.
    """
    _ordered(low, high)

    def clipped(x: Array, t: Array) -> Array:
        x0 = denoise(x, t)
        return jnp.clip(x0, low, high).astype(x0.dtype)

    return clipped


def dynamic_threshold(denoise: Denoiser, *, quantile: ArrayLike = 0.995) -> Denoiser:
    """Shrinks estimates of x0 that leave [-1, 1] back into it (Imagen, arXiv:2205.11487, section 2.3).

    Each example is clipped to [-s, s] and divided by s, where s is the ``quantile`` of its absolute values, at least 1.
    Large guidance scales, which push values out of range at every step, then saturate less than under `clip_data`.

    Args:
        denoise: the denoiser.
        quantile: in [0, 1]; may be traced.

    Returns:
        A Denoiser with values in [-1, 1].

    Raises:
        ValueError: a quantile that is known is out of range.

    >>> denoise = dynamic_threshold(lambda x, t: x, quantile=0.5)
    >>> denoise(jnp.array([[0.5, 4.0, -8.0], [0.1, 0.2, 0.3]]), 0.0)
    Array([[ 0.125,  1.   , -1.   ],
           [ 0.1  ,  0.2  ,  0.3  ]], dtype=float32)
    """
    checks.interval("quantile", quantile, 0.0, 1.0)

    def thresholded(x: Array, t: Array) -> Array:
        x0 = denoise(x, t)
        size = jnp.abs(x0).reshape(x0.shape[0], -1).astype(jnp.promote_types(x0.dtype, jnp.float32))
        bound = beside(jnp.maximum(jnp.quantile(size, jnp.asarray(quantile, size.dtype), axis=1), 1), x0)
        return (jnp.clip(x0, -bound, bound) / bound).astype(x0.dtype)

    return thresholded


def _extrapolate(good: Array, bad: Array, scale: ArrayLike) -> Array:
    """Eq. 2, in the dtype of the denoisers whatever that of the scale."""
    return (bad + scale * (good - bad)).astype(good.dtype)


def _ordered(low: ArrayLike, high: ArrayLike) -> None:
    known = not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer)
    if known and not np.all(np.asarray(low) <= np.asarray(high)):
        raise ValueError(f"`low` must be at most `high`, got {low} and {high}")
