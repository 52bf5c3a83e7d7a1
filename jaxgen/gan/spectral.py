"""Spectral normalisation, as a function of parameters: every kernel is divided by its largest singular value.

    W -> W / sigma(W),    sigma(W) = max |W v| / |v| = u^T W v                                           (1)
    d sigma / d W = u v^T                                                                               (2)

with u, v the leading singular vectors (Miyato et al. 2018, arXiv:1802.05957, Eqs. 6 to 8). They are constants of
differentiation, which gives the paper's gradient, Eq. 12, and is exact: by (2) their own change does not move sigma.

The paper carries u from step to step and improves it once in each. Here `params` is the only state, so every call finds
u and v afresh. Singular values of a random kernel crowd at the top, where the power iteration sees no gap; the span
K of what it passes through holds far more,

    K = span{q, G q, ..., G^(k-1) q},  G = W^T W,    v = argmax of |W v| over unit v in K                (3)

(Lanczos, with the Ritz vector of K for v): the same k products with G. Of Gaussian kernels it finds sigma this much too
small, at worst of five:

    kernel               k = 5      10       20       32                power iteration, 20     100
    [4, 4, 64, 128]      4e-2     1e-2     4e-5     < 1e-6                             2e-2    5e-3
    [4, 4, 128, 256]     4e-2     2e-2     3e-3     3e-6                               3e-2    6e-3
    [4, 4, 256, 512]     3e-2     7e-3     4e-3     1e-3                               2e-2    5e-3
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array, Params


def _is_kernel(path: str, leaf: Array) -> bool:
    return jnp.ndim(leaf) >= 2


def spectral_normalise(
    params: Params, *, iterations: int = 20, where: Callable[[str, Array], bool] = _is_kernel
) -> Params:
    """Divides every kernel by its largest singular value, Eq. 1.

    The critic is then ``apply(spectral_normalise(params), x)``, and gradients go to ``params``. A kernel is a matrix
    [everything else, features] for this purpose, such as [h w in, out] for a convolution's [h, w, in, out]. A dense
    layer becomes 1-Lipschitz; a convolution sqrt(h w)-Lipschitz at most, since taps of neighbouring outputs overlap.
    A kernel of zeros stays as it is.

    Args:
        params: a pytree of arrays.
        iterations: k of Eq. 3, products with W and its transpose; exact from the number of ``features`` on. Sigma is
            never overestimated: 20 find it to 0.4 % in DCGAN's random kernels, and better in trained ones, where few
            directions stand out.
        where: ``(path, leaf) -> bool``, with a path such as 'params/Dense_0/kernel': what to normalise; leaves of two
            axes or more unless given. Leave out what is no linear map, such as positions that are added.

    Returns:
        ``params`` with the chosen leaves divided, shapes and dtypes as before; computed in float32 at least.

    Raises:
        TypeError: a chosen leaf is not floating.
        ValueError: a chosen leaf has fewer than two axes, or ``iterations`` is not an integer of at least 1.

    >>> spectral_normalise({"kernel": jnp.diag(jnp.array([4.0, 2.0])), "bias": jnp.ones(2)})["kernel"]
    Array([[1. , 0. ],
           [0. , 0.5]], dtype=float32)
    """
    checks.positive_integer("iterations", iterations)

    def normalise(path: tuple[jax.tree_util.KeyEntry, ...], leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not where(name, leaf):
            return leaf
        checks.floating(name, leaf)
        checks.rank_at_least(name, leaf, 2)
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        with jax.default_matmul_precision("highest"):
            matrix = wide.reshape(-1, wide.shape[-1])
            u, v = _leading(jax.lax.stop_gradient(matrix), min(iterations, *matrix.shape))
            sigma = u @ matrix @ v
        return (wide / jnp.where(sigma > 0, sigma, 1)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(normalise, params)


def _leading(matrix: Array, iterations: int) -> tuple[Array, Array]:
    """Leading singular vectors u [rows], v [columns] by Eq. 3; zeros for u where the matrix is zero."""
    largest = jnp.max(jnp.abs(matrix))
    matrix = matrix / jnp.where(largest > 0, largest, 1)  # squares then neither overflow nor vanish

    def extend(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
        basis, q = carry
        basis = basis.at[i].set(q)
        image = (matrix @ q) @ matrix
        new = image
        for _ in range(2):  # in floating point once is not enough
            new = new - (basis @ new) @ basis
        # Where rounding alone is new, the span is complete.
        complete = jnp.linalg.norm(new) <= 10 * jnp.finfo(new.dtype).eps * jnp.linalg.norm(image)
        return (basis, jnp.where(complete, 0, _unit(new))), None

    columns = matrix.shape[1]
    start = _unit(jax.random.normal(jax.random.key(0), (columns,), matrix.dtype))
    empty = jnp.zeros((iterations, columns), matrix.dtype)
    (basis, _), _ = jax.lax.scan(extend, (empty, start), jnp.arange(iterations))
    images = basis @ matrix.T
    v = _unit(jnp.linalg.eigh(images @ images.T)[1][:, -1] @ basis)
    return _unit(matrix @ v), v


def _unit(vector: Array) -> Array:
    length = jnp.linalg.norm(vector)
    return vector / jnp.where(length > 0, length, 1)
