"""Losses that keep embeddings from collapsing by their moments over the batch, without negatives.

With z_i and z'_i in R^d the embeddings of two views of example i of n, m_j the mean and v_j the variance of dimension j
(divided by n - 1), VICReg (Bardes et al. 2022, arXiv:2105.04906) descends

    variance      V(Z) = 1/d sum_j max(0, 1 - sqrt(v_j + eps))                                          (1)
    covariance    C(Z) = 1/(n - 1) sum_i (z_i - m)(z_i - m)^T                                           (2)
                  c(Z) = 1/d sum_(j != k) C(Z)_jk^2                                                     (3)
    invariance    s(Z, Z') = 1/(n d) sum_i |z_i - z'_i|^2                                               (4)
    loss          invariance s(Z, Z') + variance [V(Z) + V(Z')] + covariance [c(Z) + c(Z')]             (5)

the paper's Eqs. 1-6, but for the 1/d of (4): its Eq. 5 lacks it, its Algorithm 1 has it, and the weights are for it.

Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230) descends, with u_j and u'_j the variances divided by n,

    correlation   R_jk = 1/n sum_i (z_i - m)_j (z'_i - m')_k / sqrt((u_j + eps)(u'_k + eps))            (6)
    loss          sum_j (1 - R_jj)^2 + off_diagonal sum_(j != k) R_jk^2                                 (7)

the paper's Eqs. 1-2, but for eps: it stands in the authors' batch normalisation, and a dimension that has collapsed
counts as uncorrelated by it.

Both are functions of means over the batch. Under ``axis_name`` these are means over all devices: each device has the
one loss of the global batch, and the mean over devices of its gradients by shared parameters is the loss's gradient.
"""

import math

import jax.numpy as jnp
from jax import lax

from jaxgen import checks
from jaxgen.typing import Array, ArrayLike


def vicreg(
    first: Array,
    second: Array,
    *,
    invariance: ArrayLike = 25.0,
    variance: ArrayLike = 25.0,
    covariance: ArrayLike = 1.0,
    eps: float = 1e-4,
    axis_name: str | None = None,
) -> Array:
    """VICReg, Eq. 5: views agree, dimensions vary by a standard deviation of 1 at least and are uncorrelated.

    It takes embeddings as they are: normalised ones cannot vary so much. The authors' program halves the variance term
    of the paper; ``variance=12.5`` is that.

    Args:
        first: [n, d], a view of n examples, floating; n at least 2.
        second: [n, d], another view of them.
        invariance: scalar, the weight of Eq. 4; may be traced, as those below.
        variance: scalar, the weight of Eq. 1.
        covariance: scalar, the weight of Eq. 3.
        eps: added to the variances under the root, above 0.
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any. Under jit nothing is
            needed.

    Returns:
        A scalar, at least 0, in float32 at least; under ``axis_name`` the same on every device.

    Raises:
        ValueError: the embeddings are not two arrays of one shape [n, d], the batch is of one example, a weight is no
            finite scalar of at least 0, or ``eps`` is not above 0.
        TypeError: the embeddings are not floating.

    >>> round(float(vicreg(jnp.zeros((4, 8)), jnp.zeros((4, 8)))), 3)
    49.5
    """
    first, second, n = _checked(first, second, eps, axis_name)
    invariance, variance = _weight("invariance", invariance), _weight("variance", variance)
    covariance = _weight("covariance", covariance)

    def regularised(z: Array) -> Array:
        centred = z - _batch_mean(z, axis_name)
        moments = _second_moments(centred, centred, axis_name) * (n / (n - 1))
        hinges = jnp.maximum(0, 1 - jnp.sqrt(jnp.diagonal(moments) + eps))
        others = jnp.fill_diagonal(moments, 0, inplace=False)
        return variance * jnp.mean(hinges) + covariance * jnp.sum(others**2) / z.shape[1]

    distance = jnp.mean(_batch_mean((first - second) ** 2, axis_name))
    return invariance * distance + regularised(first) + regularised(second)


def barlow_twins(
    first: Array,
    second: Array,
    *,
    off_diagonal: ArrayLike = 0.005,
    eps: float = 1e-5,
    axis_name: str | None = None,
) -> Array:
    """Barlow Twins, Eq. 7: across views each dimension correlates with itself and with no other.

    Args:
        first: [n, d], a view of n examples, floating; n at least 2. Shift and scale of a dimension do not matter, but
            for ``eps``.
        second: [n, d], another view of them.
        off_diagonal: scalar, the weight of what the dimensions share; may be traced.
        eps: added to the variances, above 0.
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any. Under jit nothing is
            needed.

    Returns:
        A scalar, at least 0, in float32 at least; under ``axis_name`` the same on every device.

    Raises:
        ValueError: the embeddings are not two arrays of one shape [n, d], the batch is of one example,
            ``off_diagonal`` is no finite scalar of at least 0, or ``eps`` is not above 0.
        TypeError: the embeddings are not floating.

    >>> barlow_twins(jnp.ones((4, 8)), jnp.ones((4, 8)))
    Array(8., dtype=float32)
    """
    first, second, _ = _checked(first, second, eps, axis_name)
    off_diagonal = _weight("off_diagonal", off_diagonal)

    def standardised(z: Array) -> Array:
        centred = z - _batch_mean(z, axis_name)
        return centred * lax.rsqrt(_batch_mean(centred**2, axis_name) + eps)

    correlation = _second_moments(standardised(first), standardised(second), axis_name)
    own = jnp.sum((1 - jnp.diagonal(correlation)) ** 2)
    others = jnp.fill_diagonal(correlation, 0, inplace=False)
    return own + off_diagonal * jnp.sum(others**2)


def _batch_mean(z: Array, axis_name: str | None) -> Array:
    mean = jnp.mean(z, axis=0)
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def _second_moments(a: Array, b: Array, axis_name: str | None) -> Array:
    """[d, d]: the batch's means of a_j b_k."""
    moments = jnp.matmul(a.T, b, precision="highest") / a.shape[0]
    return moments if axis_name is None else lax.pmean(moments, axis_name)


def _checked(first: Array, second: Array, eps: float, axis_name: str | None) -> tuple[Array, Array, int]:
    """The views in float32 at least, and the size of the global batch."""
    for name, view in (("first", first), ("second", second)):
        checks.floating(name, view)
        checks.shape(name, view, (None, None))
    checks.same_shape("second", second, "first", first)
    checks.positive("eps", eps)
    n = first.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name))
    if n < 2:
        raise ValueError(f"`first` must hold at least 2 examples, for their variance, got {n}")
    dtype = jnp.promote_types(jnp.result_type(first, second), jnp.float32)
    return first.astype(dtype), second.astype(dtype), n


def _weight(name: str, weight: ArrayLike) -> Array:
    checks.shape(name, weight, ())
    checks.finite(name, weight)
    checks.interval(name, weight, 0, math.inf)
    return jnp.asarray(weight)
