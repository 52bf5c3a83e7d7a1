"""Squared distances between points, summed from differences, a feature at a time.

Expanded to |x|^2 - 2 x . p + |p|^2 they would be a product of matrices, on a CPU twice as fast for 2,048 features and
slower for 64, but with an error in proportion to |x|^2: in modes a few hundred times narrower than they are apart, as a
collapsed generator has them, neighbours would be noise. From differences a copy lies at exactly 0, and no distance
loses digits, whatever the modes or the offset.
"""

import jax
import jax.numpy as jnp

from jaxgen.typing import Array


def squared_distances(x: Array, columns: Array) -> Array:
    """The squared Euclidean distances of one point from many.

    Args:
        x: [features].
        columns: [features, points], the others.

    Returns:
        [points].
    """

    def add(feature: Array, total: Array) -> Array:
        return total + (columns[feature] - x[feature]) ** 2

    # Several features a step: a sum is read and written once for all of them.
    return jax.lax.fori_loop(0, x.shape[0], add, jnp.zeros_like(columns, shape=columns.shape[1:]), unroll=8)
