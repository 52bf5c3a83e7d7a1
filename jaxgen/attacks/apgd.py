"""Auto-PGD: projected gradient ascent that sets its own step size, for each example.

With s the steepest direction of the threat's norm and P the projection onto ball and bounds, a step is

    z_{k+1} = P(x_k + eta s(g_k)),    x_{k+1} = P(x_k + 0.75 (z_{k+1} - x_k) + 0.25 (x_k - x_{k-1}))      (1)

(Croce & Hein 2020, arXiv:2003.01690, Algorithm 1), the first one of a run x_1 = z_1. It starts at eta = 2 eps. At
checkpoints after w_j = ceil(p_j steps) steps,

    p_0 = 0,    p_1 = 0.22,    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06),                           (2)

eta is halved, and the example goes back to the best point it has seen, if

    f rose in fewer than 0.75 (w_j - w_{j-1}) of the steps since the last checkpoint, or                  (3)
    eta was not halved there and the best value has not changed since.                                    (4)

For the norm 1 (Croce & Hein 2021, "Mind the box", arXiv:2103.01208) steps are sparse, s
moving a share of the coordinates, and there is no momentum. The first 30 % of the steps are in a ball of radius 3 eps,
the next 30 % of 2 eps and the rest of eps; each stage starts at the projection of the last one's best point. At
checkpoints, every 4 % of the steps, the share becomes 2/3 of the coordinates in which the best point differs from the
clean one; if these have become fewer by 5 %, the example goes back to that point and eta to the radius, else eta
shrinks to 2/3, a tenth of the radius at the least.

All of this is a table of rows, one for each evaluation, that one compiled loop reads.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks
from jaxgen.attacks.objectives import Best, better, choose, evaluate_and_gradient, unseen
from jaxgen.attacks.steepest import steepest
from jaxgen.attacks.threat import ThreatModel, beside, check, project
from jaxgen.attacks.threat import random_start as draw_start
from jaxgen.typing import Array, Key, Objective


class _Row(NamedTuple):
    """What one evaluation does, [rows] each.

    Attributes:
        radius: of the ball, in parts of eps.
        fresh: whether a stage begins here, with an evaluation and without a step.
        first: whether this is a stage's first step.
        window: at a checkpoint the number of steps since the last one, elsewhere 0.
    """

    radius: Array
    fresh: Array
    first: Array
    window: Array


class _Point(NamedTuple):
    """Points [batch, ...], the gradients there, and the values [batch]."""

    x: Array
    gradient: Array
    value: Array


class _State(NamedTuple):
    """What a run carries.

    Attributes:
        now: where it stands.
        previous: [batch, ...], where it stood before.
        peak: its point of the highest value.
        best: what is returned: an example that is won may have a lower value than one that is not.
        eta: [batch], the step size.
        rises: [batch], in how many steps since the last checkpoint the value rose.
        halved: [batch], whether eta was halved at the last checkpoint.
        plateau: [batch], the highest value at the last checkpoint.
        share: [batch], of the coordinates that move, for norm 1.
        changed: [batch], for norm 1 the number of coordinates in which the peak was not clean at the last checkpoint.
    """

    now: _Point
    previous: Array
    peak: _Point
    best: Best
    eta: Array
    rises: Array
    halved: Array
    plateau: Array
    share: Array
    changed: Array


def apgd(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    *,
    steps: int = 100,
    random_start: bool = True,
    unroll: int = 1,
) -> Array:
    """Auto-PGD: ascent without a step size to choose, in each of the three norms.

    The paper's objectives are `cross_entropy`, `dlr` and its targeted form.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``. Without a random start it decides
            nothing.
        objective: ``x -> [batch]``, ascended.
        x: [batch, ...], the clean examples, within the bounds, floating.
        threat: what the attacker may do, of a finite ``eps``.
        steps: how many, at least 1; each is an evaluation and a gradient, as is the start (for norm 1: of each stage).
        random_start: whether to start at a random point of the ball instead of at ``x``.
        unroll: steps per iteration of the compiled loop, at least 1.

    Returns:
        The best point seen of each example, one that is won before one that is not and then the one of the highest
        value: the shape and dtype of ``x``, in ball and bounds.

    Raises:
        ValueError: ``x``, ``threat`` and the objective's value do not fit, or one known is out of range.
        TypeError: ``key`` is not a typed key, or ``x`` or the objective's value not floating.

    >>> threat = ThreatModel(2, eps=1.0, low=-1.0, high=1.0)
    >>> apgd(jax.random.key(0), lambda x: x @ jnp.array([3.0, 4.0]), jnp.zeros((1, 2)), threat).round(3)
    Array([[0.6, 0.8]], dtype=float32)
    """
    checks.key("key", key)
    checks.positive_integer("steps", steps)
    checks.positive_integer("unroll", unroll)
    check(threat, x)
    checks.finite("threat.eps", threat.eps)
    x = jnp.asarray(x)
    sparse = threat.norm == 1
    rows = _stages(steps) if sparse else _checkpoints(steps)

    eps = jnp.asarray(threat.eps, jnp.promote_types(x.dtype, jnp.float32))

    def step(state: _State, row: _Row) -> tuple[_State, None]:
        radius = row.radius * eps
        stage = dataclasses.replace(threat, eps=radius)
        state = choose(row.fresh, _opening(state.peak.x, radius if sparse else 2 * radius), state)
        now = state.now
        moved = now.x + beside(state.eta, x) * steepest(threat.norm, now.gradient, share=state.share)
        new = project(stage, moved.astype(x.dtype), x)
        if not sparse:
            inertia = jnp.where(row.first, 1, 0.75)
            moved = now.x + inertia * (new - now.x) + (1 - inertia) * (now.x - state.previous)
            new = project(stage, moved.astype(x.dtype), x)
        value, won, gradient = evaluate_and_gradient(objective, new)
        there = _Point(new, gradient, value)
        state = state._replace(
            now=there,
            previous=now.x,
            peak=choose(value > state.peak.value, there, state.peak),
            best=better(state.best, Best(new, value, won)),
            rises=state.rises + (value > now.value),
        )
        adapted = _adapt_sparse(state, radius, x) if sparse else _adapt(state, row.window)
        return choose(row.window > 0, adapted, state), None

    widest = rows.radius[0] * eps
    start = draw_start(key, dataclasses.replace(threat, eps=widest), x) if random_start else x
    state, _ = jax.lax.scan(step, _opening(start, widest), rows, unroll=unroll)
    return project(threat, state.best.x, x)


def _opening(x: Array, eta: Array) -> _State:
    """Where a stage begins: of the gradient 0, so that its first row only projects ``x`` onto its ball."""
    best = unseen(x)
    point = _Point(x, jnp.zeros_like(x), best.value)
    return _State(
        now=point._replace(value=-best.value),  # which no value exceeds: the start is no rise
        previous=x,
        peak=point,
        best=best,
        eta=jnp.zeros_like(best.value) + eta,
        rises=jnp.zeros_like(best.value, int),
        halved=jnp.ones_like(best.value, bool),
        plateau=best.value,
        share=jnp.full_like(best.value, 0.2),
        changed=jnp.full_like(best.value, jnp.inf),
    )


def _adapt(state: _State, window: Array) -> _State:
    """A checkpoint of norm 2 or inf, Eqs. 3 and 4."""
    stuck = ~state.halved & (state.peak.value <= state.plateau)
    halved = (state.rises < 0.75 * window) | stuck
    return state._replace(
        now=choose(halved, state.peak, state.now),
        eta=jnp.where(halved, state.eta / 2, state.eta),
        rises=jnp.zeros_like(state.rises),
        halved=halved,
        plateau=state.peak.value,
    )


def _adapt_sparse(state: _State, radius: Array, x: Array) -> _State:
    """A checkpoint of norm 1."""
    changed = jnp.sum(state.peak.x != x, axis=tuple(range(1, x.ndim))).astype(state.changed.dtype)
    fewer = changed < 0.95 * state.changed
    return state._replace(
        now=choose(fewer, state.peak, state.now),
        eta=jnp.where(fewer, radius, jnp.maximum(state.eta / 1.5, radius / 10)),
        share=changed / (1.5 * math.prod(x.shape[1:])),
        changed=changed,
    )


def _checkpoints(steps: int) -> _Row:
    """The rows of a run for norm 2 or inf: the start, then every step, Eq. 2."""
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    # Rounded, since 0.41 * 100 must not be 41.000000000000007 and its ceiling 42.
    after = sorted({math.ceil(round(q * steps, 9)) for q in p if q <= 1})
    window = np.zeros(steps + 1, int)
    window[after[1:]] = np.diff(after)
    index = np.arange(steps + 1)
    return _row(np.ones(steps + 1), index, window)


def _stages(steps: int) -> _Row:
    """The rows of a run for norm 1: of each stage its start, then every step."""
    large = 3 * steps // 10
    lengths = [(3, large), (2, large), (1, steps - 2 * large)] if large else [(1, steps)]
    radius = np.concatenate([np.full(length + 1, radius) for radius, length in lengths])
    index = np.concatenate([np.arange(length + 1) for _, length in lengths])
    window = np.concatenate([np.arange(length + 1) % max(steps // 25, 1) == 0 for _, length in lengths])
    # A later stage begins with a checkpoint: its share is by how sparse the last one's best point is.
    window[0] = False
    return _row(radius, index, window)


def _row(radius: np.ndarray, index: np.ndarray, window: np.ndarray) -> _Row:
    return _Row(
        jnp.asarray(radius, jnp.float32), jnp.asarray(index == 0), jnp.asarray(index == 1), jnp.asarray(window, int)
    )
