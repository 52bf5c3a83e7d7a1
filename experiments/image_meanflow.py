"""Class-conditional images in one or two evaluations of the network: MeanFlow (Geng et al. 2025, arXiv:2505.13447).

A U-Net, told both ends of a step, learns the average velocity of the rectified flow between them, with guidance learned
into it: a sample costs as many evaluations as it has steps.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.image_diffusion import (
    CURVES,
    Denoised,
    Denoising,
    How,
    Network,
    Sample,
    check,
    network,
    padded,
    smoke,
    trained,
)
from jaxgen import diffusion, train
from jaxgen.typing import Array, Denoiser, Key, Metrics, Params, Table

__all__ = ["CURVES", "Config", "Sample", "Samples", "check", "method", "smoke"]

PATH = diffusion.rectified_flow()


@dataclasses.dataclass(frozen=True)
class Config(Denoising):
    """Settings of a training run."""

    guidance: float = 1.0
    """Scale of classifier-free guidance that the network learns; 1 for none."""
    sample_steps: int = 1
    """Steps, and evaluations, of the run's own samples."""
    time_mean: float = -0.4
    """Mean of log(t / (1 - t)) in training."""
    time_std: float = 1.0
    """Standard deviation of log(t / (1 - t)) in training."""
    distinct: float = 0.75
    """Share of examples whose step has a length in training; the others learn the velocity."""
    power: float = 1.0
    """Power of its own error that each example's loss is divided by; 0 for none."""


class Samples(Denoised):
    """Draws from a run's network, compiled once whatever the number of steps and the seed."""

    solver = "euler"

    def __init__(self, config: Config, shape: Sequence[int], classes: int, mesh: Mesh) -> None:
        """Prepares to draw images of ``shape`` (height, width, channels) of ``classes`` classes."""
        net = _network(config, shape, classes)

        def denoiser(params: Params, labels: Array, table: Table, scale: Array) -> Denoiser:
            return diffusion.meanflow_denoiser(PATH, _average_velocity(net, params, labels), table.times)

        super().__init__(config, PATH, denoiser, shape, mesh)

    def chosen(self, options: Sample) -> How:
        """How ``options`` have it, at the guidance that the network has learned."""
        learned = self._config.guidance
        if options.guidance not in (None, learned):
            raise ValueError(f"`guidance` is part of this network, {learned:g}, got {options.guidance:g}")
        return super().chosen(options)

    def table(self, solver: str, steps: int, eta: float | None = None) -> Table:
        """So many equal steps, whose ends the network is told."""
        if solver != self.solver or eta is not None:
            raise ValueError(f"`solver` must be {self.solver!r}, without `eta`, got {solver!r} and {eta}")
        return padded(diffusion.euler(PATH, diffusion.uniform_times(PATH, steps)))


def method(config: Config, shape: Sequence[int], classes: int) -> train.Method:
    """How the experiment trains, written for the global batch of images in [-1, 1]."""
    net = _network(config, shape, classes)
    draw_times = diffusion.meanflow_times(
        diffusion.logit_normal_time(config.time_mean, config.time_std), distinct=config.distinct
    )

    def losses(params: Params, x0: Array, labels: Array, key: Key, **options: Any) -> tuple[Array, Metrics]:
        conditional = _average_velocity(net, params, labels, **options)
        guide = None
        if config.guidance != 1:
            unconditional = _average_velocity(net, params, jnp.full_like(labels, classes), **options)
            scale = jnp.where(labels == classes, 1.0, config.guidance)
            guide = diffusion.meanflow_guide(conditional, unconditional, scale)
        errors = diffusion.meanflow_loss(PATH, conditional, x0, key, draw_times=draw_times, guide=guide)
        return diffusion.adaptive(errors, power=config.power), {"error": errors.mean()}

    return trained(config, net, losses, shape, classes, times=(2,))


def _network(config: Config, shape: Sequence[int], classes: int) -> Network:
    # Training differentiates by time: sinusoids much faster than the flow itself would only make that noisy.
    return network(config, shape, classes, time_scale=3.0)


def _average_velocity(net: Network, params: Params, labels: Array, **options: Any) -> diffusion.AverageVelocity:
    def average(x: Array, t: Array, r: Array) -> Array:
        u: Array = net.apply(params, x, jnp.stack([t, t - r], axis=1), labels, **options)  # type: ignore[assignment]
        return u

    return average
