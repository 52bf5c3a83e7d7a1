"""Class-conditional images by a rectified flow whose network estimates the clean image (Li & He, arXiv:2511.13720).

    x_t = (1 - t) x0 + t eps,    velocity = eps - x0 = (x_t - x0) / t                          (1)

Errors are measured in velocity, but what the network puts out is x0: images lie near a surface of few dimensions, noise
and velocities do not, and a transformer on large patches of pixels has no room for the rest.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.image_diffusion import (
    CURVES,
    Denoised,
    Denoising,
    Network,
    Sample,
    built,
    check,
    guided,
    network,
    smoke,
    trained,
)
from jaxgen import diffusion, train
from jaxgen.typing import Array, Denoiser, Key, Metrics, Params, Table

__all__ = ["CURVES", "Config", "Sample", "Samples", "check", "method", "smoke"]

PATH = diffusion.rectified_flow()
SHORTEST = 0.05  # what t is kept above in Eq. 1


@dataclasses.dataclass(frozen=True)
class Config(Denoising):
    """Settings of a training run."""

    time_mean: float = 0.8
    """Mean of log(t / (1 - t)) in training; t = 1 is noise."""
    time_std: float = 0.8
    """Standard deviation of the same."""


class Samples(Denoised):
    """Draws from a run's network, compiled once whatever the solver, its steps, the guidance and the seed."""

    solver = "heun"  # for the run's own samples

    def __init__(self, config: Config, shape: Sequence[int], classes: int, mesh: Mesh) -> None:
        """Prepares to draw images of ``shape`` (height, width, channels) of ``classes`` classes."""
        net = _network(config, shape, classes)
        super().__init__(config, PATH, guided(functools.partial(_denoiser, net), classes), shape, mesh)

    def table(self, solver: str, steps: int, eta: float | None = None) -> Table:
        """The sampler of that name on equal steps of time."""
        return built(PATH, diffusion.uniform_times(PATH, steps), solver, eta)


def method(config: Config, shape: Sequence[int], classes: int) -> train.Method:
    """How the experiment trains, written for the global batch of images in [-1, 1]."""
    net = _network(config, shape, classes)

    def losses(params: Params, x0: Array, labels: Array, key: Key, **options: Any) -> tuple[Array, Metrics]:
        return diffusion.denoising_loss(
            PATH,
            diffusion.data,
            _denoiser(net, params, labels, **options),
            x0,
            key,
            draw_time=diffusion.logit_normal_time(config.time_mean, config.time_std),
            weight=velocity_weight,
        ), {}

    return trained(config, net, losses, shape, classes)


def velocity_weight(c: diffusion.Coefficients, prediction: diffusion.Prediction) -> Array:
    """Makes squared errors of x0 those of the velocity, Eq. 1."""
    return 1 / jnp.maximum(c.sigma, SHORTEST) ** 2


def _network(config: Config, shape: Sequence[int], classes: int) -> Network:
    return network(config, shape, classes, time_scale=1000.0)


def _denoiser(net: Network, params: Params, labels: Array, **options: Any) -> Denoiser:
    return diffusion.denoiser(
        PATH,
        diffusion.data,
        lambda x, t: net.apply(params, x, t, labels, **options),  # type: ignore[arg-type, return-value]
    )
