"""Starts: ``python -m benchmarks compile``: from the start of a process to its first image (peer: ``[peers]``).

Twenty steps of DDIM of one image by the U-Net of `networks`, its weights in a file. Each start is a process of its own,
and sides take turns with them; what a start needs is in the operating system's memory, from one before that does not
count. The sides:

    jaxgen             JAX's persistent cache holds every program of an earlier start
    jaxgen-exported    likewise; the sampler and its weights are a file of `jaxgen.export`, written by another process
    jaxgen-cold        as jaxgen, without a cache
    diffusers          eager: nothing is compiled

Phases are the medians of "python" (the interpreter, NumPy and this module), "import", "load" (the weights), "trace",
"lower", "compile", and "first": the image itself, with all that is not told apart before it.
"""

import collections
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rounds, sampling, side
from benchmarks.case import Case, Work
from benchmarks.record import Record

Phase = Callable[[str], None]
"""Called where a phase ends."""


def jaxgen(network: str, steps: int, folder: Path, ended: Phase) -> np.ndarray:
    """An image by one compiled program."""
    import jax

    from jaxgen import pretrained

    ended("import")
    module, params = pretrained.load_diffusers_unet(folder / "weights")
    x, table = sampling.start(network, 1), sampling.table("ddim", steps)
    ended("load")
    traced = jax.jit(sampler(module)).trace(params, table, x)
    ended("trace")
    lowered = traced.lower()
    ended("lower")
    program = lowered.compile()
    ended("compile")
    return np.asarray(program(params, table, x))


def sampler(module: Any) -> Callable[[Any, Any, Any], Any]:
    """(params, table, x) -> images, by DDIM as it is published."""
    import jax

    from jaxgen import diffusion

    path, key = diffusion.linear_beta(), jax.random.key(0)  # nothing is drawn from the key

    def draw(params: Any, table: Any, x: Any) -> Any:
        def predicted(x: Any, t: Any) -> Any:
            return module.apply(params, x, t - 1)

        denoise = diffusion.denoiser(path, diffusion.noise, predicted)
        return diffusion.sample(key, diffusion.clip_data(denoise, -1.0, 1.0), table, x)

    return draw


def exported(network: str, steps: int, folder: Path, ended: Phase) -> np.ndarray:
    """An image by the program of a file."""
    from jaxgen import export

    ended("import")
    draw = export.load(folder / "sampler")
    x, table = sampling.start(network, 1), sampling.table("ddim", steps)
    ended("load")
    return np.asarray(draw(table, x))


def write_exported(network: str, steps: int, folder: Path) -> None:
    """Writes that file."""
    from jaxgen import export, pretrained

    module, params = pretrained.load_diffusers_unet(folder / "weights")
    table, x = sampling.table("ddim", steps), sampling.start(network, 1)
    export.save(folder / "sampler", sampler(module), params, table, x)


