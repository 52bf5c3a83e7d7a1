"""What every experiment in image diffusion does with its recipe: train or go on, show, measure, sample.

A recipe is a module with ``Config``, ``method`` and ``Samples``, as `experiments.image_diffusion` is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import image_data, image_diffusion, judge
from experiments.image_diffusion import Platform, Settings, Solver, Transformer
from jaxgen import checkpoint, checks, cli, data, images, log, loop, place, run, train
from jaxgen.typing import Batch

# Where a run's files are and what it runs on do not change what it computes.
NOT_IDENTITY = ("workdir", "data_dir", "platform", "log_every", "save_every", "grid_every", "judged_steps")
AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws images from a trained run.

    Image i depends on (seed, i, its class) alone, not on how many are drawn.
    """

    workdir: str
    """Directory of the run."""
    out: str | None = None
    """File to write: .png for a grid, .npz for arrays "image" (float32 in [-1, 1]) and "label"; by default drawn.png
    in the run's directory."""
    classes: tuple[int, ...] = ()
    """Classes to draw, in turn; all of them by default."""
    count: int = 100
    """How many images."""
    solver: Solver = "dpmpp_2m"
    """Solver."""
    steps: int = 20
    """Steps of the solver."""
    eta: float | None = None
    """Share of fresh noise, for ddim, euler_ancestral and the sde solvers: 0 for none; their own by default."""
    guidance: float | None = None
    """Scale of classifier-free guidance; the run's own by default."""
    seed: int = 0
    """Seed of the noise."""
    columns: int = 10
    """Images per row of the grid."""
    batch_size: int = 100
    """Images at a time; another size compiles anew."""
    platform: Platform | None = None
    """Devices to run on; JAX's choice by default."""


