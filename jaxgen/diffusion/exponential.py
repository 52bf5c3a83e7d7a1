"""Exponential integrators: the one integral behind DPM-Solver++, DEIS and UniPC.

In lambda = log(alpha / sigma) the probability flow, and with eta > 0 the reverse SDE of the same marginals, have the
solution (Lu et al. 2022, arXiv:2211.01095, proposition 4.1; for the SDE, k-diffusion's rate eta)

    x_s = sigma_s / sigma e^{-eta h} x + alpha_s int_0^1 H e^{-H (1 - u)} d(lambda + u h) du
          + sigma_s sqrt(1 - e^{-2 eta h}) z,    h = lambda_s - lambda,  H = (1 + eta) h                  (1)

and, written for the noise eps = (x - alpha d) / sigma (Zhang & Chen 2022, arXiv:2204.13902),

    x_s = alpha_s / alpha x + sigma_s int_0^1 H e^{-H (1 - u)} eps(lambda + u h) du,    H = -h            (2)

A solver replaces d, or eps, by the polynomial through what it knows, at u_j = (lambda_j - lambda) / h: 0 is the present
evaluation, negative values are earlier ones and 1 is the one that a corrector adds. Then the integral is a sum,

    sum_j w_j d_j,    w_j = int_0^1 H e^{-H (1 - u)} L_j(u) du,    L_j(u) = prod_{k != j} (u - u_k) / (u_j - u_k)   (3)

with m of them exact for polynomials of degree m - 1: local error O(h^{m + 1}), order m. The first evaluations have
fewer before them. An evaluation at alpha = 0 lies infinitely far back, where its w_j is 0; a step from alpha = 0 or to
time 0 is infinitely long and holds d and eps fixed, which is DDIM's step.
"""

from collections.abc import Sequence

import numpy as np

from jaxgen.diffusion.path import Path, noise_ratio

# Exact to rounding for every |H| below 100, small ones included, where the closed forms cancel.
_POINTS, _MASSES = np.polynomial.legendre.leggauss(64)


def exponential_weights(length: float, nodes: Sequence[float]) -> np.ndarray:
    """The weights w_j of Eq. 3.

    Args:
        length: H, of either sign; it may be infinite for a single node.
        nodes: the u_j, distinct and finite.

    Returns:
        One weight per node; they sum to 1 - e^-H.

    >>> (exponential_weights(1e-9, [0.0, -1.0]) / 1e-9).round(6)  # in short steps Adams and Bashforth's
    array([ 1.5, -0.5])
    """
    if len(nodes) == 1:
        return np.array([-np.expm1(-length)])
    u, du = 0.5 * (1 + _POINTS), 0.5 * _MASSES
    density = length * np.exp(-length * (1 - u)) * du
    basis = [np.prod([(u - other) / (node - other) for other in nodes if other != node], axis=0) for node in nodes]
    return np.array(basis) @ density


def half_log_snr(path: Path, times: np.ndarray) -> np.ndarray:
    """The lambda of each time: -inf where alpha is 0, inf at time 0."""
    with np.errstate(divide="ignore"):
        return -np.log(noise_ratio(path, times))


def known_nodes(lam: np.ndarray, i: int, order: int) -> list[float]:
    """The nodes u_j of the step from ``lam[i]``: 0 and as many as ``order - 1`` earlier ones, by increasing age.

    Args:
        lam: [n + 1] lambda of every time.
        i: the step.
        order: how many are wanted.

    Returns:
        At most ``order`` nodes: fewer at the start, and 0 alone for a step of infinite length.
    """
    h = lam[i + 1] - lam[i]
    if not np.isfinite(h):
        return [0.0]
    recent = lam[max(i - order + 1, 0) : i + 1][::-1]
    return [(then - lam[i]) / h for then in recent if np.isfinite(then)]
