"""Carlini & Wagner's attack: the smallest perturbation in L2, by Adam and a search for the weight of being adversarial.

Carlini & Wagner 2017 (arXiv:1608.04644, sections V and VI). Within the bounds [low, high] by a change of variables,

    x(u) = (low + high) / 2 + (high - low) / 2 tanh u                                                     (1)

Adam minimises, with m the margin (`objectives`, Eqs. 2 and 5) and a weight c,

    || x(u) - x ||^2 + c max(confidence - m(x(u)), 0)                                                     (2)

for each example by itself. A small c finds nothing, a large one something far away: c grows tenfold until the attack
succeeds, and is then halved in from both sides. The nearest adversarial iterate of all searches is what counts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgen import checks
from jaxgen.attacks.boundary import classifier_of, in_reach, within
from jaxgen.attacks.objectives import margin
from jaxgen.attacks.threat import ThreatModel, check, distance
from jaxgen.typing import Array, ArrayLike, Key, Objective


class _Found(NamedTuple):
    x: Array
    distance: Array


class _Descent(NamedTuple):
    u: Array
    adam: optax.OptState
    found: _Found
    success: Array


class _Weight(NamedTuple):
    weight: Array
    low: Array
    high: Array


def carlini_wagner(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    *,
    searches: int = 9,
    steps: int = 1000,
    step_size: ArrayLike = 0.01,
    weight: ArrayLike = 1e-3,
    confidence: ArrayLike = 0.0,
    unroll: int = 1,
) -> Array:
    """The smallest L2 perturbation that changes the class, Eqs. 1 and 2.

    The search does not look at the ball: what it finds is given back where it lies within, all of it for an infinite
    ``threat.eps``.

    Args:
        key: not used, since nothing is drawn: attacks are called alike.
        objective: a `Classified`, of which the score does not matter. A target has to be reached.
        x: [batch, ...] within the bounds, floating: the clean examples.
        threat: of norm 2 and finite bounds.
        searches: how many weights are tried.
        steps: of Adam, for each weight: one gradient each.
        step_size: Adam's, in u; a scalar above 0.
        weight: c of the first search, a scalar above 0.
        confidence: by what margin an example has to be adversarial, a scalar of at least 0: larger ones transfer better
            to other classifiers.
        unroll: steps per round of the compiled loop.

    Returns:
        The shape and dtype of ``x``: the nearest adversarial example where one was found in the ball, else ``x``. An
        example that is won, by its margin, as it comes stays as it is.

    Raises:
        TypeError: ``objective`` is a plain function, or ``x`` is not floating.
        ValueError: ``threat`` is not of norm 2, has infinite bounds or does not fit ``x``, or an option is out of
            range.

    >>> threat = ThreatModel(2, eps=math.inf, low=0.0, high=1.0)
    >>> objective = margin(lambda x: x, jnp.array([0]))
    >>> carlini_wagner(jax.random.key(0), objective, jnp.array([[0.75, 0.25]]), threat).round(3)
    Array([[0.5, 0.5]], dtype=float32)
    """
    classifier = classifier_of(objective)
    check(threat, x)
    if threat.norm != 2:
        raise ValueError(f"`threat.norm` must be 2, got {threat.norm:g}")
    for name, bound in (("low", threat.low), ("high", threat.high)):
        checks.finite(f"threat.{name}", bound)
    for name, count in (("searches", searches), ("steps", steps), ("unroll", unroll)):
        checks.positive_integer(name, count)
    for name, value in (("step_size", step_size), ("weight", weight), ("confidence", confidence)):
        checks.shape(name, value, ())
    checks.positive("step_size", step_size)
    checks.positive("weight", weight)
    checks.interval("confidence", confidence, 0, math.inf)
    goal = margin(classifier.logits, classifier.labels, targets=classifier.targets)
    x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    clean = x.astype(wide)
    low, high = jnp.asarray(threat.low, wide), jnp.asarray(threat.high, wide)
    middle, half = (low + high) / 2, (high - low) / 2
    # Slightly inside: at the bounds themselves u would be infinite, and near them it hardly moves x.
    start = jnp.arctanh(0.999 * jnp.clip((clean - middle) / half, -1, 1))

    def loss(u: Array, c: Array) -> tuple[Array, tuple[Array, Array]]:
        moved = within(threat, middle + half * jnp.tanh(u), x.dtype)
        value, won = goal.judge(moved)
        squared = jnp.sum(jnp.square(moved.astype(wide) - clean).reshape(x.shape[0], -1), axis=1)
        return jnp.sum(squared + c * jnp.maximum(confidence - value, 0)), (moved, won & (value >= confidence))

    gradient = jax.grad(loss, has_aux=True)
    adam = optax.adam(step_size)  # elementwise, so that examples do not see each other

    def search(carry: tuple[_Found, _Weight], nothing: None) -> tuple[tuple[_Found, _Weight], None]:
        found, bracket = carry
        c = bracket.weight

        def step(state: _Descent, nothing: None) -> tuple[_Descent, None]:
            g, (moved, won) = gradient(state.u, c)
            updates, adam_state = adam.update(g, state.adam)
            far = distance(2, moved, x)
            nearer = won & (far < state.found.distance)
            found = _Found(
                jax.vmap(jnp.where)(nearer, moved, state.found.x), jnp.where(nearer, far, state.found.distance)
            )
            return _Descent(state.u + updates, adam_state, found, state.success | won), None

        begin = _Descent(start, adam.init(start), found, jnp.zeros_like(c, bool))
        (_, _, found, success), _ = jax.lax.scan(step, begin, length=steps, unroll=unroll)
        low, high = jnp.where(success, bracket.low, c), jnp.where(success, c, bracket.high)
        return (found, _Weight(jnp.where(high < jnp.inf, (low + high) / 2, 10 * c), low, high)), None

    value, won = goal.judge(x)
    found = _Found(x, jnp.where(won & (value >= confidence), jnp.zeros((), wide), jnp.inf))
    zeros = jnp.zeros_like(found.distance)
    (found, _), _ = jax.lax.scan(
        search, (found, _Weight(zeros + weight, zeros, zeros + jnp.inf)), None, length=searches
    )
    return in_reach(threat, found.x, found.distance < jnp.inf, x)
