"""What a network predicts, as a value.

On the path x = alpha x0 + sigma eps a network may be trained to give any linear combination of x0 and eps. Each is a
`Prediction`: the target that it is trained on, and how its output turns into an estimate of x0. After `denoiser` has
applied the latter, nothing in the library asks which one it was.

    noise     eps                              x0 = (x - sigma out) / alpha                        (1)
    data      x0                               x0 = out                                            (2)
    v         alpha eps - sigma x0             x0 = (alpha x - sigma out) / (alpha^2 + sigma^2)    (3)
    velocity  alpha' x0 + sigma' eps           x0 = (sigma' x - sigma out) / det                   (4)
    score     -eps / sigma                     x0 = (x + sigma^2 out) / alpha                      (5)

with ' the derivative by time and det = alpha sigma' - alpha' sigma. (1) is DDPM (arXiv:2006.11239), (3) Salimans & Ho
2022 (arXiv:2202.00512), (4) flow matching (arXiv:2210.02747), (5) Song et al. 2021 (arXiv:2011.13456).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.diffusion.path import Path, beside, times_for
from jaxgen.typing import Array, Denoiser, Network


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives by time at one time each, shaped to multiply x."""

    alpha: Array
    sigma: Array
    alpha_dot: Array
    sigma_dot: Array


class Prediction(NamedTuple):
    """One of Eqs. 1-5, as functions of a path's coefficients.

    Attributes:
        target: (coefficients, x0, noise) -> what the network should output.
        to_data: (coefficients, x, output) -> x0.
        gain: (coefficients) -> the factor c^2 by which squared errors of the output exceed those of the x0 that it
            implies, ||out - target||^2 = c^2 ||x0_hat - x0||^2.
    """

    target: Callable[[Coefficients, Array, Array], Array]
    to_data: Callable[[Coefficients, Array, Array], Array]
    gain: Callable[[Coefficients], Array]


noise = Prediction(
    target=lambda c, x0, eps: eps,
    to_data=lambda c, x, out: (x - c.sigma * out) / c.alpha,
    gain=lambda c: (c.alpha / c.sigma) ** 2,
)
"""Predicts the noise, Eq. 1."""

data = Prediction(
    target=lambda c, x0, eps: x0,
    to_data=lambda c, x, out: out,
    gain=lambda c: jnp.ones_like(c.alpha),
)
"""Predicts the clean data, Eq. 2."""

v = Prediction(
    target=lambda c, x0, eps: c.alpha * eps - c.sigma * x0,
    to_data=lambda c, x, out: (c.alpha * x - c.sigma * out) / (c.alpha**2 + c.sigma**2),
    gain=lambda c: ((c.alpha**2 + c.sigma**2) / c.sigma) ** 2,
)
"""Predicts v, Eq. 3."""

velocity = Prediction(
    target=lambda c, x0, eps: c.alpha_dot * x0 + c.sigma_dot * eps,
    to_data=lambda c, x, out: (c.sigma_dot * x - c.sigma * out) / _determinant(c),
    gain=lambda c: (_determinant(c) / c.sigma) ** 2,
)
"""Predicts the velocity dx/dt along the path, Eq. 4."""

score = Prediction(
    target=lambda c, x0, eps: -eps / c.sigma,
    to_data=lambda c, x, out: (x + c.sigma**2 * out) / c.alpha,
    gain=lambda c: (c.alpha / c.sigma**2) ** 2,
)
"""Predicts the score, the gradient of the log-density of x, Eq. 5."""


def denoiser(path: Path, prediction: Prediction, net: Network) -> Denoiser:
    """Turns a network into an estimate of the clean data.

    Args:
        path: the path that the network was trained on.
        prediction: what it predicts: `noise`, `data`, `v`, `velocity` or `score`.
        net: ``(x [batch, ...], t [batch]) -> output``, parameters and conditioning closed over.

    Returns:
        A Denoiser ``(x [batch, ...], t [batch] or scalar) -> x0``, of the shape and dtype of x. It raises ValueError
        where the network's output has another shape than x, or where a time that is known is not in [0, path.t_max].

    >>> from jaxgen import diffusion
    >>> blank = diffusion.denoiser(diffusion.linear_beta(), diffusion.noise, lambda x, t: x)  # x is all noise, it says
    >>> blank(jnp.ones((2, 8, 8, 1)), 0.0).shape
    (2, 8, 8, 1)
    """

    def denoise(x: Array, t: Array) -> Array:
        t = jnp.broadcast_to(times_for(path, t, x), x.shape[:1])
        output = net(x, t)
        checks.same_shape("net(x, t)", output, "x", x)
        return prediction.to_data(path_coefficients(path, t, x), x, output).astype(x.dtype)

    return denoise


def edm_precondition(net: Network, *, sigma_data: float = 0.5) -> Denoiser:
    """Wraps a raw network as a denoiser on the `edm` path (Karras et al. 2022, arXiv:2206.00364, Eq. 7 and table 1).

        x0 = c_skip x + c_out net(c_in x, c_noise),    c_noise = log(sigma) / 4

    which keeps the network's inputs, and its targets, at unit variance for data of standard deviation ``sigma_data``.
    To train it pass it as the network of the `data` prediction, with `log_normal_time` and `edm_weight`.

    Args:
        net: ``(x [batch, ...], c_noise [batch]) -> output``, of the shape of x.
        sigma_data: standard deviation of the data, above 0.

    Returns:
        A Denoiser ``(x, t) -> x0`` whose t is the noise level sigma, above 0.

    Raises:
        ValueError: ``sigma_data`` is not above 0.
    """
    checks.positive("sigma_data", sigma_data)

    def denoise(x: Array, t: Array) -> Array:
        checks.floating("x", x)
        t = jnp.broadcast_to(jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32)), x.shape[:1])
        sigma = beside(t, x)
        variance = sigma**2 + sigma_data**2
        c_skip = sigma_data**2 / variance
        c_out = sigma * sigma_data * jax.lax.rsqrt(variance)
        c_in = jax.lax.rsqrt(variance)
        output = net((c_in * x).astype(x.dtype), jnp.log(t) / 4)
        checks.same_shape("net(x, t)", output, "x", x)
        return (c_skip * x + c_out * output).astype(x.dtype)

    return denoise


def path_coefficients(path: Path, t: Array, x: Array) -> Coefficients:
    """The path's coefficients and their derivatives at times t [batch], shaped to multiply x [batch, ...]."""
    t = beside(t, x)
    alpha, alpha_dot = jax.jvp(path.alpha, (t,), (jnp.ones_like(t),))
    sigma, sigma_dot = jax.jvp(path.sigma, (t,), (jnp.ones_like(t),))
    return Coefficients(alpha, sigma, alpha_dot, sigma_dot)


def _determinant(c: Any) -> Array:
    return c.alpha * c.sigma_dot - c.alpha_dot * c.sigma
