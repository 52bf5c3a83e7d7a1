"""Solvers against exact denoisers: observed order, moments, and independence of what the network predicts."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, testing
from tests.diffusion import oracle
from tests.diffusion.oracle import EVERY, MEAN, ORDERS, PATHS, STD, STOCHASTIC, interior_times

KEY = jax.random.key(0)
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@on_every_path
@pytest.mark.parametrize("solver", ORDERS)
def test_observed_order(path, solver):
    oracle.check_order(path, *ORDERS[solver])


@on_every_path
@pytest.mark.parametrize("solver", ORDERS)
def test_observed_order_where_the_denoiser_is_not_affine(path, solver):
    oracle.check_order(path, *ORDERS[solver], error=oracle.mixture_error)


@pytest.mark.parametrize("solver", ["dpmpp_3m", "deis-3", "unip-3"])
def test_a_first_step_as_long_as_the_others_limits_order_three(solver, monkeypatch):
    """What their docstrings say."""
    monkeypatch.setattr(oracle, "eased_times", interior_times)
    oracle.check_order(PATHS["edm"], ORDERS[solver][0], 2)


@on_every_path
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_variance_of_stochastic_solvers(path, solver):
    """Its weak order; that the mean follows the marginal's is checked on the way."""
    oracle.check_order(path, *STOCHASTIC[solver], error=oracle.variance_error)


@on_every_path
@pytest.mark.parametrize("solver", oracle.MEAN_ORDERS)
def test_mean_of_stochastic_solvers(path, solver):
    oracle.check_order(path, *oracle.MEAN_ORDERS[solver], error=partial(oracle.mean_error, eta=0.5))


@on_every_path
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_the_mean_of_a_gaussian_is_exact_at_eta_one(path, solver):
    assert oracle.mean_error(path, STOCHASTIC[solver][0], 10, eta=1.0) < 1e-12


@on_every_path
def test_sampling_agrees_with_the_table_as_read_row_by_row(path):
    """All solvers at once: `sample` under vmap over a stack, against the NumPy reading, with the same noise."""
    x = np.random.default_rng(3).normal(size=(4, 3)) * path.sigma(path.t_max)
    times = interior_times(path, 5)
    tables = {name: build(path, times) for name, build in EVERY.items()}
    noise = oracle.row_noise(KEY, max(len(table.times) for table in tables.values()), x)
    with jax.enable_x64(True):
        denoise = testing.gaussian_denoiser(path, MEAN, STD)
        sampler = jax.jit(jax.vmap(lambda table: diffusion.sample(KEY, denoise, table, jnp.asarray(x))))
        ends = np.asarray(sampler(diffusion.stack(list(tables.values()))))
    for got, (name, table) in zip(ends, tables.items(), strict=True):
        expected = oracle.run(table, oracle.gaussian(path), x, noise)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9, err_msg=name)


def test_drawn_samples_have_the_propagated_moments():
    """The Monte-Carlo run of `sample`, started at alpha = 0, against the exact moments of every stochastic solver."""
    path, draws = PATHS["rectified_flow"], 20_000
    times = np.array([1.0, 0.8, 0.5, 0.3, 0.15, 0.05])
    denoise = testing.gaussian_denoiser(path, MEAN, STD)
    sampler = jax.jit(partial(diffusion.sample, KEY, denoise))
    x = diffusion.prior(KEY, path, 1.0, (draws, 3))
    for name, (build, _) in STOCHASTIC.items():
        table = build(path, times)
        mean, variance = oracle.moments(path, table, np.zeros(3), np.ones(3))
        end = sampler(diffusion.pad(table, rows=11, slots=3), x)
        np.testing.assert_allclose(end.mean(0), mean, atol=float(5 * np.sqrt(variance / draws).max()), err_msg=name)
        np.testing.assert_allclose(end.var(0), variance, rtol=5 * np.sqrt(2 / draws), err_msg=name)


@on_every_path
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_many_steps_reach_the_data_distribution(path, solver):
    """From noise that the path does not tell from pure noise, down to time 0."""
    high = float(diffusion.time_at_ratio(path, np.array([200.0]))[0])
    times = diffusion.log_snr_times(path, 400, t_max=high)
    build, order = STOCHASTIC[solver]
    mean, variance = oracle.moments(path, build(path, times), np.zeros(3), np.full(3, path.sigma(high) ** 2))
    np.testing.assert_allclose(mean, MEAN, atol=0.02)
    np.testing.assert_allclose(variance, STD**2, rtol=0.03 if order == 1 else 0.004)


