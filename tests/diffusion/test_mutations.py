"""Known defects of other libraries, put back one by one: each must turn the checks that the tests make red.

A defect is a builder that edits the right table, or a compiled sampler. The checks are the very functions that the
tests call on the library (`oracle`).
"""

from functools import partial

import jax
import numpy as np
import pytest

from jaxgen import diffusion, testing
from jaxgen.diffusion import likelihood
from tests.diffusion import oracle, test_likelihood
from tests.diffusion.oracle import MEAN, PATHS, STD

PATH = PATHS["linear_beta"]  # alpha changes along it, so that a wrong alpha shows


def alpha_of_the_wrong_time(path, times):
    """DDIM that scales x0 by alpha(t) where it should by alpha(next t)."""
    table = diffusion.ddim(path, times)
    table.weights[:, 0, 1] += path.alpha(times[:-1]) - path.alpha(times[1:])
    return table


def corrector_without_an_evaluation(path, times):
    """Heun whose corrector reuses the first evaluation: Euler's method."""
    table = diffusion.heun(path, times)
    table.weights[1::2, 0, 2] += table.weights[1::2, 0, 3]
    table.weights[1::2, 0, 3] = 0.0
    return table


def swapped_posterior(path, times):
    """DDPM whose two posterior coefficients, of x and of x0, are exchanged."""
    table = diffusion.ddpm(path, times)
    table.weights[:, 0, :2] = table.weights[:, 0, 1::-1].copy()
    return table


def history_of_another_call(path, times):
    """DPM-Solver++(2M) that extrapolates in its first step, from whatever its memory holds."""
    before = diffusion.time_at_ratio(path, 1.02 * diffusion.noise_ratio(path, times[:1]))
    table = diffusion.dpmpp_2m(path, np.append(before, times))
    return diffusion.Table(table.times[1:], table.weights[1:])


def halved_second_difference(path, times):
    """DPM-Solver++(3M) as released: parity with it is tested, its order is 2."""
    return oracle.halved_second_difference(diffusion.dpmpp_3m(path, times), path, times)


def noise_without_its_drift(path, times):
    """An SDE solver that adds the noise but keeps the deterministic solver's other weights."""
    table = diffusion.dpmpp_2m(path, times)
    table.weights[:, 0, 3] = diffusion.dpmpp_2m_sde(path, times).weights[:, 0, 3]
    return table


def churn_without_its_level(path, times):
    """Karras's sampler that noises the state up but tells the denoiser, and Heun, the level before."""
    table = diffusion.edm_stochastic(path, times, s_churn=5.0)
    plain = diffusion.edm_stochastic(path, times, s_churn=0.0)
    weights = np.array(plain.weights)
    weights[..., 4] = table.weights[..., 4]
    return diffusion.Table(plain.times, weights)


def dropped_at_the_end(path, times):
    """A last step to time 0 that stops at the last noise level instead: the sample keeps noise."""
    return diffusion.ddim(path, np.append(times[:-1], 0.5 * times[-2]))


@pytest.mark.parametrize(
    ("defect", "check"),
    [
        (alpha_of_the_wrong_time, partial(oracle.check_order, nominal=1)),
        (corrector_without_an_evaluation, partial(oracle.check_order, nominal=2)),
        (swapped_posterior, oracle.check_posterior),
        (swapped_posterior, partial(oracle.check_order, nominal=1, error=oracle.variance_error)),
        (history_of_another_call, oracle.check_starts_afresh),
        (halved_second_difference, partial(oracle.check_order, nominal=3)),
        (noise_without_its_drift, partial(oracle.check_order, nominal=2, error=oracle.variance_error)),
        (churn_without_its_level, partial(oracle.check_order, nominal=2, error=oracle.variance_error)),
        (dropped_at_the_end, partial(oracle.check_ends_on_data, steps=7)),
    ],
)
def test_the_oracle_sees(defect, check):
    with pytest.raises(AssertionError):
        check(PATH, defect)


def test_the_oracle_sees_a_static_guidance_scale():
    """One compiled program per scale."""
    exact = testing.gaussian_denoiser(PATHS["edm"], MEAN, STD)
    key = jax.random.key(0)

    def guided(table, x, scale):
        return diffusion.sample(key, diffusion.cfg(exact, exact, scale), table, x)

    with pytest.raises(AssertionError, match="programs"):
        oracle.check_one_program(jax.jit(guided, static_argnums=2), steps=(1,), solvers=("ddim", "heun"))


def test_the_oracle_sees_the_priors_standard_deviation_squared(monkeypatch):
    """A log-likelihood whose prior takes the square of its variance: no difference at sigma = 1, so edm's is asked."""
    monkeypatch.setattr(
        likelihood, "gaussian_nll", lambda x, mean, variance: diffusion.gaussian_nll(x, mean, variance**2)
    )
    with pytest.raises(AssertionError):
        test_likelihood.test_the_prior_is_noise_at_the_last_time(PATHS["edm"])
