"""FAB: along the boundary to the point of it that is nearest to the example.

Croce & Hein 2020 (arXiv:1907.02044, Algorithm 1). The nearest of the boundary's tangents at the iterate x_i is reached
from there by the smallest step s_i within the bounds of the data (`boundary`, Eq. 1), and from the example x itself by
s'_i. The next iterate is drawn towards the second,

    a   = min(|| s_i || / (|| s_i || + || s'_i ||), alpha_max)                                            (1)
    x_(i+1) = (1 - a) (x_i + eta s_i) + a (x + eta s'_i)                                                  (2)

and wherever it is adversarial, it is noted if none has been nearer, and moved back into the class:

    x_(i+1) <- x + beta (x_(i+1) - x)                                                                     (3)

No step size is to be chosen, and the scale of the logits cancels. With an objective that has targets and is won by any
class this is FAB-T, of one gradient a step.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.attacks.boundary import classifier_of, in_reach, nearest, smallest_step, tangents, within
from jaxgen.attacks.threat import ThreatModel, beside, check, distance, random_start
from jaxgen.typing import Array, ArrayLike, Key, Objective


class _State(NamedTuple):
    point: Array
    found: Array
    distance: Array


def fab(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    *,
    steps: int = 100,
    rivals: int = 9,
    alpha_max: ArrayLike = 0.1,
    eta: ArrayLike = 1.05,
    beta: ArrayLike = 0.9,
    start_at_random: bool = False,
    unroll: int = 1,
) -> Array:
    """The smallest perturbation that changes the class, Eqs. 1-3.

    The search does not look at the ball: what it finds is given back where it lies within, all of it for an infinite
    ``threat.eps``. So one run answers for every radius.

    Args:
        key: a single key, or [batch] keys; used for a random start alone.
        objective: a `Classified`, of which the score does not matter.
        x: [batch, ...] within the bounds, floating: the clean examples.
        threat: of any norm.
        steps: each takes one gradient for every rival, and one evaluation more.
        rivals: how many classes are considered, the likeliest wrong ones of ``x``. A target is its own only rival.
        alpha_max: how much of the way is the example's own at most, Eq. 1; a scalar in [0, 1].
        eta: how far steps go, a scalar of at least 1; above it they end beyond the tangent.
        beta: how much of an adversarial perturbation is kept, Eq. 3; a scalar in [0, 1].
        start_at_random: starts from a point of half the ball, which must be finite, for `restarts`.
        unroll: steps per round of the compiled loop.

    Returns:
        The shape and dtype of ``x``: the nearest adversarial example where one was found in the ball, else ``x``. An
        example that is won as it comes stays as it is.

    Raises:
        TypeError: ``objective`` is a plain function, ``x`` is not floating, or ``key`` not a typed key.
        ValueError: ``x`` and ``threat`` do not fit together, or an option is out of range.

    >>> from jaxgen.attacks.objectives import margin
    >>> threat = ThreatModel(2, eps=math.inf, low=0.0, high=1.0)
    >>> x = fab(jax.random.key(0), margin(lambda x: x, jnp.array([0])), jnp.array([[0.75, 0.25]]), threat)
    >>> x.round(2)  # the boundary is at [0.5, 0.5]
    Array([[0.5, 0.5]], dtype=float32)
    """
    classifier = classifier_of(objective)
    check(threat, x)
    checks.positive_integer("steps", steps)
    checks.positive_integer("rivals", rivals)
    checks.positive_integer("unroll", unroll)
    for name, value, low, high in (("alpha_max", alpha_max, 0, 1), ("eta", eta, 1, math.inf), ("beta", beta, 0, 1)):
        checks.shape(name, value, ())
        checks.interval(name, value, low, high)
    x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    clean = x.astype(wide)

    def step(state: _State, _: None) -> tuple[_State, None]:
        point = state.point.astype(wide)
        s, slope, rise = nearest(threat, point, *at(state.point))
        behind = jnp.sum((slope * (point - clean)).reshape(x.shape[0], -1), axis=1)
        own = smallest_step(threat, clean, slope, rise + behind)[0]
        length, own_length = (distance(threat.norm, v, jnp.zeros_like(v)) for v in (s, own))
        both = length + own_length
        a = beside(jnp.minimum(length / jnp.where(both > 0, both, 1), alpha_max), x)
        moved = within(threat, (1 - a) * (point + eta * s) + a * (clean + eta * own), x.dtype)

        won, far = classifier.judge(moved)[1], distance(threat.norm, moved, x)
        nearer = won & (far < state.distance)
        back = within(threat, clean + beta * (moved.astype(wide) - clean), x.dtype)
        select = jax.vmap(jnp.where)
        found = select(nearer, moved, state.found)
        return _State(select(won, back, moved), found, jnp.where(nearer, far, state.distance)), None

    won = classifier.judge(x)[1]
    at = tangents(classifier, x, rivals)
    start = random_start(key, dataclasses.replace(threat, eps=jnp.asarray(threat.eps) / 2), x) if start_at_random else x
    first = _State(start, x, jnp.where(won, jnp.zeros((), wide), jnp.inf))
    last, _ = jax.lax.scan(step, first, length=steps, unroll=unroll)
    return in_reach(threat, last.found, last.distance < jnp.inf, x)
