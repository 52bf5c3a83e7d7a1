"""The command ``export``: a run's sampler and its averaged weights in one file, which runs without this code.

    python -m experiments.digits_diffusion export --workdir RUN --out digits.jaxgen

What the run's own samples were drawn with is data there, so another solver, number of steps or guidance, and any number
of images, are calls of the same function:

    import jax, numpy as np
    from jaxgen import diffusion, export

    draw = export.load("digits.jaxgen")                       # print(draw) says what it takes
    path = diffusion.edm(0.01, 80.0)
    table = diffusion.pad(diffusion.heun(path, diffusion.karras_times(path, 10)), rows=256, slots=4)
    images = draw(jax.random.key(0), np.arange(10), {"table": table, "guidance": 1.5})        # [10, 8, 8, 1] in [-1, 1]
"""

import dataclasses
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np
from etils.epath import Path

from experiments import image_training
from jaxgen import export, place, random
from jaxgen.typing import Array, Key, Params


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a trained run's sampler to one file, to be run on other machines without the code that trained it."""

    workdir: str
    """Directory of the run."""
    out: str | None = None
    """File to write; sampler.jaxgen in the run's directory by default."""
    platforms: tuple[Literal["cpu", "cuda", "tpu", "rocm"], ...] = ("cpu", "cuda", "tpu")
    """What it can be run on."""


def write(name: str, options: Export, recipe: ModuleType) -> None:
    """Writes the sampler of a run's last checkpoint: ``draw(key, labels [any], how) -> images``.

    Image i depends on (key, i) and its label alone, as in the command ``sample``.

    Args:
        name: the experiment's.
        options: of which run, and where to.
        recipe: how the run was trained.

    Raises:
        ValueError: the directory is another experiment's.
        OSError: there is no run in the directory, or the file cannot be written.
    """
    workdir = Path(options.workdir)
    out = workdir / "sampler.jaxgen" if options.out is None else Path(options.out)
    config, shape, classes = image_training.recalled(workdir, recipe.Config, name)
    mesh = place.mesh(place.devices())
    samples = recipe.Samples(config, shape, classes, mesh)
    state = image_training.restored(workdir, recipe.method(config, shape, classes), mesh)

    def draw(params: Params, key: Key, labels: Array, how: Any) -> Array:
        drawn: Array = samples.draw(params, how, random.example_keys(key, labels.shape[0]), labels)
        return drawn

    labels = jax.ShapeDtypeStruct(jax.export.symbolic_shape("images"), np.int32)
    export.save(out, draw, state.average, jax.random.key(0), labels, samples.own(), platforms=options.platforms)
    print(
        f"{out} holds the sampler. What it takes: python -c \"from jaxgen import export; print(export.load('{out}'))\""
    )