@on_every_path
def test_ddpm_is_the_posterior(path):
    oracle.check_posterior(path, diffusion.ddpm)


@on_every_path
def test_solvers_that_are_others_by_another_name(path):
    times = np.append(interior_times(path, 6), 0.0)
    x = np.random.default_rng(4).normal(size=(5, 3)) * path.sigma(times[0])
    for one, other in [
        (diffusion.euler(path, times), diffusion.ddim(path, times)),
        (diffusion.euler_ancestral(path, times, eta=0.3), diffusion.ddim(path, times, eta=0.3)),
        (diffusion.euler_ancestral(path, times), diffusion.ddpm(path, times)),
        (diffusion.unipc(path, times, order=1, corrector=False), diffusion.ddim(path, times)),
        (diffusion.unipc(path, times, order=2, corrector=False), diffusion.dpmpp_2m(path, times)),
        (diffusion.deis(path, times, order=1), diffusion.ddim(path, times)),
        (diffusion.dpmpp_2m_sde(path, times, eta=0.0), diffusion.dpmpp_2m(path, times)),
        (diffusion.dpmpp_3m_sde(path, times, eta=0.0), diffusion.dpmpp_3m(path, times)),
        (diffusion.edm_stochastic(path, times, s_churn=0.0), diffusion.heun(path, times)),
        (diffusion.edm_stochastic(path, times, s_min=30.0), diffusion.heun(path, times)),
        (diffusion.edm_stochastic(path, times, s_max=0.01), diffusion.heun(path, times)),
    ]:
        ends = [oracle.run(table, oracle.mixture(path), x, np.ones((30, 5, 3))) for table in (one, other)]
        np.testing.assert_allclose(*ends, rtol=1e-9)
    np.testing.assert_allclose(  # one step of the SDE with d held fixed is the posterior
        diffusion.dpmpp_2m_sde(path, times).weights[0, 0, [0, 2, 3]],
        diffusion.ddpm(path, times).weights[0, 0],
        rtol=1e-9,
    )


def test_the_papers_b_matters_only_where_one_difference_is_weighted():
    path = PATHS["edm"]
    one, other = (diffusion.unipc(path, interior_times(path, 6), order=3, b=b) for b in (np.expm1, lambda h: h))
    assert not np.allclose(one.weights[1], other.weights[1])
    np.testing.assert_allclose(one.weights[2:], other.weights[2:], rtol=1e-12)


def test_edm_stochastic_is_the_papers_algorithm():
    """Algorithm 2 of arXiv:2206.00364, line by line, with the same noise; the first level is capped at sigma_max."""
    path = diffusion.edm()
    times = diffusion.karras_times(path, 6)
    denoise = oracle.mixture(path)
    rng = np.random.default_rng(5)
    x0, noise = 80.0 * rng.normal(size=(4, 3)), rng.normal(size=(12, 4, 3))
    options = {"s_churn": 1.5, "s_noise": 1.003, "s_min": 0.05, "s_max": 50.0}
    table = diffusion.edm_stochastic(path, times, **options)
    x, row = x0, 0  # step i's noise comes from the row before its first evaluation
    for t, s in itertools.pairwise(times):
        raised = t * (1.25 if 0.05 <= t <= 50.0 else 1.0)
        x = x + np.sqrt(raised**2 - t**2) * 1.003 * noise[row]
        slope = (x - denoise(x, raised)) / raised
        moved = x + (s - raised) * slope
        if s > 0:
            moved = x + (s - raised) * 0.5 * (slope + (moved - denoise(moved, s)) / s)
        x, row = moved, row + 2
    np.testing.assert_allclose(oracle.run(table, denoise, x0, noise), x, rtol=1e-9)
    capped = diffusion.edm_stochastic(path, [79.0, 1.0, 0.0], s_churn=1e6)
    np.testing.assert_allclose(capped.times[1], 80.0)
    shapes = {diffusion.edm_stochastic(path, times, s_churn=churn).weights.shape for churn in (0.0, 1.0, 40.0)}
    assert len(shapes) == 1


@on_every_path
def test_ddim_inversion_follows_the_flow_to_first_order(path):
    oracle.check_order(path, diffusion.ddim_inversion, 1)


