"""Solvers, each built as a table in float64 on the host.

With d = denoise(x, t) and eps = (x - alpha d) / sigma, a step from time t to s < t of a solver with memory is linear in
what it has seen, so it is a row of weights (`Table`). From here on alpha, sigma are the values at t and alpha_s,
sigma_s those at s.

DDIM (Song et al. 2021, arXiv:2010.02502, Eq. 12) holds d and eps fixed over the step:

    x_s = alpha_s d + sqrt(sigma_s^2 - std^2) eps + std z,    z ~ N(0, I)                                 (1)
    std = eta sqrt(sigma_{t|s}^2 sigma_s^2 / sigma^2),    sigma_{t|s}^2 = sigma^2 - (alpha / alpha_s)^2 sigma_s^2   (2)

At eta = 1 this is sampling from the posterior q(x_s | x_t, x0 = d), that is DDPM (arXiv:2006.11239, Eq. 7); at eta = 0
it is Euler's method on the probability-flow ODE. With scale S = path.scale, y = x / S and tau = sigma / S, along which
alpha / S is affine with slope c, that ODE reads

    dy / dtau = eps + c d                                                                                 (3)

which Heun's method integrates. DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2) extrapolates d linearly
in lambda = log(alpha / sigma), with h the step in lambda and h_before that of the step before:

    x_s = sigma_s / sigma x + alpha_s (1 - e^-h) ((1 + h / (2 h_before)) d - h / (2 h_before) d_before)  (4)

All of them end on x = d when their last time is 0.
"""

from collections.abc import Sequence

import numpy as np

from jaxgen import checks
from jaxgen.diffusion.path import Path, noise_ratio
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
    times = _checked(path, times)
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


def heun(path: Path, times: ArrayLike) -> Table:
    """Heun's method on the probability-flow ODE, Eq. 3. Second order.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1. Each step evaluates the denoiser twice, but for a last step to
    time 0, which is Euler's: 2n - 1 evaluations then.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].

    Returns:
        A Table of 2n or 2n - 1 rows and three slots.

    Raises:
        ValueError: the times are not decreasing or out of range.
    """
    times = _checked(path, times)
    alpha, sigma = path.alpha(times), path.sigma(times)
    scale = alpha if path.scale is None else path.scale(times)
    if not np.all(scale > 0):
        raise ValueError("heun: alpha is 0 at `times[0]` and the path names no other `scale`; start at a smaller time")
    tau = sigma / scale
    at, rows = [], []
    predictors = np.asarray(ddim(path, times).weights)[:, 0]
    for i in range(len(times) - 1):
        per_x, per_d, _ = predictors[i]
        # Slots: the point to evaluate, the step's start, the denoiser's output there.
        at.append(times[i])
        rows.append([[per_x, 0, 0, per_d, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
        if sigma[i + 1] == 0:
            break
        half = 0.5 * (tau[i + 1] - tau[i]) * scale[i + 1]
        slope = (alpha[i + 1] / scale[i + 1] - alpha[i] / scale[i]) / (tau[i + 1] - tau[i])
        corrected = [
            half / sigma[i + 1],
            scale[i + 1] / scale[i] + half / sigma[i],
            half * (slope - alpha[i] / sigma[i]),
            half * (slope - alpha[i + 1] / sigma[i + 1]),
            0,
        ]
        at.append(times[i + 1])
        rows.append([corrected, [0] * 5, [0] * 5])
    return Table(np.array(at), np.array(rows, np.float64))


def dpmpp_2m(path: Path, times: ArrayLike) -> Table:
    """DPM-Solver++(2M), Eq. 4: a two-step method, one evaluation a step. Second order.

    The first step, and a last step to time 0, are first-order.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].

    Returns:
        A Table of n rows and two slots.

    Raises:
        ValueError: the times are not decreasing or out of range.
    """
    times = _checked(path, times)
    alpha, sigma = path.alpha(times), path.sigma(times)
    lam = -np.log(noise_ratio(path, times), where=sigma > 0, out=np.full_like(times, -np.inf))
    rows = []
    for i in range(len(times) - 1):
        per_x = sigma[i + 1] / sigma[i]
        per_d = alpha[i + 1] - alpha[i] * per_x  # alpha_s (1 - e^-h)
        first_order = i == 0 or sigma[i + 1] == 0
        back = 0.0 if first_order else 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1])
        rows.append([[per_x, -back * per_d, (1 + back) * per_d, 0], [0, 0, 1, 0]])
    return Table(times[:-1], np.array(rows, np.float64))


def pad(table: Table, *, rows: int | None = None, slots: int | None = None) -> Table:
    """Gives a table more rows and slots that change nothing.

    One compiled sampler then serves tables of several sizes. Added rows come last, leave the state as it is and do not
    call the denoiser.

    Args:
        table: the table to pad.
        rows: number of rows wanted; as many as there are by default.
        slots: number of slots wanted; as many as there are by default.

    Returns:
        The padded Table, in NumPy float64.

    Raises:
        ValueError: the table is larger already.

    >>> from jaxgen import diffusion
    >>> table = diffusion.ddim(diffusion.edm(), [80.0, 1.0, 0.0])
    >>> pad(table, rows=32, slots=3).weights.shape
    (32, 3, 5)
    """
    times, weights = np.asarray(table.times, np.float64), np.asarray(table.weights, np.float64)
    old_rows, old_slots = weights.shape[:2]
    rows = old_rows if rows is None else rows
    slots = old_slots if slots is None else slots
    if rows < old_rows or slots < old_slots:
        raise ValueError(
            f"cannot pad a table of {old_rows} rows and {old_slots} slots to {rows} rows and {slots} slots"
        )
    padded = np.zeros((rows, slots, slots + 2))
    padded[:old_rows, :old_slots, :old_slots] = weights[:, :, :old_slots]
    padded[:old_rows, :old_slots, slots:] = weights[:, :, old_slots:]
    padded[old_rows:, :, :slots] = np.eye(slots)
    return Table(np.append(times, np.full(rows - old_rows, times[-1])), padded)


def stack(tables: Sequence[Table]) -> Table:
    """Pads tables to one size and stacks them, for ``jax.vmap`` over samplers.

    Args:
        tables: at least one table.

    Returns:
        A Table with a leading axis: times [tables, rows], weights [tables, rows, slots, slots + 2].

    Raises:
        ValueError: there is none.
    """
    if not tables:
        raise ValueError("`tables` must hold at least one table, got none")
    shapes = np.array([np.shape(table.weights)[:2] for table in tables])
    rows, slots = (int(n) for n in shapes.max(axis=0))
    padded = [pad(table, rows=rows, slots=slots) for table in tables]
    return Table(np.stack([t.times for t in padded]), np.stack([t.weights for t in padded]))


def _checked(path: Path, times: ArrayLike) -> np.ndarray:
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"`times` must be a grid of at least 2 times, got shape {list(times.shape)}")
    checks.interval("times", times, 0.0, path.t_max)
    if not np.all(np.diff(times) < 0):
        raise ValueError("`times` must decrease strictly, from noise to data, got times that do not")
    return times
