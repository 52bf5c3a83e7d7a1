"""The Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv:1706.08500, Eq. 6).

    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)                                      (1)

No covariance and no matrix square root is formed: both lose half of the digits. With the QR decomposition of the
centred features, Q R = (X - m) / sqrt(n - 1), a covariance is C = R^T R, and the last trace is the sum of the singular
values of R1 R2^T,

    tr (C1 C2)^(1/2) = || R1 R2^T ||_*                                                          (2)

since C1 C2 = R1^T (R1 R2^T) R2 has the eigenvalues of (R1 R2^T)(R1 R2^T)^T. It holds in float32, for fewer samples than
features too.
"""

import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array


def frechet_distance(a: Array, b: Array) -> Array:
    """The squared Fréchet distance between Gaussians fitted to two sets of features, Eq. 1.

    Biased upwards for few samples: compare only values of equal sample sizes, and with the distance between two halves
    of the data.

    Args:
        a: [n, features], n at least 2; floating.
        b: [m, features], m at least 2; floating.

    Returns:
        A scalar, in the features' squared units.

    Raises:
        ValueError: a shape is wrong.
        TypeError: the features are not floating.

    >>> float(frechet_distance(jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [5.0]])))
    9.0
    """
    for name, features in (("a", a), ("b", b)):
        checks.floating(name, features)
        checks.shape(name, features, (None, None))
        if features.shape[0] < 2:
            raise ValueError(f"`{name}` must hold at least 2 rows of features, got {features.shape[0]}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`a` and `b` must hold features of one length, got {a.shape[1]} and {b.shape[1]}")
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    cross = jnp.linalg.svd(jnp.matmul(root_a, root_b.T, precision="highest"), compute_uv=False).sum()
    return jnp.sum((mean_a - mean_b) ** 2) + jnp.sum(root_a**2) + jnp.sum(root_b**2) - 2 * cross


def _moments(features: Array) -> tuple[Array, Array]:
    """The mean, and a root R of the covariance, C = R^T R."""
    mean = features.mean(axis=0)
    centred = (features - mean) / jnp.sqrt(features.shape[0] - 1)
    return mean, jnp.linalg.qr(centred, mode="r")
