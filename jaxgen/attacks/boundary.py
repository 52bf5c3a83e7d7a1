"""The nearest point of a classifier's boundary, as its tangents show it, within the bounds of the data.

Where a function g of an example, below 0 here and above 0 beyond the boundary, is replaced by its tangent, the nearest
point of the boundary is a step away:

    minimise || s ||_p    such that    <w, s> = c    and    low <= x + s <= high,    w = grad g(x), c = -g(x)  (1)

Without bounds that is |c| / || w ||_q, q dual to p (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599; Croce & Hein 2020,
arXiv:1907.02044, Eq. 4). With them let every coordinate move to the side on which <w, s> gains (for c > 0: the sign of
w), by 0 <= t <= r, where r is the room to the bound there. With a = |w|, Eq. 1 is solved by

    p = inf    t = min(z, r)                                                                              (2)
    p = 2      t = min(z a, r)                                                                            (3)
    p = 1      t = r in the order of falling a, until the sum is there                                    (4)

and one number z >= 0 for each example such that sum a t = |c|. As a function of z that sum is concave and piecewise
linear, so that Newton's method from 0 rises to the solution, holds one more coordinate at its bound in every round, and
ends on it. Where not even t = r reaches |c|, that corner is the step.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.attacks.objectives import Classified
from jaxgen.attacks.threat import ThreatModel, beside, distance
from jaxgen.typing import Array, Objective


def smallest_step(threat: ThreatModel, x: Array, slope: Array, rise: Array) -> tuple[Array, Array]:
    """The smallest step within the bounds along which a linear function of an example rises by so much, Eq. 1.

    Args:
        threat: its norm is what is small, its bounds are kept; its ``eps`` does not matter.
        x: [batch, ...] within the bounds, in float32 at least.
        slope: w, the shape of ``x``.
        rise: c, [batch], of either sign.

    Returns:
        The step, the shape of ``x``, and [batch] whether it rises by all of ``rise``.

    >>> threat = ThreatModel(2, eps=math.inf, low=0.0, high=1.0)
    >>> smallest_step(threat, jnp.array([[0.5, 0.5]]), jnp.array([[4.0, 3.0]]), jnp.array([3.2]))[0]
    Array([[0.5, 0.4]], dtype=float32)
    """
    direction = jnp.sign(slope) * beside(jnp.where(rise < 0, -1, 1), x)
    room = jnp.where(direction > 0, threat.high - x, x - threat.low)
    a, r = jnp.abs(slope).reshape(x.shape[0], -1), room.reshape(x.shape[0], -1)
    # In units of the largest: squares of the small gradients of a confident network would vanish.
    largest = jnp.max(a, axis=1, keepdims=True, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    a, c = a / unit, jnp.abs(rise)[:, None] / unit
    r = jnp.where(a > 0, jnp.maximum(r, 0), 0)
    t = _greedy(a, r, c) if threat.norm == 1 else _level(a, r, c, jnp.ones_like(a) if threat.norm == math.inf else a)
    return direction * t.reshape(x.shape), jnp.sum(a * r, axis=1) >= c[:, 0]


def _level(a: Array, r: Array, c: Array, pace: Array) -> Array:
    """Eqs. 2 and 3, where ``pace`` is 1 and a: [batch, n] from [batch, n] and c [batch, 1]."""

    def grown(held: Array) -> Array:
        left = c - jnp.sum(jnp.where(held, a * r, 0), axis=1, keepdims=True)
        gain = jnp.sum(jnp.where(held, 0, a * pace), axis=1, keepdims=True)
        return jnp.where(held, r, pace * jnp.maximum(left, 0) / jnp.where(gain > 0, gain, 1))

    def newton(state: tuple[Array, Array]) -> tuple[Array, Array]:
        held, _ = state
        now = held | (grown(held) >= r)
        return now, now != held

    held, _ = jax.lax.while_loop(lambda state: jnp.any(state[1]), newton, (r <= 0, jnp.ones_like(a, bool)))
    return grown(held)


def _greedy(a: Array, r: Array, c: Array) -> Array:
    """Eq. 4: [batch, n] from [batch, n], a in [0, 1], and c [batch, 1]."""
    r = jnp.minimum(r, c / jnp.where(a > 0, a, 1))

    def above(least: Array) -> Array:
        return jnp.sum(jnp.where(a > least, a * r, 0), axis=1, keepdims=True)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        enough = above(middle) >= c
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # Sorting would take many times as long. The last coordinates, as good as equal by now, share what is left.
    low, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(c), jnp.ones_like(c)))
    sure, both = above(high), above(low)
    part = jnp.clip((c - sure) / jnp.where(both > sure, both - sure, 1), 0, 1)
    return jnp.where(a > high, r, jnp.where(a > low, part * r, 0))


Tangents = Callable[[Array], tuple[Array, Array]]
"""``x [batch, ...] -> (slopes [k, batch, ...], rises [k, batch])``: w and c of Eq. 1, of k pieces of a boundary."""


def tangents(objective: Classified, x: Array, rivals: int) -> Tangents:
    """The tangents of a classifier's boundary: with g the lead of each rival over the label, by logits.

    The rivals are the likeliest wrong classes of the clean examples. A class that is aimed at is the only rival, and g
    its lead over the strongest other class (over the label, if any class wins).

    Args:
        objective: its ``score`` does not matter.
        x: [batch, ...], the clean examples.
        rivals: k, at most.

    Returns:
        A function of points of the shape of ``x``. It takes one evaluation of the classifier and k gradients, one after
        the other, so that the memory is that of one.
    """
    labels, targets = jnp.asarray(objective.labels), objective.targets
    alone = labels if targets is None else jnp.asarray(targets)

    def but(logits: Array) -> Array:
        return jnp.where(jnp.arange(logits.shape[1]) == alone[:, None], -jnp.inf, logits)

    if targets is None:
        logits = objective.logits(x)
        classes = jax.lax.top_k(but(logits), min(rivals, logits.shape[1] - 1))[1]
    else:
        classes = alone[:, None]

    def leads(x: Array) -> Array:
        logits = objective.logits(x).astype(x.dtype)
        if targets is None or objective.any_class:
            champion = jnp.take_along_axis(logits, labels[:, None], axis=1)
        else:
            champion = jnp.max(but(logits), axis=1, keepdims=True)
        return (jnp.take_along_axis(logits, classes, axis=1) - champion).T

    def at(x: Array) -> tuple[Array, Array]:
        values, pullback = jax.vjp(leads, x)
        each = jnp.eye(len(values), dtype=values.dtype)[:, :, None] * jnp.ones_like(values)
        return jax.lax.map(lambda one: pullback(one)[0], each), -values

    return at


def nearest(threat: ThreatModel, x: Array, slopes: Array, rises: Array) -> tuple[Array, Array, Array]:
    """The nearest of several tangents.

    Args:
        threat: the norm and the bounds.
        x: [batch, ...] within the bounds, in float32 at least.
        slopes: [k, batch, ...].
        rises: [k, batch].

    Returns:
        The step to it, the shape of ``x``, its slope, likewise, and its rise, [batch]. If none is within the bounds,
        it is the first.
    """
    steps, reached = jax.vmap(lambda slope, rise: smallest_step(threat, x, slope, rise))(slopes, rises)
    lengths = jax.vmap(lambda step: distance(threat.norm, step, jnp.zeros_like(step)))(steps)
    first = jnp.argmin(jnp.where(reached, lengths, jnp.inf), axis=0)
    pick = jax.vmap(lambda values, i: values[i], in_axes=(1, 0))
    return pick(steps, first), pick(slopes, first), pick(rises, first)


def within(threat: ThreatModel, x: Array, dtype: jnp.dtype) -> Array:
    """Examples clipped to the bounds, in the dtype that they are to be judged and given back in."""
    low, high = (jnp.asarray(bound, dtype) for bound in (threat.low, threat.high))
    return jnp.clip(x.astype(dtype), low, high)


def in_reach(threat: ThreatModel, found: Array, won: Array, x: Array) -> Array:
    """What a search for small perturbations gives back: the example found, where it is one and in the ball, else ``x``.

    Args:
        threat: the ball.
        found: [batch, ...].
        won: [batch] bool, whether it is adversarial.
        x: the shape of ``found``, the clean examples.

    Returns:
        The shape of ``x``.
    """
    return jax.vmap(jnp.where)(won & (distance(threat.norm, found, x) <= jnp.asarray(threat.eps)), found, x)


def classifier_of(objective: Objective) -> Classified:
    """The objective, if it knows its classifier; plain functions are refused by name."""
    if not isinstance(objective, Classified):
        raise TypeError(f"`objective` must know its classifier, as `margin` does, got {type(objective).__name__}")
    return objective
