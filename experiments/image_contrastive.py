"""Contrastive learning of images: what the experiments on digits and CIFAR-10 have in common.

The recipe is SimCLR's (Chen et al. 2020, arXiv:2002.05709): two random views of each image, a residual network and a
small head on top of it, and the loss by which each view has to find the other among all views of the batch. Labels are
not used. What serves afterwards is the network below the head: its features are measured by linear classifiers of few
labels, by nearest neighbours, and by eye.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import image_data, image_settings, image_training, planned, representation
from experiments.image_settings import Platform, Settings
from experiments.representation import Features
from jaxgen import checks, cli, contrastive, data, hosts, images, nets, place, plan, run, train
from jaxgen.typing import Array, Batch, Key, Metrics, Params

CURVES = ("loss", "alignment", "uniformity", "examples_per_second")
ENCODED = 500  # images at a time


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of a training run."""

    temperature: float = 0.5
    """Temperature of the loss."""
    block_size: int | None = None
    """Views to compare with at a time, to save memory; by default all."""
    optimiser: Literal["adamw", "lars"] = "lars"
    """AdamW, or LARS for large batches."""
    weight_decay: float = 1e-4
    """Weight decay, of kernels alone."""
    warmup: int = 200
    """Steps in which the learning rate warms up, linearly; it then decays to 0 along a cosine."""

    area: float = 0.08
    """The smallest part of the image that a view shows."""
    aspect: float = 4 / 3
    """The most by which a view's width is stretched against its height, or the reverse."""
    flip: float = 0.5
    """Probability that a view is mirrored."""
    jitter: float = 0.8
    """Probability that its colours change."""
    strength: float = 0.5
    """How much they do."""
    grey: float = 0.2
    """Probability that it loses its colours."""
    blur: float = 0.0
    """Probability that it is blurred."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Residual blocks per stage."""
    bottleneck: bool = True
    """Whether blocks are bottlenecks."""
    width: int = 64
    """Channels of the first stage; each next one has twice as many."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation: by the batch in training and by the data afterwards, or by groups of channels."""
    groups: int = 8
    """Groups, of that."""
    head: tuple[int, ...] = (2048, 128)
    """Features behind each layer of the head, which serves in training alone."""

    label_shares: tuple[float, ...] = (0.01, 0.1)
    """Shares of the training labels that linear classifiers of the features get, besides all of them."""
    label_draws: int = 10
    """Draws of those labels."""
    neighbours: int = 200
    """Nearest neighbours that classify."""


@dataclasses.dataclass(frozen=True)
class Embed:
    """Writes the features of a data set's images by a trained encoder, with the labels, as arrays."""

    workdir: str
    """Directory of the run."""
    out: str | None = None
    """File to write, .npz: "features" (float32) and "label"; by default features.npz in the run's directory."""
    dataset: str | None = None
    """Data set, of images of the run's shape; by default the run's own."""
    split: str = "test"
    """Part of it."""
    data_dir: str | None = None
    """Where data sets are kept; tensorflow-datasets' own choice by default."""
    platform: Platform | None = None
    """Devices to run on; JAX's choice by default."""


def check(config: Config) -> None:
    """Raises ValueError where a setting is out of range or does not fit another."""
    image_settings.check(config)
    if config.batch_size < 2:
        raise ValueError(f"`batch_size` must be at least 2, for there to be other images, got {config.batch_size}")
    for field in ("warmup", "groups", "label_draws", "neighbours"):
        checks.positive_integer(field, getattr(config, field))
    if config.warmup >= config.steps:
        raise ValueError(f"`warmup` must be shorter than `steps`, {config.steps}, got {config.warmup}")
    checks.interval("weight_decay", config.weight_decay, 0.0, 1.0)
    for share in config.label_shares:
        if not 0 < share < 1:
            raise ValueError(f"`label_shares` must lie in (0, 1), got {config.label_shares}")
    if config.image_size is not None:
        raise ValueError(f"`image_size` must be none: the features of all images are measured, got {config.image_size}")


def smoke(config: Config) -> Config:
    """The same experiment, tiny: every part of it runs, nothing is learned."""
    return dataclasses.replace(
        config,
        workdir=config.workdir + "-smoke",
        steps=20, warmup=2, batch_size=16, microbatches=1, blocks=(1,) * len(config.blocks), width=8, groups=4,
        head=(16, 8), log_every=5, save_every=10, label_draws=2, neighbours=20,
    )  # fmt: skip


