"""Gaussian paths: how data turns into noise.

A path joins a clean example x0 to noise eps ~ N(0, I) by two functions of its own time t:

    x_t = alpha(t) x0 + sigma(t) eps                                                           (1)

with alpha(0) = 1 and sigma(0) = 0: time 0 is the data. Every diffusion and flow-matching model with Gaussian noise
is one pair (alpha, sigma). What matters to a sampler is the noise-to-signal ratio

    rho(t) = sigma(t) / alpha(t),    lambda(t) = -log rho(t),                                  (2)

lambda being half the log signal-to-noise ratio of Kingma et al. 2021 (arXiv:2107.00630).

The two functions take NumPy arrays to NumPy arrays, in float64, and JAX arrays, traced or not, to JAX arrays, so that
the tables of a sampler are built on the host by the very formulas that a training step traces on the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks
from jaxgen.typing import Array, ArrayLike


class Path(NamedTuple):
    """A Gaussian path, Eq. 1.

    Attributes:
        alpha: the signal's factor, a function of time; runs on NumPy and on JAX arrays.
        sigma: the noise's standard deviation, likewise.
        t_min: the smallest time worth resolving, above 0: where grids of times end before they step to the data at 0.
        t_max: the time at which sampling starts.
        scale: Runge-Kutta solvers integrate x / scale(t) against sigma(t) / scale(t) (Karras et al. 2022,
            arXiv:2206.00364, s(t) of Eq. 4). None stands for alpha, which gives straight coordinates for
            variance-preserving and variance-exploding paths alike; alpha / scale must be affine in sigma / scale.
    """

    alpha: Callable[[Any], Any]
    sigma: Callable[[Any], Any]
    t_min: float
    t_max: float
    scale: Callable[[Any], Any] | None = None


def linear_beta(steps: int = 1000, beta_first: float = 1e-4, beta_last: float = 0.02) -> Path:
    """The variance-preserving path of DDPM (Ho et al. 2020, arXiv:2006.11239, section 4).

    Time runs over [0, steps] and counts noising steps, as in the paper: alpha(t)^2 is the product of the first t
    factors (1 - beta_s), beta rising linearly from ``beta_first`` to ``beta_last``, so that t = 1 is the first noised
    state and t = steps the last. (Code that indexes its arrays of betas from 0, as diffusers does, calls our t by the
    number t - 1.) Between whole times log alpha is linear.

    Args:
        steps: number of noising steps, at least 1.
        beta_first: variance added by the first step, in (0, 1).
        beta_last: variance added by the last step, in [beta_first, 1).

    Raises:
        ValueError: an argument is out of its range.
    """
    checks.positive_integer("steps", steps)
    if not 0 < beta_first <= beta_last < 1:
        raise ValueError(f"betas must satisfy 0 < beta_first <= beta_last < 1, got {beta_first} and {beta_last}")
    betas = np.linspace(beta_first, beta_last, steps)
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])

    def interpolated(t: Any) -> Any:
        xp = _numpy_of(t)
        below = xp.clip(xp.floor(t), 0, steps - 1).astype(np.int32)
        values = xp.asarray(log_alpha_bar, t.dtype)
        return values[below] + (t - below.astype(t.dtype)) * (values[below + 1] - values[below])

    return Path(
        alpha=lambda t: _numpy_of(t).exp(0.5 * interpolated(_float(t))),
        # expm1 keeps its digits where alpha is close to 1.
        sigma=lambda t: _numpy_of(t).sqrt(-_numpy_of(t).expm1(interpolated(_float(t)))),
        t_min=1.0,
        t_max=float(steps),
    )


def cosine(offset: float = 0.008) -> Path:
    """The variance-preserving cosine path (Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17), over times [0, 1].

    alpha(t) = cos(a(t)) / cos(a(0)) with a(t) = (t + offset) / (1 + offset) * pi / 2, held at 1e-4 where it would fall
    below, just before t = 1, as the paper clips its last betas.

    Args:
        offset: the paper's s, in (0, 1).

    Raises:
        ValueError: ``offset`` is out of its range.
    """
    if not 0 < offset < 1:
        raise ValueError(f"`offset` must lie in (0, 1), got {offset}")
    rate = 0.5 * np.pi / (1 + offset)
    angle0 = rate * offset

    def alpha(t: Any) -> Any:
        t = _float(t)
        xp = _numpy_of(t)
        return xp.maximum(xp.cos(rate * t + angle0) / np.cos(angle0), 1e-4)

    def sigma(t: Any) -> Any:
        # 1 - alpha^2 = sin(a - a0) sin(a + a0) / cos(a0)^2, without the cancellation of the left side near t = 0.
        t = _float(t)
        xp = _numpy_of(t)
        return xp.sqrt(xp.sin(rate * t) * xp.sin(rate * t + 2 * angle0)) / np.cos(angle0)

    return Path(alpha=alpha, sigma=sigma, t_min=1e-3, t_max=1.0)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Path:
    """The variance-exploding path of EDM (Karras et al. 2022, arXiv:2206.00364): alpha = 1, sigma = t.

    Args:
        sigma_min: the last noise level before the data, above 0.
        sigma_max: the first noise level of sampling, above ``sigma_min``.

    Raises:
        ValueError: the levels are out of order.
    """
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(f"noise levels must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return Path(
        alpha=lambda t: _numpy_of(t).ones_like(_float(t)),
        sigma=_float,
        t_min=sigma_min,
        t_max=sigma_max,
    )


def rectified_flow() -> Path:
    """The straight path of rectified flow and flow matching (arXiv:2209.03003, 2210.02747), over times [0, 1].

    alpha = 1 - t and sigma = t: data at 0 and pure noise at 1, as in Stable Diffusion 3 (the flow-matching papers count
    time the other way). Solvers may start at t = 1, where alpha is exactly 0.
    """
    return Path(
        alpha=lambda t: 1 - _float(t),
        sigma=_float,
        t_min=1e-3,
        t_max=1.0,
        scale=lambda t: _numpy_of(t).ones_like(_float(t)),
    )


def diffuse(path: Path, x0: Array, t: ArrayLike, noise: Array) -> Array:
    """Noises clean data to times t: x_t = alpha(t) x0 + sigma(t) noise, Eq. 1.

    Args:
        path: the Gaussian path.
        x0: [batch, ...] clean data, floating.
        t: [batch] or scalar, in [0, path.t_max].
        noise: shape of ``x0``, standard normal.

    Returns:
        x_t, of the shape and dtype of ``x0``.

    Raises:
        ValueError: shapes disagree, or a time that is known is out of range.
        TypeError: ``x0`` is not floating.

    >>> diffuse(linear_beta(), jnp.ones((1, 2)), 0.0, jnp.zeros((1, 2)))
    Array([[1., 1.]], dtype=float32)
    """
    checks.floating("x0", x0)
    checks.rank_at_least("x0", x0, 1)
    checks.same_shape("noise", noise, "x0", x0)
    alpha, sigma = coefficients(path, t, x0)
    return (alpha * x0 + sigma * noise).astype(x0.dtype)


def coefficients(path: Path, t: ArrayLike, x: Array) -> tuple[Array, Array]:
    """alpha(t) and sigma(t), shaped to multiply ``x``.

    Args:
        path: the Gaussian path.
        t: [batch] or scalar, in [0, path.t_max].
        x: [batch, ...].

    Returns:
        Two arrays [batch, 1, ...] (or scalars, for a scalar ``t``), in float32 at least.

    Raises:
        ValueError: ``t`` has another shape, or holds a known value out of range.
    """
    t = times_for(path, t, x)
    t = beside(t, x) if t.ndim else t
    return path.alpha(t), path.sigma(t)


def beside(t: Array, x: Array) -> Array:
    """One value per example, t [batch], as [batch, 1, ...], so that it multiplies x [batch, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def times_for(path: Path, t: ArrayLike, x: Array) -> Array:
    """Checks times against ``x`` and gives them in float32 at least: half precision cannot count to 1,000."""
    if jnp.ndim(t) != 0:
        checks.shape("t", t, (x.shape[0],))
    checks.interval("t", t, 0.0, path.t_max)
    return jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32))


def informative_times(path: Path, t: ArrayLike, x: Array) -> Array:
    """Times as `times_for` gives them, but where alpha is 0 a thousandth less.

    There x is noise alone, and what scales a derivative by sigma^2 / alpha meets 0 times infinity, whose limit exists.
    """
    t = times_for(path, t, x)
    return jnp.where(path.alpha(t) > 0, t, 0.999 * t)


def noise_ratio(path: Path, t: np.ndarray) -> np.ndarray:
    """rho(t) = sigma / alpha of Eq. 2 in float64 on the host; infinite where alpha is 0."""
    t = np.asarray(t, np.float64)
    with np.errstate(divide="ignore"):
        return path.sigma(t) / path.alpha(t)


def _numpy_of(t: Any) -> Any:
    return jnp if isinstance(t, jax.Array) else np


def _float(t: Any) -> Any:
    if isinstance(t, jax.Array):
        return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.float32)
    return np.asarray(t, np.float64)
