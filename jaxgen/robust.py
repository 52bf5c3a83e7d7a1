"""Robust training whose attack costs nothing: "free" adversarial training as a method (Shafahi et al. 2019).

The gradient of a loss by its input comes with that by the parameters, from one evaluation. Free adversarial training
(arXiv:1904.12843, Algorithm 1) uses both: it replays every batch m times in a row, and each time

    g, h = the gradients of L(params, x + delta) by params and by x                                  (1)
    params <- the optimiser's step along g                                                          (2)
    delta <- the projection onto the ball of  delta + step_size * steepest(h)                         (3)

so that m replays are m updates of the parameters and m steps of an attack at the price of m ordinary updates: train for
so many fewer epochs. delta outlives its batch: the next one's attack begins where this one's ended.

Other recipes (PGD, FGSM-RS, TRADES) attack anew: `train.minimise` of `attacks.adversarial` losses.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgen import checks, train
from jaxgen.attacks.steepest import steepest, step_length
from jaxgen.attacks.threat import ThreatModel, check, project
from jaxgen.typing import Array, ArrayLike, Key, Loss, Metrics, Params


class Replaying(NamedTuple):
    """The state of `free`.

    Attributes:
        step: int32 scalar, the number of steps taken: of batches, each replayed.
        learner: the parameters and the optimiser's state.
        average: what the ``average`` given to `free` keeps; else ().
        perturbation: delta of Eq. 3, in the ball around 0.
    """

    step: Array
    learner: train.Learner
    average: Any
    perturbation: Array


def free(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    init: Callable[[Key], Params],
    threat: ThreatModel,
    shape: Sequence[int],
    *,
    replays: int = 8,
    step_size: ArrayLike | None = None,
    field: str = "image",
    average: train.Average | None = None,
    axis_name: str | None = None,
) -> train.Method:
    """Free adversarial training, Eqs. 1 to 3; the loss is what `train.minimise` would take.

    Args:
        loss: ``(params, batch, key) -> (scalar, metrics)``, a mean of examples that do not see each other.
        optimiser: any optax gradient transformation; it makes ``replays`` updates in a step, which is what its
            schedules count.
        init: ``key -> params``.
        threat: what the attack may do.
        shape: of ``batch[field]``, [batch, ...], on one device under pmap: row i of every batch is moved by row i of
            delta, which begins as zeros.
        replays: m, at least 1; the paper's choice for CIFAR-10 is 8.
        step_size: of the attack, in ``threat.norm``: a scalar or [batch]; None for ``threat.eps``, as in the paper.
        field: which entry of the batch, a mapping, is attacked.
        average: a running average of the parameters to keep beside them, updated once a step.
        axis_name: the mapped axis over which the batch is split, for `place.pmap`. Under ``jit`` on a mesh nothing is
            needed.

    Returns:
        A Method of state `Replaying`. Its metrics are the loss's own, "loss" and "grad_norm", means over the replays.

    Raises:
        ValueError: an option is out of range, or (while tracing) ``batch[field]`` does not have that shape.
        TypeError: (while tracing) ``batch[field]`` is not floating.

    >>> logistic = lambda params, batch, key: (jnp.mean(jnp.log1p(jnp.exp(-batch["image"] @ params))), {})
    >>> threat = ThreatModel(math.inf, eps=0.1, low=-1.0, high=1.0)
    >>> method = free(logistic, optax.sgd(0.1), lambda key: jnp.ones(3), threat, (4, 3), replays=2)
    >>> state, _ = method.step(method.init(jax.random.key(0)), {"image": jnp.ones((4, 3))}, jax.random.key(0))
    >>> state.perturbation[0]  # against the weights
    Array([-0.1, -0.1, -0.1], dtype=float32)
    """
    checks.positive_integer("replays", replays)

    def initial(key: Key) -> Replaying:
        params = init(key)
        return Replaying(
            step=jnp.zeros((), jnp.int32),
            learner=train.Learner(params, optimiser.init(params)),
            average=() if average is None else average.init(params),
            perturbation=jnp.zeros(shape),
        )

    def step(state: Replaying, batch: Mapping[str, Any], key: Key) -> tuple[Replaying, Metrics]:
        checks.shape(f"batch[{field!r}]", batch[field], shape)
        check(threat, batch[field])
        x = jnp.asarray(batch[field])
        ball = dataclasses.replace(threat, low=-math.inf, high=math.inf)
        length = step_length(threat, x, step_size, default=1.0)
        key = jax.random.fold_in(key, state.step)

        def averaged(params: Params, x: Array, key: Key) -> tuple[Array, Metrics]:
            value, metrics = loss(params, {**batch, field: x}, key)
            metrics = {**metrics, "loss": value}
            # Inside of what is differentiated, as in `train.descend`.
            return (value, metrics) if axis_name is None else jax.lax.pmean((value, metrics), axis_name)

        def replay(carried: tuple[train.Learner, Array], number: Array) -> tuple[tuple[train.Learner, Array], Metrics]:
            (params, opt_state), delta = carried
            moved = project(threat, (x + delta).astype(x.dtype), x)
            gradients = jax.grad(averaged, argnums=(0, 1), has_aux=True)
            (descent, ascent), metrics = gradients(params, moved, jax.random.fold_in(key, number))
            if axis_name is not None:
                descent = jax.lax.pmean(descent, axis_name)
            metrics = {**metrics, "grad_norm": optax.tree.norm(descent)}
            updates, opt_state = optimiser.update(descent, opt_state, params)
            delta = delta + length * steepest(threat.norm, ascent)
            delta = project(ball, delta, jnp.zeros_like(delta))
            return (train.Learner(optax.apply_updates(params, updates), opt_state), delta), metrics

        (learner, delta), metrics = jax.lax.scan(replay, (state.learner, state.perturbation), jnp.arange(replays))
        count = state.step + 1
        kept = state.average if average is None else average.update(state.average, learner.params, count)
        return Replaying(count, learner, kept, delta), jax.tree.map(lambda value: value.mean(0), metrics)

    return train.Method(initial, step)
