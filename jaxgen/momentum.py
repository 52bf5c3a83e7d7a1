"""Learning from a second encoder that follows the first: MoCo and BYOL as training methods.

    target <- average(target, params)        after every step                                      (1)

Gradients reach the first encoder alone. The target's embeddings, of another view of the same examples, are what it has
to match: among those of earlier batches (`moco`), or by themselves (`byol`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgen import checks, contrastive, train
from jaxgen.typing import Array, Batch, Key, Metrics, Params

Views = Callable[[Key, Batch], tuple[Any, Any]]
"""``(key, batch) -> (first, second)``: two views of every example, as the encoder takes them."""


class Following(NamedTuple):
    """The state of `moco` and `byol`.

    Attributes:
        step: int32 scalar, the number of steps taken.
        learner: the encoder's parameters and the optimiser's state.
        target: what follows them, a tree like the parameters.
        queue: of `moco`, [queue_size, features] unit embeddings, the latest first; else ().
    """

    step: Array
    learner: train.Learner
    target: Any
    queue: Any


def moco(
    embed: Callable[[Params, Any], Array],
    views: Views,
    optimiser: optax.GradientTransformation,
    init: Callable[[Key], Params],
    features: int,
    *,
    queue_size: int = 65_536,
    temperature: float = 0.2,
    average: train.Average | None = None,
    axis_name: str | None = None,
) -> train.Method:
    """Momentum contrast: a query has to find its key among those of earlier batches.

    He et al. 2020 (arXiv:1911.05722, Algorithm 1), with the temperature of MoCo v2 (arXiv:2003.04297). The queue begins
    as random directions and then holds the latest keys of the global batch. Batch statistics, where the encoder has
    them, are the global batch's; the paper's shuffling of examples between devices answers local ones.

    Args:
        embed: ``(params, x) -> [n, features]``: the encoder with its projection.
        views: ``(key, batch) -> (first, second)``: queries are embedded from the first, keys from the second.
        optimiser: any optax gradient transformation.
        init: ``key -> params``.
        features: the length of an embedding.
        queue_size: keys to tell the right one from, at least the global batch.
        temperature: above 0.
        average: how the target follows; ``train.ema(0.999, warmup=False)`` by default.
        axis_name: the mapped axis over which the batch is split, for `place.pmap` or ``shard_map(check_vma=False)``;
            ``views`` must then draw by the global index of an example. Under ``jit`` on a mesh nothing is needed.

    Returns:
        A Method of state `Following`. Its metrics are "loss" (`contrastive.moco_loss`), "grad_norm" and "accuracy", the
        share of queries to which no key is nearer than their own.

    Raises:
        ValueError: an argument is out of range, or (while tracing) the queue is smaller than the global batch or an
            embedding is not [n, features].
    """
    for name, number in (("features", features), ("queue_size", queue_size)):
        checks.positive_integer(name, number)
    checks.positive("temperature", temperature)
    average = train.ema(0.999, warmup=False) if average is None else average

    def initial(key: Key) -> Following:
        params_key, queue_key = jax.random.split(key)
        queue = contrastive.normalise(jax.random.normal(queue_key, (queue_size, features)))
        return _start(init(params_key), optimiser, average, queue)

    def step(state: Following, batch: Batch, key: Key) -> tuple[Following, Metrics]:
        view_key, key = jax.random.split(jax.random.fold_in(key, state.step))
        first, second = views(view_key, batch)
        keys = contrastive.normalise(embed(state.target, second))
        checks.shape("embed(params, x)", keys, (None, features))

        def loss(params: Params, first: Any, key: Key) -> tuple[Array, Metrics]:
            queries = embed(params, first)
            losses = contrastive.moco_loss(queries, keys, state.queue, temperature=temperature)
            unit = contrastive.normalise(queries)
            others = jnp.max(unit @ state.queue.T, axis=1)
            return losses.mean(), {"accuracy": jnp.mean(jnp.sum(unit * keys, axis=1) >= others)}

        learner, metrics = train.descend(loss, optimiser, state.learner, first, key, axis_name=axis_name)
        arrived = keys if axis_name is None else jax.lax.all_gather(keys, axis_name, tiled=True)
        if len(arrived) > queue_size:
            raise ValueError(f"`queue_size` must be at least the global batch, {len(arrived)}, got {queue_size}")
        queue = jnp.concatenate([arrived.astype(state.queue.dtype), state.queue])[:queue_size]
        return _followed(state, learner, average, queue), metrics

    return train.Method(initial, step)


def byol(
    project: Callable[[Params, Any], Array],
    predict: Callable[[Params, Array], Array],
    views: Views,
    optimiser: optax.GradientTransformation,
    init: Callable[[Key], Params],
    *,
    average: train.Average | None = None,
    axis_name: str | None = None,
) -> train.Method:
    """Bootstrap your own latent: what one view says of the other's embedding, without negatives.

    Grill et al. 2020 (arXiv:2006.07733, Eqs. 1 to 4, both directions).

    Args:
        project: ``(params, x) -> [n, d]``: the encoder with its projection, of the learner and of the target.
        predict: ``(params, projections) -> [n, d]``: the learner's prediction of the target's projections.
        views: ``(key, batch) -> (first, second)``.
        optimiser: any optax gradient transformation.
        init: ``key -> params``, of ``project`` and ``predict`` together.
        average: how the target follows; ``train.ema(0.996, warmup=False)`` by default. (The paper lets its decay grow
            to 1.)
        axis_name: as in `moco`.

    Returns:
        A Method of state `Following`. Its metrics are "loss", the sum of both directions' `contrastive.byol_loss`, in
        [0, 8], and "grad_norm".

    Raises:
        ValueError: (while tracing) predictions and projections differ in shape.
    """
    average = train.ema(0.996, warmup=False) if average is None else average

    def initial(key: Key) -> Following:
        return _start(init(key), optimiser, average, ())

    def step(state: Following, batch: Batch, key: Key) -> tuple[Following, Metrics]:
        view_key, key = jax.random.split(jax.random.fold_in(key, state.step))
        both = views(view_key, batch)
        targets = [project(state.target, view) for view in both]

        def loss(params: Params, both: Any, key: Key) -> tuple[Array, Metrics]:
            predictions = [predict(params, project(params, view)) for view in both]
            losses = [contrastive.byol_loss(predictions[i], targets[1 - i]) for i in (0, 1)]
            return jnp.mean(losses[0] + losses[1]), {}

        learner, metrics = train.descend(loss, optimiser, state.learner, both, key, axis_name=axis_name)
        return _followed(state, learner, average, ()), metrics

    return train.Method(initial, step)


def _start(params: Params, optimiser: optax.GradientTransformation, average: train.Average, queue: Any) -> Following:
    learner = train.Learner(params, optimiser.init(params))
    return Following(jnp.zeros((), jnp.int32), learner, average.init(params), queue)


def _followed(state: Following, learner: train.Learner, average: train.Average, queue: Any) -> Following:
    """The state after a step, Eq. 1."""
    count = state.step + 1
    return Following(count, learner, average.update(state.target, learner.params, count), queue)
