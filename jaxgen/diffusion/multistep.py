"""Multi-step solvers: one evaluation a step, and the outputs of the steps before.

DPM-Solver++ extrapolates the estimate of x0 and DEIS that of the noise, both with the weights of `exponential_weights`;
Eq. numbers are those of `jaxgen.diffusion.exponential`. The two-step DPM-Solver++(2M) (Lu et al. 2022,
arXiv:2211.01095, algorithm 2) is published with the integral taken of d at the step's middle, which to its order is the
same: with h_before the step before in lambda,

    w = (1 - e^-H) (1 + h / (2 h_before), -h / (2 h_before))                                              (4)

The first steps have fewer outputs to go by and are of lower order, so a method of order 3 behaves like one of order 2
on a grid whose first steps are as long as the others: its first step's error, O(h^2), is what remains. It shows order 3
where the first steps are short, or from a start where d hardly changes, as it does in noise.

All of them end on x = d when their last time is 0.
"""

import numpy as np

from jaxgen.diffusion.exponential import exponential_weights, half_log_snr, known_nodes
from jaxgen.diffusion.path import Path
from jaxgen.diffusion.tables import check_order, grid, with_history
from jaxgen.typing import ArrayLike, Table


def dpmpp_2m(path: Path, times: ArrayLike) -> Table:
    """DPM-Solver++(2M), Eqs. 1 and 4: a two-step method, one evaluation a step. Second order.

    The first step, and a last step to time 0, are first-order.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].

    Returns:
        A Table of n rows and two slots.

    Raises:
        ValueError: the times are not decreasing or out of range.
    """
    return _extrapolated_data(path, times, order=2, eta=0.0)


def dpmpp_3m(path: Path, times: ArrayLike) -> Table:
    """DPM-Solver++(3M), Eqs. 1 and 3 with three nodes: one evaluation a step. Third order after its start.

    The first two steps are of first and second order, a last step to time 0 of the first; the global order is 3 if the
    first step is short. The weights integrate the parabola exactly. The authors' released code, which diffusers and
    k-diffusion follow, gives its second difference half of that weight, and is of order 2.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].

    Returns:
        A Table of n rows and three slots.

    Raises:
        ValueError: the times are not decreasing or out of range.
    """
    return _extrapolated_data(path, times, order=3, eta=0.0)


def dpmpp_2m_sde(path: Path, times: ArrayLike, *, eta: float = 1.0) -> Table:
    """SDE-DPM-Solver++(2M), Eqs. 1 and 4 with fresh noise. Weak order 2.

    Lu et al. 2022 (arXiv:2211.01095); k-diffusion's name and eta. The order is that of mean and variance on
    Gaussian data. The first step, and a last step to time 0, are first-order.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].
        eta: the rate of fresh noise, at least 0: 0 gives `dpmpp_2m`, 1 the reverse SDE of Song et al. 2021.

    Returns:
        A Table of n rows and two slots.

    Raises:
        ValueError: the times are not decreasing or out of range, or ``eta`` is below 0.
    """
    return _extrapolated_data(path, times, order=2, eta=eta)


def dpmpp_3m_sde(path: Path, times: ArrayLike, *, eta: float = 1.0) -> Table:
    """SDE-DPM-Solver++(3M), Eqs. 1 and 3 with fresh noise. Weak order 2.

    k-diffusion's name and eta. On Gaussian data the variance is of order 2, and the mean of order 3 if the first step
    is short (exact at eta = 1). The weights are `dpmpp_3m`'s: see there how others' code differs.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].
        eta: the rate of fresh noise, at least 0: 0 gives `dpmpp_3m`.

    Returns:
        A Table of n rows and three slots.

    Raises:
        ValueError: the times are not decreasing or out of range, or ``eta`` is below 0.
    """
    return _extrapolated_data(path, times, order=3, eta=eta)


def deis(path: Path, times: ArrayLike, *, order: int = 3) -> Table:
    """DEIS in the logarithm of sigma / alpha, Eqs. 2 and 3 (Zhang & Chen 2022, arXiv:2204.13902).

    Its polynomials are in log rho, as diffusers has them ("logrho"); those of the paper's tAB and rhoAB are in t and in
    rho = sigma / alpha.

    Of order ``order`` after its start: the first steps are of lower order, a last step to time 0 of the first.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].
        order: number of noise estimates that are extrapolated, 1, 2 or 3; 1 is `ddim`.

    Returns:
        A Table of n rows and ``order`` slots.

    Raises:
        ValueError: the times are not decreasing or out of range, or ``order`` is none of the three.
    """
    check_order(order)
    times = grid(path, times)
    alpha, sigma, lam = path.alpha(times), path.sigma(times), half_log_snr(path, times)
    unit = np.eye(order + 2)
    rows = []
    for i in range(len(times) - 1):
        eps = (unit[0] - alpha[i] * unit[order]) / sigma[i]
        nodes = known_nodes(lam, i, order)
        if len(nodes) == 1:
            update = alpha[i + 1] * unit[order] + sigma[i + 1] * eps
        else:
            weights = sigma[i + 1] * exponential_weights(lam[i] - lam[i + 1], nodes)
            update = alpha[i + 1] / alpha[i] * unit[0] + weights[0] * eps
            update[1 : len(nodes)] += weights[1:]
        rows.append(with_history([update], order, remembered=eps))
    return Table(times[:-1], np.array(rows))


def _extrapolated_data(path: Path, times: ArrayLike, *, order: int, eta: float) -> Table:
    """Eq. 1 with ``order`` nodes. Slots: the state, then past outputs of the denoiser, the latest first."""
    if not 0 <= eta < np.inf:
        raise ValueError(f"`eta` must be at least 0 and finite, got {eta}")
    times = grid(path, times)
    alpha, sigma, lam = path.alpha(times), path.sigma(times), half_log_snr(path, times)
    rows = []
    for i in range(len(times) - 1):
        h = lam[i + 1] - lam[i]
        fresh = (alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])) ** eta  # e^{-eta h}, at infinite h as well
        nodes = known_nodes(lam, i, order)
        weights = exponential_weights((1 + eta) * h, nodes)
        if order == 2 and len(nodes) == 2:
            weights = -np.expm1(-(1 + eta) * h) * np.array([1 - 0.5 / nodes[1], 0.5 / nodes[1]])
        update = np.zeros(order + 2)
        update[0] = sigma[i + 1] / sigma[i] * fresh
        update[1 : len(nodes)] = alpha[i + 1] * weights[1:]
        update[order] = alpha[i + 1] * weights[0]
        update[order + 1] = sigma[i + 1] * np.sqrt(max(1 - fresh**2, 0.0))
        rows.append(with_history([update], order))
    return Table(times[:-1], np.array(rows))
