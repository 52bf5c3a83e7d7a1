"""What is measured: a case is one piece of work, done by several sides."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Setting = str | int | float | bool


class Work(NamedTuple):
    """A side that is ready to work.

    Attributes:
        run: does the work once and returns its outputs, which may still be on their way.
        outputs: from what ``run`` returns to the array by which sides are compared.
        phases: seconds of what went before, by name: "lower", "compile".
        flops: of one run, as the compiler counts them.
        temporary_bytes: memory of one run beside arguments and results, as the compiler plans it.
        quality: from the array by which sides are compared to scores by name, where the work has any.
    """

    run: Callable[[], Any]
    outputs: Callable[[Any], np.ndarray] = np.asarray
    phases: Mapping[str, float] = {}
    flops: float | None = None
    temporary_bytes: int | None = None
    quality: Callable[[np.ndarray], Mapping[str, float]] = lambda output: {}


Side = Callable[[int], Work]
"""``batch -> Work``, parameters and data included; called in a process of its own."""


@dataclass(frozen=True)
class Case:
    """One piece of work. Sides are compared on it: the first is jaxgen's.

    Attributes:
        name: what it is called, unique in its suite.
        settings: what tells it from its siblings: network, solver, steps, batch, precision.
        sides: who does the work, by name.
        batch: the size that is measured.
        unit: what there are ``batch`` of.
        libraries: of sides that are not JAX's, the modules that they need, the framework first.
        flops: gives those of one of them, counted from the model and not by a compiler; None where that says nothing.
        tolerance: by how much two outputs may differ, in parts of the root mean square of the first side's.
        alike: the share of the numbers of an output that has to agree so; 1 where sides do the same work to rounding.
    """

    name: str
    settings: Mapping[str, Setting]
    sides: Mapping[str, Side] = field(repr=False)
    batch: int
    unit: str = "images"
    libraries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flops: Callable[[], float] | None = None
    tolerance: float = 1e-3
    alike: float = 1.0


def every_core() -> None:
    """Makes every core that this process may use a device of JAX's on a CPU. Call it before the first array."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cores)


def devices(batch: int) -> list[Any]:
    """What a side of JAX's computes on: one accelerator, or as many of a CPU's cores as divide the batch.

    Call it before the first array.
    """
    import jax

    every_core()
    found = jax.devices()
    return found[: math.gcd(batch, len(found)) if found[0].platform == "cpu" else 1]


def compiled(function: Callable[..., Any], *arguments: Any, outputs: Callable[[Any], np.ndarray] = np.asarray) -> Work:
    """A pure function as a side's work: lowered and compiled here, each timed by itself.

    Args:
        function: a function of arrays, or one that `jax.jit` has made.
        *arguments: what it is run on.
        outputs: as in `Work`.

    Returns:
        The work; every run is of the same executable, so that nothing can be compiled in it.
    """
    import jax  # not above: sides of other frameworks do without

    start = time.perf_counter()
    lowered = (function if hasattr(function, "lower") else jax.jit(function)).lower(*arguments)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    flops = cost.get("flops", 0.0)
    return Work(
        run=lambda: program(*arguments),
        outputs=outputs,
        phases={"lower": middle - start, "compile": end - middle},
        flops=flops if flops > 0 else None,
        temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
    )