def diffusers(network: str, steps: int, folder: Path, ended: Phase) -> np.ndarray:
    """An image by diffusers."""
    import diffusers
    import torch

    ended("import")
    module = diffusers.UNet2DModel.from_pretrained(folder / "weights").eval().to(memory_format=torch.channels_last)
    scheduler: Any = diffusers.DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=True, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = torch.tensor(sampling.start(network, 1).transpose(0, 3, 1, 2))
    ended("load")
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(module(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    return x.permute(0, 2, 3, 1).numpy()


COMMAND = [sys.executable, "-m", "benchmarks.compilation"]
SIDES = {"jaxgen": jaxgen, "jaxgen-exported": exported, "jaxgen-cold": jaxgen, "diffusers": diffusers}
WARM = ("jaxgen", "jaxgen-exported")


def main(arguments: list[str]) -> None:
    """One start of a side; it prints a line of JSON. Or, where no side is named, what the exported one reads."""
    ends = {"python": time.time()}
    if len(arguments) == 3:
        write_exported(arguments[0], int(arguments[1]), Path(arguments[2]))
        return
    name, threads, network, steps, folder, file = arguments
    side.bind(int(threads))
    framework = "torch" if SIDES[name] is diffusers else "jax"
    hits, count = {"load": 0}, _cache_hits() if framework == "jax" else lambda: 0

    def ended(phase: str) -> None:
        ends[phase], hits[phase] = time.time(), count()

    image = SIDES[name](network, int(steps), Path(folder), ended)
    ended("first")
    np.save(file, image)
    # The sampler itself, and not some small program before it.
    cached = hits.get("compile", hits["first"]) > hits.get("lower", hits["load"])
    print(json.dumps({"ends": ends, "cached": cached, **side.machine(framework)}))


def _cache_hits() -> Callable[[], int]:
    """How many programs come from JAX's persistent cache from here on."""
    from jax import monitoring

    count = 0

    def heard(event: str, **_: Any) -> None:
        nonlocal count
        count += event == "/jax/compilation_cache/cache_hits"

    monitoring.register_event_listener(heard)
    return lambda: count


def started(name: str, task: tuple[str, int], threads: int, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Starts a side once.

    Returns:
        What it says, with the "seconds" from its start to its image, and the image.

    Raises:
        RefusedError: it fails, or it finds its program in a cache that it was to do without.
    """
    variables = {**os.environ, **dict.fromkeys(rounds.THREADS, str(threads))}
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    if name in WARM:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    file = folder / "image.npy"
    words = [name, str(threads), *map(str, task), str(folder), str(file)]
    start = time.time()
    process = subprocess.run([*COMMAND, *words], env=variables, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise rounds.RefusedError(f"{name} ended with {process.returncode}: see what it printed above")
    told = json.loads(process.stdout.splitlines()[-1])
    ends = told.pop("ends")
    instants = [start, *ends.values()]
    told["phases"] = {name: end - begin for name, (begin, end) in zip(ends, itertools.pairwise(instants), strict=True)}
    told["seconds"] = ends["first"] - start
    if name == "jaxgen-cold" and told["cached"]:
        raise rounds.RefusedError(f"{name}: its program came from a cache")
    return told, np.load(file)


def write_files(network: str, steps: int, folder: Path) -> None:
    """Writes a network as diffusers reads it, and its sampler, by processes that end before any start is timed."""
    subprocess.run([sys.executable, "-m", "benchmarks.networks", network, str(folder / "weights")], check=True)
    subprocess.run([*COMMAND, network, str(steps), str(folder)], check=True)


def records(options: Namespace) -> Iterator[Record]:
    """Starts all sides in turn; a record for each."""
    case = cases(options.quick)[0]
    if options.case not in case.name:
        return
    task = str(case.settings["network"]), int(case.settings["steps"])
    sides = rounds.present(case, options.against)
    before = os.getloadavg()[0]
    told: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_files(*task, folder)
        for name in sides:
            started(name, task, options.threads, folder)
        for order in rounds.turns(sides, repeats=options.repeats, budget=options.budget):
            images = {}
            for name in order:
                one, images[name] = started(name, task, options.threads, folder)
                if name in WARM and not one["cached"]:
                    raise rounds.RefusedError(f"{name}: its program did not come from the cache")
                told[name].append(one)
            rounds.check_threads({name: each[-1] for name, each in told.items()}, options.threads)
            alike = rounds.check_outputs({name: images[name] for name in sides}, case)
    yield from rounds.records_of(
        "compile",
        case,
        {name: [one["seconds"] for one in told[name]] for name in sides},
        {name: {**told[name][-1], "phases": _medians([one["phases"] for one in told[name]])} for name in sides},
        {name: {} for name in sides},
        alike,
        threads=options.threads,
        loads=(before, os.getloadavg()[0]),
    )


def _medians(phases: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in phases) for name in phases[0]}


def cases(quick: bool) -> list[Case]:
    """The one; its sides are not called but started."""
    network, steps = ("unet-tiny", 4) if quick else ("unet", 20)

    def not_called(batch: int) -> Work:
        raise NotImplementedError

    return [
        Case(
            name=f"first-image-{network}-ddim-{steps}",
            settings={"network": network, "solver": "ddim", "steps": steps, "batch": 1, "precision": "float32"},
            sides=dict.fromkeys(SIDES, not_called),
            batch=1,
            libraries={"diffusers": ("torch", "diffusers")},
        )
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
