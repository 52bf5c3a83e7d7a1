"""Losses into steps: a training method is a pair of pure functions, as an optimiser is in optax.

    state = method.init(key)
    state, metrics = method.step(state, batch, key)

A step folds the number of steps taken into the key that it is given, so one key serves a whole run, and a run is a pure
function of (key, data, steps): continue it from a stored state with the same key and data and it continues bit by bit.

Nothing here compiles: `jaxgen.place` does, or a `jax.jit` of your own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgen import checks
from jaxgen.typing import Array, Batch, Key, Loss, Metrics, Params


class Method(NamedTuple):
    """A way of training, as two pure functions over a state that only they look into.

    Attributes:
        init: key -> state.
        step: (state, batch, key) -> (state, metrics).
    """

    init: Callable[[Key], Any]
    step: Callable[[Any, Batch, Key], tuple[Any, Metrics]]


class Learner(NamedTuple):
    """One optimised player: its parameters and its optimiser's state."""

    params: Params
    opt_state: optax.OptState


class Minimising(NamedTuple):
    """The state of `minimise`.

    Attributes:
        step: int32 scalar, the number of steps taken.
        learner: the parameters and the optimiser's state.
        average: what the ``average`` given to `minimise` keeps: for `ema` a tree like the parameters; else ().
    """

    step: Array
    learner: Learner
    average: Any


class Average(NamedTuple):
    """A running average of parameters.

    Attributes:
        init: params -> average.
        update: (average, params, step) -> average, after the step numbered ``step``, counted from 1.
    """

    init: Callable[[Params], Any]
    update: Callable[[Any, Params, Array], Any]


def ema(decay: float = 0.9999, *, warmup: bool = True) -> Average:
    """Exponential moving average, in the parameters' own dtype: average <- d average + (1 - d) params.

    Args:
        decay: d, in [0, 1).
        warmup: starts with d = min(decay, (1 + step) / (10 + step)), so that the first average is not the initial draw.

    Raises:
        ValueError: ``decay`` is out of range.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must lie in [0, 1), got {decay}")

    def update(average: Params, params: Params, step: Array) -> Params:
        rate = 1 - (jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.asarray(decay))
        return jax.tree.map(lambda old, new: old + rate.astype(new.dtype) * (new - old), average, params)

    return Average(init=lambda params: jax.tree.map(jnp.copy, params), update=update)


def minimise(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    init: Callable[[Key], Params],
    *,
    average: Average | None = None,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> Method:
    """One player descending one loss.

    Clipping, schedules and weight decay are parts of the optimiser: ``optax.chain(optax.clip_by_global_norm(1.0),
    optax.adamw(...))``.

    Args:
        loss: ``(params, batch, key) -> (scalar, metrics)``.
        optimiser: any optax gradient transformation.
        init: ``key -> params``.
        average: a running average of the parameters to keep beside them, such as `ema(0.999)`.
        microbatches: splits each batch into so many parts, one after the other, and averages their gradients: the
            memory of one part for the step of the whole batch. Part m takes rows m, m + microbatches, ... and the key
            folded with m.
        axis_name: the mapped axis over which to average gradients and metrics, for `place.pmap` or ``shard_map``. Under
            ``jit`` on a mesh nothing is needed.

    Returns:
        A Method of state `Minimising`. Its metrics are the loss's own, "loss" and "grad_norm" (before the optimiser).

    Raises:
        ValueError: ``microbatches`` is not a positive integer, or (while tracing) does not divide the batch.

    >>> square = lambda params, batch, key: (jnp.sum((params - batch) ** 2), {})
    >>> method = minimise(square, optax.sgd(0.25), lambda key: jnp.ones(2))
    >>> state, metrics = method.step(method.init(jax.random.key(0)), jnp.zeros(2), jax.random.key(0))
    >>> state.learner.params, metrics["loss"]
    (Array([0.5, 0.5], dtype=float32), Array(2., dtype=float32))
    """
    checks.positive_integer("microbatches", microbatches)

    def initial(key: Key) -> Minimising:
        params = init(key)
        return Minimising(
            step=jnp.zeros((), jnp.int32),
            learner=Learner(params, optimiser.init(params)),
            average=() if average is None else average.init(params),
        )

    def gradients(params: Params, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return grads, {**metrics, "loss": value}

    def accumulated(params: Params, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        parts = jax.tree.map(lambda leaf: _interleaved(leaf, microbatches), batch)
        keys = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(microbatches))
        total = jax.eval_shape(gradients, params, jax.tree.map(lambda leaf: leaf[0], parts), key)

        def add(total: Any, part: tuple[Batch, Key]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, *part)), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), total)
        total, _ = jax.lax.scan(add, zeros, (parts, keys))
        return jax.tree.map(lambda leaf: leaf / microbatches, total)

    def step(state: Minimising, batch: Batch, key: Key) -> tuple[Minimising, Metrics]:
        key = jax.random.fold_in(key, state.step)
        params, opt_state = state.learner
        grads, metrics = (gradients if microbatches == 1 else accumulated)(params, batch, key)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        updates, opt_state = optimiser.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        count = state.step + 1
        averaged = state.average if average is None else average.update(state.average, params, count)
        return Minimising(count, Learner(params, opt_state), averaged), metrics

    return Method(initial, step)


def _interleaved(leaf: Array, parts: int) -> Array:
    # Row r goes to part r % parts: a batch that is split over devices by blocks of rows gives each device its share of
    # each part.
    rows = leaf.shape[0]
    if rows % parts:
        raise ValueError(f"`microbatches` must divide the batch, got a batch of {rows} and {parts} microbatches")
    return jnp.swapaxes(leaf.reshape(rows // parts, parts, *leaf.shape[1:]), 0, 1)
