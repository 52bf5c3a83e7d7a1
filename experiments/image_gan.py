"""Class-conditional image GANs: what the experiments on digits and CIFAR-10 have in common.

The recipe is R3GAN's (Huang et al. 2024, arXiv:2501.05441): ResNets without normalisation play the relativistic pairing
game, with zero-centred penalties of the critic's gradient at data and at samples,

    discriminator    softplus(D(y) - D(x)) + gamma / 2 (|| grad D(x) ||^2 + || grad D(y) ||^2)         (1)
    generator        softplus(D(x) - D(y))                                                             (2)

by Adam without momentum. In a first part of training, the burn-in, the learning rate, gamma and Adam's memory go along
a cosine from values at which the players move fast to values at which they settle. Other losses, other networks and
augmentation of what the discriminator sees are settings.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import image_data, image_settings
from experiments.image_draws import Draws
from experiments.image_settings import Generating
from jaxgen import checks, gan, nets, random, train
from jaxgen.typing import Array, Batch, Key, Metrics, Params

# What ADA's transformations are on images whose meaning a mirror or a right angle changes.
UPRIGHT: Mapping[str, Any] = MappingProxyType(
    {"flip": False, "quarter_turns": False, "rotation": 0.2, "luma_flip": False}
)


@dataclasses.dataclass(frozen=True)
class Config(Generating):
    """Settings of a training run; ``batch_size`` images are split among the discriminator's updates of a step."""

    loss: Literal["minimax", "nonsaturating", "least_squares", "hinge", "wasserstein", "relativistic"] = "relativistic"
    """The game."""
    discriminator_steps: int = 1
    """Updates of the discriminator for each of the generator."""
    burn_in: int = 1000
    """Steps in which learning rate, gamma and Adam's memory change."""
    learning_rate_end: float = 5e-4
    """Learning rate from then on."""
    gamma: float = 1.0
    """The gamma of Eq. 1 at first."""
    gamma_end: float = 0.1
    """Gamma from then on."""
    beta2: float = 0.9
    """Adam's memory of squared gradients at first."""
    beta2_end: float = 0.99
    """Memory from then on."""

    augment: Literal["none", "diffaugment", "ada"] = "none"
    """What the discriminator sees of images: all, or what `gan.diffaugment` or `gan.ada` leaves."""
    ada_target: float | None = 0.6
    """Share by which more pairs of data and samples are told apart than mistaken, at which ADA's probability is kept;
    none to let the probability rise to its most in the burn-in and stay."""
    ada_most: float = 0.8
    """The most that ADA's probability is."""
    ada_images: int = 100_000
    """Images in which ADA's probability goes from 0 to 1."""
    upright: bool = False
    """Whether images mean something else when mirrored or turned, so that augmentation must not."""

    network: Literal["r3gan", "dcgan"] = "r3gan"
    """ResNets without normalisation, or DCGAN's networks, of which the settings after ``widths`` do not speak."""
    latent: int = 64
    """Length of the latent vectors."""
    widths: tuple[int, ...] = (768, 768, 768, 768)
    """Channels per stage: of R3GAN from 4 pixels up, of DCGAN from the image down."""
    blocks: int = 2
    """Residual blocks per stage."""
    expansion: int = 2
    """Channels inside a block, as a multiple of the stage's."""
    group_size: int = 16
    """Channels per group of its grouped convolution."""


@dataclasses.dataclass(frozen=True)
class Sample(image_settings.Sample):
    """Draws images from a trained run.

    Image i depends on (seed, i, its class) alone, not on how many are drawn.
    """

    spread: float = 1.0
    """Standard deviation of the latents: below 1 for likelier images of less variety."""


