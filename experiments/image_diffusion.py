"""Class-conditional image diffusion: what the experiments on digits, MNIST and CIFAR-10 have in common.

The recipe is EDM's (Karras et al. 2022, arXiv:2206.00364): noise levels drawn log-normally, a preconditioned U-Net or
transformer that estimates the clean image, an average of its weights, and deterministic solvers; classes are dropped at
random in training, so that sampling can be guided (arXiv:2207.12598).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgen import diffusion, nets, place, random, train
from jaxgen.typing import Array, Batch, Denoiser, Key, Metrics, Params, Table

Platform = Literal["cpu", "gpu", "tpu"]
Network = nets.UNet | nets.DiT
Solver = Literal[
    "ddim", "ddpm", "euler", "euler_ancestral", "heun", "edm_stochastic",
    "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "deis", "unipc",
]  # fmt: skip
WITH_ETA = ("ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
# Tables are padded to one size, so that no choice of solver, steps, eta or guidance compiles anything anew.
ROWS, SLOTS = 256, 4


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Settings of a diffusion transformer."""

    patch: int = 2
    """Side of a patch of the image, which is a token."""
    features: int = 128
    """Features of a token."""
    depth: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    rotary: bool = False
    """Whether queries and keys are rotated by their position; else sines and cosines are added to the tokens."""
    qk_norm: bool = False
    """Whether queries and keys are normalised."""
    remat: bool = False
    """Whether to keep each block's input alone for the gradient and compute the rest again, to save memory."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a training run, whatever the recipe."""

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
    image_size: int | None = None
    """Side to which images are cropped and shrunk as they are read, for data sets that do not fit into memory."""

    network: Literal["unet", "dit"] = "unet"
    """A U-Net, of which the next settings speak, or a diffusion transformer."""
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
    """Share of the U-Net's activations dropped in training."""
    dit: Transformer = Transformer()
    """The transformer."""
    bfloat16: bool = False
    """Whether to compute in bfloat16; parameters stay float32."""

    guidance: float = 1.0
    """Scale of classifier-free guidance for the run's own samples; 1 for none."""
    sample_steps: int = 20
    """Steps of the solver for the run's own samples."""
    judged: int = 1000
    """Samples that the judge measures at the end; 0 for no judge."""
    judged_steps: tuple[int, ...] = ()
    """Other numbers of steps whose samples it measures too."""
    judge_steps: int = 1500
    """Training steps of the judge."""

    log_every: int = 20
    """Steps between records of metrics."""
    save_every: int = 500
    """Steps between checkpoints."""
    grid_every: int = 500
    """Steps between grids of samples."""


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of a training run."""

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


class Draws:
    """Draws from a network, compiled once whatever the table, the guidance and the seed."""

    def __init__(
        self,
        path: diffusion.Path,
        denoiser: Callable[[Params, Array, Table, Array], Denoiser],
        shape: Sequence[int],
        classes: int,
        mesh: Mesh,
    ) -> None:
        """Prepares to draw images of ``shape`` by ``denoiser(params, labels, table, scale of guidance)``."""
        self.path, self.denoiser, self.classes, self._devices = path, denoiser, classes, mesh.size

        def draw(shared: tuple[Params, Table, Array], split: tuple[Key, Array]) -> Array:
            (params, table, scale), (keys, labels) = shared, split
            denoise = denoiser(params, labels, table, scale)
            x = diffusion.prior(keys, path, jnp.asarray(table.times)[0], (len(labels), *shape))
            return jnp.clip(diffusion.sample(keys, denoise, table, x), -1, 1)

        self._draw = place.rows(draw, mesh)

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


class Samples(Draws):
    """Draws from a run's network, compiled once whatever the solver, its steps, the guidance and the seed."""

    solver = "dpmpp_2m"  # for the run's own samples

    def __init__(self, config: Config, shape: Sequence[int], classes: int, mesh: Mesh) -> None:
        """Prepares to draw images of ``shape`` (height, width, channels) of ``classes`` classes."""
        net = _network(config, shape, classes)
        path = diffusion.edm(config.sigma_min, config.sigma_max)
        super().__init__(path, guided(functools.partial(denoiser, config, net), classes), shape, classes, mesh)

    def table(self, solver: str, steps: int, eta: float | None = None) -> Table:
        """The sampler of that name on Karras's grid of noise levels."""
        return built(self.path, diffusion.karras_times(self.path, steps), solver, eta)


