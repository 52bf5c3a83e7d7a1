"""Grids of times for samplers: NumPy float64, from noise to data, built on the host.

A grid of n steps holds n + 1 strictly decreasing times and ends at 0, the data. There are three kinds:

    in the path's own time               uniform_times, quadratic_times, shift_times
    in its noising steps, whole numbers  leading_times, trailing_times, linspace_times (paths that count steps)
    in rho = sigma / alpha, and so       karras_times, log_snr_times, exponential_times, ratio_times
    the same noise levels on every path

Any other decreasing array will do as well.
"""

import numpy as np

from jaxgen import checks
from jaxgen.diffusion.path import Path, noise_ratio
from jaxgen.typing import ArrayLike


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


def quadratic_times(path: Path, steps: int) -> np.ndarray:
    """Uniform in the square root of time, from ``path.t_max`` to 0 (Song et al. 2021, arXiv:2010.02502, appendix D.2).

    Args:
        path: the Gaussian path.
        steps: number of steps, at least 1.

    Returns:
        [steps + 1] decreasing times, closer to each other towards the data.

    >>> from jaxgen import diffusion
    >>> diffusion.quadratic_times(diffusion.linear_beta(1000), 4)
    array([1000. ,  562.5,  250. ,   62.5,    0. ])
    """
    checks.positive_integer("steps", steps)
    return path.t_max * np.linspace(1.0, 0.0, steps + 1) ** 2


def shift_times(times: ArrayLike, shift: float) -> np.ndarray:
    """Moves times on `rectified_flow` towards noise, t' = shift t / (1 + (shift - 1) t).

    Esser et al. 2024 (arXiv:2403.03206, Eq. 23): it multiplies sigma / alpha by ``shift``, which is what a larger image
    takes to lose as much; the square root of the ratio of pixel counts, 3 in Stable Diffusion 3.

    Args:
        times: any shape, in [0, 1].
        shift: above 0; 1 changes nothing.

    Returns:
        The shifted times, of the same shape; 0 and 1 stay.

    Raises:
        ValueError: a time is out of range, or ``shift`` is not above 0.

    >>> from jaxgen import diffusion
    >>> diffusion.shift_times(diffusion.uniform_times(diffusion.rectified_flow(), 2), 3.0)
    array([1.  , 0.75, 0.  ])
    """
    checks.interval("times", times, 0.0, 1.0)
    checks.positive("shift", shift)
    t = np.asarray(times, np.float64)
    return shift * t / (1 + (shift - 1) * t)


