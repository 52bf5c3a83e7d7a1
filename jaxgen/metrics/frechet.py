"""The Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv:1706.08500, Eq. 6).

    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)                                      (1)

No covariance and no matrix square root is formed: both lose half of the digits. Nor is Eq. 1 evaluated: between sets
that are alike nearly all of it cancels. With roots of the covariances, C = R^T R (`jaxgen.metrics.moments`), it is

    d^2 = |m1 - m2|^2 + min over rotations U, V of || U R1 - V R2 ||^2                            (2)

(Bhatia, Jain & Lim 2017, arXiv:1712.01504, Theorem 1), whose terms are squares; and since it is a minimum, an error in
the rotations matters in second order only. They are the singular vectors of R1 R2^T. That product has the squares of
the roots' singular values, and an SVD in float32 no digits left for the small ones, which are most: in features whose
variances fall as 1 / k^2 they hold enough of a small distance to spoil its third digit. So they are turned once more,
by an SVD of their own: of the rows after the first eighth.
"""

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.metrics import moments
from jaxgen.metrics.moments import Moments
from jaxgen.typing import Array


def frechet_distance(a: Array | Moments, b: Array | Moments) -> Array:
    """The squared Fréchet distance between Gaussians fitted to two sets of features, Eq. 1.

    Biased upwards for few samples: compare only values of equal sample sizes, and with the distance between two halves
    of the data.

    Args:
        a: [n, features], n at least 2; floating, and computed with in float32 at least. Or the moments of such rows,
            from `moments.of` or gathered by `moments.update`.
        b: [m, features], m at least 2; likewise.

    Returns:
        A scalar, in the features' squared units; NaN if a feature is, or where moments turn out to be of fewer than 2
        rows when compiled code runs. Differentiable by an array of more rows than features if these are linearly
        independent, by one of fewer rows always.

    Raises:
        ValueError: a shape is wrong, or there are known to be fewer than 2 rows.
        TypeError: the features are not floating.

    >>> float(frechet_distance(jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [5.0]])))
    9.0
    """
    of_a, of_b = _moments("a", a), _moments("b", b)
    if of_a.mean.shape != of_b.mean.shape:
        raise ValueError(
            f"`a` and `b` must hold features of one length, got {of_a.mean.shape[0]} and {of_b.mean.shape[0]}"
        )
    (mean_a, root_a), (mean_b, root_b) = moments.compute(of_a), moments.compute(of_b)
    rows = max(root_a.shape[0], root_b.shape[0])
    root_a, root_b = (jnp.pad(root, ((0, rows - root.shape[0]), (0, 0))) for root in (root_a, root_b))
    return jnp.sum((mean_a - mean_b) ** 2) + _between_roots(root_a, root_b)


def _moments(name: str, given: Array | Moments) -> Moments:
    if isinstance(given, Moments):
        moments.check_rows(name, given)
        return given
    checks.floating(name, given)
    checks.shape(name, given, (None, None))
    if given.shape[0] < 2:
        raise ValueError(f"`{name}` must hold at least 2 rows of features, got {given.shape[0]}")
    return moments.of(given)


@jax.custom_jvp
def _between_roots(a: Array, b: Array) -> Array:
    """The minimum in Eq. 2."""
    u, v = _rotations(a, b)
    return jnp.sum((_product(u, a) - _product(v, b)) ** 2)


@_between_roots.defjvp
def _between_roots_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # At a minimum the rotations' own derivatives, which equal singular values do not have, are not needed.
    u, v = _rotations(*primals)
    difference, change = (_product(u, a) - _product(v, b) for a, b in (primals, tangents))
    return jnp.sum(difference**2), 2 * jnp.sum(difference * change)


def _rotations(a: Array, b: Array) -> tuple[Array, Array]:
    """U and V of Eq. 2, for roots [n, features]; [n, n]."""

    def aligning(a: Array, b: Array) -> tuple[Array, Array]:
        u, _, v = jnp.linalg.svd(_product(a, b.T))
        return u.T, v

    u, v = aligning(a, b)
    small = u.shape[0] // 8
    again_u, again_v = aligning(_product(u[small:], a), _product(v[small:], b))
    return u.at[small:].set(_product(again_u, u[small:])), v.at[small:].set(_product(again_v, v[small:]))


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision="highest")