def guided(
    denoiser: Callable[[Params, Array], Denoiser], classes: int
) -> Callable[[Params, Array, Table, Array], Denoiser]:
    """Classifier-free guidance of ``denoiser(params, labels)`` towards its labels, as `Draws` takes it."""

    def guide(params: Params, labels: Array, table: Table, scale: Array) -> Denoiser:
        return diffusion.cfg(denoiser(params, labels), denoiser(params, jnp.full_like(labels, classes)), scale)

    return guide


def built(path: diffusion.Path, times: np.ndarray, solver: str, eta: float | None) -> Table:
    """The sampler of that name on a grid of times."""
    if eta is not None and solver not in WITH_ETA:
        raise ValueError(f"`eta` is for the solvers {', '.join(WITH_ETA)}, got {eta} and the solver {solver}")
    return padded(getattr(diffusion, solver)(path, times, **({} if eta is None else {"eta": eta})))


def padded(table: Table) -> Table:
    """The table in the size that all have, so that one program serves them."""
    rows = ROWS
    while rows < np.size(table.times):
        rows *= 2
    return diffusion.pad(table, rows=rows, slots=SLOTS)


def network(config: Settings, shape: Sequence[int], classes: int, *, time_scale: float) -> Network:
    """The experiment's network."""
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    if config.network == "dit":
        if config.dropout:
            raise ValueError(f"`dropout` must be 0 for the network dit, which has none, got {config.dropout:g}")
        return nets.DiT(
            out_channels=shape[-1],
            features=config.dit.features,
            depth=config.dit.depth,
            heads=config.dit.heads,
            patch=config.dit.patch,
            num_classes=classes,
            time_scale=time_scale,
            positions=nets.rotary_positions if config.dit.rotary else nets.sincos_positions,
            qk_norm=config.dit.qk_norm,
            remat=jax.checkpoint_policies.nothing_saveable if config.dit.remat else None,
            dtype=dtype,
        )
    return nets.UNet(
        out_channels=shape[-1],
        channels=config.channels,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention=config.attention,
        num_classes=classes,
        dropout=config.dropout,
        groups=config.groups,
        time_scale=time_scale,
        dtype=dtype,
    )


def _network(config: Config, shape: Sequence[int], classes: int) -> Network:
    # log(sigma) / 4 spans about 2.6: the embedding's sinusoids resolve hundreds
    return network(config, shape, classes, time_scale=250.0)


def denoiser(config: Config, network: Network, params: Params, labels: Array, **options: Any) -> Denoiser:
    """The network as an estimate of clean images of the classes ``labels``."""
    return diffusion.edm_precondition(
        lambda x, t: network.apply(params, x, t, labels, **options),  # type: ignore[arg-type, return-value]
        sigma_data=config.sigma_data,
    )


def method(config: Config, shape: Sequence[int], classes: int) -> train.Method:
    """How the experiment trains, written for the global batch of uint8-range images in [-1, 1]."""
    net = _network(config, shape, classes)
    path = diffusion.edm(config.sigma_min, config.sigma_max)

    def losses(params: Params, x0: Array, labels: Array, key: Key, **options: Any) -> tuple[Array, Metrics]:
        return diffusion.denoising_loss(
            path,
            diffusion.data,
            denoiser(config, net, params, labels, **options),
            x0,
            key,
            draw_time=diffusion.log_normal_time(config.time_mean, config.time_std),
            weight=diffusion.edm_weight(config.sigma_data),
        ), {}

    return trained(config, net, losses, shape, classes)


def trained(
    config: Settings,
    network: Network,
    losses: Callable[..., tuple[Array, Metrics]],
    shape: Sequence[int],
    classes: int,
    *,
    times: Sequence[int] = (),
) -> train.Method:
    """Adam on the mean of ``losses(params, x0, labels, key, **options of apply)``, some labels hidden.

    ``times`` is the shape of what the network is told of time, per example.
    """

    def loss(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        x0, labels = batch["image"], batch["label"]
        noise_key, label_key, flip_key, dropout_key = jax.random.split(key, 4)
        if config.flip:
            mirrored = _coins(flip_key, len(x0), 0.5)
            x0 = jnp.where(mirrored[:, None, None, None], x0[:, :, ::-1], x0)
        labels = jnp.where(_coins(label_key, len(x0), config.label_dropout), classes, labels)
        options = {"rngs": {"dropout": dropout_key}} if config.dropout else {}
        values, metrics = losses(params, x0, labels, noise_key, **options)
        return values.mean(), metrics

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)
    example = (jnp.zeros((1, *shape)), jnp.zeros((1, *times)), jnp.zeros(1, jnp.int32))
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
