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


PlayerLoss = Callable[[Params, Params, Batch, Key, Any], tuple[Array, Metrics]]
"""``(params, opponent's params, batch, key, carried) -> (scalar, metrics)``; differentiated by argument 0."""


class Player(NamedTuple):
    """One side of a game, as `alternate` takes it.

    Attributes:
        loss: ``(params, opponent's params, batch, key, carried) -> (scalar, metrics)``, which the player descends by
            its own parameters alone; ``carried`` is what the `Feedback` carries, or ().
        optimiser: any optax gradient transformation.
        init: ``key -> params``.
    """

    loss: PlayerLoss
    optimiser: optax.GradientTransformation
    init: Callable[[Key], Params]


class Feedback(NamedTuple):
    """What losses are told besides the batch: a state that follows from the metrics and from the number of steps.

    The probability of an adaptive augmentation is one, a weight by schedule another, and the number of steps itself, as
    `gan.lazy` asks for it: ``Feedback(lambda: jnp.int32(0), lambda carried, metrics, step: step)``.

    Attributes:
        init: nothing -> carried, any tree of arrays: what the first step's losses see.
        update: (carried, metrics, step) -> carried, after the step numbered ``step``, counted from 1.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Metrics, Array], Any]


class Alternating(NamedTuple):
    """The state of `alternate`.

    Attributes:
        step: int32 scalar, the number of steps taken.
        discriminator: the discriminator's parameters and its optimiser's state.
        generator: the generator's.
        average: what the ``average`` given to `alternate` keeps of the generator: for `ema` a tree like its parameters;
            else ().
        carried: what the ``feedback`` carries; else ().
    """

    step: Array
    discriminator: Learner
    generator: Learner
    average: Any
    carried: Any


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

    def step(state: Minimising, batch: Batch, key: Key) -> tuple[Minimising, Metrics]:
        key = jax.random.fold_in(key, state.step)
        learner, metrics = descend(
            loss, optimiser, state.learner, batch, key, microbatches=microbatches, axis_name=axis_name
        )
        count = state.step + 1
        averaged = state.average if average is None else average.update(state.average, learner.params, count)
        return Minimising(count, learner, averaged), metrics

    return Method(initial, step)


def alternate(
    discriminator: Player,
    generator: Player,
    *,
    discriminator_steps: int = 1,
    average: Average | None = None,
    feedback: Feedback | None = None,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> Method:
    """Two players in turn: so many updates of the discriminator, then one of the generator against it.

    Goodfellow et al. 2014 (arXiv:1406.2661, Algorithm 1), as one step of one program.

    Args:
        discriminator: the player that is updated first; its opponent's parameters are the generator's.
        generator: the player that is updated last; its opponent's parameters are the updated discriminator's.
        discriminator_steps: k, the discriminator's updates in a step, which is what a schedule in its optimiser counts.
            The batch is split among them: update i takes rows i, i + k, ... and the generator the rows of the last, so
            that all updates see batch / k rows.
        average: a running average of the generator's parameters to keep beside them, such as `ema(0.999)`.
        feedback: what both losses are told besides, and how it follows from a step's metrics.
        microbatches: splits the rows of each update into so many parts and averages their gradients, as in `minimise`.
        axis_name: the mapped axis over which to average gradients and metrics, for `place.pmap` or ``shard_map``. Under
            ``jit`` on a mesh nothing is needed.

    Returns:
        A Method of state `Alternating`. Its metrics are both losses' own, "loss" and "grad_norm", with "discriminator_"
        (the mean over its updates) and "generator_" before their names.

    Raises:
        ValueError: ``discriminator_steps`` or ``microbatches`` is not a positive integer, or (while tracing) does not
            divide the batch; or ``feedback`` carries on what is of another structure, shape or dtype than before.

    >>> critic = Player(lambda slope, at, *_: (slope**2 - slope * at, {}), optax.sgd(0.5), lambda key: jnp.zeros(()))
    >>> mover = Player(lambda at, slope, *_: (slope * at, {}), optax.sgd(0.5), lambda key: jnp.ones(()))
    >>> method = alternate(critic, mover)
    >>> state, metrics = method.step(method.init(jax.random.key(0)), jnp.zeros(1), jax.random.key(0))
    >>> state.discriminator.params, state.generator.params
    (Array(0.5, dtype=float32), Array(0.75, dtype=float32))
    """
    checks.positive_integer("discriminator_steps", discriminator_steps)
    checks.positive_integer("microbatches", microbatches)

    def initial(key: Key) -> Alternating:
        discriminator_key, generator_key = jax.random.split(key)
        critic, maker = discriminator.init(discriminator_key), generator.init(generator_key)
        return Alternating(
            step=jnp.zeros((), jnp.int32),
            discriminator=Learner(critic, discriminator.optimiser.init(critic)),
            generator=Learner(maker, generator.optimiser.init(maker)),
            average=() if average is None else average.init(maker),
            carried=() if feedback is None else jax.tree.map(_typed, feedback.init()),
        )

    def update(
        player: Player, learner: Learner, opponent: Learner, carried: Any, batch: Batch, key: Key
    ) -> tuple[Learner, Metrics]:
        def loss(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
            return player.loss(params, opponent.params, batch, key, carried)

        return descend(loss, player.optimiser, learner, batch, key, microbatches=microbatches, axis_name=axis_name)

    def step(state: Alternating, batch: Batch, key: Key) -> tuple[Alternating, Metrics]:
        discriminator_key, generator_key = jax.random.split(jax.random.fold_in(key, state.step))
        parts, keys = _parts("discriminator_steps", discriminator_steps, batch, discriminator_key)
        critic, critic_metrics = jax.lax.scan(
            lambda critic, part: update(discriminator, critic, state.generator, state.carried, *part),
            state.discriminator,
            (parts, keys),
        )
        last = jax.tree.map(lambda leaf: leaf[-1], parts)
        maker, maker_metrics = update(generator, state.generator, critic, state.carried, last, generator_key)
        metrics = {f"discriminator_{name}": value.mean(0) for name, value in critic_metrics.items()}
        metrics |= {f"generator_{name}": value for name, value in maker_metrics.items()}
        count = state.step + 1
        return Alternating(
            count,
            critic,
            maker,
            state.average if average is None else average.update(state.average, maker.params, count),
            state.carried if feedback is None else _carried_on(feedback, state.carried, metrics, count),
        ), metrics

    return Method(initial, step)


def _typed(leaf: Any) -> Array:
    """An array of the leaf's own dtype. A plain number's is weak: the second step would be another program."""
    leaf = jnp.asarray(leaf)
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.astype(leaf.dtype)


def _carried_on(feedback: Feedback, carried: Any, metrics: Metrics, step: Array) -> Any:
    new = jax.tree.map(_typed, feedback.update(carried, metrics, step))
    before, after = (jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree) for tree in (carried, new))
    if before != after:
        raise ValueError(f"`feedback` must carry on what it was given, {before}, got {after}")
    return new


def descend(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    learner: Learner,
    batch: Batch,
    key: Key,
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[Learner, Metrics]:
    """One update of one learner: the piece that methods are made of.

    Args:
        loss: ``(params, batch, key) -> (scalar, metrics)``.
        optimiser: any optax gradient transformation.
        learner: the parameters and the optimiser's state.
        batch: what the loss takes.
        key: what the loss takes.
        microbatches: as in `minimise`.
        axis_name: as in `minimise`.

    Returns:
        The learner after the update, and the loss's metrics with "loss" and "grad_norm".

    Raises:
        ValueError: ``microbatches`` does not divide the batch.
    """
    params, opt_state = learner

    def averaged(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        value, metrics = loss(params, batch, key)
        metrics = {**metrics, "loss": value}
        # Inside of what is differentiated: shard_map sums the gradients of what devices share by itself.
        return (value, metrics) if axis_name is None else jax.lax.pmean((value, metrics), axis_name)

    def gradients(batch: Batch, key: Key) -> tuple[Params, Metrics]:
        grads, metrics = jax.grad(averaged, has_aux=True)(params, batch, key)
        return grads, metrics

    if microbatches == 1:
        grads, metrics = gradients(batch, key)
    else:
        grads, metrics = _accumulated(gradients, *_parts("microbatches", microbatches, batch, key))
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
    updates, opt_state = optimiser.update(grads, opt_state, params)
    return Learner(optax.apply_updates(params, updates), opt_state), metrics


def _accumulated(gradients: Callable[[Batch, Key], Any], parts: Batch, keys: Key) -> Any:
    """The mean of ``gradients`` over the parts, one after the other."""
    total = jax.eval_shape(gradients, jax.tree.map(lambda leaf: leaf[0], parts), keys[0])

    def add(total: Any, part: tuple[Batch, Key]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(*part)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), total)
    total, _ = jax.lax.scan(add, zeros, (parts, keys))
    return jax.tree.map(lambda leaf: leaf / len(keys), total)


def _parts(name: str, parts: int, batch: Batch, key: Key) -> tuple[Batch, Key]:
    """The batch in so many parts, [parts, batch / parts, ...], and a key for each."""
    keys = jax.vmap(lambda part: jax.random.fold_in(key, part))(jnp.arange(parts))
    return jax.tree.map(lambda leaf: _interleaved(name, leaf, parts), batch), keys


def _interleaved(name: str, leaf: Array, parts: int) -> Array:
    # Row r goes to part r % parts: a batch that is split over devices by blocks of rows gives each device its share of
    # each part.
    rows = leaf.shape[0]
    if rows % parts:
        raise ValueError(f"`{name}` must divide the batch, got a batch of {rows} and {name} of {parts}")
    return jnp.swapaxes(leaf.reshape(rows // parts, parts, *leaf.shape[1:]), 0, 1)
