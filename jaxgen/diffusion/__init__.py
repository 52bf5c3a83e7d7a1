"""Diffusion and flow matching: a Gaussian path, what a network predicts on it, and samplers as tables.

>>> import jax
>>> from jaxgen import diffusion
>>> path = diffusion.linear_beta()
>>> net = lambda x, t: x  # any (x [batch, ...], t [batch]) -> output
>>> denoise = diffusion.denoiser(path, diffusion.noise, net)
>>> table = diffusion.ddim(path, diffusion.uniform_times(path, 20))
>>> key = jax.random.key(0)
>>> x = diffusion.prior(key, path, table.times[0], (2, 8, 8, 1))
>>> diffusion.sample(key, denoise, table, x).shape
(2, 8, 8, 1)
"""

from jaxgen.diffusion.guidance import (
    autoguidance,
    cfg,
    cfg_interval,
    classifier_guidance,
    clip_data,
    dynamic_threshold,
)
from jaxgen.diffusion.inverse import inpaint, posterior_sampling
from jaxgen.diffusion.learned_variance import learned_variance_loss, learned_variance_sample
from jaxgen.diffusion.likelihood import (
    bits_per_dimension,
    dequantise,
    divergence,
    log_density,
    probability_flow,
)
from jaxgen.diffusion.losses import (
    adaptive,
    denoising_loss,
    edm_weight,
    gaussian_nll,
    log_normal_time,
    logit_normal_time,
    min_snr,
    offset_noise,
    uniform_time,
)
from jaxgen.diffusion.meanflow import AverageVelocity, meanflow_denoiser, meanflow_guide, meanflow_loss, meanflow_times
from jaxgen.diffusion.multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde
from jaxgen.diffusion.path import Path, cosine, diffuse, edm, linear_beta, noise_ratio, rectified_flow
from jaxgen.diffusion.prediction import (
    Coefficients,
    Prediction,
    data,
    denoiser,
    edm_precondition,
    noise,
    score,
    v,
    velocity,
)
from jaxgen.diffusion.predictor_corrector import unipc
from jaxgen.diffusion.runge_kutta import dpmpp_2s, edm_stochastic, heun
from jaxgen.diffusion.sampling import prior, sample, trajectory
from jaxgen.diffusion.self_conditioning import self_conditioned
from jaxgen.diffusion.solvers import ddim, ddim_inversion, ddpm, euler, euler_ancestral
from jaxgen.diffusion.tables import pad, stack
from jaxgen.diffusion.times import (
    exponential_times,
    karras_times,
    leading_times,
    linspace_times,
    log_snr_times,
    quadratic_times,
    ratio_times,
    shift_times,
    time_at_ratio,
    trailing_times,
    uniform_times,
)
from jaxgen.typing import Table

__all__ = [
    "AverageVelocity",
    "Coefficients",
    "Path",
    "Prediction",
    "Table",
    "adaptive",
    "autoguidance",
    "bits_per_dimension",
    "cfg",
    "cfg_interval",
    "classifier_guidance",
    "clip_data",
    "cosine",
    "data",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "denoiser",
    "denoising_loss",
    "dequantise",
    "diffuse",
    "divergence",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dynamic_threshold",
    "edm",
    "edm_precondition",
    "edm_stochastic",
    "edm_weight",
    "euler",
    "euler_ancestral",
    "exponential_times",
    "gaussian_nll",
    "heun",
    "inpaint",
    "karras_times",
    "leading_times",
    "learned_variance_loss",
    "learned_variance_sample",
    "linear_beta",
    "linspace_times",
    "log_density",
    "log_normal_time",
    "log_snr_times",
    "logit_normal_time",
    "meanflow_denoiser",
    "meanflow_guide",
    "meanflow_loss",
    "meanflow_times",
    "min_snr",
    "noise",
    "noise_ratio",
    "offset_noise",
    "pad",
    "posterior_sampling",
    "prior",
    "probability_flow",
    "quadratic_times",
    "ratio_times",
    "rectified_flow",
    "sample",
    "score",
    "self_conditioned",
    "shift_times",
    "stack",
    "time_at_ratio",
    "trailing_times",
    "trajectory",
    "uniform_time",
    "uniform_times",
    "unipc",
    "v",
    "velocity",
]
