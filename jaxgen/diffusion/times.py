"""Grids of times for samplers: NumPy float64, from noise to data, built on the host.

A grid of n steps holds n + 1 strictly decreasing times and ends at 0, the data. `uniform_times` is uniform in the
path's own time; the others are uniform in a function of the noise-to-signal ratio rho = sigma / alpha, and so are the
same grid of noise levels on every path. Any other decreasing array will do as well.
"""

import numpy as np

from jaxgen import checks
from jaxgen.diffusion.path import Path, noise_ratio


def uniform_times(path: Path, steps: int) -> np.ndarray:
    """Uniform in time, from ``path.t_max`` to 0.

    Args:
        path: the Gaussian path.
        steps: number of steps, at least 1.

    Returns:
        [steps + 1] decreasing times.

    >>> from jaxgen import diffusion
    >>> diffusion.uniform_times(diffusion.linear_beta(1000), 4)
    array([1000.,  750.,  500.,  250.,    0.])
    """
    checks.positive_integer("steps", steps)
    return np.linspace(path.t_max, 0.0, steps + 1)


def karras_times(
    path: Path, steps: int, *, rho: float = 7.0, t_min: float | None = None, t_max: float | None = None
) -> np.ndarray:
    """Uniform in (sigma / alpha)^(1/rho), then 0 (Karras et al. 2022, arXiv:2206.00364, Eq. 5).

    Args:
        path: the Gaussian path.
        steps: number of steps, at least 1.
        rho: the exponent, above 0; larger values put more steps near the data.
        t_min: the last time before 0; ``path.t_min`` by default.
        t_max: the first time; ``path.t_max`` by default.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: an argument is out of range, or alpha is 0 at ``t_max``, so that the ratio is infinite there.
    """
    checks.positive("rho", rho)
    return _ratio_uniform(path, steps, t_min, t_max, lambda r: r ** (1 / rho), lambda u: u**rho)


def log_snr_times(path: Path, steps: int, *, t_min: float | None = None, t_max: float | None = None) -> np.ndarray:
    """Uniform in log(sigma / alpha), then 0: the grid of the DPM-Solver papers (arXiv:2206.00927).

    Args:
        path: the Gaussian path.
        steps: number of steps, at least 1.
        t_min: the last time before 0; ``path.t_min`` by default.
        t_max: the first time; ``path.t_max`` by default.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: an argument is out of range, or alpha is 0 at ``t_max``, so that the ratio is infinite there.
    """
    return _ratio_uniform(path, steps, t_min, t_max, np.log, np.exp)


def _ratio_uniform(path, steps, t_min, t_max, forward, backward) -> np.ndarray:  # type: ignore[no-untyped-def]
    checks.positive_integer("steps", steps)
    t_min = path.t_min if t_min is None else t_min
    t_max = path.t_max if t_max is None else t_max
    if not 0 < t_min < t_max <= path.t_max:
        raise ValueError(f"times must satisfy 0 < t_min < t_max <= {path.t_max:g}, got {t_min} and {t_max}")
    highest, lowest = noise_ratio(path, t_max), noise_ratio(path, t_min)
    if not np.isfinite(highest):
        raise ValueError(
            f"`t_max` is {t_max:g}, where this path's alpha is 0 and sigma / alpha infinite: pass a smaller `t_max`, "
            "or use uniform_times"
        )
    grid = backward(np.linspace(forward(highest), forward(lowest), steps))
    times = time_at_ratio(path, grid)
    times[0] = t_max
    if steps > 1:
        times[-1] = t_min
    return np.append(times, 0.0)


def time_at_ratio(path: Path, ratio: np.ndarray) -> np.ndarray:
    """Inverts the path's sigma / alpha, which rises with time, by bisection to float64's last digits.

    Args:
        path: the Gaussian path.
        ratio: any shape, within the ratios of [0, path.t_max].

    Returns:
        The times, of the shape of ``ratio``.
    """
    low, high = np.zeros_like(ratio), np.full_like(ratio, path.t_max)
    for _ in range(200):
        middle = 0.5 * (low + high)
        below = noise_ratio(path, middle) < ratio
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high
