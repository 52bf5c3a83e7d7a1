"""Robust classifiers of images: what the experiments on digits and CIFAR-10 have in common.

One network is trained several ways, with and without attacks, and all are attacked the same way afterwards: by one step
and by many (Madry et al. 2018, arXiv:1706.06083), at one radius and at others, and by AutoAttack (Croce & Hein 2020,
arXiv:2003.01690), whose number is the one to believe. Where there is a diffusion model of the images, it defends a
classifier that was trained without attacks: by purification, which is attacked as one who knows of it would, and by
smoothing, which is certified instead.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from etils.epath import Path
from jax.sharding import Mesh

from experiments import image_data, image_diffusion, image_settings, image_training, planned, robustness
from experiments.image_settings import Settings
from experiments.robustness import Measured
from jaxgen import attacks, checks, cli, data, hosts, images, nets, place, plan, random, run, train
from jaxgen.typing import Array, Batch, Key, Metrics, Params

Recipe = Literal["standard", "fgsm_rs", "pgd", "trades"]
CURVES = ("loss", "accuracy")


@dataclasses.dataclass(frozen=True)
class Config(Measured):
    """Settings of a run, which trains one network in several ways and attacks them all."""

    trainings: tuple[Recipe, ...] = ("pgd",)
    """Without attacks, with one step from a random start, with several steps, or for a balance of right and firm."""
    attack_steps: int = 10
    """Steps of the attack in training, of "pgd" and "trades"."""
    attack_step_size: float = 4 / 255
    """Length of each of them."""
    grad_align: float = 0.0
    """Weight of GradAlign, which keeps "fgsm_rs" from overfitting to its one step."""
    beta: float = 6.0
    """What firmness is worth to "trades"."""

    optimiser: Literal["adamw", "sgd"] = "sgd"
    """AdamW, or gradient descent with momentum."""
    weight_decay: float = 5e-4
    """Weight decay, of kernels alone."""
    warmup: int = 100
    """Steps in which the learning rate warms up, linearly."""
    decays: tuple[int, ...] = ()
    """Steps at which it falls to a tenth; where there are none, it decays to 0 along a cosine."""
    shift: int = 0
    """Pixels by which training images are shifted, at most."""
    flip: bool = False
    """Whether they are mirrored at random."""

    network: Literal["resnet", "wide_resnet"] = "wide_resnet"
    """A residual network of basic blocks, or a wide one."""
    blocks: tuple[int, ...] = (1, 1)
    """Residual blocks per stage, of the first."""
    width: int = 16
    """Channels of the first convolution."""
    depth: int = 28
    """Layers of the wide one."""
    widening: int = 10
    """Its channels, as a multiple."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation: by the batch in training and by the data afterwards, or by groups of channels."""
    groups: int = 8
    """Groups, of that."""

    denoiser_steps: int = 0
    """Training steps of the diffusion model; 0 for none, and no defence by one."""
    denoiser_channels: int = 32
    """Channels of its first level."""


def check(config: Config) -> None:
    """Raises ValueError where a setting is out of range or does not fit another."""
    image_settings.check(config)
    if not config.trainings or len(set(config.trainings)) != len(config.trainings):
        raise ValueError(f"`trainings` must name one at least, and none twice, got {config.trainings}")
    for field in (
        "attack_steps", "groups", "measured", "pgd_steps", "auto_steps", "queries", "defended", "purify_steps",
        "aware_steps", "aware_draws", "smooth_draws",
    ):  # fmt: skip
        checks.positive_integer(field, getattr(config, field))
    for field in ("eps", "attack_step_size", "purify_noise", "smooth_noise"):
        checks.positive(field, getattr(config, field))
    for field in ("grad_align", "beta", "weight_decay", "shift"):
        checks.interval(field, getattr(config, field), 0.0, math.inf)
    checks.interval("curve", config.curve, 0.0, math.inf)
    if config.denoiser_steps and "standard" not in config.trainings:
        raise ValueError(
            f"`denoiser_steps` must be 0 without the training 'standard', which is what it defends, "
            f"got {config.denoiser_steps} and {config.trainings}"
        )
    if config.image_size is not None:
        raise ValueError(f"`image_size` must be none: images are attacked as they are, got {config.image_size}")
    if not 0 <= config.warmup < config.steps:
        raise ValueError(f"`warmup` must lie in [0, `steps`), [0, {config.steps}), got {config.warmup}")
    if any(not config.warmup < step < config.steps for step in config.decays):
        raise ValueError(f"`decays` must lie between `warmup` and `steps`, got {config.decays}")


