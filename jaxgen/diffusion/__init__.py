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
from jaxgen.diffusion.losses import (
    denoising_loss,
    edm_weight,
    gaussian_nll,
    log_normal_time,
    logit_normal_time,
    min_snr,
    uniform_time,
)
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
from jaxgen.diffusion.sampling import prior, sample, trajectory
from jaxgen.diffusion.solvers import ddim, ddpm, dpmpp_2m, euler, heun, pad, stack
from jaxgen.diffusion.times import karras_times, log_snr_times, time_at_ratio, uniform_times
from jaxgen.typing import Table

__all__ = [
    "Coefficients",
    "Path",
    "Prediction",
    "Table",
    "autoguidance",
    "cfg",
    "cfg_interval",
    "classifier_guidance",
    "clip_data",
    "cosine",
    "data",
    "ddim",
    "ddpm",
    "denoiser",
    "denoising_loss",
    "diffuse",
    "dpmpp_2m",
    "dynamic_threshold",
    "edm",
    "edm_precondition",
    "edm_weight",
    "euler",
    "gaussian_nll",
    "heun",
    "inpaint",
    "karras_times",
    "linear_beta",
    "log_normal_time",
    "log_snr_times",
    "logit_normal_time",
    "min_snr",
    "noise",
    "noise_ratio",
    "pad",
    "posterior_sampling",
    "prior",
    "rectified_flow",
    "sample",
    "score",
    "stack",
    "time_at_ratio",
    "trajectory",
    "uniform_time",
    "uniform_times",
    "v",
    "velocity",
]
