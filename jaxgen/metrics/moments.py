"""Mean and covariance of features that come in pieces, on one device or on many.

The covariance is carried as a root of the scatter of n rows X about their mean m, any matrix R for which

    R^T R = S = (X - m)^T (X - m)                                                               (1)

such as the centred rows themselves, or the square matrix that a QR decomposition leaves of them. S itself is never
formed: it has the squares of R's singular values, and float32 would lose the small ones. Two sets of rows merge (Chan,
Golub & LeVeque 1983, "Algorithms for computing the sample variance", Eq. 2.1) by

    n = n_a + n_b,    m = m_a + (n_b / n) (m_b - m_a)                                            (2)
    S = S_a + S_b + (n_a n_b / n) (m_b - m_a) (m_b - m_a)^T                                      (3)

and Eq. 3 is Eq. 1 for R_a, R_b and the row sqrt(n_a n_b / n) (m_b - m_a), stacked; QR makes one square root of
the three (TSQR: Demmel et al. 2008, arXiv:0808.2664). So whatever the pieces, their order and the devices they came on,
the moments are those of all rows at once, to rounding.

    state = moments.init(2048)
    for images in batches:
        state = moments.update(state, extract(images))
    distance = metrics.frechet_distance(state, reference)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks
from jaxgen.metrics.streaming import counted
from jaxgen.typing import Array


class Moments(NamedTuple):
    """The moments of some rows of features.

    Attributes:
        rows: how many, an int32 scalar.
        mean: [features], of them.
        rest: [features], what rounding left of the mean: so that thousands of updates do not add up.
        root: [rows, features], R of Eq. 1; its rows are `features` many, or fewer.
    """

    rows: Array
    mean: Array
    rest: Array
    root: Array


def init(features: int, *, dtype: Any = jnp.float32) -> Moments:
    """The moments of no rows.

    Args:
        features: the length of a row.
        dtype: float32 or float64, of the moments.

    Returns:
        What `update` and `merge` begin with.

    Raises:
        ValueError: ``features`` is not an integer of at least 1.
    """
    checks.positive_integer("features", features)
    nothing = jnp.zeros(features, dtype)
    return Moments(jnp.int32(0), nothing, nothing, jnp.zeros((features, features), dtype))


def of(features: Array, *, mask: Array | None = None) -> Moments:
    """The moments of an array.

    Args:
        features: [rows, features], floating; computed with in float32 at least.
        mask: [rows] bool, which rows to count (a last batch is often padded); all by default. What the others hold does
            not matter, NaN neither.

    Returns:
        The moments. Their root is square for more rows than features, else the centred rows as they are.

    Raises:
        ValueError: a shape is wrong.
        TypeError: the features are not floating, or the mask is not bool.

    >>> of(jnp.array([[1.0], [2.0], [6.0]])).mean
    Array([3.], dtype=float32)
    """
    moments = _centred(features, mask, jnp.promote_types(jnp.result_type(features), jnp.float32))
    rows, length = moments.root.shape
    return moments if rows <= length else moments._replace(root=jnp.linalg.qr(moments.root, mode="r"))


def update(state: Moments, features: Array, *, mask: Array | None = None) -> Moments:
    """The moments with more rows.

    It costs a QR decomposition of ``features + rows`` rows and its rounding, whatever came before: as many rows at a
    time as there are features, or more, cost a row little, and keep all digits where a thousand updates leave five.

    Args:
        state: of the rows so far, from `init`.
        features: [rows, features], as in `of`; rounded to the state's dtype.
        mask: as in `of`.

    Returns:
        A state of the same shapes and dtypes, as ``scan`` needs it.

    Raises:
        ValueError: a shape is wrong, or these rows are not as long as those of the state.
        TypeError: as in `of`.
    """
    return merge(state, _centred(features, mask, state.mean.dtype))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of both, Eqs. 2 and 3.

    Args:
        a: of some rows.
        b: of others, as long.

    Returns:
        Moments in the dtypes of ``a``; with the first from `init`, in its shapes.

    Raises:
        ValueError: rows of one are not as long as those of the other.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"`a` and `b` must be moments of rows of one length, got {a.mean.shape[0]} and {b.mean.shape[0]}"
        )
    count, dtype = a.rows + b.rows, a.mean.dtype
    share = b.rows.astype(dtype) / jnp.maximum(count, 1).astype(dtype)
    step = (b.mean.astype(dtype) - a.mean) + (b.rest.astype(dtype) - a.rest)
    change = share * step + a.rest
    mean = a.mean + change
    between = jnp.sqrt(a.rows.astype(dtype) * share) * step
    root = jnp.linalg.qr(jnp.concatenate([a.root, b.root.astype(dtype), between[None]]), mode="r")
    return Moments(count, mean, change - (mean - a.mean), root)


def compute(state: Moments) -> tuple[Array, Array]:
    """The mean and the covariance, unbiased, as a root of it.

    Args:
        state: of at least 2 rows.

    Returns:
        The mean [features], and R [rows, features]: the covariance is ``R.T @ R``. R is NaN where the count turns out
        below 2 when compiled code runs.

    Raises:
        ValueError: the state is known to hold fewer than 2 rows.

    >>> mean, root = compute(of(jnp.array([[1.0, 0.0], [3.0, 0.0]])))
    >>> root.T @ root
    Array([[2., 0.],
           [0., 0.]], dtype=float32)
    """
    check_rows("state", state)
    degrees = jnp.where(state.rows > 1, state.rows - 1, jnp.nan).astype(state.root.dtype)
    return state.mean, state.root / jnp.sqrt(degrees)


def check_rows(name: str, state: Moments) -> None:
    """Raises ValueError where a state is known to hold fewer than the 2 rows that have a covariance."""
    if not isinstance(state.rows, jax.core.Tracer) and np.any(np.asarray(state.rows) < 2):
        raise ValueError(f"`{name}` must hold at least 2 rows of features, got {state.rows}")


def _centred(features: Array, mask: Array | None, dtype: Any) -> Moments:
    """Moments whose root is the centred rows, zeros for those that do not count."""
    checks.floating("features", features)
    checks.shape("features", features, (None, None))
    features = jnp.asarray(features, dtype)
    mask = counted(mask, features.shape[0])
    count = jnp.sum(mask, dtype=jnp.int32)
    rows = jnp.maximum(count, 1).astype(dtype)
    mean = jnp.sum(jnp.where(mask[:, None], features, 0), axis=0) / rows
    return Moments(count, mean, jnp.zeros_like(mean), jnp.where(mask[:, None], features - mean, 0))
