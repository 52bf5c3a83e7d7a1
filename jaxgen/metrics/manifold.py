"""Precision and recall by manifolds of nearest neighbours (Kynkäänniemi et al. 2019, arXiv:1904.06991, section 2).

A set of points stands for a manifold: the balls about each, out to its k-th nearest neighbour in the set. With R_j the
distance from p_j to that neighbour, p_j itself not counted,

    f(x, p) = 1 if |x - p_j| <= R_j for some j, else 0                                          (1)
    precision = mean of f(g_i, r) over the generated points g                                   (2)
    recall = mean of f(r_i, g) over the real points r                                           (3)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.metrics.distances import squared_distances
from jaxgen.typing import Array


class PrecisionRecall(NamedTuple):
    """How much of what is generated is real, and how much of what is real is generated.

    Attributes:
        precision: the share of the generated points that lie in the manifold of the real ones, Eq. 2; a scalar.
        recall: the share of the real points that lie in the manifold of the generated ones, Eq. 3; a scalar.
    """

    precision: Array
    recall: Array


def precision_recall(generated: Array, real: Array, *, neighbours: int = 3, block_size: int = 256) -> PrecisionRecall:
    """Improved precision and recall, Eqs. 2 and 3.

    Both grow with ``neighbours`` and change with the numbers of points: compare only values of equal ones, and with
    those of two halves of the data. A copy of a point always lies in that point's manifold; one that its set holds more
    than ``neighbours`` times has radius 0 and reaches nothing but its copies. An outlier has a large radius, and what
    falls into it counts.

    Args:
        generated: [n, features], n above ``neighbours``; floating, and computed with in float32 at least.
        real: [m, features], m above ``neighbours``; likewise.
        neighbours: k, the neighbour that a ball reaches; the paper's choice is 3.
        block_size: how many points are compared at a time: memory is block_size x the larger of n and m,
            beside a copy of the features.

    Returns:
        Two scalars in [0, 1]; NaN if a feature is.

    Raises:
        ValueError: a shape is wrong, or ``neighbours`` or ``block_size`` is not an integer of at least 1.
        TypeError: the features are not floating.

    >>> real = jnp.array([[0.0], [1.0], [8.0], [9.0]])
    >>> precision, recall = precision_recall(real[:2], real, neighbours=1)
    >>> float(precision), float(recall)
    (1.0, 0.5)
    """
    checks.positive_integer("neighbours", neighbours)
    checks.positive_integer("block_size", block_size)
    for name, features in (("generated", generated), ("real", real)):
        checks.floating(name, features)
        checks.shape(name, features, (None, None))
        if features.shape[0] <= neighbours:
            raise ValueError(
                f"`neighbours` must be less than the number of rows of `{name}`, {features.shape[0]}, got {neighbours}"
            )
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"`generated` and `real` must hold features of one length, got {generated.shape[1]} and {real.shape[1]}"
        )
    dtype = jnp.promote_types(jnp.result_type(generated, real), jnp.float32)
    generated, real = jnp.asarray(generated, dtype), jnp.asarray(real, dtype)
    return PrecisionRecall(
        precision=_share_inside(generated, real, neighbours, block_size),
        recall=_share_inside(real, generated, neighbours, block_size),
    )


def _share_inside(queries: Array, points: Array, neighbours: int, block_size: int) -> Array:
    """The mean of Eq. 1 over the queries."""
    columns = points.T

    def squared_radius(index: Array) -> Array:
        # The first is the point itself, at exactly 0. Of the last alone XLA would make a full sort: hence the minimum.
        return -jnp.min(jax.lax.top_k(-squared_distances(points[index], columns), neighbours + 1)[0])

    def inside(index: Array) -> Array:
        deepest = jnp.max(squared_radii - squared_distances(queries[index], columns))
        return jnp.heaviside(deepest, 1.0)  # 1 on a ball's boundary; a NaN stays one

    # Of indices: a map over the features would copy them to cut them into blocks.
    squared_radii = jax.lax.map(squared_radius, jnp.arange(points.shape[0]), batch_size=block_size)
    return jnp.mean(jax.lax.map(inside, jnp.arange(queries.shape[0]), batch_size=block_size))