@pytest.mark.parametrize("path", ["linear_beta", "cosine", "edm", "rectified_flow"])
def test_ddim_undoes_its_inversion_to_first_order(path):
    """From the data itself, up to a ratio of 5 and back."""
    path = PATHS[path]
    x = MEAN + STD * np.random.default_rng(6).normal(size=(8, 3))

    def error(steps):
        high = float(diffusion.time_at_ratio(path, np.array([5.0]))[0])
        times = high * np.linspace(1.0, 0.0, steps + 1) ** 2
        noised = oracle.run(diffusion.ddim_inversion(path, times), oracle.gaussian(path), x)
        return np.abs(oracle.run(diffusion.ddim(path, times), oracle.gaussian(path), noised) - x).max()

    assert oracle.observed_order(error) == pytest.approx(1, abs=0.2)


@on_every_path
def test_ddim_undoes_its_inversion_exactly_where_the_noise_does_not_change(path):
    times = np.append(interior_times(path, 6), 0.0)
    eps = np.random.default_rng(7).normal(size=(4, 3))
    x = np.random.default_rng(8).normal(size=(4, 3))

    def denoise(x, t):
        return (x - path.sigma(t) * eps) / path.alpha(t)

    noised = oracle.run(diffusion.ddim_inversion(path, times), denoise, x)
    np.testing.assert_allclose(noised, path.alpha(times[0]) * x + path.sigma(times[0]) * eps, rtol=1e-9)
    np.testing.assert_allclose(oracle.run(diffusion.ddim(path, times), denoise, noised), x, rtol=1e-7, atol=1e-9)


@on_every_path
@pytest.mark.parametrize("prediction", ["noise", "data", "v", "velocity", "score"])
def test_every_prediction_gives_the_same_sample(path, prediction):
    """A network that outputs its target for the exact denoiser's x0 must sample as the exact denoiser does."""
    prediction = getattr(diffusion, prediction)
    times = interior_times(path, 12)
    table = diffusion.dpmpp_2m(path, times)
    exact = testing.gaussian_denoiser(path, MEAN, STD)

    def net(x, t):
        c = diffusion.prediction.path_coefficients(path, t, x)
        x0 = exact(x, t)
        return prediction.target(c, x0, (x - c.alpha * x0) / c.sigma)

    with jax.enable_x64(True):
        x = np.random.default_rng(1).normal(size=(5, 3)) * path.sigma(times[0])
        got = diffusion.sample(KEY, diffusion.denoiser(path, prediction, net), table, jnp.asarray(x))
    np.testing.assert_allclose(got, oracle.run(table, oracle.gaussian(path), x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "data", "v", "velocity", "score"])
@on_every_path
def test_target_and_to_data_are_inverse(path, prediction):
    prediction = getattr(diffusion, prediction)
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x0, eps = jnp.asarray(rng.normal(size=(2, 6, 3)))
        t = jnp.asarray(diffusion.time_at_ratio(path, np.geomspace(10, 0.1, 6)))
        c = diffusion.prediction.path_coefficients(path, t, x0)
        x = c.alpha * x0 + c.sigma * eps
        np.testing.assert_allclose(prediction.to_data(c, x, prediction.target(c, x0, eps)), x0, rtol=1e-9, atol=1e-9)
        # gain relates the two errors
        wrong = prediction.target(c, x0, eps) + 0.1
        ratio = (0.1 / (prediction.to_data(c, x, wrong) - x0)) ** 2
        np.testing.assert_allclose(ratio, jnp.broadcast_to(prediction.gain(c), ratio.shape), rtol=1e-6)


@pytest.mark.parametrize("solver", EVERY)
def test_no_history_before_the_first_row(solver):
    oracle.check_starts_afresh(PATHS["cosine"], EVERY[solver])


@on_every_path
@pytest.mark.parametrize("solver", EVERY)
def test_tables_end_on_the_denoiser(path, solver):
    """In any number of steps; a rectified flow starts at 1, where alpha is 0 and nothing may divide by it."""
    for steps in (1, 2, 3, 7):
        oracle.check_ends_on_data(path, EVERY[solver], steps)


@pytest.mark.parametrize("solver", ORDERS)
def test_a_rectified_flow_may_start_at_one(solver):
    """The one step from alpha = 0 is of first order: the end is still the flow's, to the step's error."""
    path = PATHS["rectified_flow"]
    x = np.random.default_rng(9).normal(size=(16, 3))
    build, order = ORDERS[solver]
    end = oracle.run(build(path, np.linspace(1.0, 0.1, 91)), oracle.gaussian(path), x)
    mean, variance = oracle.marginal(path, 0.1)
    np.testing.assert_allclose(end, mean + np.sqrt(variance) * x, atol=0.05 if order == 1 else 0.005)


