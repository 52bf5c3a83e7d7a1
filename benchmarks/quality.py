"""Quality against cost: ``python -m benchmarks quality``: what samples are worth, by solver and network evaluations.

A sampler's speed says nothing without the quality of what it draws. Here are both, of one trained model, the run of
`experiments.digits_diffusion` in ``--run``, which is trained first where there is none (minutes). Every solver draws
1,000 images of all classes with the run's own guidance, a hundred at a time; a hundred is what is timed. One compiled
program serves all. quality.png shows, against evaluations and against time,

    frechet       the Fréchet distance of the images from those of training, on features of `experiments.judge`, a
                  classifier that has seen the latter only
    recognised    the share of images that this classifier takes for the class asked for

with what held-out real images score on the first: these are fewer, and a distance is larger for fewer images. An
evaluation is of the network with guidance, at noise levels on Karras's grid. On this path ddim and euler are the same
solver, and so are ddpm and euler_ancestral.
"""

import dataclasses
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from benchmarks import record, rounds, side
from benchmarks.case import Case, every_core
from benchmarks.record import Record

SEED = 0


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        images: that each solver draws.
        batch: at a time.
        evaluations: of the network, for an image, at the most.
    """

    images: int
    batch: int
    evaluations: tuple[int, ...]


FULL, QUICK = Size(1000, 100, (5, 8, 12, 20, 35)), Size(40, 20, (2, 8))


class Model(NamedTuple):
    """A trained run and what judges it.

    Attributes:
        samples: draws, `image_diffusion.Samples`.
        params: of its network.
        judge: a classifier, `experiments.judge.Judge`.
        real: the images of training, `experiments.judge.Real`.
        digest: of the run's settings.
    """

    samples: Any
    params: Any
    judge: Any
    real: Any
    digest: str


def model(folder: Path, quick: bool, images: int) -> Model:
    """The run in a folder, trained if it is not, and a judge, which is."""
    from experiments import digits_diffusion, image_diffusion, image_run, image_training, judge
    from jaxgen import data, place
    from jaxgen.checkpoint import Checkpoints

    if not (folder / "config.json").exists():
        config = dataclasses.replace(digits_diffusion.CONFIG, workdir=str(folder))
        if quick:
            config = dataclasses.replace(image_diffusion.smoke(config), workdir=str(folder), judged=0)
        image_run.fit("digits_diffusion", config, image_diffusion)
    config, shape, classes = image_training.recalled(folder, image_diffusion.Config)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        if checkpoints.latest() != config.steps:
            raise ValueError(f"{folder} holds step {checkpoints.latest()} of {config.steps}: it has not been trained")
    mesh = place.mesh(place.devices(config.platform))
    training, held_out = (data.load(config.dataset, split=s, data_dir=config.data_dir) for s in ("train", "test"))
    trained = judge.train_judge(
        training, held_out, classes=classes, mesh=mesh, seed=config.seed, steps=config.judge_steps
    )
    return Model(
        samples=image_diffusion.Samples(config, shape, classes, mesh),
        params=image_training.restored(folder, image_diffusion.method(config, shape, classes), mesh).average,
        judge=trained,
        real=judge.seen(lambda x: trained(x)[1], training, held_out, judged=images),
        digest=record.digest(image_training.identity(dataclasses.replace(config, workdir=""), shape, classes)),
    )


def cases_of(model: Model, solver: str, size: Size) -> Iterator[tuple[Case, Any]]:
    """A case for each number of evaluations, and how `image_diffusion.Samples` then draws.

    A solver that evaluates the network twice in a step takes as many steps as fit.
    """
    from experiments import image_diffusion

    for most in size.evaluations:
        for steps in range(most, 0, -1):
            options: Any = {"solver": solver, "steps": steps}
            how = model.samples.chosen(image_diffusion.Sample("", **options))
            if (needed := evaluations(how[0])) <= most:
                settings = {**options, "evaluations": needed, "images": size.images, "run": model.digest}
                yield Case(f"{solver}-{needed}", settings, sides={}, batch=size.batch), how
                break


def evaluations(table: Any) -> int:
    """How many rows of a table call the denoiser."""
    slots = table.weights.shape[1]
    return int(np.any(table.weights[:, :, slots] != 0, axis=1).sum())


def draw(model: Model, how: Any, size: Size) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Images, the classes asked for, and the seconds of each batch."""
    labels = np.arange(size.batch) % model.judge.network.classes
    parts, seconds = [], []
    for number in range(size.images // size.batch):
        start = time.perf_counter()
        parts.append(model.samples(model.params, labels, how, seed=SEED + number, batch_size=size.batch))
        seconds.append(time.perf_counter() - start)
    return np.concatenate(parts), np.tile(labels, len(parts)), seconds


def score(model: Model, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What the images are worth."""
    import jax

    from jaxgen import metrics

    predicted, features = model.judge(images)
    return {
        "frechet": float(jax.jit(metrics.frechet_distance)(features, model.real.features)),
        "recognised": float(np.mean(predicted == labels)),
        "frechet_held_out": model.real.floor["frechet"],
    }


def records(options: Namespace) -> Iterator[Record]:
    """A record for each solver and number of evaluations.

    Raises:
        RefusedError: there is no such run; a program was compiled in a draw that was timed; images are not finite; more
            evaluations took no more time.
    """
    from experiments import image_diffusion

    side.bind(options.threads)
    every_core()
    load, size = os.getloadavg()[0], QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as temporary:
        default = Path(temporary) / "run" if options.quick else Path("runs/digits_diffusion")
        try:
            trained = model(options.run or default, options.quick, size.images)
        except (ValueError, OSError) as error:
            raise rounds.RefusedError(f"--run: {error}") from error
    compilations = side.compilation_counter()
    for solver in get_args(image_diffusion.Solver):
        found = []
        for case, how in cases_of(trained, solver, size):
            if options.case not in case.name:
                continue
            seconds, told = measured(trained, case, how, size, compilations)
            found += rounds.records_of(
                "quality", case, {"jaxgen": seconds}, {"jaxgen": told}, {"jaxgen": {}}, {}, threads=options.threads,
                loads=(load, os.getloadavg()[0]),
            )  # fmt: skip
        if len(found) > 1 and found[-1].p50 < rounds.GROWTH * found[0].p50:
            raise rounds.RefusedError(f"{solver}: time does not grow from {found[0].case} to {found[-1].case}")
        yield from found


def measured(
    model: Model, case: Case, how: Any, size: Size, compilations: Callable[[], int]
) -> tuple[list[float], dict[str, Any]]:
    """The seconds of each batch, and what a side of `rounds` would tell."""
    start = time.perf_counter()
    draw(model, how, size._replace(images=size.batch))
    first, compiled = time.perf_counter() - start, compilations()
    images, labels, seconds = draw(model, how, size)
    if compilations() > compiled:
        raise rounds.RefusedError(f"{case.name}: programs were compiled while images were drawn")
    if not np.isfinite(images).all():
        raise rounds.RefusedError(f"{case.name}: images are not finite")
    return seconds, {"phases": {"first": first}, "quality": score(model, images, labels), **side.machine("jax")}


def plot(path: Path, records: Sequence[Record]) -> None:
    """Both scores against evaluations and against seconds, a line for each solver."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from jaxgen.images import save_figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    solvers = list(dict.fromkeys(r.settings["solver"] for r in records))
    for number, solver in enumerate(solvers):
        group = sorted((r for r in records if r.settings["solver"] == solver), key=lambda r: r.settings["evaluations"])
        style = {"color": colormaps["tab20"](number), "marker": "o^s"[number % 3], "markersize": 4, "label": solver}
        for axes, name in zip(panels, ("frechet", "recognised"), strict=True):
            scores = [r.quality[name] for r in group]
            axes[0].plot([r.settings["evaluations"] for r in group], scores, **style)
            axes[1].plot([1e3 * r.p50 / r.batch for r in group], scores, **style)
    for axes in panels[0]:
        axes.axhline(
            records[0].quality["frechet_held_out"], color="k", linestyle=":", linewidth=1, label="held-out images"
        )
        axes.set_yscale("log")
    for axes in panels.flat:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3, which="both")
    panels[0, 0].set_ylabel("Fréchet distance")
    panels[1, 0].set(xlabel="network evaluations", ylabel="recognised")
    panels[1, 1].set_xlabel("milliseconds an image")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(path, figure)
