"""Class-conditional image diffusion: what the experiments on digits, MNIST and CIFAR-10 have in common.

The recipe is EDM's (Karras et al. 2022, arXiv:2206.00364): noise levels drawn log-normally, a preconditioned U-Net that
estimates the clean image, an average of its weights, and deterministic solvers; classes are dropped at random in
training, so that sampling can be guided (arXiv:2207.12598).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgen import diffusion, nets, place, random, train
from jaxgen.typing import Array, Batch, Denoiser, Key, Metrics, Params, Table

Platform = Literal["cpu", "gpu", "tpu"]
SOLVERS = {
    "ddim": diffusion.ddim,
    "ddpm": diffusion.ddpm,
    "euler": diffusion.euler,
    "heun": diffusion.heun,
    "dpmpp_2m": diffusion.dpmpp_2m,
}
# Tables are padded to one size, so that no choice of solver, steps, eta or guidance compiles anything anew.
ROWS, SLOTS = 256, 3


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a training run."""

    workdir: str
    """Directory of the run: settings, checkpoints, metrics, pictures. Run again with the same one to go on."""
    dataset: str
    """Data set: "digits" (embedded) or any of tensorflow-datasets' with "image" and "label"."""
    data_dir: str | None = None
    """Where data sets are kept; tensorflow-datasets' own choice by default."""
    seed: int = 0
    """Seed of everything random."""
    platform: Platform | None = None
    """Devices to run on; JAX's choice by default."""
    fsdp: int = 1
    """Over how many devices the state is split; the batch is split over all of them in any case."""

    steps: int = 4000
    """Training steps."""
    batch_size: int = 128
    """Images per step, over all devices."""
    microbatches: int = 1
    """Parts that each batch is split into, one after the other, to save memory."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam; warms up linearly and decays to 0 along a cosine."""
    warmup: int = 200
    """Steps of warm-up."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    ema: float = 0.999
    """Decay of the average of the parameters, which is what samples."""
    label_dropout: float = 0.1
    """Share of the labels that are hidden in training, for guidance."""
    flip: bool = False
    """Whether training images are mirrored at random."""

    channels: int = 32
    """Channels of the U-Net's first level."""
    multipliers: tuple[int, ...] = (1, 2)
    """Multiples of them, one per level."""
    blocks: int = 1
    """Residual blocks per level."""
    attention: tuple[int, ...] = (4,)
    """Image heights at which the U-Net attends."""
    groups: int = 8
    """Groups of its GroupNorms."""
    dropout: float = 0.0
    """Share of activations dropped in training."""
    bfloat16: bool = False
    """Whether to compute in bfloat16; parameters stay float32."""

    sigma_data: float = 0.5
    """Standard deviation of the data, for EDM's preconditioning."""
    time_mean: float = -1.2
    """Mean of the log noise level in training."""
    time_std: float = 1.2
    """Standard deviation of the log noise level in training."""
    sigma_min: float = 0.002
    """Lowest noise level of sampling, before the data."""
    sigma_max: float = 80.0
    """Highest noise level of sampling."""
    guidance: float = 1.0
    """Scale of classifier-free guidance for the run's own samples; 1 for none."""
    sample_steps: int = 20
    """Steps of DPM-Solver++(2M) for the run's own samples."""
    judged: int = 1000
    """Samples that the judge measures at the end; 0 for no judge."""
    judge_steps: int = 1500
    """Training steps of the judge."""

    log_every: int = 20
    """Steps between records of metrics."""
    save_every: int = 500
    """Steps between checkpoints."""
    grid_every: int = 500
    """Steps between grids of samples."""


