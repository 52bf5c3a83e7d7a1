"""Class-conditional image diffusion: what the experiments on digits, MNIST and CIFAR-10 have in common.

The recipe is EDM's (Karras et al. 2022, arXiv:2206.00364): noise levels drawn log-normally, a preconditioned U-Net or
transformer that estimates the clean image, an average of its weights, and deterministic solvers; classes are dropped at
random in training, so that sampling can be guided (arXiv:2207.12598).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import image_data, image_settings
from experiments.image_draws import Draws
from experiments.image_settings import Generating
from jaxgen import checks, diffusion, nets, train
from jaxgen.typing import Array, Batch, Denoiser, Key, Metrics, Params, Table

Network = nets.UNet | nets.DiT
Solver = Literal[
    "ddim", "ddpm", "euler", "euler_ancestral", "heun", "edm_stochastic",
    "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "deis", "unipc",
]  # fmt: skip
WITH_ETA = ("ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
# Tables are padded to one size, so that no choice of solver, steps, eta or guidance compiles anything anew.
ROWS, SLOTS = 256, 4

AnyDenoising = TypeVar("AnyDenoising", bound="Denoising")


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
class Denoising(Generating):
    """Settings of a training run, whatever the path and the loss."""

    warmup: int = 200
    """Steps in which the learning rate warms up, linearly; it then decays to 0 along a cosine."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    label_dropout: float = 0.1
    """Share of the labels that are hidden in training, for guidance."""

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

    guidance: float = 1.0
    """Scale of classifier-free guidance for the run's own samples; 1 for none."""
    sample_steps: int = 20
    """Steps of the solver for the run's own samples."""
    judged_steps: tuple[int, ...] = ()
    """Other numbers of steps whose samples the judge measures too."""


@dataclasses.dataclass(frozen=True)
class Config(Denoising):
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


@dataclasses.dataclass(frozen=True)
class Sample(image_settings.Sample):
    """Draws images from a trained run.

    Image i depends on (seed, i, its class) alone, not on how many are drawn.
    """

    solver: Solver = "dpmpp_2m"
    """Solver."""
    steps: int = 20
    """Steps of the solver."""
    eta: float | None = None
    """Share of fresh noise, for ddim, euler_ancestral and the sde solvers: 0 for none; their own by default."""
    guidance: float | None = None
    """Scale of classifier-free guidance; the run's own by default."""


class How(NamedTuple):
    """How images are drawn, as data: the sampler, and the scale of classifier-free guidance."""

    table: Table
    guidance: Any


class Denoised(Draws):
    """Draws from a run's network, compiled once whatever the solver, its steps, the guidance and the seed."""

    solver = "dpmpp_2m"  # for the run's own samples

    def __init__(
        self,
        config: Denoising,
        path: diffusion.Path,
        denoiser: Callable[[Params, Array, Table, Array], Denoiser],
        shape: Sequence[int],
        mesh: Mesh,
    ) -> None:
        """Prepares to draw images of ``shape`` by ``denoiser(params, labels, table, scale of guidance)``."""
        self.path, self.denoiser, self._config = path, denoiser, config

        def draw(params: Params, how: How, keys: Key, labels: Array) -> Array:
            table, scale = how
            denoise = denoiser(params, labels, table, scale)
            x = diffusion.prior(keys, path, jnp.asarray(table.times)[0], (labels.shape[0], *shape))
            return jnp.clip(diffusion.sample(keys, denoise, table, x), -1, 1)

        super().__init__(draw, mesh)

    def table(self, solver: str, steps: int, eta: float | None = None) -> Table:
        """The sampler of that name."""
        raise NotImplementedError

    def own(self) -> How:
        """How the run draws its own samples."""
        return self._how(self.solver, self._config.sample_steps)

    def judged(self) -> dict[str, How]:
        """What the judge measures besides: how, by a name for it."""
        return {f"{steps}_steps": self._how(self.solver, steps) for steps in self._config.judged_steps}

    def chosen(self, options: Sample) -> How:
        """How ``options`` have it."""
        checks.positive_integer("steps", options.steps)
        return self._how(options.solver, options.steps, options.eta, options.guidance)

    def _how(self, solver: str, steps: int, eta: float | None = None, guidance: float | None = None) -> How:
        guidance = self._config.guidance if guidance is None else guidance
        checks.finite("guidance", guidance)
        return How(self.table(solver, steps, eta), np.float32(guidance))


class Samples(Denoised):
    """Draws from a run's network by the solvers of a diffusion, on Karras's grid of noise levels."""

    def __init__(self, config: Config, shape: Sequence[int], classes: int, mesh: Mesh) -> None:
        """Prepares to draw images of ``shape`` (height, width, channels) of ``classes`` classes."""
        net = _network(config, shape, classes)
        path = diffusion.edm(config.sigma_min, config.sigma_max)
        super().__init__(config, path, guided(functools.partial(denoiser, config, net), classes), shape, mesh)

    def table(self, solver: str, steps: int, eta: float | None = None) -> Table:
        """The sampler of that name on Karras's grid of noise levels."""
        return built(self.path, diffusion.karras_times(self.path, steps), solver, eta)


CURVES = ("loss", "grad_norm")  # of training, as a figure


def check(config: Denoising) -> None:
    """Raises ValueError where a setting is out of range or does not fit another."""
    image_settings.check_generating(config)
    checks.positive_integer("sample_steps", config.sample_steps)
    for steps in config.judged_steps:
        checks.positive_integer("judged_steps", steps)
    checks.interval("clip", config.clip, 0.0, float("inf"))
    checks.finite("guidance", config.guidance)
    if not 0 <= config.warmup < config.steps:
        raise ValueError(f"`warmup` must lie in [0, `steps`), [0, {config.steps}), got {config.warmup}")
    for field in ("label_dropout", "dropout"):
        checks.interval(field, getattr(config, field), 0.0, 1.0)


def smoke(config: AnyDenoising) -> AnyDenoising:
    """The same experiment, tiny: every part of it runs, nothing is learned."""
    return dataclasses.replace(
        config,
        workdir=config.workdir + "-smoke",
        steps=20, warmup=5, batch_size=16, channels=8, groups=4, blocks=1, microbatches=1,
        dit=dataclasses.replace(config.dit, features=16, depth=2, heads=2),
        log_every=5, save_every=10, grid_every=10, sample_steps=4, judged=20 if config.judged else 0, judge_steps=20,
    )  # fmt: skip


def guided(
    denoiser: Callable[[Params, Array], Denoiser], classes: int
) -> Callable[[Params, Array, Table, Array], Denoiser]:
    """Classifier-free guidance of ``denoiser(params, labels)`` towards its labels, as `Denoised` takes it."""

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


def network(config: Denoising, shape: Sequence[int], classes: int, *, time_scale: float) -> Network:
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


def unlabelled(config: Config, shape: Sequence[int], classes: int) -> Callable[[Params, Array, Array], Array]:
    """The network as an estimate of clean images of any class: ``(params, x, t) -> x0``."""
    net = _network(config, shape, classes)

    def estimate(params: Params, x: Array, t: Array) -> Array:
        return denoiser(config, net, params, jnp.full(len(x), classes))(x, t)

    return estimate


def method(config: Config, shape: Sequence[int], classes: int) -> train.Method:
    """How the experiment trains, written for the global batch of images in [-1, 1]."""
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
    config: Denoising,
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
            x0 = image_data.mirrored(flip_key, x0)
        labels = jnp.where(image_data.coins(label_key, len(x0), config.label_dropout), classes, labels)
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
