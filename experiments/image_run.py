"""What every experiment that generates images does with its recipe: train or go on, show, measure, sample.

A recipe is a module, as `experiments.image_diffusion` is, with

    Config, Sample                   settings of a run, and what its command ``sample`` can be asked
    check(config), smoke(config)     refuses settings that do not fit; the same experiment, tiny
    method(config, shape, classes)   how it trains
    Samples(config, shape, classes, mesh)
                                     an `experiments.image_draws.Draws` with the ways in which it draws: ``own()``, the
                                     run's own; ``judged()``, more for the judge, by name; ``chosen(options)``
    CURVES                           metrics to draw
"""

import functools
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from experiments import image_contrastive, image_data, image_export, image_settings, image_training, judge, planned
from experiments.image_settings import Generating, Sample
from jaxgen import cli, data, hosts, images, loop, place, plan, run

FRAMES = 12  # of the film, at most


def fit(name: str, config: Generating, recipe: ModuleType) -> None:
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
    mesh = image_training.mesh_for(config)
    training = image_data.opened(config, mesh)
    shape, classes = training.shape, training.classes
    ours = recipe.method(config, shape, classes)
    samples = recipe.Samples(config, shape, classes, mesh)
    own, like = samples.own(), place.state_shapes(ours, mesh)  # a network that does not fit is refused here
    workdir = Path(config.workdir)
    features = None
    if config.features is not None:
        features = image_contrastive.encoder(config.features, shape, mesh, data_dir=config.data_dir)
    run.claim(workdir, name, image_training.identity(config, shape, classes))

    def picture(step: int, state: Any) -> None:
        # The same noise every time. The first row, a sample of each of ten classes, is a frame of the film.
        columns = min(classes, 10)
        labels = np.tile(np.arange(columns) * classes // columns, 10)
        drawn = samples(state.average, labels, own, seed=config.seed)
        if not hosts.first():
            return
        images.save_grid(workdir / "samples" / f"{step:07}.png", drawn, columns=columns)
        images.save_grid(workdir / "film" / f"{step:07}.png", drawn[:columns], columns=columns)
        if step == config.steps:
            images.save_grid(workdir / "samples.png", drawn, columns=columns)
            frames = sorted(file for file in (workdir / "film").iterdir() if file.suffix == ".png")
            images.save_film(workdir / "film.png", _thinned(frames))

    def in_between(step: int, state: Any) -> None:
        if step < config.steps:
            picture(step, state)

    records = image_training.opened_log(workdir / "metrics.jsonl")
    records.say(f"{name}: {training.examples} images of {'x'.join(map(str, shape))}")
    pictures = loop.Every(config.grid_every, in_between)
    state = image_training.trained(config, ours, mesh, like, training.batches, records, (pictures,))
    picture(config.steps, state)
    judged = config.judged if training.arrays is not None else 0
    labels = np.arange(judged) % classes
    ways = {"": own, **samples.judged()} if judged else {}
    drawn = {variant: samples(state.average, labels, how, seed=config.seed) for variant, how in ways.items()}
    if not hosts.first():
        return  # one host judges, with what all have drawn
    images.save_curves(workdir / "curves.png", workdir / "metrics.jsonl", recipe.CURVES)
    if training.arrays is not None and judged:
        held_out = data.load(config.dataset, split="test", data_dir=config.data_dir)
        trained = judge.train_judge(
            training.arrays,
            held_out,
            classes=classes,
            mesh=image_training.own(mesh),
            seed=config.seed,
            steps=config.judge_steps,
        )
        real = judge.seen(features or (lambda x: trained(x)[1]), training.arrays, held_out, judged=config.judged)
        source = f"judge-{config.judge_steps}-steps-seed-{config.seed}"
        if config.features is not None:
            source = "encoder-" + re.sub(r"[|:\s]", "-", Path(config.features).name)
        for variant, images_of in drawn.items():
            records.say(f"samples{variant and f' of {variant}'}:")
            records.say(
                judge.report(trained, images_of, labels, real, workdir / variant, features=features, extractor=source)
            )
    records.say(
        f"{workdir} holds samples.png, film.png, curves.png, metrics.jsonl and checkpoints. To draw more samples:\n"
        f"  python -m experiments.{name} sample --workdir {workdir} --classes 3 7 --count 40"
    )


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
    config, shape, classes = image_training.recalled(workdir, recipe.Config, name)
    if not all(0 <= label < classes for label in options.classes):
        raise ValueError(f"`classes` must lie in [0, {classes - 1}], got {list(options.classes)}")
    hosts.join()
    mesh = place.mesh(place.devices(options.platform))
    samples = recipe.Samples(config, shape, classes, mesh)
    how = samples.chosen(options)
    state = image_training.restored(workdir, recipe.method(config, shape, classes), mesh)
    labels = np.resize(options.classes or np.arange(classes), options.count)
    drawn = samples(state.average, labels, how, seed=options.seed, batch_size=options.batch_size)
    if not hosts.first():
        return
    if out.suffix == ".npz":
        images.save_arrays(out, image=drawn, label=labels)
    else:
        images.save_grid(out, drawn, columns=options.columns)
    print(f"{options.count} images of the classes {sorted(set(labels.tolist()))} are in {out}")


def programs(recipe: ModuleType, config: Any, mesh: Mesh, effort: plan.Effort) -> dict[str, Callable[[], plan.Program]]:
    """What a recipe compiles, for the command ``plan``."""
    recipe.check(config)
    batch, shape, classes = image_data.described(config)
    ours = recipe.method(config, shape, classes)
    samples = recipe.Samples(config, shape, classes, mesh)
    return {
        "training step": lambda: plan.step(ours, mesh, batch, effort=effort),
        "sampler": lambda: samples.compiled(place.state_shapes(ours, mesh).average, samples.own(), effort),
    }


def command_line(module: str, name: str, config: Generating, recipe: ModuleType, **sampling: Any) -> None:
    """An experiment's ``main``: training, ``--smoke`` and commands; ``sampling`` are the defaults of ``sample``."""
    cli.main(
        module,
        cli.Command(functools.partial(fit, name, recipe=recipe), config, recipe.smoke(config)),
        {
            "sample": cli.Command(
                functools.partial(draw, name, recipe=recipe), recipe.Sample(config.workdir, **sampling)
            ),
            "export": cli.Command(
                functools.partial(image_export.write, name, recipe=recipe), image_export.Export(config.workdir)
            ),
            "plan": planned.command(name, functools.partial(programs, recipe), config, recipe.smoke(config)),
        },
    )
