"""How often something happens at most, given how often it did: Clopper and Pearson's bound, in single precision.

Of n independent trials, each a success with probability q, m or fewer succeed with probability

    F(m; n, q) = sum_(j <= m) b(j),    b(j) = n! / (j! (n - j)!) q^j (1 - q)^(n - j)                    (1)

and the q at which F is alpha is exceeded by the true one with probability alpha at most (Clopper & Pearson 1934). F
falls in q, so bisection finds it.

F is an incomplete beta function, but by differences of log-gammas: of 100,000 trials these are near 10^6, of which
single precision keeps no decimals, so that alpha would come out 15 % wrong (and half of it at a million trials). Loader
2000 ("Fast and accurate computation of binomial probabilities") cancels what is large before it is computed:

    log b(m) = s(n) - s(m) - s(n - m) - D,    s(x) = log x! - x log x + x                              (2)
    D = n q phi((m - n q) / (n q)) + n p phi((n q - m) / (n p)),    p = 1 - q                             (3)
    phi(u) = (1 + u) log(1 + u) - u

where s is small, by Stirling's series, and D is about half the squared distance of m from n q in standard deviations.
The rest of Eq. 1 is a sum of products of ratios below 1, for m < n q:

    F / b(m) = 1 + r_1 + r_1 r_2 + ...,    r_j = (m - j + 1) p / ((n - m + j) q)                         (4)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, xlog1py, xlogy

from jaxgen.typing import Array, ArrayLike


def upper_bound(successes: ArrayLike, trials: ArrayLike, *, alpha: ArrayLike) -> Array:
    """The probability of a success that the true one exceeds with probability ``alpha`` at most.

    Small ones are as exact as their dtype: a lower bound of a probability near 1 is best had as 1 less the upper bound
    of the failures'.

    Args:
        successes: m, any shape, integers in [0, trials].
        trials: n, broadcastable with ``successes``, integers of at least 0. No trial bounds nothing: 1.
        alpha: broadcastable too, in (0, 1).

    Returns:
        Bounds in (0, 1], in float32, or in float64 where JAX computes in it. Errors are on the side of caution but for
        those of F, of about 1e-3 in alpha at a million trials and less for fewer.

    Raises:
        ValueError: ``alpha`` is known and out of range.

    >>> upper_bound(0, 100_000, alpha=0.001)  # 1 - 0.001^(1 / 100000)
    Array(6.9...e-05, dtype=float32)
    """
    check_level(alpha)
    dtype = jnp.result_type(float)
    m, n, level = jnp.broadcast_arrays(*(jnp.asarray(x, dtype) for x in (successes, trials, alpha)))
    known = m < n  # else every q below 1 makes m or fewer successes certain
    m, n = jnp.where(known, m, 0), jnp.where(known, n, 1)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        below = _log_cumulative(m, n, middle) > jnp.log(level)
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    # A bound as small as 1 / n takes log2 n halvings to reach, and its digits as many as there are.
    halvings = jnp.finfo(dtype).nmant + 30
    _, high = jax.lax.fori_loop(0, halvings, halve, (m / n, jnp.ones_like(m)))
    return jnp.where(known, high, 1)


def check_level(alpha: ArrayLike) -> None:
    """Raises ValueError unless ``alpha`` lies in (0, 1); a traced one is not looked at."""
    if not isinstance(alpha, jax.core.Tracer) and not np.all((np.asarray(alpha) > 0) & (np.asarray(alpha) < 1)):
        raise ValueError(f"`alpha` must lie in (0, 1), got {alpha}")


def _log_cumulative(m: Array, n: Array, q: Array) -> Array:
    """The logarithm of F, Eq. 1, for m < n and q in (m / n, 1]: floating arrays of one shape."""
    epsilon = jnp.finfo(q.dtype).eps
    p = jnp.maximum(1 - q, epsilon)
    excess = n * q - m
    deviance = n * q * _phi(-excess / (n * q)) + n * p * _phi(excess / (n * p))
    log_mass = _stirling(n) - _stirling(m) - _stirling(n - m) - deviance

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        _, term, total = state
        return jnp.any(term > epsilon * total)

    def add(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        j, term, total = state
        term = term * (m - j + 1) * p / ((n - m + j) * q)
        return j + 1, term, total + term

    one = jnp.ones_like(m)
    _, _, total = jax.lax.while_loop(goes_on, add, (jnp.ones((), m.dtype), one, one))
    return log_mass + jnp.log(total)


def _phi(u: Array) -> Array:
    return xlog1py(1 + u, u) - u


def _stirling(x: Array) -> Array:
    """The s of Eq. 2, to 1e-13: by its series (DLMF 5.11.1) where that is exact, else by its definition."""
    large = jnp.maximum(x, 32)
    series = 0.5 * jnp.log(2 * jnp.pi * large) + (1 / 12 - (1 / 360 - 1 / 1260 / large**2) / large**2) / large
    return jnp.where(x < 32, gammaln(x + 1) - xlogy(x, x) + x, series)
