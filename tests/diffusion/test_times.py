"""Grids of times: what they are uniform in, where they end, what they refuse."""

import numpy as np
import pytest

from jaxgen import diffusion
from tests.diffusion.oracle import PATHS

on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
GRIDS = {
    name: getattr(diffusion, f"{name}_times")
    for name in ("uniform", "quadratic", "karras", "log_snr", "exponential", "leading", "trailing", "linspace")
}


def start(path):
    """The path's own, or where alpha is 0 a time before."""
    return path.t_max if path.alpha(path.t_max) > 0 else 0.99


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [2, 3, 7, 50])
def test_grids_fall_strictly_to_the_data_in_as_many_steps(grid, steps):
    path = PATHS["linear_beta"]
    times = GRIDS[grid](path, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == np.float64
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)
    if grid != "leading":
        assert times[0] == path.t_max
    assert len(diffusion.dpmpp_2m(path, times).times) == steps


@on_every_path
def test_what_grids_are_uniform_in(path):
    first = start(path)
    ratio = diffusion.noise_ratio(path, diffusion.karras_times(path, 12, t_max=first)[:-1])
    np.testing.assert_allclose(np.diff(ratio ** (1 / 7), 2), 0, atol=1e-9)
    ratio = diffusion.noise_ratio(path, diffusion.log_snr_times(path, 12, t_max=first)[:-1])
    np.testing.assert_allclose(np.diff(np.log(ratio), 2), 0, atol=1e-9)
    np.testing.assert_allclose(np.diff(diffusion.uniform_times(path, 12), 2), 0, atol=1e-9 * path.t_max)
    np.testing.assert_allclose(np.diff(np.sqrt(diffusion.quadratic_times(path, 12)), 2), 0, atol=1e-9 * path.t_max)


def test_exponential_is_log_snr():
    np.testing.assert_array_equal(
        diffusion.exponential_times(PATHS["edm"], 9, t_min=0.1, t_max=9.0),
        diffusion.log_snr_times(PATHS["edm"], 9, t_min=0.1, t_max=9.0),
    )


@on_every_path
def test_time_at_ratio_inverts_the_ratio(path):
    times = np.linspace(0.01, 1.0, 30) * start(path)
    np.testing.assert_allclose(diffusion.time_at_ratio(path, diffusion.noise_ratio(path, times)), times, rtol=1e-7)


@on_every_path
def test_ratio_times(path):
    levels = np.array([15.0, 6.5, 2.7, 0.9, 0.15, 0.03])
    times = diffusion.ratio_times(path, levels)
    np.testing.assert_allclose(diffusion.noise_ratio(path, times[:-1]), levels, rtol=1e-9)
    assert times[-1] == 0
    np.testing.assert_array_equal(diffusion.ratio_times(path, np.append(levels, 0.0)), times)
    finer = diffusion.noise_ratio(path, diffusion.ratio_times(path, levels, steps=11)[:-1])
    np.testing.assert_allclose(finer[::2], levels, rtol=1e-9)
    np.testing.assert_allclose(finer[1::2], np.sqrt(levels[1:] * levels[:-1]), rtol=1e-9)
    one = diffusion.ratio_times(path, levels, steps=1)
    np.testing.assert_allclose(diffusion.noise_ratio(path, one), [15.0, 0.0], rtol=1e-9)


def test_shift_multiplies_the_noise_ratio():
    path = PATHS["rectified_flow"]
    times = diffusion.uniform_times(path, 10)
    shifted = diffusion.shift_times(times, 3.0)
    assert shifted[0] == 1
    assert shifted[-1] == 0
    np.testing.assert_allclose(
        diffusion.noise_ratio(path, shifted[1:]), 3.0 * diffusion.noise_ratio(path, times[1:]), rtol=1e-12
    )
    np.testing.assert_array_equal(diffusion.shift_times(times, 1.0), times)
    assert diffusion.shift_times(0.5, 3.0) == 0.75


def test_all_steps_are_all_times():
    path = diffusion.linear_beta(40)
    for grid in (diffusion.leading_times, diffusion.trailing_times, diffusion.linspace_times):
        np.testing.assert_array_equal(grid(path, 40), np.arange(40.0, -1.0, -1.0))


BETA, FLOW, EDM = PATHS["linear_beta"], PATHS["rectified_flow"], PATHS["edm"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[(lambda grid=grid: grid(BETA, 0), "`steps` must be an integer of at least 1, got 0") for grid in GRIDS.values()],
        *[(lambda grid=grid: grid(BETA, 2.0), "`steps` must be an integer of at least 1, got 2.0") for grid in GRIDS.values()],
        *[(lambda grid=GRIDS[name]: grid(BETA, 1001), "`steps` must be at most the path's 1000, got 1001") for name in ("leading", "trailing", "linspace")],
        *[(lambda grid=GRIDS[name], path=path: grid(path, 5), "`path` must count noising steps") for name in ("leading", "trailing", "linspace") for path in (FLOW, EDM)],
        (lambda: diffusion.linspace_times(BETA, 1), "`steps` must be at least 2"),
        (lambda: diffusion.leading_times(BETA, 1000, offset=1), "`offset` must be a whole number that keeps"),
        (lambda: diffusion.leading_times(BETA, 10, offset=-1), "`offset` must be a whole number that keeps"),
        (lambda: diffusion.leading_times(BETA, 10, offset=0.5), "`offset` must be a whole number that keeps"),
        (lambda: diffusion.leading_times(BETA, 10, offset=np.nan), "`offset` must be a whole number that keeps"),
        (lambda: diffusion.karras_times(EDM, 5, rho=0.0), "`rho` must be above 0"),
        (lambda: diffusion.karras_times(EDM, 5, t_min=2.0, t_max=1.0), "times must satisfy 0 < t_min < t_max <= 80, got 2.0 and 1.0"),
        (lambda: diffusion.exponential_times(EDM, 5, t_max=81.0), "times must satisfy"),
        (lambda: diffusion.karras_times(FLOW, 5), "`t_max` is 1, where this path's alpha is 0"),
        (lambda: diffusion.shift_times([1.2, 0.0], 3.0), r"`times` must lie in \[0, 1\]"),
        (lambda: diffusion.shift_times([1.0, 0.0], 0.0), "`shift` must be above 0"),
        (lambda: diffusion.ratio_times(EDM, []), "`ratios` must hold at least one level above 0"),
        (lambda: diffusion.ratio_times(EDM, [0.0]), "`ratios` must hold at least one level above 0"),
        (lambda: diffusion.ratio_times(EDM, [[1.0]]), "`ratios` must hold at least one level above 0"),
        (lambda: diffusion.ratio_times(EDM, [1.0, 2.0]), "`ratios` must decrease strictly"),
        (lambda: diffusion.ratio_times(EDM, [1.0, -1.0]), "`ratios` must be above 0"),
        (lambda: diffusion.ratio_times(EDM, [1.0, np.nan]), "`ratios` must be above 0"),
        (lambda: diffusion.ratio_times(EDM, [81.0, 1.0]), "`ratios` must lie within the path's, up to 80, got 81"),
        (lambda: diffusion.ratio_times(EDM, [1.0], steps=0), "`steps` must be an integer"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
