"""The fast gradient sign method: one step of steepest ascent.

The linear approximation f(c + d) = f(c) + g . d of an objective is greatest in the ball of radius eps at

    x = c + eps s(g),    s(g) = sign(g) for inf,    g / || g ||_2 for 2                                  (1)

(Goodfellow et al. 2014, arXiv:1412.6572, section 4), which is then projected onto the bounds. From a random start x_0
in the ball (FGSM-RS, Wong et al. 2020, arXiv:2001.03994) the step is projected onto the ball as well:

    x = P(x_0 + step_size s(grad f(x_0)))                                                                (2)
"""

import jax.numpy as jnp

from jaxgen import checks
from jaxgen.attacks.objectives import evaluate_and_gradient
from jaxgen.attacks.steepest import advance, step_length
from jaxgen.attacks.threat import ThreatModel, check, project
from jaxgen.attacks.threat import random_start as draw_start
from jaxgen.typing import Array, ArrayLike, Key, Objective


def fgsm(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    *,
    random_start: bool = False,
    step_size: ArrayLike | None = None,
    share: ArrayLike = 0.01,
) -> Array:
    """The fast gradient sign method, Eq. 1, for any norm; from a random start FGSM-RS, Eq. 2.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``. Without a random start it decides
            nothing.
        objective: ``x -> [batch]``, ascended.
        x: [batch, ...], the clean examples, within the bounds, floating.
        threat: what the attacker may do.
        random_start: whether to start at a random point of the ball. The paper then takes steps of 1.25 eps.
        step_size: at least 0, a scalar or [batch]; None for ``threat.eps``.
        share: of the coordinates that move, for norm 1; see `steepest`.

    Returns:
        The shape and dtype of ``x``, in ball and bounds.

    Raises:
        ValueError: ``x``, ``threat``, ``step_size`` and the objective's value do not fit, or one known is out of range.
        TypeError: ``key`` is not a typed key, or ``x`` or the objective's value not floating.

    >>> import math, jax
    >>> threat = ThreatModel(math.inf, eps=0.25, low=0.0, high=1.0)
    >>> x = jnp.array([[0.5, 0.5, 0.0]])
    >>> fgsm(jax.random.key(0), lambda x: x @ jnp.array([1.0, -2.0, -3.0]), x, threat)
    Array([[0.75, 0.25, 0.  ]], dtype=float32)
    """
    checks.key("key", key)
    check(threat, x)
    x = jnp.asarray(x)
    length = step_length(threat, x, step_size, default=1.0)
    start = draw_start(key, threat, x) if random_start else x
    _, _, gradient = evaluate_and_gradient(objective, start)
    moved = advance(threat, start, gradient, length, share=share)
    return project(threat, moved, x)