@pytest.mark.parametrize("solver", [diffusion.heun, diffusion.edm_stochastic])
def test_runge_kutta_from_alpha_zero_needs_a_scale(solver):
    path = PATHS["rectified_flow"]._replace(scale=None)
    with pytest.raises(ValueError, match=r"`times\[0\]` has alpha = 0"):
        solver(path, [1.0, 0.5, 0.0])


def test_heun_on_rectified_flow_averages_velocities():
    """In the flow's own time, Heun is x + dt/2 (v1 + v2) with v = (x - x0) / t."""
    path = diffusion.rectified_flow()
    t, s = 0.6, 0.3
    denoise = oracle.mixture(path)
    x = np.random.default_rng(3).normal(size=(4, 3))
    v1 = (x - denoise(x, t)) / t
    v2 = (x + (s - t) * v1 - denoise(x + (s - t) * v1, s)) / s
    got = oracle.run(diffusion.heun(path, [t, s]), denoise, x)
    np.testing.assert_allclose(got, x + 0.5 * (s - t) * (v1 + v2), rtol=1e-12)


def test_evaluation_counts():
    path = diffusion.edm()
    times = diffusion.karras_times(path, 18)
    assert len(diffusion.heun(path, times).times) == 35  # the paper's count for 18 steps
    assert len(diffusion.heun(path, times[:-1]).times) == 34
    assert len(diffusion.dpmpp_2s(path, times).times) == 35
    assert len(diffusion.edm_stochastic(path, times).times) == 36  # one row evaluates nothing
    flow = PATHS["rectified_flow"]
    assert len(diffusion.dpmpp_2s(flow, diffusion.uniform_times(flow, 5)).times) == 8  # from alpha = 0 one, to 0 one
    for solver in (diffusion.ddim, diffusion.dpmpp_2m, diffusion.dpmpp_3m_sde, diffusion.deis, diffusion.unipc):
        assert len(solver(path, times).times) == 18


@pytest.mark.parametrize("solver", [*EVERY.values(), diffusion.ddim_inversion], ids=[*EVERY, "ddim_inversion"])
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 1.0], "decrease"),
        ([1.0, 1.0, 0.0], "decrease"),
        ([1.0], "at least 2"),
        ([81.0, 1.0], r"lie in \[0, 80\]"),
        ([1.0, -0.5], r"lie in \[0, 80\]"),
        ([np.nan, 0.0], "not finite"),
        ([[1.0, 0.0]], "at least 2"),
    ],
)
def test_bad_times_are_refused(solver, times, message):
    with pytest.raises(ValueError, match=r"`times`.*" + message):
        solver(diffusion.edm(), times)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        *[(s, {"eta": eta}, r"`eta` must lie in \[0, 1\], got") for s in ("ddim", "euler_ancestral") for eta in (-0.1, 1.1, np.nan)],
        *[(s, {"eta": eta}, "`eta` must be at least 0 and finite, got") for s in ("dpmpp_2m_sde", "dpmpp_3m_sde") for eta in (-0.1, np.inf, np.nan)],
        *[(s, {"order": order}, "`order` must be 1, 2 or 3, got") for s in ("deis", "unipc") for order in (0, 4, 1.5)],
        ("edm_stochastic", {"s_churn": -1.0}, "`s_churn` must be at least 0 and finite, got -1"),
        ("edm_stochastic", {"s_churn": np.inf}, "`s_churn` must be at least 0 and finite, got inf"),
        ("edm_stochastic", {"s_noise": 0.0}, "`s_noise` must be above 0"),
        ("edm_stochastic", {"s_min": -1.0}, "`s_min` and `s_max` must satisfy.*got -1"),
        ("edm_stochastic", {"s_min": 2.0, "s_max": 1.0}, "`s_min` and `s_max` must satisfy.*got 2.0 and 1.0"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(solver, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(diffusion, solver)(diffusion.edm(), [1.0, 0.0], **options)


@pytest.mark.parametrize(
    "solver", [diffusion.ddim, diffusion.heun, diffusion.dpmpp_2m, diffusion.unipc, diffusion.deis]
)
def test_traced_times_are_refused(solver):
    with pytest.raises(ValueError, match="`times` must be known when a table is built"):
        jax.jit(lambda times: solver(diffusion.edm(), times))(jnp.array([1.0, 0.5, 0.0]))
