"""Steps of steepest ascent in three norms.

The direction of unit norm along which g . d is greatest is

    s(g) = sign(g) for inf,    g / || g ||_2 for 2                                                        (1)

and for 1 the sign of the one largest coordinate. On that one step has little effect, since the bounds of the data cut
it off. So at most step_size / k is given to a coordinate, and no more than the room r that it has to its bound, the
largest first, until the step is used up: with the coordinates in the order of |g_i|, from the largest,

    d_i = sign(g_i) clip(step_size - sum_{j < i} c_j, 0, c_i),    c_i = min(step_size / k, r_i)           (2)

k = 1 is the steepest ascent in ball and bounds at once, a linear function's maximum (Croce & Hein 2021,
arXiv:2103.01208); without bounds it is the sign of the k largest coordinates (SLIDE, Tramèr & Boneh
2019, arXiv:1904.13000).
"""

import math

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.attacks.threat import ThreatModel, beside, check_norm
from jaxgen.typing import Array, ArrayLike


def steepest(norm: float, gradient: Array, *, share: ArrayLike = 0.01) -> Array:
    """The direction of unit norm along which a linear function of this gradient rises.

    Eq. 1, and for norm 1 Eq. 2 without bounds.

    Args:
        norm: 1, 2 or ``math.inf``.
        gradient: [batch, ...], floating.
        share: k / n, in [0, 1], for norm 1; a scalar or [batch]. One coordinate moves at least, and all that are as
            large as the last of them.

    Returns:
        The shape of ``gradient``, in float32 at least; zero where an example's gradient is zero.

    Raises:
        ValueError: ``norm`` is another one, or ``share`` is out of range.

    >>> steepest(1, jnp.array([[0.0, -3.0, 2.0, 1.0]]), share=0.5)
    Array([[ 0. , -0.5,  0.5,  0. ]], dtype=float32)
    """
    check_norm(norm)
    checks.interval("share", share, 0.0, 1.0)
    g = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    if norm == math.inf:
        return jnp.sign(g)
    rows = g.reshape(g.shape[0], -1)
    a = jnp.abs(rows)
    if norm == 1:
        least = jnp.take_along_axis(jnp.sort(a, axis=1), a.shape[1] - _moving(share, a), axis=1)
        signs = jnp.where(a >= least, jnp.sign(rows), 0)
        rows = signs / jnp.maximum(jnp.sum(jnp.abs(signs), axis=1, keepdims=True), 1)
    else:
        # By the largest first: the squares of the small gradients of a confident network would vanish.
        largest = jnp.max(a, axis=1, keepdims=True, initial=0)
        rows = rows / jnp.where(largest > 0, largest, 1)
        rows = rows / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(rows), axis=1, keepdims=True)), 1)
    return rows.reshape(g.shape)


def advance(threat: ThreatModel, x: Array, gradient: Array, length: Array, *, share: ArrayLike = 0.01) -> Array:
    """One step of steepest ascent, Eqs. 1 and 2, not yet projected.

    Args:
        threat: the threat model.
        x: [batch, ...], the points, floating.
        gradient: the shape of ``x``.
        length: of the steps, as `step_length` gives it: a scalar or [batch, 1, ...].
        share: as in `steepest`.

    Returns:
        The shape and dtype of ``x``; for norm 1 within the bounds if ``x`` is.

    Raises:
        ValueError: ``share`` is out of range.
    """
    if threat.norm != 1:
        return (x + length * steepest(threat.norm, gradient)).astype(x.dtype)
    checks.interval("share", share, 0.0, 1.0)
    wide = length.dtype
    room = jnp.where(gradient > 0, jnp.asarray(threat.high, wide) - x, x - jnp.asarray(threat.low, wide))
    room = jnp.where(gradient == 0, 0, jnp.maximum(room, 0)).reshape(x.shape[0], -1)
    a, length = jnp.abs(gradient).reshape(room.shape), length.reshape(-1, 1)
    most = jnp.minimum(room, length / _moving(share, room))
    falling, given = jax.lax.sort((-a, most), num_keys=1)
    # The coordinate where the step is used up: larger ones take all they may, and those that equal it share the rest.
    last = jnp.minimum(jnp.sum(jnp.cumsum(given, axis=1) < length, axis=1, keepdims=True), a.shape[1] - 1)
    least = -jnp.take_along_axis(falling, last, axis=1)
    rest = length - jnp.sum(jnp.where(a > least, most, 0), axis=1, keepdims=True)
    equal = jnp.sum(jnp.where(a == least, most, 0), axis=1, keepdims=True)
    part = jnp.clip(rest / jnp.where(equal > 0, equal, 1), 0, 1)
    moves = jnp.where(a > least, most, jnp.where(a == least, part * most, 0)).reshape(x.shape)
    return (x + jnp.sign(gradient) * moves).astype(x.dtype)


def step_length(threat: ThreatModel, x: Array, step_size: ArrayLike | None, *, default: float) -> Array:
    """The length of an attack's steps, shaped to multiply ``x``.

    Args:
        threat: the threat model.
        x: [batch, ...].
        step_size: a scalar or [batch], at least 0; None for the default.
        default: in parts of ``threat.eps``.

    Returns:
        A scalar, or [batch, 1, ...].

    Raises:
        ValueError: ``step_size`` has another shape or is known to be out of range, or is left to an infinite radius.
    """
    if step_size is None:
        checks.finite("threat.eps", threat.eps)
        return default * beside(threat.eps, x)
    if jnp.ndim(step_size) != 0:
        checks.shape("step_size", step_size, x.shape[:1])
    checks.interval("step_size", step_size, 0.0, math.inf)
    checks.finite("step_size", step_size)
    return beside(step_size, x)


def _moving(share: ArrayLike, rows: Array) -> Array:
    """The number k of Eq. 2, [batch, 1], for ``rows`` [batch, n]."""
    count = jnp.clip(jnp.ceil(beside(share, rows) * rows.shape[1]).astype(int), 1, rows.shape[1])
    return jnp.broadcast_to(count, (rows.shape[0], 1))
