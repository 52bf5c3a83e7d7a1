"""Solvers of two evaluations a step: Heun's method, DPM-Solver++(2S) and Karras's stochastic sampler.

With d = denoise(x, t), eps = (x - alpha d) / sigma, scale S = path.scale, y = x / S and tau = sigma / S, along which
alpha / S is affine with slope c, the probability-flow ODE reads

    dy / dtau = eps + c d                                                                                 (1)

Heun's method averages its right side over the two ends of a step, the second of them reached by Euler's method.

DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1 with r = 1/2) evaluates d at the middle m of the step,
in lambda = log(alpha / sigma), and holds it fixed over the step of length h in lambda:

    x_m = sigma_m / sigma x + alpha_m (1 - e^{-h/2}) d                                                    (2)
    x_s = sigma_s / sigma x + alpha_s (1 - e^-h) denoise(x_m, m)                                          (3)

Karras et al.'s stochastic sampler (arXiv:2206.00364, algorithm 2) first noises the state up, from the ratio
rho = sigma / alpha to rho^ = (1 + gamma) rho, then takes Heun's step from there. On any path, with alpha^ and sigma^ at
the time t^ of the ratio rho^, noising up is

    x^ = alpha^ / alpha x + s_noise sqrt(sigma^^2 - (alpha^ / alpha)^2 sigma^2) z,    z ~ N(0, I)         (4)

In a table the noise comes after an evaluation, so Eq. 4 belongs to the row before the one that evaluates x^.

All of them end on x = d when their last time is 0, by Euler's step.
"""

import numpy as np

from jaxgen import checks
from jaxgen.diffusion.path import Path, noise_ratio
from jaxgen.diffusion.tables import grid
from jaxgen.diffusion.times import time_at_ratio
from jaxgen.typing import ArrayLike, Table

_KEEP = np.eye(5)[0]  # the weights, over three slots, that give slot 0


def heun(path: Path, times: ArrayLike) -> Table:
    """Heun's method on the probability-flow ODE, Eq. 1. Second order.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1. Each step evaluates the denoiser twice, but for a last step to
    time 0, which is Euler's: 2n - 1 evaluations then.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].

    Returns:
        A Table of 2n or 2n - 1 rows and three slots.

    Raises:
        ValueError: the times are not decreasing or out of range, or alpha is 0 at the first and the path names no other
            scale.
    """
    times = grid(path, times)
    return _heun_from(path, times[:-1], times, np.ones(len(times) - 1), np.zeros(len(times) - 1))


def edm_stochastic(
    path: Path,
    times: ArrayLike,
    *,
    s_churn: float = 40.0,
    s_noise: float = 1.0,
    s_min: float = 0.0,
    s_max: float = np.inf,
) -> Table:
    """Karras et al.'s stochastic sampler, Eq. 4 and Heun's method (arXiv:2206.00364, algorithm 2). Second order.

    Its first row evaluates nothing: it adds the first step's noise. No step noises up beyond ``path.t_max``, so that a
    first step from there starts without. The rows do not depend on the four options: one shape for all of them.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].
        s_churn: total amount of churn, at least 0; a step's gamma is min(s_churn / n, sqrt(2) - 1). 0 gives `heun`.
        s_noise: factor of the noise's standard deviation, above 0; the paper's tuned values lie in [1, 1.007].
        s_min: no churn where sigma / alpha is below, at least 0.
        s_max: no churn where sigma / alpha is above, at least ``s_min``.

    Returns:
        A Table of 2n + 1 or 2n rows and three slots.

    Raises:
        ValueError: the times are not decreasing or out of range, an option is, or alpha is 0 at the first time and the
            path names no other scale.
    """
    if not 0 <= s_churn < np.inf:
        raise ValueError(f"`s_churn` must be at least 0 and finite, got {s_churn}")
    checks.positive("s_noise", s_noise)
    if not 0 <= s_min <= s_max:
        raise ValueError(f"`s_min` and `s_max` must satisfy 0 <= s_min <= s_max, got {s_min} and {s_max}")
    times = grid(path, times)
    steps = len(times) - 1
    ratio = noise_ratio(path, times[:-1])
    gamma = np.where((ratio >= s_min) & (ratio <= s_max), min(s_churn / steps, np.sqrt(2) - 1), 0.0)
    starts = np.where(gamma > 0, time_at_ratio(path, (1 + gamma) * ratio), times[:-1])  # the search ends at t_max
    moved = starts > times[:-1]
    kept = np.divide(path.alpha(starts), path.alpha(times[:-1]), where=moved, out=np.ones(steps))
    added = np.maximum(path.sigma(starts) ** 2 - (kept * path.sigma(times[:-1])) ** 2, 0.0)
    table = _heun_from(path, starts, times, kept, s_noise * np.sqrt(np.where(moved, added, 0.0)))
    first = np.stack([kept[0] * _KEEP, np.zeros(5), np.zeros(5)])
    first[0, 4] = s_noise * np.sqrt(added[0]) if moved[0] else 0.0
    return Table(np.append(starts[0], table.times), np.concatenate([first[None], table.weights]))


