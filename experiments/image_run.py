"""What every experiment in images does with its recipe: train or go on, show, measure, sample.

A recipe is a module, as `experiments.image_diffusion` is, with

    Config, Sample                   settings of a run, and what its command ``sample`` can be asked
    check(config), smoke(config)     refuses settings that do not fit; the same experiment, tiny
    method(config, shape, classes)   how it trains
    Samples(config, shape, classes, mesh)
                                     an `experiments.image_draws.Draws` with the ways in which it draws: ``own()``, the
                                     run's own; ``judged()``, more for the judge, by name; ``chosen(options)``
    CURVES                           metrics to draw
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import image_data, image_settings, judge
from experiments.image_settings import Sample, Settings
from jaxgen import checkpoint, cli, data, images, log, loop, place, run, train
from jaxgen.typing import Batch

# Where a run's files are and what it runs on do not change what it computes.
NOT_IDENTITY = ("workdir", "data_dir", "platform", "log_every", "save_every", "grid_every", "judged_steps")
FRAMES = 12  # of the film, at most


def fit(name: str, config: Settings, recipe: ModuleType) -> None:
    """Trains, or goes on, and writes all that a run leaves behind.

    Args:
        name: the experiment's, as in ``python -m experiments.NAME``.
        config: its settings.
        recipe: how it trains and samples.

    Raises:
        ValueError: a setting does not fit another, the devices or the data; or the directory is another run's.
        OSError: the directory cannot be written.
    """
    recipe.check(config)
    if jax.process_count() > 1:
        raise ValueError(f"image experiments run on the devices of one host, got {jax.process_count()} processes")
    mesh = place.mesh(place.devices(config.platform), fsdp=config.fsdp)
    if config.batch_size % mesh.size:
        raise ValueError(f"`batch_size` must divide among {mesh.size} devices, got {config.batch_size}")
    training = image_data.opened(config)
    shape, classes = training.shape, training.classes
    ours = recipe.method(config, shape, classes)
    samples = recipe.Samples(config, shape, classes, mesh)
    own, like = samples.own(), place.state_shapes(ours, mesh)  # a network that does not fit is refused here
    workdir = Path(config.workdir)
    run.claim(workdir, name, _identity(config, shape, classes))

    def picture(step: int, state: Any) -> None:
        # The same noise every time. The first row, a sample of each of ten classes, is a frame of the film.
        columns = min(classes, 10)
        labels = np.tile(np.arange(columns) * classes // columns, 10)
        drawn = samples(state.average, labels, own, seed=config.seed)
        images.save_grid(workdir / "samples" / f"{step:07}.png", drawn, columns=columns)
        images.save_grid(workdir / "film" / f"{step:07}.png", drawn[:columns], columns=columns)
        if step == config.steps:
            images.save_grid(workdir / "samples.png", drawn, columns=columns)
            images.save_film(workdir / "film.png", _thinned(sorted((workdir / "film").glob("*.png"))))

    def in_between(step: int, state: Any) -> None:
        if step < config.steps:
            picture(step, state)

    records = log.Log(workdir / "metrics.jsonl")
    records.say(f"{name}: {training.examples} images of {'x'.join(map(str, shape))}")
    state = _train(config, ours, mesh, like, training.batches, records, loop.Every(config.grid_every, in_between))
    picture(config.steps, state)
    images.save_curves(workdir / "curves.png", workdir / "metrics.jsonl", recipe.CURVES)
    if training.arrays is not None and config.judged:
        held_out = data.load(config.dataset, split="test", data_dir=config.data_dir)
        trained = judge.train_judge(
            training.arrays, held_out, classes=classes, mesh=mesh, seed=config.seed, steps=config.judge_steps
        )
        labels = np.arange(config.judged) % classes
        for variant, how in {"": own, **samples.judged()}.items():
            records.say(f"samples{variant and f' of {variant}'}:")
            drawn = samples(state.average, labels, how, seed=config.seed)
            records.say(judge.report(trained, drawn, labels, training.arrays, held_out, workdir / variant))
    records.say(
        f"{workdir} holds samples.png, film.png, curves.png, metrics.jsonl and checkpoints. To draw more samples:\n"
        f"  python -m experiments.{name} sample --workdir {workdir} --classes 3 7 --count 40"
    )


def _train(
    config: Settings,
    ours: train.Method,
    mesh: Mesh,
    like: Any,
    batches: Callable[[int], Batch],
    records: log.Log,
    pictures: loop.Every,
) -> Any:
    """The state after the last step, from the last checkpoint on if there is one."""
    learners = [leaf for leaf in jax.tree.leaves(like, is_leaf=_is_learner) if _is_learner(leaf)]
    count = sum(leaf.size for learner in learners for leaf in jax.tree.leaves(learner.params))
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


def _is_learner(leaf: Any) -> bool:
    return isinstance(leaf, train.Learner)


def _thinned(files: list[Path]) -> list[Path]:
    """At most FRAMES of them, ever further apart, as training slows down; the first and the last among them."""
    if len(files) <= FRAMES:
        return files
    return [files[i - 1] for i in sorted({round(i) for i in np.geomspace(1, len(files), FRAMES)})]


def draw(name: str, options: Sample, recipe: ModuleType) -> None:
    """Draws images from a run's last checkpoint to a file: the command ``sample``.

    Args:
        name: the experiment's.
        options: what to draw, the recipe's ``Sample``.
        recipe: how the run was trained.

    Raises:
        ValueError: an option is out of range; the directory is another experiment's.
        OSError: there is no run in the directory, or the file cannot be written.
    """
    image_settings.check_sample(options)
    workdir = Path(options.workdir)
    out = workdir / "drawn.png" if options.out is None else Path(options.out)
    config, shape, classes = recalled(name, workdir, recipe)
    if not all(0 <= label < classes for label in options.classes):
        raise ValueError(f"`classes` must lie in [0, {classes - 1}], got {list(options.classes)}")
    mesh = place.mesh(place.devices(options.platform))
    samples = recipe.Samples(config, shape, classes, mesh)
    how = samples.chosen(options)
    with checkpoint.Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(place.state_shapes(recipe.method(config, shape, classes), mesh))
    labels = np.resize(options.classes or np.arange(classes), options.count)
    drawn = samples(state.average, labels, how, seed=options.seed, batch_size=options.batch_size)
    if out.suffix == ".npz":
        images.save_arrays(out, image=drawn, label=labels)
    else:
        images.save_grid(out, drawn, columns=options.columns)
    print(f"{options.count} images of the classes {sorted(set(labels.tolist()))} are in {out}")


def command_line(module: str, name: str, config: Settings, recipe: ModuleType, **sampling: Any) -> None:
    """An experiment's ``main``: training, ``--smoke`` and the command ``sample``, whose defaults are ``sampling``."""
    cli.main(
        module,
        cli.Command(functools.partial(fit, name, recipe=recipe), config, recipe.smoke(config)),
        {
            "sample": cli.Command(
                functools.partial(draw, name, recipe=recipe), recipe.Sample(config.workdir, **sampling)
            )
        },
    )


def _identity(config: Settings, shape: Sequence[int], classes: int) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IDENTITY}
    # Runs from before there was a choice do not have these.
    if settings.get("network") == "unet":
        del settings["network"], settings["dit"]
    if settings["image_size"] is None:
        del settings["image_size"]
    return {**settings, "image_shape": list(shape), "classes": classes}


def recalled(name: str, workdir: Path, recipe: ModuleType) -> tuple[Any, tuple[int, ...], int]:
    """The settings of the run in ``workdir``, the shape of its images and how many classes they have."""
    found = run.read_config(workdir)
    if found["experiment"] != name:
        raise ValueError(f"`workdir` {workdir} is a run of {found['experiment']!r}, not of {name!r}")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found["config"].items()}
    try:
        defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(recipe.Config)}
        for name, value in settings.items():
            if isinstance(value, dict):
                settings[name] = type(defaults[name])(**value)
        shape: tuple[int, ...] = settings.pop("image_shape")
        classes: int = settings.pop("classes")
        return recipe.Config(workdir=str(workdir), **settings), shape, classes
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{workdir} was written by jaxgen {found['jaxgen']}, whose settings this version does not read ({error})"
        ) from error
