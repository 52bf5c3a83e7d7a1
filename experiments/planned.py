"""The command ``plan``: what an experiment compiles, compiled for TPUs that need not be there.

    python -m experiments.digits_diffusion plan --topology v5e:2x2
    python -m experiments.imagenet_dit plan --topology v6e:16x16 --fsdp 16 --json plan.json

It takes every option of the training command. No data are read and no TPU is needed, but Google's compiler for them is:
``pip install "jaxgen[tpu-aot]"``.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils.epath import Path
from jax.sharding import Mesh

from jaxgen import cli, place, plan

Programs = Callable[[Any, Mesh, plan.Effort], Mapping[str, Callable[[], plan.Program]]]
"""``(settings, mesh, effort) -> what compiles each program, by the program's name``."""


@dataclasses.dataclass(frozen=True)
class Planning:
    """What the command ``plan`` can be asked, besides an experiment's settings."""

    topology: str = "v5e:2x2"
    """TPUs: a family and the chips along each axis, such as v5e:4x4, v6e:16x16, v5p:2x2x1; *2 behind it for two slices
    of them, v5e:1x1 for one chip."""
    effort: plan.Effort = "quick"
    """How hard the compiler tries: "full" takes many times as long, and is what will run."""
    explain: bool = False
    """Whether to say where each part of the state lies, and why."""
    json: str | None = None
    """File for all that was found, as JSON."""


def command(name: str, programs: Programs, config: Any, smoke: Any) -> cli.Command:
    """The command for an experiment of that name.

    Args:
        name: the experiment's.
        programs: what it compiles.
        config: its settings, a frozen dataclass.
        smoke: the same, tiny.
    """
    doc = "Compiles what the experiment runs for TPUs that need not be there: what fits, and what it waits for."
    options = dataclasses.make_dataclass(
        "Planned", (), bases=(Planning, type(config)), frozen=True, namespace={"__doc__": doc}
    )

    def joined(settings: Any) -> Any:
        return options(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)})

    return cli.Command(functools.partial(_run, name, programs), joined(config), joined(smoke))


def _run(name: str, programs: Programs, options: Any) -> None:
    """Compiles, and says what was found.

    Raises:
        ValueError: a setting does not fit another, or there is no such topology.
        OSError: there is no compiler for TPUs, or the file cannot be written.
    """
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # a TPU that happens to be there may be somebody's
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled here can be kept, but not read again
    topology = plan.topology(options.topology)
    split = {"fsdp": getattr(options, "fsdp", 1), "tensor": getattr(options, "tensor", 1)}
    mesh = place.mesh(topology.devices, **split)
    found = {}
    for part, compiled in programs(options, mesh, options.effort).items():
        print(f"compiling for {topology.name}: {part}", file=sys.stderr, flush=True)
        found[part] = compiled()
    planned = plan.Plan(name, topology, found, **split)
    print(plan.table(planned))
    if options.explain:
        for part, program in found.items():
            if program.leaves:
                print(f"\nthe state of {part}:", *program.leaves, sep="\n")
    if options.json is not None:
        Path(options.json).write_text(plan.record(planned) + "\n")