class Samples:
    """Draws from a run's network, compiled once whatever the solver, its steps, the guidance and the seed."""

    def __init__(self, config: Config, shape: Sequence[int], classes: int, mesh: Mesh) -> None:
        """Prepares to draw images of ``shape`` (height, width, channels) of ``classes`` classes."""
        self.path = diffusion.edm(config.sigma_min, config.sigma_max)
        self.classes, self._shape, self._devices = classes, tuple(shape), mesh.size
        network = unet(config, shape, classes)

        def draw(shared: tuple[Params, Table, Array], split: tuple[Key, Array]) -> Array:
            (params, table, scale), (keys, labels) = shared, split
            denoise = diffusion.cfg(
                denoiser(config, network, params, labels),
                denoiser(config, network, params, jnp.full_like(labels, classes)),
                scale,
            )
            x = diffusion.prior(keys, self.path, jnp.asarray(table.times)[0], (len(labels), *shape))
            return jnp.clip(diffusion.sample(keys, denoise, table, x), -1, 1)

        self._draw = place.rows(draw, mesh)

    def table(self, solver: str, steps: int, eta: float | None = None) -> Table:
        """The sampler of that name on Karras's grid of noise levels."""
        if eta is not None and solver != "ddim":
            raise ValueError(f"`eta` is for the solver ddim, got {eta} and the solver {solver}")
        times = diffusion.karras_times(self.path, steps)
        built = diffusion.ddim(self.path, times, eta=eta) if eta is not None else SOLVERS[solver](self.path, times)
        rows = ROWS
        while rows < np.size(built.times):
            rows *= 2
        return diffusion.pad(built, rows=rows, slots=SLOTS)

    def __call__(
        self,
        params: Params,
        labels: np.ndarray,
        table: Table,
        *,
        guidance: float,
        seed: int,
        batch_size: int = 100,
    ) -> np.ndarray:
        """Draws one image [height, width, channels] in [-1, 1] per label [n]."""
        labels = np.asarray(labels, np.int32)
        batch_size = -(-batch_size // self._devices) * self._devices
        padded = np.append(labels, np.zeros(-len(labels) % batch_size, np.int32))
        drawn = []
        for start in range(0, len(padded), batch_size):
            keys = random.example_keys(jax.random.key(seed), batch_size, start=start)
            shared = (params, table, np.float32(guidance))
            drawn.append(self._draw(shared, (keys, padded[start : start + batch_size])))
        return np.concatenate([np.asarray(part) for part in drawn])[: len(labels)]


def unet(config: Config, shape: Sequence[int], classes: int) -> nets.UNet:
    """The experiment's network."""
    return nets.UNet(
        out_channels=shape[-1],
        channels=config.channels,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention=config.attention,
        num_classes=classes,
        dropout=config.dropout,
        groups=config.groups,
        time_scale=250.0,  # log(sigma) / 4 spans about 2.6: the embedding's sinusoids resolve hundreds
        dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32,
    )


def denoiser(config: Config, network: nets.UNet, params: Params, labels: Array, **options: Any) -> Denoiser:
    """The network as an estimate of clean images of the classes ``labels``."""
    return diffusion.edm_precondition(
        lambda x, t: network.apply(params, x, t, labels, **options),  # type: ignore[arg-type, return-value]
        sigma_data=config.sigma_data,
    )


def method(config: Config, shape: Sequence[int], classes: int) -> train.Method:
    """How the experiment trains, written for the global batch of uint8-range images in [-1, 1]."""
    network = unet(config, shape, classes)
    path = diffusion.edm(config.sigma_min, config.sigma_max)

    def loss(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        x0, labels = batch["image"], batch["label"]
        noise_key, label_key, flip_key, dropout_key = jax.random.split(key, 4)
        if config.flip:
            mirrored = _coins(flip_key, len(x0), 0.5)
            x0 = jnp.where(mirrored[:, None, None, None], x0[:, :, ::-1], x0)
        labels = jnp.where(_coins(label_key, len(x0), config.label_dropout), classes, labels)
        options = {"rngs": {"dropout": dropout_key}} if config.dropout else {}
        losses = diffusion.denoising_loss(
            path,
            diffusion.data,
            denoiser(config, network, params, labels, **options),
            x0,
            noise_key,
            draw_time=diffusion.log_normal_time(config.time_mean, config.time_std),
            weight=diffusion.edm_weight(config.sigma_data),
        )
        return losses.mean(), {}

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)
    example = (jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    return train.minimise(
        loss,
        optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(schedule)),
        lambda key: nets.init(network, key, *example),
        average=train.ema(config.ema),
        microbatches=config.microbatches,
    )


def _coins(key: Key, batch: int, probability: float) -> Array:
    """One biased coin per example."""
    keys = random.example_keys(key, batch)
    return random.draw(jax.random.uniform, keys, (), jnp.float32) < probability