class Samples(Draws):
    """Draws from a run's generator, compiled once whatever the spread and the seed."""

    def __init__(self, config: Config, shape: Sequence[int], classes: int, mesh: Mesh) -> None:
        """Prepares to draw images of ``shape`` (height, width, channels) of ``classes`` classes."""
        generator, _ = networks(config, shape, classes)

        def draw(params: Params, spread: Array, keys: Key, labels: Array) -> Array:
            return jnp.clip(_made(generator, params, spread * random.normal(keys, (config.latent,)), labels), -1, 1)

        super().__init__(draw, mesh)

    def own(self) -> np.floating:
        """How the run draws its own samples."""
        return np.float32(1.0)

    def judged(self) -> Mapping[str, np.floating]:
        """What the judge measures besides: nothing."""
        return {}

    def chosen(self, options: Sample) -> np.floating:
        """How ``options`` have it."""
        checks.interval("spread", options.spread, 0.0, float("inf"))
        return np.float32(options.spread)


CURVES = ("discriminator_loss", "generator_loss", "discriminator_r1", "discriminator_told_apart")


def check(config: Config) -> None:
    """Raises ValueError where a setting is out of range or does not fit another."""
    image_settings.check_generating(config)
    for field in ("discriminator_steps", "burn_in", "ada_images", "latent"):
        checks.positive_integer(field, getattr(config, field))
    checks.positive("learning_rate_end", config.learning_rate_end)
    for field in ("gamma", "gamma_end"):
        checks.interval(field, getattr(config, field), 0.0, float("inf"))
    checks.interval("ada_most", config.ada_most, 0.0, 1.0)
    for field in ("beta2", "beta2_end"):
        if not 0 <= getattr(config, field) < 1:
            raise ValueError(f"`{field}` must lie in [0, 1), got {getattr(config, field)}")
    if config.ada_target is not None:
        checks.interval("ada_target", config.ada_target, -1.0, 1.0)
    if config.batch_size % (config.discriminator_steps * config.microbatches):
        raise ValueError(
            f"`batch_size` must be a multiple of `discriminator_steps` x `microbatches`, "
            f"{config.discriminator_steps} x {config.microbatches}, got {config.batch_size}"
        )


def smoke(config: Config) -> Config:
    """The same experiment, tiny: every part of it runs, nothing is learned."""
    return dataclasses.replace(
        config,
        workdir=config.workdir + "-smoke",
        steps=20, burn_in=10, batch_size=16, microbatches=1, latent=8, widths=(8,) * len(config.widths), blocks=1,
        group_size=8, log_every=5, save_every=10, grid_every=5, judged=20 if config.judged else 0, judge_steps=20,
    )  # fmt: skip


def networks(config: Config, shape: Sequence[int], classes: int) -> tuple[nn.Module, nn.Module]:
    """The generator and the discriminator."""
    height, width, channels = shape
    if height != width:
        raise ValueError(f"`dataset` must hold square images, got {height} x {width}")
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    if config.network == "dcgan":
        options: dict[str, Any] = {"size": height, "channels": channels, "num_classes": classes, "dtype": dtype}
        # BatchNorm would make an image depend on what is drawn beside it.
        norm = functools.partial(nets.GroupNorm, groups=math.gcd(8, *config.widths))
        return (
            nets.DCGANGenerator(**options, widths=config.widths, norm=norm),
            nets.DCGANDiscriminator(**options, widths=config.widths),
        )
    stages = height.bit_length() - 2
    if height != 4 * 2 ** (stages - 1):
        raise ValueError(f"`dataset` must hold images of 4, 8, 16 .. pixels for the network r3gan, got {height}")
    if len(config.widths) != stages:
        raise ValueError(
            f"`widths` must be {stages} for images of {height} pixels, one for each of 4, 8 .. {height}, "
            f"got {config.widths}"
        )
    options = {
        "channels": channels,
        "num_classes": classes,
        "widths": config.widths,
        "blocks": config.blocks,
        "expansion": config.expansion,
        "group_size": config.group_size,
        "dtype": dtype,
    }
    return nets.R3GANGenerator(**options), nets.R3GANDiscriminator(**options)


