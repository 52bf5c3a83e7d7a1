"""Nearest neighbours: has a generator copied its training data?"""

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array


def nearest_neighbours(queries: Array, references: Array, *, block_size: int = 256) -> tuple[Array, Array]:
    """The nearest reference of each query, in Euclidean distance.

    Args:
        queries: [n, features], floating.
        references: [m, features], m at least 1; floating.
        block_size: how many queries are compared at a time: memory is block_size x m.

    Returns:
        Distances [n], and the indices [n] of the references.

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

    # |q - r|^2 expands to a product of matrices; the offset common to all keeps its digits.
    centre = jnp.mean(references, axis=0)
    references = references - centre
    lengths = jnp.sum(references**2, axis=1)

    def nearest(query: Array) -> tuple[Array, Array]:
        index = jnp.argmin(lengths - 2 * jnp.matmul(references, query - centre, precision="highest"))
        return jnp.linalg.norm(query - centre - references[index]), index

    return jax.lax.map(nearest, queries, batch_size=block_size)
