"""MeanFlow: samples in one or two evaluations, from one training run and no teacher.

Geng et al. 2025 (arXiv:2505.13447). The network learns the average of the probability flow's velocity v between two
times r <= t,

    u(x_t, t, r) = 1 / (t - r)  integral from r to t of v(x_s, s) ds,    x_r = x_t - (t - r) u(x_t, t, r)         (1)

instead of v itself, to which u comes down at r = t. Differentiating (t - r) u by t along the flow gives the identity

    u = v - (t - r) du/dt,    du/dt = v . grad_x u + partial_t u                                           (2)

whose right side, with the network in u's place and no gradient through it, is the target of a regression: one
Jacobian-vector product in the direction (v, 1, 0). As in flow matching, the velocity of a single pair of data and
noise stands for the flow's, which is its mean.

Where alpha and sigma are straight lines in time (`rectified_flow`, `edm`), Eq. 1 is a step of Euler's table whose
denoiser is told where the step ends: `meanflow_denoiser`. So few-step sampling is `sample`, like any other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks, random
from jaxgen.diffusion.losses import TimeDraw, logit_normal_time
from jaxgen.diffusion.path import Path, beside
from jaxgen.diffusion.prediction import denoiser, path_coefficients, velocity
from jaxgen.typing import Array, ArrayLike, Denoiser, Key

AverageVelocity = Callable[[Array, Array, Array], Array]
"""``(x [batch, ...], t [batch], r [batch]) -> u [batch, ...]``, r <= t: parameters and conditioning closed over."""

TwoTimesDraw = Callable[[Key], tuple[Array, Array]]
"""``key -> (t, r)``, two scalars, r <= t: draws the times of one example."""

Guide = Callable[[Array, Array, Array], Array]
"""``(x [batch, ...], t [batch], v [batch, ...]) -> the velocity to follow instead of v``."""


def meanflow_loss(
    path: Path,
    net: AverageVelocity,
    x0: Array,
    key: Key,
    *,
    draw_times: TwoTimesDraw | None = None,
    guide: Guide | None = None,
    axis_name: str | None = None,
) -> Array:
    """The squared error of Eq. 2, one value per example. The paper descends `adaptive` of it.

    Args:
        path: the Gaussian path; the paper's is `rectified_flow`.
        net: ``(x [batch, ...], t [batch], r [batch]) -> u [batch, ...]``; differentiable in forward mode.
        x0: [batch, ...] clean data, floating, scaled to about [-1, 1].
        key: a single key; example i draws its times and noise from ``fold_in(key, i)``.
        draw_times: the distribution of (t, r); `meanflow_times` by default, which suits times in [0, 1].
        guide: what replaces the velocity of a single pair, such as `meanflow_guide`: classifier-free guidance that is
            learned, so that a guided sample costs no second evaluation.
        axis_name: the mapped axis over which the batch is split, under pmap or shard_map.

    Returns:
        [batch], in float32 at least: means over all other axes.

    Raises:
        ValueError: the network's output has another shape than ``x0``.
        TypeError: ``x0`` is not floating, or ``key`` not a typed key.
    """
    checks.floating("x0", x0)
    checks.rank_at_least("x0", x0, 2)
    draw_times = meanflow_times() if draw_times is None else draw_times
    keys = random.example_keys(key, x0.shape[0], axis_name=axis_name)
    clock = jnp.promote_types(x0.dtype, jnp.float32)
    t, r = (time.astype(clock) for time in jax.vmap(draw_times)(random.fold(keys, 0)))
    eps = random.normal(random.fold(keys, 1), x0.shape[1:], dtype=x0.dtype)
    c = path_coefficients(path, t, x0)
    x = (c.alpha * x0 + c.sigma * eps).astype(x0.dtype)
    v = velocity.target(c, x0, eps).astype(x0.dtype)
    v = v if guide is None else jax.lax.stop_gradient(guide(x, t, v).astype(x0.dtype))
    output, slope = jax.jvp(net, (x, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))
    checks.same_shape("net(x, t, r)", output, "x0", x0)
    target = jax.lax.stop_gradient(v - beside(t - r, x) * slope.astype(clock))
    return jnp.square(output.astype(clock) - target).reshape(x0.shape[0], -1).mean(axis=1)


def meanflow_times(draw_time: TimeDraw | None = None, *, distinct: float = 0.25) -> TwoTimesDraw:
    """Two independent times in order; one time, twice, in the other cases (the paper's section 4.3).

    Args:
        draw_time: the distribution of each; the paper's `logit_normal_time(-0.4, 1.0)` by default.
        distinct: share of examples whose times differ, in [0, 1]; the others learn the velocity itself.

    Raises:
        ValueError: ``distinct`` is out of range.
    """
    checks.interval("distinct", distinct, 0.0, 1.0)
    draw_time = logit_normal_time(-0.4, 1.0) if draw_time is None else draw_time

    def draw(key: Key) -> tuple[Array, Array]:
        first, second, coin = jax.random.split(key, 3)
        one, other = draw_time(first), draw_time(second)
        t = jnp.maximum(one, other)
        return t, jnp.where(jax.random.uniform(coin) < distinct, jnp.minimum(one, other), t)

    return draw


def meanflow_guide(
    conditional: AverageVelocity, unconditional: AverageVelocity, scale: ArrayLike, *, mix: float = 0.0
) -> Guide:
    """Classifier-free guidance for the `meanflow_loss` of the conditional network (the paper's section 4.2).

        (1 - mix) (scale v + (1 - scale) u_unconditional(x, t, t)) + mix u_conditional(x, t, t)                  (3)

    whose fixed point is the guided velocity scale v_conditional + (1 - scale) v_unconditional whatever ``mix``, which
    only makes the target less noisy.

    Args:
        conditional: the network that is trained, with its condition.
        unconditional: the same without.
        scale: 1 for no guidance, above 1 to make samples typical of their condition (the paper's omega'). A number, or
            [batch]: 1 where the condition was dropped.
        mix: the paper's kappa, in [0, 1).

    Raises:
        ValueError: ``mix`` is out of range, or a scale that is known is not finite.
    """
    checks.finite("scale", scale)
    if not 0 <= mix < 1:
        raise ValueError(f"`mix` must lie in [0, 1), got {mix}")

    def guide(x: Array, t: Array, v: Array) -> Array:
        factor = beside(jnp.broadcast_to(jnp.asarray(scale, t.dtype), t.shape), x)
        guided = factor * v + (1 - factor) * unconditional(x, t, t)
        return (1 - mix) * guided + mix * conditional(x, t, t) if mix else guided

    return guide


def meanflow_denoiser(path: Path, net: AverageVelocity, times: ArrayLike) -> Denoiser:
    """The network as the denoiser of `euler`'s table on the grid ``times``: each row is Eq. 1.

    Args:
        path: `rectified_flow` or `edm`: alpha and sigma are straight lines in time.
        net: ``(x, t, r) -> u``, as trained by `meanflow_loss` on this path.
        times: [n + 1] decreasing times, those of the table: the network is told, as r, the greatest of them below t.

    Returns:
        A Denoiser: the estimate of x0 at which the line from x_t through x_r ends.

    Raises:
        ValueError: the path is curved in time, or ``times`` are no grid or known to lie out of it.

    >>> from jaxgen import diffusion
    >>> path, times = diffusion.rectified_flow(), [1.0, 0.5, 0.0]
    >>> denoise = meanflow_denoiser(path, lambda x, t, r: x, times)
    >>> diffusion.sample(jax.random.key(0), denoise, diffusion.euler(path, times), jnp.ones((1, 2)))  # x / 2, twice
    Array([[0.25, 0.25]], dtype=float32)
    """
    grid = path.t_max * np.array([0.0, 0.5, 1.0])
    if any(abs(np.diff(f(grid), 2)[0]) > 1e-6 * path.t_max for f in (path.alpha, path.sigma)):
        raise ValueError("`path` must have alpha and sigma straight in time, as rectified_flow() and edm() have")
    if np.ndim(times) != 1:
        raise ValueError(f"`times` must be a grid of times, got shape {list(np.shape(times))}")
    checks.interval("times", times, 0.0, path.t_max)

    def told(x: Array, t: Array) -> Array:
        later = jnp.asarray(times, t.dtype)
        return net(x, t, jnp.max(jnp.where(later < t[:, None], later, 0.0), axis=1))

    return denoiser(path, velocity, told)
