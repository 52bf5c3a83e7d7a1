"""Single-step solvers, each built as a table in float64 on the host.

With d = denoise(x, t) and eps = (x - alpha d) / sigma, a step from time t to s < t is linear in what it has seen, so it
is a row of weights (`Table`). From here on alpha, sigma are the values at t and alpha_s, sigma_s those at s.

DDIM (Song et al. 2021, arXiv:2010.02502, Eq. 12) holds d and eps fixed over the step:

    x_s = alpha_s d + sqrt(sigma_s^2 - std^2) eps + std z,    z ~ N(0, I)                                 (1)
    std = eta sqrt(sigma_{t|s}^2 sigma_s^2 / sigma^2),    sigma_{t|s}^2 = sigma^2 - (alpha / alpha_s)^2 sigma_s^2   (2)

At eta = 1 this is sampling from the posterior q(x_s | x_t, x0 = d), that is DDPM (arXiv:2006.11239, Eq. 7); at eta = 0
it is Euler's method on the probability-flow ODE, which in noise-to-signal coordinates reads

    d(x / alpha) / d rho = eps,    rho = sigma / alpha                                                    (3)

Inversion walks Eq. 3 the other way, from s up to t. At s = 0 there is no noise to estimate, so eps is taken from the
denoiser's answer to x_s at the time t that the step leads to:

    x_t = alpha (x_s / alpha_s + (rho - rho_s) eps),    eps = (x_s - alpha denoise(x_s, t)) / sigma       (4)

All but the inversion end on x = d when their last time is 0.
"""

import numpy as np

from jaxgen.diffusion.path import Path
from jaxgen.diffusion.tables import grid
from jaxgen.typing import ArrayLike, Table


def ddim(path: Path, times: ArrayLike, *, eta: float = 0.0) -> Table:
    """DDIM, Eqs. 1 and 2: deterministic at eta = 0, DDPM's ancestral sampling at eta = 1. First order.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max], such as `uniform_times` gives.
        eta: share of the posterior's noise that is drawn afresh, in [0, 1].

    Returns:
        A Table of n rows and one slot.

    Raises:
        ValueError: the times are not decreasing or out of range, or ``eta`` is.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must lie in [0, 1], got {eta}")
    times = grid(path, times)
    alpha, sigma = path.alpha(times), path.sigma(times)
    rows = []
    for i in range(len(times) - 1):
        kept = alpha[i] / alpha[i + 1]
        added = max(sigma[i] ** 2 - (kept * sigma[i + 1]) ** 2, 0.0)
        std = eta * np.sqrt(added) * sigma[i + 1] / sigma[i]
        per_eps = np.sqrt(max(sigma[i + 1] ** 2 - std**2, 0.0)) / sigma[i]
        rows.append([[per_eps, alpha[i + 1] - alpha[i] * per_eps, std]])
    return Table(times[:-1], np.array(rows))


def ddpm(path: Path, times: ArrayLike) -> Table:
    """DDPM's ancestral sampling from the exact posterior, Eq. 1 at eta = 1. First order.

    Its variance is the "beta tilde" of Ho et al. 2020 (arXiv:2006.11239, Eq. 7).

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max]; the paper's sampler takes all of them,
            ``uniform_times(path, 1000)``.

    Returns:
        A Table of n rows and one slot.

    Raises:
        ValueError: the times are not decreasing or out of range.
    """
    return ddim(path, times, eta=1.0)


def euler(path: Path, times: ArrayLike) -> Table:
    """Euler's method on the probability-flow ODE, Eq. 3: the very steps of DDIM at eta = 0. First order.

    On `edm` it is Karras et al.'s Euler sampler, on `rectified_flow` the flow-matching one.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].

    Returns:
        A Table of n rows and one slot.

    Raises:
        ValueError: the times are not decreasing or out of range.
    """
    return ddim(path, times, eta=0.0)


def euler_ancestral(path: Path, times: ArrayLike, *, eta: float = 1.0) -> Table:
    """Euler's method to a lower noise level, then fresh noise up to the next: the very steps of `ddim`. First order.

    k-diffusion's name; its ``sigma_up`` is the standard deviation of Eq. 2 and its ``sigma_down`` the square root in
    Eq. 1.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].
        eta: share of the posterior's noise that is drawn afresh, in [0, 1].

    Returns:
        A Table of n rows and one slot.

    Raises:
        ValueError: the times are not decreasing or out of range, or ``eta`` is.
    """
    return ddim(path, times, eta=eta)


def ddim_inversion(path: Path, times: ArrayLike) -> Table:
    """DDIM backwards, from data to noise, Eq. 4 (Mokady et al. 2022, arXiv:2211.09794). First order.

    It takes the grid that `ddim` takes and walks it from its last time to its first, so that the one undoes the other
    to first order in the step, and exactly where the predicted noise does not change along the way. At a first time
    where alpha is 0 an estimate of the data says nothing of the noise, and Eq. 4 leaves the state as it is: begin the
    grid just below.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max]; the state that `sample` starts from is the one at
            ``times[-1]``, the data if that is 0.

    Returns:
        A Table of n rows and one slot; its times rise to ``times[0]``.

    Raises:
        ValueError: the times are not decreasing or out of range.

    >>> from jaxgen import diffusion
    >>> diffusion.ddim_inversion(diffusion.edm(), [80.0, 1.0, 0.0]).times
    array([ 1., 80.])
    """
    rising = grid(path, times)[::-1]
    alpha, sigma = path.alpha(rising), path.sigma(rising)
    kept = alpha[1:] / alpha[:-1]
    per_eps = sigma[1:] - kept * sigma[:-1]
    rows = np.stack([kept + per_eps / sigma[1:], -per_eps * alpha[1:] / sigma[1:], np.zeros_like(kept)], axis=1)
    return Table(rising[1:], rows[:, None, :])
