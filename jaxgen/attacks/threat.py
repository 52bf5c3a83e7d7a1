"""Threat models: what an attacker may do to an example, and exact projections onto it.

An attacker may move an example c within a ball of one of three norms and within the bounds of the data:

    || x - c ||_p <= eps    and    low <= x <= high,    p in {1, 2, inf}                                   (1)

The Euclidean projection of a point y onto both at once is not the one onto the ball followed by the one onto the box.
With d = y - c, a = |d| and the room r to the bound on d's side (high - c where d > 0, c - low elsewhere), which is
never negative since c lies in the bounds, one multiplier for an example does it: x = c + sign(d) m with

    p = inf    m = min(a, eps, r)                                                                         (2)
    p = 2      m = min(s a, r)          with s in [0, 1] such that   sum m^2 = eps^2                      (3)
    p = 1      m = clip(a - t, 0, r)    with t >= 0 such that        sum m   = eps                        (4)

and s = 1, t = 0 where that is within the ball already. In u = s^2 the sum of Eq. 3 is concave and piecewise linear, so
that Newton's method rises to the solution and ends on it after finitely many steps. In t that of Eq. 4 is piecewise
linear between the sorted numbers a and a - r: Duchi et al. 2008 ("Efficient projections onto the l1-ball for learning
in high dimensions") without bounds, Croce & Hein 2021 ("Mind the box", arXiv:2103.01208) with them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks, random
from jaxgen.typing import Array, ArrayLike, Key


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """What the attacker may do, Eq. 1: a ball around each example, and the bounds of the data.

    ``norm`` is part of the program; the rest is data, which may be traced and mapped over. Another radius is
    ``dataclasses.replace(threat, eps=...)``. No argument has a default, so that bounds cannot be forgotten.

    Attributes:
        norm: 1, 2 or ``math.inf``.
        eps: the ball's radius, at least 0: a scalar, or [batch], one per example; infinite for no ball.
        low: the least value of the data: a scalar, or of a shape that broadcasts to an example's.
        high: the greatest value, likewise; above ``low``.

    Raises:
        ValueError: ``norm`` is another one, a known ``eps`` is negative or not a number, or known bounds are not
            ``low < high``.
        TypeError: ``eps`` or a bound is a list, a tuple or a string.

    >>> ThreatModel(math.inf, eps=8 / 255, low=0.0, high=1.0).norm
    inf
    """

    norm: float
    eps: ArrayLike
    low: ArrayLike
    high: ArrayLike

    def __post_init__(self) -> None:
        """Refuses what is known to be wrong."""
        check_norm(self.norm)
        object.__setattr__(self, "norm", float(self.norm))
        for name, value in (("eps", self.eps), ("low", self.low), ("high", self.high)):
            # Not what JAX takes for a number: as a list is a pytree of its own, its values would go unchecked.
            if isinstance(value, list | tuple | str):
                raise TypeError(f"`{name}` must be a number or an array, got {type(value).__name__}")
        if _known(self.eps):
            checks.interval("eps", self.eps, 0.0, math.inf)
        if _known(self.low) and _known(self.high):
            low, high = np.asarray(self.low), np.asarray(self.high)
            if not np.all(low < high):
                raise ValueError(f"`low` must lie below `high`, got low={self.low} and high={self.high}")


def _unflatten(norm: float, leaves: Any) -> ThreatModel:
    # JAX puts gradients, axes and placeholders where the numbers were: these are not checked.
    threat = object.__new__(ThreatModel)
    for name, value in zip(("norm", "eps", "low", "high"), (norm, *leaves), strict=True):
        object.__setattr__(threat, name, value)
    return threat


jax.tree_util.register_pytree_with_keys(
    ThreatModel,
    lambda threat: (
        [(jax.tree_util.GetAttrKey(name), getattr(threat, name)) for name in ("eps", "low", "high")],
        threat.norm,
    ),
    _unflatten,
)


def check(threat: ThreatModel, x: Array) -> None:
    """Refuses a batch that does not fit its threat model.

    Args:
        threat: the threat model.
        x: [batch, ...], the clean examples.

    Raises:
        ValueError: ``x`` has no batch axis or leaves known bounds, ``threat.eps`` is neither a scalar nor [batch], or
            the bounds do not broadcast to an example.
        TypeError: ``threat`` is not a ThreatModel, or ``x`` is not floating.
    """
    if not isinstance(threat, ThreatModel):
        raise TypeError(f"`threat` must be a ThreatModel, got {type(threat).__name__}")
    checks.floating("x", x)
    checks.rank_at_least("x", x, 1)
    if jnp.ndim(threat.eps) != 0:
        checks.shape("threat.eps", threat.eps, x.shape[:1])
    for name, bound in (("low", threat.low), ("high", threat.high)):
        shape, example = jnp.shape(bound), x.shape[1:]
        if len(shape) > len(example) or any(s not in (1, e) for s, e in zip(shape[::-1], example[::-1], strict=False)):
            raise ValueError(
                f"`threat.{name}` must be a scalar or broadcast to an example, {list(example)}, got {list(shape)}"
            )
    if all(_known(value) for value in (x, threat.low, threat.high)):
        # In the dtype of x: a bound that it cannot hold is rounded as x was.
        values, low, high = (np.asarray(value, x.dtype) for value in (x, threat.low, threat.high))
        if not np.all((values >= low) & (values <= high)):
            raise ValueError(
                f"`x` must lie in [low, high] of its threat model, got values from {values.min()} to {values.max()} "
                f"for low={threat.low} and high={threat.high}"
            )


def beside(value: ArrayLike, x: Array) -> Array:
    """A scalar or one value per example, [batch], shaped to multiply ``x``; in float32 at least.

    Args:
        value: a scalar or [batch].
        x: [batch, ...].

    Returns:
        A scalar, or [batch, 1, ...].
    """
    value = jnp.asarray(value, jnp.promote_types(x.dtype, jnp.float32))
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def project(threat: ThreatModel, x: Array, center: Array) -> Array:
    """The nearest point of ball and bounds, Eqs. 2-4, of each example: exact, of both at once.

    Args:
        threat: the threat model.
        x: [batch, ...], the points to be projected, floating.
        center: the shape of ``x``, the clean examples, within the bounds.

    Returns:
        The shape and dtype of ``x``: within the bounds, in the ball to rounding. A point of both comes back as it is,
        and ``eps`` 0 gives ``center`` exactly.

    Raises:
        ValueError: ``center`` does not have the shape of ``x``.

    >>> threat = ThreatModel(1, eps=1.0, low=0.0, high=1.0)
    >>> project(threat, jnp.array([[2.0, 0.75, 0.0]]), jnp.array([[0.5, 0.5, 0.5]]))  # not [[1.0, 0.5, 0.5]]
    Array([[1.  , 0.625, 0.125]], dtype=float32)
    """
    checks.same_shape("center", center, "x", x)
    x, center = jnp.asarray(x), jnp.asarray(center)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y, c = x.astype(wide), center.astype(wide)
    eps, low, high = beside(threat.eps, y), jnp.asarray(threat.low, wide), jnp.asarray(threat.high, wide)
    if threat.norm == math.inf:
        projected = jnp.clip(jnp.clip(y, c - eps, c + eps), low, high)
    else:
        inside = jnp.clip(y, low, high)
        d = y - c
        room = jnp.maximum(jnp.where(d > 0, high - c, c - low), 0)
        a, r = (v.reshape(x.shape[0], -1) for v in (jnp.abs(d), jnp.broadcast_to(room, x.shape)))
        magnitude = _magnitude_1 if threat.norm == 1 else _magnitude_2
        m = magnitude(a, r, eps.reshape(-1, 1)).reshape(x.shape)
        far = beside(distance(threat.norm, inside, c), y) > eps
        projected = jnp.where(far, jnp.clip(c + jnp.sign(d) * m, low, high), inside)
    return projected.astype(x.dtype)


def _magnitude_2(a: Array, r: Array, eps: Array) -> Array:
    """Eq. 3: [batch, n] from [batch, n], [batch, n] and [batch, 1]."""

    def squared_scale(held: Array) -> Array:
        left = jnp.square(eps) - jnp.sum(jnp.square(jnp.where(held, r, 0)), axis=1, keepdims=True)
        free = jnp.sum(jnp.square(jnp.where(held, 0, a)), axis=1, keepdims=True)
        return jnp.clip(left / jnp.where(free > 0, free, 1), 0, 1)

    # Coordinates that have reached their bound never leave it again: there are at most n rounds, and mostly three.
    def more(state: tuple[Array, Array]) -> Array:
        return jnp.any(state[1])

    def newton(state: tuple[Array, Array]) -> tuple[Array, Array]:
        held, _ = state
        now = held | (jnp.sqrt(squared_scale(held)) * a >= r)
        return now, now != held

    held, _ = jax.lax.while_loop(more, newton, (r <= 0, jnp.ones_like(a, bool)))
    return jnp.minimum(jnp.sqrt(squared_scale(held)) * a, r)


def _magnitude_1(a: Array, r: Array, eps: Array) -> Array:
    """Eq. 4: [batch, n] from [batch, n], [batch, n] and [batch, 1]."""
    # As t falls, coordinate i starts to grow at a_i and stops at a_i - r_i (at 0, if it is not stopped before).
    starts, stops = a, jnp.maximum(a - r, 0)
    t = jnp.concatenate([starts, stops], axis=1)
    growing = jnp.concatenate([jnp.ones_like(a), -jnp.ones_like(a)], axis=1)
    falling, growing = jax.lax.sort((-t, growing), num_keys=1)
    t, growing = -falling, jnp.cumsum(growing, axis=1)
    # The sum of Eq. 4 at every breakpoint; the solution lies right below the last one where it is still at most eps.
    total = jnp.cumsum(jnp.pad(growing[:, :-1] * (t[:, :-1] - t[:, 1:]), ((0, 0), (1, 0))), axis=1)
    last = jnp.sum(total <= eps, axis=1, keepdims=True) - 1
    above = jnp.take_along_axis(t, last, axis=1)
    # Solved anew from there, since running sums of many numbers lose digits, as does a level far above eps.
    free = jnp.sum((starts >= above) & (stops < above), axis=1, keepdims=True)
    missing = eps - jnp.sum(jnp.clip(a - above, 0, r), axis=1, keepdims=True)
    return jnp.clip(a - above + missing / jnp.maximum(free, 1), 0, r)


def random_start(key: Key, threat: ThreatModel, x: Array) -> Array:
    """A point of the ball, uniform in its volume, projected onto the bounds.

    With g of density proportional to exp(-|g|^p) and z exponential, g / (sum |g|^p + z)^(1 / p) is uniform in the
    unit ball of the norm p (Barthe et al. 2005, arXiv:math/0503650).

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``.
        threat: the threat model, of a finite ``eps``.
        x: [batch, ...], the clean examples, floating.

    Returns:
        The shape and dtype of ``x``, in ball and bounds.

    Raises:
        ValueError: a known ``threat.eps`` is infinite, or does not fit ``x``.
        TypeError: ``key`` is not a typed key, or ``x`` is not floating.
    """
    check(threat, x)
    checks.finite("threat.eps", threat.eps)

    def unit(key: Key, shape: Sequence[int], dtype: jnp.dtype) -> Array:
        if threat.norm == math.inf:
            return jax.random.uniform(key, shape, dtype, minval=-1, maxval=1)
        inner, outer = jax.random.split(key)
        z = jax.random.exponential(outer, (), dtype)
        if threat.norm == 1:
            g = jax.random.laplace(inner, shape, dtype)
            return g / (jnp.sum(jnp.abs(g)) + z)
        g = jax.random.normal(inner, shape, dtype)
        return g / jnp.sqrt(jnp.sum(jnp.square(g)) + 2 * z)

    x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    shift = beside(threat.eps, x) * random.draw(unit, random.keys_for(key, x.shape[0]), x.shape[1:], wide)
    return project(threat, (x + shift).astype(x.dtype), x)


def distance(norm: float, x: Array, center: Array) -> Array:
    """How far each example has moved.

    Args:
        norm: 1, 2 or ``math.inf``.
        x: [batch, ...].
        center: the shape of ``x``.

    Returns:
        [batch], in float32 at least.

    Raises:
        ValueError: ``norm`` is another one, or the shapes differ.

    >>> distance(2, jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2)))
    Array([5.], dtype=float32)
    """
    check_norm(norm)
    checks.same_shape("center", center, "x", x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    a = jnp.abs(x.astype(wide) - center.astype(wide)).reshape(x.shape[0], -1)
    if norm == math.inf:
        return jnp.max(a, axis=1, initial=0)
    if norm == 1:
        return jnp.sum(a, axis=1)
    return jnp.sqrt(jnp.sum(jnp.square(a), axis=1))


def check_norm(norm: Any) -> None:
    """Raises ValueError unless ``norm`` is 1, 2 or ``math.inf``."""
    if isinstance(norm, bool) or norm not in (1, 2, math.inf):
        raise ValueError(f"`norm` must be 1, 2 or math.inf, got {norm!r}")


def _known(value: Any) -> bool:
    """Whether this is numbers, not the tracer, axis or placeholder that stands for some."""
    return isinstance(value, int | float | np.ndarray | np.generic | jax.Array) and not isinstance(
        value, jax.core.Tracer
    )