def encoder_of(config: Config) -> nets.ResNet:
    """The network whose features serve: [batch, height, width, channels] -> [batch, features]."""
    return nets.ResNet(
        blocks=config.blocks,
        bottleneck=config.bottleneck,
        stem=nets.cifar_stem,
        width=config.width,
        norm=nets.BatchNorm if config.norm == "batch" else functools.partial(nets.GroupNorm, groups=config.groups),
        dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32,
    )


def method(config: Config, shape: Sequence[int]) -> train.Method:
    """How the experiment trains, written for the global batch of images in [-1, 1]."""
    encoder = encoder_of(config)
    head = nets.MLP(
        config.head, norm=nets.BatchNorm if config.norm == "batch" else nets.RMSNorm, dtype=encoder.dtype
    )  # fmt: skip

    def init(key: Key) -> Params:
        encoder_key, head_key = jax.random.split(key)
        x = jnp.zeros((2, *shape))
        params = nets.init(encoder, encoder_key, x)
        features = jax.eval_shape(encoder.apply, params, x)
        return {"encoder": params, "head": nets.init(head, head_key, jnp.zeros(features.shape, features.dtype))}

    def embedded(params: Params, x: Array) -> Array:
        embeddings: Array = head.apply(params["head"], encoder.apply(params["encoder"], x))  # type: ignore[assignment]
        return embeddings

    # All images of a batch are compared, however few are embedded at a time.
    embed = contrastive.grad_cached(embedded, chunks=config.microbatches) if config.microbatches > 1 else embedded

    def view(key: Key, x: Array) -> Array:
        return contrastive.random_view(
            key, x, area=config.area, aspect=config.aspect, flip=config.flip, jitter=config.jitter,
            strength=config.strength, grey=config.grey, blur=config.blur,
        )  # fmt: skip

    def loss(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        first, second = (embed(params, view(half, batch["image"])) for half in jax.random.split(key))
        losses = contrastive.nt_xent(first, second, temperature=config.temperature, block_size=config.block_size)
        still = jax.lax.stop_gradient((first, second))
        return losses.mean(), {
            "alignment": contrastive.alignment(*still),
            "uniformity": contrastive.uniformity(still[0]),
        }

    return train.minimise(loss, _optimiser(config), init, average=train.ema(config.ema))


def _optimiser(config: Config) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)

    def kernels(params: Params) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    if config.optimiser == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=kernels)
    return optax.lars(
        rate, weight_decay=config.weight_decay, weight_decay_mask=kernels, trust_ratio_mask=kernels, momentum=0.9
    )