def method(config: Config, shape: Sequence[int], classes: int) -> train.Method:
    """How the experiment trains, written for the global batch of images in [-1, 1]."""
    generator, discriminator = networks(config, shape, classes)
    game: gan.GanLoss = getattr(gan, config.loss)
    gamma = between(config.gamma, config.gamma_end, config.burn_in)
    adaptive = config.augment == "ada"

    def optimiser(updates: int) -> optax.GradientTransformation:
        """Adam of a player with so many updates in a step."""
        burn_in = config.burn_in * updates
        return optax.inject_hyperparams(optax.adam)(
            learning_rate=between(config.learning_rate, config.learning_rate_end, burn_in),
            b1=0.0,
            b2=between(config.beta2, config.beta2_end, burn_in),
        )

    def prepared(batch: Batch, params: Params, key: Key) -> tuple[Array, Array, Key]:
        """Data, samples of the same classes, and keys for what the discriminator sees of either."""
        real, labels = batch["image"], batch["label"]
        flip_key, latent_key, augment_key = jax.random.split(key, 3)
        real = image_data.mirrored(flip_key, real) if config.flip else real
        z = random.normal(random.example_keys(latent_key, len(real)), (config.latent,))
        return real, _made(generator, params, z, labels), random.example_keys(augment_key, len(real))

    def score(params: Params, carried: Any, x: Array, labels: Array, keys: Key) -> Array:
        if config.augment == "diffaugment":
            x = gan.diffaugment(keys, x)
        elif adaptive:
            x = gan.ada(keys, x, carried["probability"], **(UPRIGHT if config.upright else {}))
        logits: Array = discriminator.apply(params, x, labels)  # type: ignore[assignment]
        return logits

    def discriminator_loss(
        params: Params, opponent: Params, batch: Batch, key: Key, carried: Any
    ) -> tuple[Array, Metrics]:
        real, fake, keys = prepared(batch, opponent, key)
        scores = gan.scored(functools.partial(score, params, carried), real, fake, batch["label"], keys)
        losses = game.discriminator(scores.real_logits, scores.fake_logits)
        losses += 0.5 * carried["gamma"] * (scores.r1 + scores.r2)
        apart = jnp.sign(scores.real_logits - scores.fake_logits).mean()
        told = {"gamma": carried["gamma"]} | ({"probability": carried["probability"]} if adaptive else {})
        return losses.mean(), {"r1": scores.r1.mean(), "r2": scores.r2.mean(), "told_apart": apart, **told}

    def generator_loss(params: Params, opponent: Params, batch: Batch, key: Key, carried: Any) -> tuple[Array, Metrics]:
        real, fake, keys = prepared(batch, params, key)
        real_logits, fake_logits = (score(opponent, carried, x, batch["label"], keys) for x in (real, fake))
        return game.generator(real_logits, fake_logits).mean(), {}

    def carry(carried: Any, metrics: Metrics, step: Array) -> dict[str, Array]:
        if not adaptive:
            return {"gamma": gamma(step)}
        if config.ada_target is None:
            probability = between(0.0, config.ada_most, config.burn_in)(step)
        else:
            probability = gan.adapt_probability(
                carried["probability"],
                metrics["discriminator_told_apart"],
                target=config.ada_target,
                images=config.ada_images,
                batch_size=config.batch_size,
            )
        return {"gamma": gamma(step), "probability": jnp.minimum(probability, config.ada_most)}

    labels = jnp.zeros(1, jnp.int32)
    return train.alternate(
        train.Player(
            discriminator_loss,
            optimiser(config.discriminator_steps),
            lambda key: nets.init(discriminator, key, jnp.zeros((1, *shape)), labels),
        ),
        train.Player(
            generator_loss, optimiser(1), lambda key: nets.init(generator, key, jnp.zeros((1, config.latent)), labels)
        ),
        discriminator_steps=config.discriminator_steps,
        average=train.ema(config.ema),
        feedback=train.Feedback(lambda: {"gamma": gamma(0)} | ({"probability": 0.0} if adaptive else {}), carry),
        microbatches=config.microbatches,
    )


def between(start: float, end: float, steps: int) -> Callable[[Any], Array]:
    """From ``start`` at step 0 to ``end`` at step ``steps`` along half a cosine, and ``end`` from there on."""
    return lambda step: end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / steps, 1.0)))


def _made(generator: nn.Module, params: Params, z: Array, labels: Array) -> Array:
    images: Array = generator.apply(params, z, labels)  # type: ignore[assignment]
    return images