def smoke(config: Config) -> Config:
    """The same experiment, tiny: every part of it runs, nothing is learned."""
    return dataclasses.replace(
        config,
        workdir=config.workdir + "-smoke",
        steps=20, warmup=2, decays=(), batch_size=16, microbatches=1, attack_steps=2, blocks=(1,) * len(config.blocks),
        width=8, depth=10, widening=1, groups=4, log_every=5, save_every=10, measured=16, pgd_steps=3,
        curve=config.curve[:3], auto_steps=5, queries=10, defended=8, purify_steps=2, aware_steps=2, aware_draws=2,
        smooth_draws=20, denoiser_steps=20 if config.denoiser_steps else 0, denoiser_channels=8,
    )  # fmt: skip


def classifier(config: Config, classes: int) -> nn.Module:
    """The network: [batch, height, width, channels] -> logits [batch, classes]."""
    options: dict[str, Any] = {
        "num_classes": classes,
        "width": config.width,
        "norm": nets.BatchNorm if config.norm == "batch" else functools.partial(nets.GroupNorm, groups=config.groups),
        "dtype": jnp.bfloat16 if config.bfloat16 else jnp.float32,
    }
    if config.network == "wide_resnet":
        return nets.WideResNet(depth=config.depth, widening=config.widening, **options)
    return nets.ResNet(blocks=config.blocks, stem=nets.cifar_stem, **options)


def threat_of(config: Config) -> attacks.ThreatModel:
    """What the attacker may do."""
    return attacks.ThreatModel(math.inf, eps=config.eps, low=-1.0, high=1.0)


def attack_of(config: Config, recipe: Recipe, apply: Callable[[Params, Array], Array]) -> attacks.BatchAttack:
    """What a training does to its batches: "clean" is the images shifted and mirrored, "image" those attacked."""
    threat = threat_of(config)
    climb = functools.partial(
        attacks.pgd, steps=config.attack_steps, step_size=config.attack_step_size, keep_best=False
    )  # fmt: skip

    def attacked(key: Key, params: Params, batch: Batch) -> Batch:
        shift_key, flip_key, key = jax.random.split(key, 3)
        x, labels = batch["image"], batch["label"]
        x = image_data.shifted(shift_key, x, config.shift) if config.shift else x
        x = image_data.mirrored(flip_key, x) if config.flip else x
        classify = functools.partial(apply, params)
        if recipe == "standard":
            moved = x
        elif recipe == "fgsm_rs":
            objective = attacks.cross_entropy(classify, labels)
            moved = attacks.fgsm(key, objective, x, threat, random_start=True, step_size=1.25 * config.eps)
        elif recipe == "pgd":
            moved = climb(key, attacks.cross_entropy(classify, labels), x, threat)
        else:
            moved = climb(key, attacks.kl_divergence(classify, x), x, threat)
        return {"clean": x, "image": moved, "label": labels}

    return attacked


def method(config: Config, recipe: Recipe, shape: Sequence[int], classes: int) -> train.Method:
    """How a classifier is trained, written for the global batch of images in [-1, 1]."""
    network, threat = classifier(config, classes), threat_of(config)

    def apply(params: Params, x: Array) -> Array:
        logits: Array = network.apply(params, x)  # type: ignore[assignment]
        return logits

    def loss(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        x, labels = batch["image"], batch["label"]
        logits = apply(params, x)
        accuracy = {"accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels)}
        if recipe == "trades":
            return attacks.trades(apply(params, batch["clean"]), logits, labels, beta=config.beta).mean(), accuracy
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if recipe == "fgsm_rs" and config.grad_align:
            objective = attacks.cross_entropy(functools.partial(apply, params), labels)
            value += config.grad_align * attacks.grad_align(objective, batch["clean"], threat, key).mean()
        return value, accuracy

    return train.minimise(
        attacks.adversarial(loss, attack_of(config, recipe, apply)),
        _optimiser(config),
        lambda key: nets.init(network, key, jnp.zeros((2, *shape))),
        average=train.ema(config.ema),
        microbatches=config.microbatches,
    )


def _optimiser(config: Config) -> optax.GradientTransformation:
    if config.decays:
        falls = optax.piecewise_constant_schedule(
            config.learning_rate, {step - config.warmup: 0.1 for step in config.decays}
        )
        rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
        rate = optax.join_schedules([rise, falls], [config.warmup])
    else:
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)

    def kernels(params: Params) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    if config.optimiser == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=kernels)
    return optax.chain(optax.add_decayed_weights(config.weight_decay, kernels), optax.sgd(rate, momentum=0.9))