class Encoding:
    """Features of images, by one compiled program whatever the parameters and the number of images."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Prepares to encode images; nothing is compiled yet."""
        self._config, self._network = config, encoder_of(config)
        self._size = -(-ENCODED // mesh.size) * mesh.size
        self._apply = place.rows(self._network.apply, mesh)
        self._everywhere = NamedSharding(mesh, PartitionSpec())

    def by(self, params: Params, training: np.ndarray | None) -> Features:
        """The features by these parameters; BatchNorm takes its statistics from training images, uint8."""
        if self._config.norm == "batch":
            assert training is not None
            params = image_training.calibrated(self._network, params, training)
        params = jax.device_put(params, self._everywhere)  # once, not with every part

        def features(x: np.ndarray) -> np.ndarray:
            padded = np.concatenate([x, np.zeros((-len(x) % self._size, *x.shape[1:]), x.dtype)])
            parts = [self._apply(params, padded[i : i + self._size]) for i in range(0, len(padded), self._size)]
            return np.concatenate([np.asarray(part) for part in parts])[: len(x)]

        return features


def encoder(
    workdir: str, shape: Sequence[int], mesh: Mesh, *, data_dir: str | None = None, name: str | None = None
) -> Features:
    """The features of images by the encoder of a run, from its last checkpoint.

    Args:
        workdir: the run's directory.
        shape: of the images that it is wanted for.
        mesh: of all hosts; each computes on its own devices.
        data_dir: where data sets are kept, for the training images that BatchNorm takes its statistics from.
        name: the experiment's; any by default.

    Raises:
        ValueError: the run is of another experiment, or of images of another shape.
        OSError: there is no run in the directory, no checkpoint in it, or its data set is not there.
    """
    config, own, _ = image_training.recalled(workdir, Config, name)
    if tuple(shape) != own:
        raise ValueError(f"`features` must be of images of shape {list(shape)}, got a run of {list(own)}: {workdir}")
    state = image_training.restored(workdir, method(config, own), mesh)
    needed = config.norm == "batch"
    training = data.load(config.dataset, split="train", data_dir=data_dir)["image"] if needed else None
    params = place.gathered(state.average["encoder"])
    return Encoding(config, image_training.own(mesh)).by(params, training)


def fit(name: str, config: Config) -> None:
    """Trains, or goes on, measures the features and writes all that a run leaves behind.

    Args:
        name: the experiment's, as in ``python -m experiments.NAME``.
        config: its settings.

    Raises:
        ValueError: a setting does not fit another, the devices or the data; or the directory is another run's.
        OSError: the directory cannot be written.
    """
    check(config)
    mesh = image_training.mesh_for(config)
    training = image_data.opened(config, mesh)
    held_out = data.load(config.dataset, split="test", data_dir=config.data_dir)
    assert training.arrays is not None  # `image_size` is refused
    representation.check(config.label_shares, config.neighbours, training.examples)
    ours = method(config, training.shape)
    like = place.state_shapes(ours, mesh)
    jax.eval_shape(ours.step, like, training.batches(0), jax.random.key(0))  # refuses what does not fit at once
    workdir = Path(config.workdir)
    run.claim(workdir, name, image_training.identity(config, training.shape, training.classes))

    records = image_training.opened_log(workdir / "metrics.jsonl")
    records.say(f"{name}: {training.examples} images of {'x'.join(map(str, training.shape))}, labels unused")
    state = image_training.trained(config, ours, mesh, like, training.batches, records)
    params = place.gathered(state.average["encoder"])
    if not hosts.first():
        return  # one host measures
    images.save_curves(workdir / "curves.png", workdir / "metrics.jsonl", CURVES)

    untrained = jax.jit(ours.init)(jax.random.key(config.seed)).average["encoder"]
    encoding, seen = Encoding(config, image_training.own(mesh)), training.arrays["image"]
    representations = {
        "pixels": lambda x: x.reshape(len(x), -1),
        "untrained": encoding.by(untrained, seen),
        "trained": encoding.by(params, seen),
    }
    records.say("accuracy on held-out images of a linear classifier of")
    records.say(
        representation.report(
            representations,
            training.arrays,
            held_out,
            workdir,
            shares=config.label_shares,
            draws=config.label_draws,
            neighbours=config.neighbours,
            seed=config.seed,
        )
    )
    records.say(
        f"{workdir} holds map.png, evaluation.json, curves.png, metrics.jsonl and checkpoints. To write features:\n"
        f"  python -m experiments.{name} embed --workdir {workdir}"
    )


def embed(name: str, options: Embed) -> None:
    """Writes features by a run's encoder: the command ``embed``.

    Args:
        name: the experiment's.
        options: what to write.

    Raises:
        ValueError: an option is out of range; the directory is another experiment's; images are of another shape.
        OSError: there is no run in the directory, or the file cannot be written.
    """
    workdir = Path(options.workdir)
    out = workdir / "features.npz" if options.out is None else Path(options.out)
    if out.suffix != ".npz":
        raise ValueError(f"`out` must be a .npz file, got {options.out!r}")
    config, _, _ = image_training.recalled(workdir, Config, name)
    arrays = data.load(options.dataset or config.dataset, split=options.split, data_dir=options.data_dir)
    hosts.join()
    mesh = place.mesh(place.devices(options.platform))
    encode = encoder(options.workdir, arrays["image"].shape[1:], mesh, data_dir=options.data_dir, name=name)
    if not hosts.first():
        return
    features = encode(data.to_unit(arrays["image"]))
    images.save_arrays(out, features=features, label=arrays["label"])
    print(f"{features.shape[1]} features of {len(features)} images are in {out}")


def programs(config: Any, mesh: Mesh, effort: plan.Effort) -> dict[str, Callable[[], plan.Program]]:
    """What the experiment compiles, for the command ``plan``."""
    check(config)
    batch, shape, _ = image_data.described(config)
    ours = method(config, shape)
    size = -(-ENCODED // place.row_parts(mesh)) * place.row_parts(mesh)
    x = jax.ShapeDtypeStruct((size, *shape), jnp.float32)

    def encoder() -> plan.Program:
        params = place.state_shapes(ours, mesh).average["encoder"]
        network = encoder_of(config)
        if config.norm == "batch":
            params = image_training.calibrated_shapes(network, params, x)
        return plan.rows(network.apply, mesh, params, x, effort=effort)

    return {"training step": lambda: plan.step(ours, mesh, batch, effort=effort), "encoder": encoder}


def command_line(module: str, name: str, config: Config) -> None:
    """An experiment's ``main``: training, ``--smoke`` and the commands ``embed`` and ``plan``."""
    cli.main(
        module,
        cli.Command(functools.partial(fit, name), config, smoke(config)),
        {
            "embed": cli.Command(functools.partial(embed, name), Embed(config.workdir)),
            "plan": planned.command(name, programs, config, smoke(config)),
        },
    )
