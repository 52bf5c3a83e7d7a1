"""Projected gradient ascent: steps of steepest ascent, each projected back onto ball and bounds.

    x_{k+1} = P(x_k + step_size s(g_k)),    g_k = grad f(x_k)                                             (1)

with s the steepest direction of the threat's norm (Madry et al. 2017, arXiv:1706.06083, section 2.1), and with momentum
(MI-FGSM, Dong et al. 2017, arXiv:1710.06081, Algorithm 1)

    m_k = decay m_{k-1} + g_k / || g_k ||_1,    x_{k+1} = P(x_k + step_size s(m_k))                       (2)

A fixed step jumps around the maximum, so that the last point need not be the best one: each example keeps the best it
has seen, by default, at the price of one more evaluation.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.attacks.objectives import Best, better, evaluate, evaluate_and_gradient, unseen
from jaxgen.attacks.steepest import advance, step_length
from jaxgen.attacks.threat import ThreatModel, check, project
from jaxgen.attacks.threat import random_start as draw_start
from jaxgen.typing import Array, ArrayLike, Key, Objective


def pgd(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    *,
    steps: int = 40,
    step_size: ArrayLike | None = None,
    decay: ArrayLike | None = None,
    random_start: bool = True,
    keep_best: bool = True,
    share: ArrayLike = 0.01,
    unroll: int = 1,
) -> Array:
    """Projected gradient ascent, Eq. 1; with a ``decay`` its form with momentum, Eq. 2.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``. Without a random start it decides
            nothing.
        objective: ``x -> [batch]``, ascended.
        x: [batch, ...], the clean examples, within the bounds, floating.
        threat: what the attacker may do.
        steps: how many, at least 1; each is an evaluation and a gradient.
        step_size: at least 0, a scalar or [batch]; None for 2.5 eps / steps, with which every point of the ball can be
            reached from every other.
        decay: of the momentum, Eq. 2, at least 0; None for no momentum, Eq. 1.
        random_start: whether to start at a random point of the ball, as the paper does, instead of at ``x``.
        keep_best: whether to return the best point seen, one that is won before one that is not and then the one of the
            highest value, instead of the last.
        share: of the coordinates that move in a step, for norm 1; see `steepest`.
        unroll: steps per iteration of the compiled loop, at least 1.

    Returns:
        The shape and dtype of ``x``, in ball and bounds.

    Raises:
        ValueError: ``x``, ``threat``, ``step_size`` and the objective's value do not fit, or one known is out of range.
        TypeError: ``key`` is not a typed key, or ``x`` or the objective's value not floating.

    >>> threat = ThreatModel(2, eps=1.0, low=-1.0, high=1.0)
    >>> x = pgd(jax.random.key(0), lambda x: x @ jnp.array([3.0, 4.0]), jnp.zeros((1, 2)), threat, random_start=False)
    >>> x.round(3)
    Array([[0.6, 0.8]], dtype=float32)
    """
    checks.key("key", key)
    checks.positive_integer("steps", steps)
    checks.positive_integer("unroll", unroll)
    if decay is not None:
        checks.shape("decay", decay, ())
        checks.interval("decay", decay, 0.0, math.inf)
    check(threat, x)
    x = jnp.asarray(x)
    length = step_length(threat, x, step_size, default=2.5 / steps)
    start = draw_start(key, threat, x) if random_start else x

    def step(state: tuple[Array, Array | None, Best | None], _: None) -> tuple[tuple[Any, ...], None]:
        now, momentum, best = state
        value, won, gradient = evaluate_and_gradient(objective, now)
        if best is not None:
            best = better(best, Best(now, value, won))
        if momentum is not None:
            momentum = gradient = jnp.asarray(decay, momentum.dtype) * momentum + _unit_1(gradient)
        moved = advance(threat, now, gradient, length, share=share)
        return (project(threat, moved, x), momentum, best), None

    momentum = None if decay is None else jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))
    best = unseen(start) if keep_best else None
    (last, _, best), _ = jax.lax.scan(step, (start, momentum, best), length=steps, unroll=unroll)
    return last if best is None else better(best, Best(last, *evaluate(objective, last))).x


def mifgsm(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    *,
    steps: int = 10,
    step_size: ArrayLike | None = None,
    decay: ArrayLike = 1.0,
    random_start: bool = False,
    keep_best: bool = True,
    share: ArrayLike = 0.01,
    unroll: int = 1,
) -> Array:
    """Projected gradient ascent with momentum, Eq. 2, by the defaults of its paper: examples that transfer.

    Args:
        key: as in `pgd`.
        objective: as in `pgd`.
        x: as in `pgd`.
        threat: as in `pgd`.
        steps: as in `pgd`.
        step_size: as in `pgd`, but None is for eps / steps.
        decay: of the momentum, at least 0; the paper's mu.
        random_start: as in `pgd`; the paper starts at ``x``.
        keep_best: as in `pgd`; the paper returns the last point.
        share: as in `pgd`.
        unroll: as in `pgd`.

    Returns:
        The shape and dtype of ``x``, in ball and bounds.

    Raises:
        ValueError: as in `pgd`.
        TypeError: as in `pgd`.
    """
    check(threat, x)
    checks.positive_integer("steps", steps)
    if step_size is None:
        checks.finite("threat.eps", threat.eps)
        step_size = jnp.asarray(threat.eps) / steps
    return pgd(
        key,
        objective,
        x,
        threat,
        steps=steps,
        step_size=step_size,
        decay=decay,
        random_start=random_start,
        keep_best=keep_best,
        share=share,
        unroll=unroll,
    )


def _unit_1(gradient: Array) -> Array:
    """Gradients [batch, ...] of unit norm, as in Eq. 2, and zero where they are."""
    g = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    total = jnp.sum(jnp.abs(g), axis=tuple(range(1, g.ndim)), keepdims=True)
    return g / jnp.where(total > 0, total, 1)
