"""The kernel distance between two sets of features (Bińkowski et al. 2018, arXiv:1801.01401, section 3).

The squared maximum mean discrepancy under the polynomial kernel, of d features,

    k(x, y) = (x . y / d + 1)^3                                                                 (1)
    MMD^2 = mean of k(x, x') over x /= x' + mean of k(y, y') over y /= y' - 2 mean of k(x, y)   (2)

which is unbiased (Gretton et al. 2012, Eq. 3), and below 0 about as often as above where the sets are alike. It is then
a thousandth of its terms and less. They need not be: what depends on one argument alone cancels in Eq. 2. About any
centre c, with x = c + u, y = c + v and

    t = |c|^2 / d + 1,    p = c . u / d,    q = c . v / d,    w = u . v / d,    s = t + p + q

the kernel is (s + w)^3, and without the terms of u alone and of v alone,

    k(x, y) ~ 3 p q (t + s) + w (3 s^2 + 3 s w + w^2)                                           (3)

no larger than the features' spread makes it, however far from 0 they lie.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.typing import Array, Key


class KernelDistance(NamedTuple):
    """The kernel distance of random subsets.

    Attributes:
        mean: over the subsets, a scalar; as unbiased as `kernel_distance`, and noisier.
        deviation: over the subsets, a scalar: the spread of one subset's value, not the error of the mean.
    """

    mean: Array
    deviation: Array


def kernel_distance(a: Array, b: Array, *, block_size: int = 256) -> Array:
    """The kernel distance between two sets, Eq. 2 of all their pairs.

    Args:
        a: [n, features], n at least 2; floating, and computed with in float32 at least.
        b: [m, features], m at least 2; likewise.
        block_size: how many rows are compared at a time: memory is block_size x the larger of n and m, beside a copy of
            the features.

    Returns:
        A scalar, in the sixth power of the features' units; NaN if a feature is.

    Raises:
        ValueError: a shape is wrong, or ``block_size`` is not an integer of at least 1.
        TypeError: the features are not floating.

    >>> float(kernel_distance(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [1.0]])))
    -19.0
    """
    checks.positive_integer("block_size", block_size)
    return _discrepancy(*_checked(a, b, 2), block_size)


def subset_kernel_distance(key: Key, a: Array, b: Array, *, subsets: int = 100, size: int = 1000) -> KernelDistance:
    """The kernel distance of random subsets, as it is usually published.

    Its mean and deviation are those of torch-fidelity and of the authors' code, but for the draw. Subset i follows from
    the key and i alone.

    Args:
        key: a single key.
        a: [n, features], n at least ``size``; floating, and computed with in float32 at least.
        b: [m, features], m at least ``size``; likewise.
        subsets: how many to draw of each set.
        size: how many rows each has, at least 2, none of them twice.

    Returns:
        Two scalars.

    Raises:
        ValueError: a shape is wrong, ``subsets`` is not an integer of at least 1, or ``size`` not one of at least 2.
        TypeError: the features are not floating, or ``key`` is not a typed key.
    """
    checks.positive_integer("subsets", subsets)
    checks.positive_integer("size", size)
    if size < 2:
        raise ValueError(f"`size` must be at least 2, got {size}")
    a, b = _checked(a, b, size)

    def distance(key: Key) -> Array:
        of_a, of_b = (
            jax.random.choice(part, features.shape[0], (size,), replace=False)
            for part, features in zip(jax.random.split(key), (a, b), strict=True)
        )
        return _discrepancy(a[of_a], b[of_b], size)

    distances = jax.lax.map(distance, random.example_keys(key, subsets))
    return KernelDistance(jnp.mean(distances), jnp.std(distances))


def _checked(a: Array, b: Array, least: int) -> tuple[Array, Array]:
    for name, features in (("a", a), ("b", b)):
        checks.floating(name, features)
        checks.shape(name, features, (None, None))
        if features.shape[0] < least:
            raise ValueError(f"`{name}` must hold at least {least} rows of features, got {features.shape[0]}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`a` and `b` must hold features of one length, got {a.shape[1]} and {b.shape[1]}")
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


def _discrepancy(a: Array, b: Array, block_size: int) -> Array:
    """Eq. 2, about the mean of both."""
    centre = (jnp.mean(a, axis=0) + jnp.mean(b, axis=0)) / 2
    a, b, dimension = a - centre, b - centre, a.shape[1]
    level = jnp.sum(centre**2) / dimension + 1

    def mean_kernel(x: Array, y: Array) -> Array:
        along_x, along_y = (jnp.matmul(rows, centre, precision="highest") / dimension for rows in (x, y))

        def total(index: Array) -> Array:
            p, q, w = along_x[index], along_y, jnp.matmul(y, x[index], precision="highest") / dimension
            s = level + p + q
            kernels = 3 * p * q * (level + s) + w * (3 * s**2 + 3 * s * w + w**2)
            return jnp.sum(jnp.where(jnp.arange(y.shape[0]) == index, 0, kernels) if x is y else kernels)

        totals = jax.lax.map(total, jnp.arange(x.shape[0]), batch_size=block_size)
        return jnp.mean(totals) / (y.shape[0] - (x is y))

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)
