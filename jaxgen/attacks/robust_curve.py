"""Robustness against the radius: one attack at many eps, in one program.

The balls of one example are nested, so what was found in a smaller one, or at the example itself, holds in all larger
ones. With x_j the attack's result at radius eps_j and x_0 = x at radius 0,

    value_i = max_{eps_j <= eps_i} value(x_j),    won_i = any_{eps_j <= eps_i} won(x_j)                 (1)

never fall as eps grows. An attack's own results may: it is no better at finding a point of a larger ball. The claims of
Eq. 1 are each as good as its proof, a point of the ball, and as sharp as all the runs together.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks, random
from jaxgen.attacks.objectives import evaluate
from jaxgen.attacks.restarts import Attack
from jaxgen.attacks.threat import ThreatModel, check
from jaxgen.typing import Array, ArrayLike, Key, Objective


class RobustCurve(NamedTuple):
    """What an attack reaches at each radius, Eq. 1, in the order of ``eps_values``.

    Attributes:
        value: [n, batch], the objective's highest value.
        won: [n, batch] bool, whether a point that wins was found: robust accuracy is ``1 - won.mean(axis=1)``. All
            False for an objective that is not `Classified`.
    """

    value: Array
    won: Array


def robust_curve(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    eps_values: ArrayLike | Sequence[float],
    *,
    attack: Attack,
    at_once: int | None = None,
) -> RobustCurve:
    """The attack's results at every radius, never falling as it grows.

    The radii are data: other values do not compile again. Each radius' attack draws the same random numbers. Examples
    do not meet, so a batch that is split over devices stays where it is.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``.
        objective: ascended, ``x -> [batch]``.
        x: [batch, ...], the clean examples, floating.
        threat: norm and bounds; its own ``eps`` is not looked at.
        eps_values: [n], each at least 0, in any order.
        attack: ``(key, objective, x, threat) -> x_adv``, options closed over.
        at_once: how many radii are attacked at a time, which is how many times the memory of one is needed; all where
            None. An attack that stops early, as `auto_attack` on what is broken, does so for the last of them.

    Returns:
        A `RobustCurve`.

    Raises:
        ValueError: ``eps_values`` is not [n] with n at least 1 or known to hold a negative number, ``at_once`` is not
            an integer of at least 1, ``x`` leaves known bounds, or the objective's value is not [batch].
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> import math
    >>> from jaxgen.attacks.threat import project
    >>> to_the_right = lambda key, objective, x, threat: project(threat, x + 9, x)
    >>> threat = ThreatModel(math.inf, eps=0.0, low=-1.0, high=1.0)
    >>> eps = jnp.array([0.0, 0.5, 2.0])
    >>> curve = robust_curve(
    ...     jax.random.key(0), lambda x: x[:, 0], jnp.zeros((1, 1)), threat, eps, attack=to_the_right
    ... )
    >>> curve.value[:, 0]
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    # By NumPy, what is known stays known under a trace and can be refused.
    radii = eps_values if isinstance(eps_values, jax.Array) else np.asarray(eps_values)
    checks.shape("eps_values", radii, (None,))
    checks.interval("eps_values", radii, 0, math.inf)
    if not radii.size:
        raise ValueError("`eps_values` must hold at least 1 radius, got shape [0]")
    radii = jnp.asarray(radii)
    if at_once is not None:
        checks.positive_integer("at_once", at_once)
    check(dataclasses.replace(threat, eps=radii[0]), x)
    keys = random.keys_for(key, x.shape[0])

    def at_radius(eps: Array) -> tuple[Array, Array]:
        return evaluate(objective, attack(keys, objective, x, dataclasses.replace(threat, eps=eps)))

    order = jnp.argsort(radii)
    found = jax.lax.map(at_radius, radii[order], batch_size=at_once) if at_once else jax.vmap(at_radius)(radii[order])
    nested = [
        jax.lax.associative_scan(jnp.maximum, jnp.maximum(at_radii, at_x))
        for at_radii, at_x in zip(found, evaluate(objective, x), strict=True)
    ]
    return RobustCurve(*(best[jnp.argsort(order)] for best in nested))
