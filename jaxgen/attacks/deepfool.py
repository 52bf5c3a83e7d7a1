"""DeepFool: over the nearest tangent of the boundary, again and again, until the class changes.

Moosavi-Dezfooli et al. 2016 (arXiv:1511.04599, Algorithm 2). From x_0 = x, with s_i the smallest step within the bounds
of the data onto the nearest tangent at x_i (`boundary`, Eq. 1),

    x_(i+1) = x_i + (1 + overshoot) s_i                                                                   (1)

until the class is another one. The paper knows no bounds and overshoots once, at the end; its authors' program at every
step. On an affine classifier the first step is the minimal perturbation, times 1 + overshoot.
"""

import math

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.attacks.boundary import classifier_of, in_reach, nearest, tangents, within
from jaxgen.attacks.threat import ThreatModel, check
from jaxgen.typing import Array, ArrayLike, Key, Objective


def deepfool(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    *,
    steps: int = 50,
    rivals: int = 9,
    overshoot: ArrayLike = 0.02,
) -> Array:
    """A small perturbation that changes the class, within a few steps, Eq. 1.

    The search does not look at the ball: what it finds is given back where it lies within, all of it for an infinite
    ``threat.eps``. It is quick, and ends at the first adversarial example; `fab` goes on to the smallest.

    Args:
        key: not used, since nothing is drawn: attacks are called alike.
        objective: a `Classified`, of which the score does not matter.
        x: [batch, ...] within the bounds, floating: the clean examples.
        threat: of any norm.
        steps: at most; it stops when every example is won.
        rivals: how many classes are considered, the likeliest wrong ones of ``x``: so many gradients a step. A target
            is its own only rival.
        overshoot: by what part of itself a step is longer, a scalar of at least 0.

    Returns:
        The shape and dtype of ``x``: the adversarial example where one was found in the ball, else ``x``. An example
        that is won as it comes stays as it is.

    Raises:
        TypeError: ``objective`` is a plain function, or ``x`` is not floating.
        ValueError: ``x`` and ``threat`` do not fit together, or an option is out of range.

    >>> from jaxgen.attacks.objectives import margin
    >>> threat = ThreatModel(math.inf, eps=math.inf, low=0.0, high=1.0)
    >>> deepfool(jax.random.key(0), margin(lambda x: x, jnp.array([0])), jnp.array([[0.75, 0.25]]), threat)
    Array([[0.495, 0.505]], dtype=float32)
    """
    classifier = classifier_of(objective)
    check(threat, x)
    checks.positive_integer("steps", steps)
    checks.positive_integer("rivals", rivals)
    checks.shape("overshoot", overshoot, ())
    checks.interval("overshoot", overshoot, 0, math.inf)
    x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        i, _, won = state
        return (i < steps) & jnp.any(~won)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        i, point, won = state
        s, _, _ = nearest(threat, point.astype(wide), *at(point))
        moved = within(threat, point.astype(wide) + (1 + overshoot) * s, x.dtype)
        point = jax.vmap(jnp.where)(won, point, moved)
        return i + 1, point, won | classifier.judge(point)[1]

    won = classifier.judge(x)[1]
    at = tangents(classifier, x, rivals)
    _, found, won = jax.lax.while_loop(goes_on, step, (jnp.array(0), x, won))
    return in_reach(threat, found, won, x)