def fit(name: str, config: Settings, recipe: ModuleType = image_diffusion) -> None:
    """Trains, or goes on, and writes all that a run leaves behind.

    Args:
        name: the experiment's, as in ``python -m experiments.NAME``.
        config: its settings.
        recipe: how it trains and samples.

    Raises:
        ValueError: a setting does not fit another, the devices or the data; or the directory is another run's.
        OSError: the directory cannot be written.
    """
    _check(config)
    if jax.process_count() > 1:
        raise ValueError(f"image experiments run on the devices of one host, got {jax.process_count()} processes")
    mesh = place.mesh(place.devices(config.platform), fsdp=config.fsdp)
    if config.batch_size % mesh.size:
        raise ValueError(f"`batch_size` must divide among {mesh.size} devices, got {config.batch_size}")
    training = image_data.opened(config)
    shape, classes = training.shape, training.classes
    workdir = Path(config.workdir)
    run.claim(workdir, name, _identity(config, shape, classes))
    samples = recipe.Samples(config, shape, classes, mesh)

    def draw(state: Any, labels: np.ndarray, steps: int = config.sample_steps) -> np.ndarray:
        table = samples.table(samples.solver, steps)
        return samples(state.average, labels, table, guidance=config.guidance, seed=config.seed)

    def grid(path: Path, state: Any) -> None:
        columns = min(classes, 10)
        labels = np.tile(np.arange(columns) * classes // columns, 10)
        images.save_grid(path, draw(state, labels), columns=columns)

    records = log.Log(workdir / "metrics.jsonl")
    records.say(f"{name}: {training.examples} images of {'x'.join(map(str, shape))}")
    ours = recipe.method(config, shape, classes)
    pictures = loop.Every(config.grid_every, lambda step, state: grid(workdir / "samples" / f"{step:07}.png", state))
    state = _train(config, ours, mesh, training.batches, records, pictures)
    grid(workdir / "samples.png", state)
    images.save_curves(workdir / "curves.png", workdir / "metrics.jsonl", ("loss", "grad_norm"))
    if training.arrays is not None and config.judged:
        held_out = data.load(config.dataset, split="test", data_dir=config.data_dir)
        trained = judge.train_judge(
            training.arrays, held_out, classes=classes, mesh=mesh, seed=config.seed, steps=config.judge_steps
        )
        for steps in (config.sample_steps, *config.judged_steps):
            out = workdir if steps == config.sample_steps else workdir / f"{steps}_steps"
            records.say(f"samples of {steps} step(s):")
            labels = np.arange(config.judged) % classes
            records.say(judge.report(trained, draw(state, labels, steps), labels, training.arrays, held_out, out))
    records.say(
        f"{workdir} holds samples.png, curves.png, metrics.jsonl and checkpoints. To draw more samples:\n"
        f"  python -m experiments.{name} sample --workdir {workdir} --classes 3 7 --count 40"
    )


def _train(
    config: Settings,
    ours: train.Method,
    mesh: Mesh,
    batches: Callable[[int], Batch],
    records: log.Log,
    pictures: loop.Every,
) -> Any:
    """The state after the last step, from the last checkpoint on if there is one."""
    like = place.state_shapes(ours, mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(like.learner.params))
    records.say(f"{count:,} parameters on {mesh.size} {mesh.devices.flat[0].platform} device(s)")
    with checkpoint.Checkpoints(Path(config.workdir) / "checkpoints") as checkpoints:
        if (done := checkpoints.latest()) is not None:
            records.say(f"{config.workdir} holds step {done} of {config.steps}: going on from there")
        return loop.run(
            place.jit(ours, mesh),
            batches,
            key=jax.random.key(config.seed),
            steps=config.steps,
            like=like,
            checkpoints=checkpoints,
            save_every=config.save_every,
            log=records,
            log_every=config.log_every,
            every=(pictures,),
        )


def draw(name: str, options: Sample, recipe: ModuleType = image_diffusion) -> None:
    """Draws images from a run's last checkpoint to a file: the command ``sample``.

    Args:
        name: the experiment's.
        options: what to draw.
        recipe: how the run was trained.

    Raises:
        ValueError: an option is out of range; the directory is another experiment's.
        OSError: there is no run in the directory, or the file cannot be written.
    """
    workdir = Path(options.workdir)
    out = workdir / "drawn.png" if options.out is None else Path(options.out)
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"`out` must be a .png or .npz file, got {options.out!r}")
    for field in ("count", "steps", "columns", "batch_size"):
        checks.positive_integer(field, getattr(options, field))
    if options.guidance is not None:
        checks.finite("guidance", options.guidance)
    config, shape, classes = recalled(name, workdir, recipe)
    if not all(0 <= label < classes for label in options.classes):
        raise ValueError(f"`classes` must lie in [0, {classes - 1}], got {list(options.classes)}")
    mesh = place.mesh(place.devices(options.platform))
    samples = recipe.Samples(config, shape, classes, mesh)
    table = samples.table(options.solver, options.steps, options.eta)
    with checkpoint.Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(place.state_shapes(recipe.method(config, shape, classes), mesh))
    labels = np.resize(options.classes or np.arange(classes), options.count)
    drawn = samples(
        state.average,
        labels,
        table,
        guidance=config.guidance if options.guidance is None else options.guidance,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    if out.suffix == ".npz":
        images.save_arrays(out, image=drawn, label=labels)
    else:
        images.save_grid(out, drawn, columns=options.columns)
    print(f"{options.count} images of the classes {sorted(set(labels.tolist()))} are in {out}")


def smoke(config: AnySettings) -> AnySettings:
    """The same experiment, tiny: every part of it runs, nothing is learned."""
    return dataclasses.replace(
        config,
        workdir=config.workdir + "-smoke",
        steps=20, warmup=5, batch_size=16, channels=8, groups=4, blocks=1, microbatches=1,
        dit=dataclasses.replace(config.dit, features=16, depth=2, heads=2),
        log_every=5, save_every=10, grid_every=10, sample_steps=4, judged=20 if config.judged else 0, judge_steps=20,
    )  # fmt: skip


def command_line(
    module: str, name: str, config: Settings, recipe: ModuleType = image_diffusion, **sampling: Any
) -> None:
    """An experiment's ``main``: training, ``--smoke`` and the command ``sample``, whose defaults are ``sampling``."""
    cli.main(
        module,
        cli.Command(functools.partial(fit, name, recipe=recipe), config, smoke(config)),
        {"sample": cli.Command(functools.partial(draw, name, recipe=recipe), Sample(config.workdir, **sampling))},
    )


def _check(config: Settings) -> None:
    for field in (
        "steps",
        "batch_size",
        "microbatches",
        "log_every",
        "save_every",
        "grid_every",
        "sample_steps",
    ):
        checks.positive_integer(field, getattr(config, field))
    checks.positive("learning_rate", config.learning_rate)
    checks.interval("clip", config.clip, 0.0, float("inf"))
    checks.finite("guidance", config.guidance)
    for steps in config.judged_steps:
        checks.positive_integer("judged_steps", steps)
    if config.image_size is not None:
        checks.positive_integer("image_size", config.image_size)
        if config.judged:
            raise ValueError(
                f"`judged` must be 0 with an `image_size`: the judge needs all images, got {config.judged}"
            )
    if not 0 <= config.warmup < config.steps:
        raise ValueError(f"`warmup` must lie in [0, `steps`), [0, {config.steps}), got {config.warmup}")
    if config.batch_size % config.microbatches:
        raise ValueError(f"`microbatches` must divide `batch_size`, {config.batch_size}, got {config.microbatches}")
    for field in ("label_dropout", "ema", "dropout"):
        checks.interval(field, getattr(config, field), 0.0, 1.0)


def _identity(config: Settings, shape: Sequence[int], classes: int) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IDENTITY}
    # Runs from before there was a choice do not have these.
    if config.network == "unet":
        del settings["network"], settings["dit"]
    if config.image_size is None:
        del settings["image_size"]
    return {**settings, "image_shape": list(shape), "classes": classes}


def recalled(name: str, workdir: Path, recipe: ModuleType = image_diffusion) -> tuple[Any, tuple[int, ...], int]:
    """The settings of the run in ``workdir``, the shape of its images and how many classes they have."""
    found = run.read_config(workdir)
    if found["experiment"] != name:
        raise ValueError(f"`workdir` {workdir} is a run of {found['experiment']!r}, not of {name!r}")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found["config"].items()}
    try:
        if "dit" in settings:
            settings["dit"] = Transformer(**settings["dit"])
        shape: tuple[int, ...] = settings.pop("image_shape")
        classes: int = settings.pop("classes")
        return recipe.Config(workdir=str(workdir), **settings), shape, classes
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{workdir} was written by jaxgen {found['jaxgen']}, whose settings this version does not read ({error})"
        ) from error
