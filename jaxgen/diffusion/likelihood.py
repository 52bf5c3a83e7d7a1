"""Likelihoods by the probability flow.

The flow that carries the path's densities p_t into each other without noise is (Song et al. 2021, arXiv:2011.13456,
Eq. 13), with d = denoise(x, t), eps = (x - alpha d) / sigma and ' the derivative by time,

    dx/dt = alpha' d + sigma' eps                                                                         (1)

along which a density changes by the divergence of the velocity (Chen et al. 2018, arXiv:1806.07366, theorem 1):

    log p_0(x_0) = log p_T(x_T) + integral_0^T tr(d velocity / dx) dt                                     (2)

Eq. 1 is integrated in the straight coordinates of the solvers: with S = path.scale, y = x / S, tau = sigma / S and c
the slope of alpha / S along tau,

    dy/dtau = eps + c d,    tr(d. / dy) = (D - (alpha - c sigma) tr J) / tau,    J = d denoise / dx        (3)

for D elements, so that with the change of variables at both ends, D log(S_T / S_0), Eq. 2 becomes

    log p_0(x_0) = log p_T(x_T) + D log(sigma_T / sigma_0) - integral (alpha - c sigma) tr J dlog tau      (4)

No derivative of the path appears: the kinks of a schedule given step by step cost no accuracy. Each step is the
classical Runge-Kutta method of fourth order for y, with its midpoint halfway in tau; tr J at its stages is integrated
by the rule that is exact, in dlog tau, for parabolas in tau (Simpson's, were it dtau), and of fourth order likewise.

The trace is exact, by D products with J, or Hutchinson's unbiased estimate (1989; for flows Grathwohl et al. 2019,
arXiv:1810.01367)

    tr J = E[v^T J v],    E[v v^T] = I                                                                    (5)

with the same v all along a trajectory.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks, random
from jaxgen.diffusion.losses import gaussian_nll
from jaxgen.diffusion.path import Path
from jaxgen.diffusion.prediction import path_coefficients
from jaxgen.diffusion.times import time_at_ratio
from jaxgen.typing import Array, ArrayLike, Denoiser, Key

Velocity = Callable[[Array, Array], Array]
"""``(x [batch, ...], t [batch] or scalar) -> dx/dt [batch, ...]``."""

ProbeDraw = Callable[[Key, Sequence[int], jnp.dtype], Array]
"""``(key, shape, dtype) -> v`` of mean 0 and covariance I, as `jax.random.rademacher` and `jax.random.normal` are."""


def probability_flow(path: Path, denoise: Denoiser) -> Velocity:
    """The velocity dx/dt of the probability flow, Eq. 1.

    For integrators of your own: diffrax's adaptive ones take
    ``diffrax.ODETerm(lambda t, x, args: velocity(x, t))``. Backwards in time it samples.

    Args:
        path: the Gaussian path.
        denoise: ``(x [batch, ...], t [batch]) -> x0``.

    Returns:
        A function ``(x [batch, ...], t [batch] or scalar) -> dx/dt [batch, ...]``, for t above 0. It raises ValueError
        where a time that is known is out of (0, path.t_max].

    >>> from jaxgen import diffusion
    >>> velocity = probability_flow(diffusion.edm(), lambda x, t: jnp.zeros_like(x))  # all data at 0: x = t eps
    >>> velocity(jnp.full((1, 2), 3.0), 2.0)
    Array([[1.5, 1.5]], dtype=float32)
    """

    def velocity(x: Array, t: ArrayLike) -> Array:
        checks.positive("t", t)
        checks.interval("t", t, 0.0, path.t_max)
        t = jnp.broadcast_to(jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32)), x.shape[:1])
        c = path_coefficients(path, t, x)
        x0 = denoise(x, t)
        checks.same_shape("denoise(x, t)", x0, "x", x)
        return (c.alpha_dot * x0 + c.sigma_dot * (x - c.alpha * x0) / c.sigma).astype(x.dtype)

    return velocity


def divergence(
    key: Key,
    function: Callable[[Array], Array],
    x: Array,
    *,
    probes: int | None = None,
    draw: ProbeDraw = jax.random.rademacher,
) -> tuple[Array, Array]:
    """A function's value and its divergence sum_i d function(x)_i / dx_i, example by example.

    Args:
        key: a single key, or [batch] keys, one per example; the exact divergence does not use it.
        function: ``x [batch, ...] -> [batch, ...]``, differentiable; its value for an example must depend on that
            example alone.
        x: [batch, ...], floating.
        probes: None for the exact divergence, by one vector-Jacobian product per element of an example; a number of at
            least 1 for the mean of so many of Hutchinson's estimates, Eq. 5, by one product each.
        draw: the probes' distribution: `jax.random.rademacher`, whose estimates vary by the elements of J off the
            diagonal alone, or `jax.random.normal`.

    Returns:
        The value, [batch, ...], and the divergence, [batch], in float32 at least.

    Raises:
        ValueError: the function's value, or a probe drawn, has another shape than ``x``; ``probes`` is below 1.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> value, trace = divergence(jax.random.key(0), jnp.square, jnp.array([[1.0, 2.0]]))
    >>> trace
    Array([6.], dtype=float32)
    """
    checks.floating("x", x)
    checks.rank_at_least("x", x, 1)
    batch, *rest = x.shape
    keys = random.keys_for(key, batch)
    value, pullback = jax.vjp(function, x)
    checks.same_shape("function(x)", value, "x", x)
    if probes is None:
        products, share = int(np.prod(rest)), 1.0
    else:
        checks.positive_integer("probes", probes)
        products, share = probes, 1 / probes

    def add(total: Array, index: Array) -> tuple[Array, None]:
        if probes is None:
            v = jnp.broadcast_to(jax.nn.one_hot(index, products, dtype=value.dtype).reshape(rest), x.shape)
        else:
            v = random.draw(draw, random.fold(keys, index), rest, value.dtype)
            checks.same_shape("draw(keys)", v, "x", x)
        terms = (v * pullback(v)[0]).reshape(batch, -1)
        return total + share * jnp.sum(terms, axis=1, dtype=total.dtype), None

    zeros = jnp.zeros((batch,), jnp.promote_types(x.dtype, jnp.float32))
    return value, jax.lax.scan(add, zeros, jnp.arange(products))[0]


def log_density(
    key: Key,
    path: Path,
    denoise: Denoiser,
    x: Array,
    times: ArrayLike,
    *,
    probes: int | None = None,
    draw: ProbeDraw = jax.random.rademacher,
    prior: Callable[[Array], Array] | None = None,
) -> Array:
    """The model's log-density of ``x`` at the path's first time, Eqs. 3 and 4, in nats.

    One `jax.lax.scan` of four evaluations of the denoiser, each with its trace, a step; fourth order in the step.
    ``x`` counts as a state at ``times[0]``: data stand for themselves where sigma(times[0]) is below what tells them
    apart, such as the width of dequantisation's noise.

    Args:
        key: a single key, or [batch] keys, one per example, for the probes; the exact trace does not use it.
        path: the Gaussian path.
        denoise: ``(x [batch, ...], t [batch]) -> x0``, differentiable by x.
        x: [batch, ...], floating.
        times: [n + 1] strictly increasing times in (0, path.t_max], from the data to noise: a sampler's grid without
            its last 0, turned round, such as ``log_snr_times(path, 100)[-2::-1]``. Known when tracing, as for tables.
        probes: None for the exact trace, else the number of Hutchinson's probes, as in `divergence`.
        draw: the probes' distribution, as in `divergence`.
        prior: ``x [batch, ...] -> [batch]``, the log-density at ``times[-1]``; N(0, sigma(times[-1])^2 I) by default.
            That leaves out the data's part alpha(times[-1])^2 Cov[x0] of the variance, and the mean alpha E[x0]: an
            error of the model, the one that its samples make too, which is small where sigma / alpha is large.

    Returns:
        [batch], in float32 at least.

    Raises:
        ValueError: the times are not increasing, out of range or traced, the path needs another ``scale`` at the last
            one, shapes do not fit, or ``probes`` is below 1.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> from jaxgen import diffusion, testing
    >>> path = diffusion.edm()
    >>> denoise = testing.gaussian_denoiser(path, 0.0, 1.0)
    >>> times = diffusion.log_snr_times(path, 50)[-2::-1]
    >>> nats = log_density(jax.random.key(0), path, denoise, jnp.zeros((1, 2)), times)
    >>> bool(abs(nats[0] + jnp.log(2 * jnp.pi)) < 0.001)  # N(0, I) in two dimensions at its mode
    True
    """
    checks.floating("x", x)
    checks.rank_at_least("x", x, 2)
    clock = jnp.promote_types(x.dtype, jnp.float32)
    batch, elements = x.shape[0], int(np.prod(x.shape[1:]))
    keys = random.keys_for(key, batch)
    times = _checked(path, times)

    def stage(carry: tuple[Array, ...], row: _Row) -> tuple[tuple[Array, ...], None]:
        """One evaluation, at ``row.reach`` along the slope before; the last of a step moves its start."""
        start, before, y, nats = carry
        point = (row.scale * (start + row.reach * before)).astype(x.dtype)
        x0, trace = divergence(
            keys, lambda x: denoise(x, jnp.full((batch,), row.time)), point, probes=probes, draw=draw
        )
        slope = (point - row.alpha * x0) / row.sigma + row.slope * x0
        y = y + row.weight * slope
        return (jnp.where(row.last, y, start), slope, y, nats - row.trace_weight * trace), None

    y = x.astype(clock) / _scale(path, times[0])
    rows = jax.tree.map(lambda column: jnp.asarray(column, bool if column.dtype == bool else clock), _rows(path, times))
    carry = (y, jnp.zeros_like(y), y, jnp.zeros((batch,), clock))
    (y, _, _, nats), _ = jax.lax.scan(jax.checkpoint(stage, prevent_cse=False), carry, rows)
    noise = jnp.asarray(_scale(path, times[-1]) * y, x.dtype)
    sigma, end = float(path.sigma(times[0])), float(path.sigma(times[-1]))
    if prior is None:
        log_prior = -jnp.sum(gaussian_nll(noise.astype(clock), 0.0, end**2).reshape(batch, -1), axis=1)
    else:
        log_prior = prior(noise)
        checks.shape("prior(x)", log_prior, (batch,))
    return log_prior + nats + elements * np.log(end / sigma)


def bits_per_dimension(log_density: Array, dimensions: int, *, levels: int = 256) -> Array:
    """Turns log-densities of dequantised images in [-1, 1] into bits per dimension.

    A pixel value of ``levels`` possible ones covers 2 / levels of [-1, 1], so a density in units of x is levels / 2
    times that in units of pixel values: -log2 p / D + log2(levels / 2). Of uniformly dequantised images, in the mean,
    it is an upper bound on the bits that a discrete model needs (Theis et al. 2016, arXiv:1511.01844, section 3.1).

    Args:
        log_density: nats, of any shape, such as `log_density` gives.
        dimensions: D, the number of elements of an example, at least 1.
        levels: of a pixel; 2 leaves the density as it is.

    Returns:
        Bits per dimension, of the shape of ``log_density``.

    Raises:
        ValueError: ``dimensions`` or ``levels`` is not an integer of at least 1.

    >>> float(bits_per_dimension(jnp.array(-3072 * jnp.log(2.0)), 3072))  # uniform over [-1, 1]: 8 bits
    8.0
    """
    checks.positive_integer("dimensions", dimensions)
    checks.positive_integer("levels", levels)
    return -log_density / (dimensions * np.log(2.0)) + np.log2(levels / 2)


def dequantise(key: Key, images: Array) -> Array:
    """Spreads pixel values uniformly over their bins, x = 2 (pixel + u) / 256 - 1 with u in [0, 1).

    A density of discrete values would grow without bound (Uria et al. 2013, arXiv:1306.0186, section 4.2). Models of
    likelihoods are to be trained on data like these.

    Args:
        key: a single key, or [batch] keys, one per example.
        images: [batch, ...], uint8.

    Returns:
        Float32 in [-1, 1], of the shape of ``images``; example i depends on (key, i) and images[i] alone.

    Raises:
        TypeError: ``images`` are not uint8, or ``key`` is not a typed key.
    """
    if jnp.result_type(images) != jnp.uint8:
        raise TypeError(f"`images` must be uint8, got dtype {jnp.result_type(images)}")
    checks.rank_at_least("images", images, 1)
    batch, *rest = images.shape
    u = random.draw(jax.random.uniform, random.keys_for(key, batch), rest, jnp.dtype(jnp.float32))
    return (images.astype(jnp.float32) + u) / 128 - 1


def _scale(path: Path, t: np.ndarray) -> np.ndarray:
    """S of Eq. 3, on the host."""
    return path.alpha(t) if path.scale is None else path.scale(t)


class _Row(NamedTuple):
    """One evaluation of a Runge-Kutta step, traced, or all of them stacked, in NumPy."""

    time: Any
    scale: Any
    alpha: Any
    sigma: Any
    slope: Any  # c of Eq. 3
    reach: Any  # where to evaluate: so far from the step's start along the slope before
    weight: Any  # what the slope found adds to y
    trace_weight: Any  # what the trace found takes from the log-density
    last: Any  # whether the step ends here


def _rows(path: Path, times: np.ndarray) -> _Row:
    """Four rows a step, in float64 on the host; alpha / S is affine in tau, so a midpoint's ratio is known."""
    scale = _scale(path, times)
    if not np.all(scale > 0):
        raise ValueError("log_density: alpha is 0 at `times[-1]` and the path names no other `scale`; end before")
    tau, signal = path.sigma(times) / scale, path.alpha(times) / scale
    length = np.diff(tau)
    middle = time_at_ratio(path, (tau[1:] + tau[:-1]) / (signal[1:] + signal[:-1]))
    at = np.stack([times[:-1], middle, middle, times[1:]], axis=1).ravel()
    alpha, sigma, slope = path.alpha(at), path.sigma(at), np.repeat(np.diff(signal) / length, 4)
    # The integrals in dlog tau of the parabolas that are 1 at one of start, middle and end and 0 at the others.
    node, share = np.polynomial.legendre.leggauss(32)
    u = (node + 1) / 2
    parabolas = np.stack([(1 - u) * (1 - 2 * u), 2 * u * (1 - u), 2 * u * (1 - u), u * (2 * u - 1)])
    dlog = length[:, None] / (tau[:-1, None] + length[:, None] * u) * share / 2
    return _Row(
        time=at,
        scale=_scale(path, at),
        alpha=alpha,
        sigma=sigma,
        slope=slope,
        reach=np.outer(length, [0, 1 / 2, 1 / 2, 1]).ravel(),
        weight=np.outer(length, [1 / 6, 1 / 3, 1 / 3, 1 / 6]).ravel(),
        trace_weight=(alpha - slope * sigma) * (dlog @ parabolas.T).ravel(),
        last=np.tile([False, False, False, True], len(length)),
    )


def _checked(path: Path, times: ArrayLike) -> np.ndarray:
    if isinstance(times, jax.core.Tracer):
        raise ValueError("`times` must be known when tracing, got a traced array")
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"`times` must be a grid of at least 2 times, got shape {list(times.shape)}")
    checks.positive("times", times)
    checks.interval("times", times, 0.0, path.t_max)
    if not np.all(np.diff(times) > 0):
        raise ValueError("`times` must increase strictly, from data to noise, got times that do not")
    return times
