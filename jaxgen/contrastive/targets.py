"""Losses against a second encoder that follows the first: no gradient reaches what they call keys and targets.

MoCo (He et al. 2020, arXiv:1911.05722, Eq. 1) asks a query q_i to find its key k_i among those of a queue, u_1 .. u_K,
which earlier batches have left; all of unit length, t the temperature,

    L_i = -log exp(<q_i, k_i> / t) / (exp(<q_i, k_i> / t) + sum_j exp(<q_i, u_j> / t))              (1)

BYOL (Grill et al. 2020, arXiv:2006.07733, Eq. 2) has no negatives: a prediction p_i is drawn to the direction of its
target z_i,

    L_i = | p_i / |p_i| - z_i / |z_i| |^2 = 2 - 2 cos(p_i, z_i)                                      (2)

`jaxgen.momentum` has the methods that train by them.
"""

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.contrastive.similarity import normalise, sharpened
from jaxgen.typing import Array


def moco_loss(queries: Array, keys: Array, queue: Array, *, temperature: float | Array = 0.2) -> Array:
    """MoCo's loss, Eq. 1: each query is to tell its key from all of a queue.

    Args:
        queries: [n, d], floating, any lengths.
        keys: [n, d], row i of the same example as row i of ``queries``; constants of differentiation.
        queue: [K, d], keys of other examples; constants of differentiation.
        temperature: t, above 0; a scalar, which may be traced. MoCo v1's is 0.07, v2's 0.2.

    Returns:
        [n]. Float32 (float64 if an embedding is). log(K + 1) where all embeddings are one.

    Raises:
        ValueError: the shapes do not fit together, or ``temperature`` is known and not above 0.
        TypeError: an embedding is not floating.

    >>> moco_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((6, 3)))  # log 7
    Array([1.9459..., 1.9459...], dtype=float32)
    """
    checks.floating("queries", queries)
    checks.floating("queue", queue)
    checks.shape("queries", queries, (None, None))
    _check_target("keys", keys, "queries", queries)
    checks.shape("queue", queue, (None, queries.shape[1]))
    sharp = sharpened(queries, temperature)
    keys, queue = (jax.lax.stop_gradient(normalise(rows)) for rows in (keys, queue))
    positive = jnp.sum(sharp * keys, axis=1)
    negatives = jnp.matmul(sharp, queue.T, precision="highest")
    return jax.nn.logsumexp(jnp.concatenate([positive[:, None], negatives], axis=1), axis=1) - positive


def byol_loss(predictions: Array, targets: Array) -> Array:
    """BYOL's loss of one direction, Eq. 2: predictions turn towards their targets.

    Args:
        predictions: [n, d], floating, any lengths.
        targets: [n, d]; constants of differentiation.

    Returns:
        [n], in [0, 4]. Float32 (float64 if an embedding is).

    Raises:
        ValueError: the shapes differ, or are not [n, d].
        TypeError: an embedding is not floating.

    >>> byol_loss(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[3.0, 0.0], [5.0, 0.0]]))
    Array([0., 2.], dtype=float32)
    """
    checks.floating("predictions", predictions)
    checks.shape("predictions", predictions, (None, None))
    _check_target("targets", targets, "predictions", predictions)
    return 2 - 2 * jnp.sum(normalise(predictions) * jax.lax.stop_gradient(normalise(targets)), axis=1)


def _check_target(name: str, targets: Array, other: str, rows: Array) -> None:
    checks.floating(name, targets)
    checks.same_shape(name, targets, other, rows)
