"""Nearest neighbours: has a generator copied its training data?"""

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.metrics.distances import squared_distances
from jaxgen.typing import Array


def nearest_neighbours(queries: Array, references: Array, *, block_size: int = 256) -> tuple[Array, Array]:
    """The nearest reference of each query, in Euclidean distance.

    Args:
        queries: [n, features], floating, and computed with in float32 at least.
        references: [m, features], m at least 1; likewise.
        block_size: how many queries are compared at a time: memory is block_size x m, beside a copy of the features.

    Returns:
        Distances [n], and the indices [n] of the references, of several as near the first. A query of NaN, or any query
        if a reference is NaN, gets NaN.

    Raises:
        ValueError: a shape is wrong, or ``block_size`` is less than 1.
        TypeError: the features are not floating.

    >>> nearest_neighbours(jnp.array([[0.0], [5.0]]), jnp.array([[4.0], [1.0]]))[1]
    Array([1, 0], dtype=int32)
    """
    checks.positive_integer("block_size", block_size)
    for name, features in (("queries", queries), ("references", references)):
        checks.floating(name, features)
        checks.shape(name, features, (None, None))
    if references.shape[0] < 1 or queries.shape[1] != references.shape[1]:
        raise ValueError(
            f"`references` must be at least 1 row of {queries.shape[1]} features, got shape {list(references.shape)}"
        )

    dtype = jnp.promote_types(jnp.result_type(queries, references), jnp.float32)
    queries, references = jnp.asarray(queries, dtype), jnp.asarray(references, dtype)
    columns = references.T

    def nearest(query: Array) -> tuple[Array, Array]:
        index = jnp.argmin(squared_distances(query, columns))
        return jnp.linalg.norm(query - references[index]), index

    return jax.lax.map(nearest, queries, batch_size=block_size)