def leading_times(path: Path, steps: int, *, offset: int = 0) -> np.ndarray:
    """Whole noising steps, evenly spaced from the first one up, then 0: DDPM's and DDIM's usual grid.

    The "leading" spacing of Lin et al. 2023 (arXiv:2305.08891, table 2) and of diffusers, whose timestep t is our
    t + 1: numbers 0, k, 2k, ... there with k = T // steps are times 1, 1 + k, 1 + 2k, ... here. The noisiest step is
    left out, which that paper calls flawed.

    Args:
        path: a path that counts steps, as `linear_beta` does.
        steps: number of steps, at least 1 and at most ``path.t_max``.
        offset: added to all times but 0: diffusers' ``steps_offset``, 1 in Stable Diffusion.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: the path counts no steps, there are too many, or the offset leads out of it.

    >>> from jaxgen import diffusion
    >>> diffusion.leading_times(diffusion.linear_beta(1000), 4)
    array([751., 501., 251.,   1.,   0.])
    """
    total = _step_count(path, steps)
    times = np.arange(steps)[::-1] * (total // steps) + 1.0 + offset
    if offset % 1 != 0 or offset < 0 or times[0] > total:
        raise ValueError(f"`offset` must be a whole number that keeps times in [1, {total}], got {offset}")
    return np.append(times, 0.0)


def trailing_times(path: Path, steps: int) -> np.ndarray:
    """Whole noising steps, evenly spaced from the last one down, then 0.

    The "trailing" spacing that Lin et al. 2023 (arXiv:2305.08891, table 2) recommend, and of diffusers, whose timestep
    t is our t + 1.

    Args:
        path: a path that counts steps, as `linear_beta` does.
        steps: number of steps, at least 1 and at most ``path.t_max``.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: the path counts no steps, or there are too many.

    >>> from jaxgen import diffusion
    >>> diffusion.trailing_times(diffusion.linear_beta(1000), 3)
    array([1000.,  667.,  333.,    0.])
    """
    total = _step_count(path, steps)
    return np.append(np.round(total - np.arange(steps) * (total / steps)), 0.0)


def linspace_times(path: Path, steps: int) -> np.ndarray:
    """Whole noising steps, evenly spaced from the last to the first, then 0.

    The "linspace" spacing of Lin et al. 2023 (arXiv:2305.08891, table 2) and of diffusers' DDIM and DDPM, whose
    timestep t is our t + 1.

    Args:
        path: a path that counts steps, as `linear_beta` does.
        steps: number of steps, at least 2 and at most ``path.t_max``.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: the path counts no steps, or there are too many or too few.

    >>> from jaxgen import diffusion
    >>> diffusion.linspace_times(diffusion.linear_beta(1000), 4)
    array([1000.,  667.,  334.,    1.,    0.])
    """
    total = _step_count(path, steps)
    if steps < 2:
        raise ValueError(f"`steps` must be at least 2, to reach both ends, got {steps}")
    return np.append(np.round(np.linspace(0, total - 1, steps))[::-1] + 1.0, 0.0)


def _step_count(path: Path, steps: int) -> int:
    checks.positive_integer("steps", steps)
    if path.t_min != 1.0 or path.t_max != int(path.t_max):
        raise ValueError(
            "`path` must count noising steps, from 1 to a whole number, "
            f"got times from {path.t_min:g} to {path.t_max:g}"
        )
    if steps > path.t_max:
        raise ValueError(f"`steps` must be at most the path's {path.t_max:g}, got {steps}")
    return int(path.t_max)


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


def exponential_times(path: Path, steps: int, *, t_min: float | None = None, t_max: float | None = None) -> np.ndarray:
    """`log_snr_times` under k-diffusion's name: noise levels in a geometric sequence.

    Args:
        path: the Gaussian path.
        steps: number of steps, at least 1.
        t_min: the last time before 0; ``path.t_min`` by default.
        t_max: the first time; ``path.t_max`` by default.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: as `log_snr_times` does.
    """
    return log_snr_times(path, steps, t_min=t_min, t_max=t_max)


def ratio_times(path: Path, ratios: ArrayLike, *, steps: int | None = None) -> np.ndarray:
    """The times of noise levels of one's own, then 0: for schedules that were optimised or published as sigmas.

    "Align your steps" (Sabour et al. 2024, arXiv:2404.14507) publishes ten levels and interpolates their logarithm for
    other numbers of steps, as this does.

    Args:
        path: the Gaussian path.
        ratios: [levels] decreasing values of sigma / alpha, above 0 but for a last one that may be 0.
        steps: number of steps, at least 1; by default one from each level above 0.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: the levels do not decrease, or the path does not reach them.

    >>> from jaxgen import diffusion
    >>> diffusion.ratio_times(diffusion.edm(), [80.0, 5.0, 0.2, 0.0])
    array([80. ,  5. ,  0.2,  0. ])
    >>> diffusion.ratio_times(diffusion.edm(), [16.0, 1.0], steps=3)
    array([16.,  4.,  1.,  0.])
    """
    levels = np.asarray(ratios, np.float64)
    if levels.ndim == 1 and levels.size and levels[-1] == 0:
        levels = levels[:-1]
    if levels.ndim != 1 or not levels.size:
        raise ValueError(f"`ratios` must hold at least one level above 0, got shape {list(np.shape(ratios))}")
    checks.positive("ratios", levels)
    if not np.all(np.diff(levels) < 0):
        raise ValueError("`ratios` must decrease strictly, from noise to data, got levels that do not")
    highest = noise_ratio(path, np.asarray(path.t_max))
    if levels[0] > highest:
        raise ValueError(f"`ratios` must lie within the path's, up to {highest:g}, got {levels[0]:g}")
    if steps is not None:
        checks.positive_integer("steps", steps)
        at = np.linspace(0, len(levels) - 1, steps)
        levels = np.exp(np.interp(at, np.arange(len(levels)), np.log(levels)))
    return np.append(time_at_ratio(path, levels), 0.0)


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


def time_at_ratio(path: Path, ratio: ArrayLike) -> np.ndarray:
    """Inverts the path's sigma / alpha, which rises with time, by bisection to float64's last digits.

    Args:
        path: the Gaussian path.
        ratio: any shape, at least 0.

    Returns:
        The times, of the shape of ``ratio``; ``path.t_max`` where the path does not reach it.

    >>> from jaxgen import diffusion
    >>> diffusion.time_at_ratio(diffusion.rectified_flow(), [1, 3])
    array([0.5 , 0.75])
    """
    ratio = np.asarray(ratio, np.float64)
    low, high = np.zeros_like(ratio), np.full_like(ratio, path.t_max)
    for _ in range(200):
        middle = 0.5 * (low + high)
        below = noise_ratio(path, middle) < ratio
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high