def fit(name: str, config: Config, *, denoiser: image_diffusion.Config | None = None) -> None:
    """Trains, or goes on, attacks and writes all that a run leaves behind.

    Args:
        name: the experiment's, as in ``python -m experiments.NAME``.
        config: its settings.
        denoiser: those of the diffusion model that defends the "standard" classifier, where there is one; what it
            shares with the classifiers is theirs.

    Raises:
        ValueError: a setting does not fit another, the devices or the data; or the directory is another run's.
        OSError: the directory cannot be written.
    """
    check(config)
    mesh = image_training.mesh_for(config)
    training = image_data.opened(config, mesh)
    held_out = data.load(config.dataset, split="test", data_dir=config.data_dir)
    shape, classes = training.shape, training.classes
    network = classifier(config, classes)
    methods = {recipe: method(config, recipe, shape, classes) for recipe in config.trainings}
    for ours in methods.values():  # refuses what does not fit at once
        jax.eval_shape(ours.step, place.state_shapes(ours, mesh), training.batches(0), jax.random.key(0))
    workdir = Path(config.workdir)
    model = None
    if config.denoiser_steps and denoiser is not None:
        model = dataclasses.replace(
            denoiser, dataset=config.dataset, data_dir=config.data_dir, seed=config.seed, platform=config.platform,
            steps=config.denoiser_steps, warmup=min(denoiser.warmup, config.denoiser_steps // 5),
            channels=config.denoiser_channels, save_every=config.save_every, log_every=config.log_every,
        )  # fmt: skip
        image_diffusion.check(model)
    run.claim(workdir, name, image_training.identity(config, shape, classes))

    say = image_training.opened_log(None).say
    say(f"{name}: {training.examples} images of {'x'.join(map(str, shape))}")

    def trained(part: str, settings: Settings, ours: train.Method) -> Params:
        say(f"{part}:")
        (workdir / part).mkdir(exist_ok=True)
        settings = dataclasses.replace(settings, workdir=str(workdir / part))
        records = image_training.opened_log(workdir / part / "metrics.jsonl")
        state = image_training.trained(settings, ours, mesh, place.state_shapes(ours, mesh), training.batches, records)
        if hosts.first():
            images.save_curves(workdir / part / "curves.png", workdir / part / "metrics.jsonl", CURVES)
        return place.gathered(state.average)

    params: dict[str, Params] = {recipe: trained(recipe, config, ours) for recipe, ours in methods.items()}
    weights = None if model is None else trained("denoiser", model, image_diffusion.method(model, shape, classes))
    if not hosts.first():
        return  # one host attacks
    mesh = image_training.own(mesh)
    if config.norm == "batch":
        assert training.arrays is not None
        params = {
            recipe: image_training.calibrated(network, part, training.arrays["image"])
            for recipe, part in params.items()
        }
    x, labels = robustness.some(held_out, config.measured, mesh)
    say(robustness.attacked(network.apply, params, x, labels, config, threat_of(config), mesh, workdir))
    if model is not None:
        estimate = image_diffusion.unlabelled(model, shape, classes)
        x, labels = robustness.some(held_out, config.defended, mesh)
        say(
            robustness.defended(
                network.apply,
                params["standard"],
                estimate,
                weights,
                x,
                labels,
                config,
                threat_of(config),
                mesh,
                workdir,
            )
        )
    say(f"{workdir} holds attacks.png, robust_curve.png, robustness.json, and for each training its checkpoints")


def programs(config: Any, mesh: Mesh, effort: plan.Effort) -> dict[str, Callable[[], plan.Program]]:
    """What the experiment compiles, for the command ``plan``: its trainings, and the attack by many steps."""
    check(config)
    batch, shape, classes = image_data.described(config)
    methods = {recipe: method(config, recipe, shape, classes) for recipe in config.trainings}
    size = -(-config.measured // place.row_parts(mesh)) * place.row_parts(mesh)
    rows = (
        jax.eval_shape(lambda: random.example_keys(jax.random.key(0), size)),
        jax.ShapeDtypeStruct((size, *shape), jnp.float32),
        jax.ShapeDtypeStruct((size,), jnp.int32),
    )

    def attack() -> plan.Program:
        params = place.state_shapes(next(iter(methods.values())), mesh).average
        network, climb = classifier(config, classes), functools.partial(attacks.pgd, steps=config.pgd_steps)
        if config.norm == "batch":
            params = image_training.calibrated_shapes(network, params, rows[1])
        run = robustness.judged(network.apply, climb, threat_of(config))
        return plan.rows(run, mesh, params, rows, effort=effort)

    trainings = {
        f"training step, {recipe}": functools.partial(plan.step, ours, mesh, batch, effort=effort)
        for recipe, ours in methods.items()
    }
    return {**trainings, f"attack, PGD-{config.pgd_steps}": attack}


def command_line(module: str, name: str, config: Config, *, denoiser: image_diffusion.Config | None = None) -> None:
    """An experiment's ``main``: training and attacks, ``--smoke`` and the command ``plan``."""
    cli.main(
        module,
        cli.Command(functools.partial(fit, name, denoiser=denoiser), config, smoke(config)),
        {"plan": planned.command(name, programs, config, smoke(config))},
    )