def _heun_from(path: Path, starts: np.ndarray, times: np.ndarray, kept: np.ndarray, std: np.ndarray) -> Table:
    """Heun's steps from ``starts[i]`` to ``times[i + 1]``; each then scales by kept[i + 1] and adds std[i + 1] z."""
    scale_of = path.alpha if path.scale is None else path.scale
    alpha, sigma, scale = path.alpha(starts), path.sigma(starts), scale_of(starts)
    alpha_s, sigma_s, scale_s = path.alpha(times[1:]), path.sigma(times[1:]), scale_of(times[1:])
    if not np.all(scale > 0):
        raise ValueError("`times[0]` has alpha = 0 and the path names no other `scale`: start at a smaller time")
    predictors = _frozen(path, starts, times[1:])
    step = sigma_s / scale_s - sigma / scale
    slope = (alpha_s / scale_s - alpha / scale) / step
    at, rows = [], []
    for i in range(len(starts)):
        # Slots: the point to evaluate, the step's start, the denoiser's output there.
        at.append(starts[i])
        per_x, per_d = predictors[i]
        rows.append([[per_x, 0, 0, per_d, 0], _KEEP, [0, 0, 0, 1, 0]])
        if sigma_s[i] == 0:
            break
        half = 0.5 * step[i] * scale_s[i]
        corrected = np.array([
            half / sigma_s[i],
            scale_s[i] / scale[i] + half / sigma[i],
            half * (slope[i] - alpha[i] / sigma[i]),
            half * (slope[i] - alpha_s[i] / sigma_s[i]),
            0.0,
        ])  # fmt: skip
        if i + 1 < len(starts):
            corrected *= kept[i + 1]
            corrected[4] = std[i + 1]
        at.append(times[i + 1])
        rows.append([corrected, np.zeros(5), np.zeros(5)])
    return Table(np.array(at), np.array(rows, np.float64))


def dpmpp_2s(path: Path, times: ArrayLike) -> Table:
    """DPM-Solver++(2S), Eqs. 2 and 3: one evaluation at the step's start, one at its middle. Second order.

    A step from alpha = 0 and a last step to time 0 have no middle in lambda: these two are first-order steps.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].

    Returns:
        A Table of 2n rows, less one for each first-order step, and two slots.

    Raises:
        ValueError: the times are not decreasing or out of range.
    """
    times = grid(path, times)
    ratio = noise_ratio(path, times)
    with np.errstate(invalid="ignore"):
        middle_ratio = np.sqrt(ratio[:-1] * ratio[1:])
    middles = time_at_ratio(path, middle_ratio)
    halves, wholes = _frozen(path, times[:-1], middles), _frozen(path, times[:-1], times[1:])
    at, rows = [], []
    for i in range(len(times) - 1):
        # Slots: the point to evaluate, the step's start.
        at.append(times[i])
        if not 0 < middle_ratio[i] < np.inf:
            rows.append([[wholes[i, 0], 0, wholes[i, 1], 0], [0, 0, 0, 0]])
            continue
        rows.append([[halves[i, 0], 0, halves[i, 1], 0], [1, 0, 0, 0]])
        at.append(middles[i])
        rows.append([[0, wholes[i, 0], wholes[i, 1], 0], [0, 0, 0, 0]])
    return Table(np.array(at), np.array(rows, np.float64))


def _frozen(path: Path, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[n, 2] weights of state and denoiser's output in the steps that hold the output fixed, Eqs. 2 and 3."""
    per_x = path.sigma(ends) / path.sigma(starts)
    return np.stack([per_x, path.alpha(ends) - path.alpha(starts) * per_x], axis=1)
