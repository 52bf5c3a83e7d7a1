"""A program compiled for devices that need not be there, and what its compiler says of it.

The programs are those of `jaxgen.place`: its own compiled step and rows are traced, so that shardings and donation are
the very ones with which they will run.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from jaxgen import place
from jaxgen.plan import flops, hlo
from jaxgen.train import Learner, Method

Effort = Literal["quick", "full"]
"""How hard the compiler tries: hardly, or as when a program is going to be run."""

# XLA's number for its level O0. It leaves out fusions and schedules that take long to find.
_LEVEL = {"quick": {"optimization_level": 9}, "full": {}}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """What is known of a compiled program; bytes are those of one device.

    Attributes:
        devices: for which it was compiled.
        rows: length of the batch, over all of them.
        parameters: numbers that are trained, or that the function is given to share.
        state: bytes of the state, or of what is shared, as it is split.
        whole: bytes of the same, not split.
        gradients: bytes of a gradient of what is trained, not split.
        arguments: bytes of all arguments, padded as the device wants them; None where the program does not fit.
        outputs: bytes of the results; None where it does not fit.
        aliased: bytes of results that take the place of an argument; None where it does not fit.
        temporaries: bytes of everything in between; None where it does not fit.
        peak: the most bytes that are in use at any time; of a program that does not fit, what it would need.
        capacity: bytes that the compiler may use, where it did not fit; else None.
        flops: operations of all devices together: products and convolutions as traced, loops by their rounds.
        xla_flops: operations of one device by XLA's count, which takes the body of a loop once.
        xla_bytes: bytes that XLA counts as accessed by one device, the body of a loop once.
        reading: what the program's text says; None where it does not fit.
        seconds: that compiling took.
        leaves: of a training step, where each part of its state lies and why, by `place.explain`.
    """

    devices: int
    rows: int
    parameters: int
    state: int
    whole: int
    gradients: int
    arguments: int | None
    outputs: int | None
    aliased: int | None
    temporaries: int | None
    peak: int
    capacity: int | None
    flops: float
    xla_flops: float | None
    xla_bytes: float | None
    reading: hlo.Reading | None
    seconds: float
    leaves: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it could be compiled for the memory that there is."""
        return self.reading is not None


def step(
    method: Method, mesh: Mesh, batch: Any, *, rules: Sequence[place.Rule] = place.TRANSFORMER, effort: Effort = "quick"
) -> Program:
    """Compiles a training step as `place.jit` does, for devices that need not be there.

    Args:
        method: a method for the global batch.
        mesh: from `place.mesh`, of the devices of a `topology` or of any others.
        batch: the global batch's shapes and dtypes, a tree of ``jax.ShapeDtypeStruct``.
        rules: how leaves of the state are split, as for `place.jit`.
        effort: the compiler's. What "full" finds is what will run; the peak of memory by "quick" has been found up to a
            tenth above it and below it, memory traffic above it.

    Returns:
        What is known of the program.

    Raises:
        ValueError: a rule does not fit, or the batch does not divide among the devices.
    """
    state = place.state_shapes(method, mesh, rules=rules)
    key = jax.eval_shape(lambda: jax.random.key(0))
    placed = place.jit(method, mesh, rules=rules).step
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    stepped = jax.jit(lambda *args: placed(*args), donate_argnums=0, out_shardings=(shardings, None))
    program = _compiled(stepped, method.step, (state, batch, key), mesh, batch, effort)
    return program._replace(leaves=tuple(map(str, place.explain(method, mesh, rules=rules))))


def rows(
    function: Callable[[Any, Any], Any], mesh: Mesh, shared: Any, rows: Any, *, effort: Effort = "quick"
) -> Program:
    """Compiles a function of something shared and of rows as `place.rows` does.

    Args:
        function: ``(shared, rows) -> rows``, as for `place.rows`.
        mesh: from `place.mesh`, of the devices of a `topology` or of any others.
        shared: shapes, dtypes and, where they have any, shardings of what is shared, such as parts of
            ``place.state_shapes(...)``.
        rows: shapes and dtypes of the rows.
        effort: as for `step`.

    Returns:
        What is known of the program.

    Raises:
        ValueError: the rows do not divide among the devices.
    """
    placed = place.rows(function, mesh)
    return _compiled(jax.jit(lambda *args: placed(*args)), function, (shared, rows), mesh, rows, effort)


def _compiled(
    jitted: Any, function: Callable[..., Any], arguments: tuple[Any, ...], mesh: Mesh, batch: Any, effort: Effort
) -> Program:
    held = arguments[0]
    learners = [leaf for leaf in jax.tree.leaves(held, is_leaf=_is_learner) if _is_learner(leaf)]
    trained = [learner.params for learner in learners]
    known: dict[str, Any] = {
        "devices": mesh.size,
        "rows": jax.tree.leaves(batch)[0].shape[0],
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained or held)),
        "state": sum(_on_one(leaf) for leaf in jax.tree.leaves(held)),
        "whole": _size(held),
        "gradients": _size(trained),
        "flops": flops.counted(function, *arguments),
    }
    lowered = jitted.lower(*arguments)
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(_LEVEL[effort]))
    except jax.errors.JaxRuntimeError as error:
        if (exceeded := _exceeded(str(error))) is None:
            raise
        needed, capacity = exceeded
        nothing: dict[str, Any] = dict.fromkeys(
            ("arguments", "outputs", "aliased", "temporaries", "xla_flops", "xla_bytes", "reading")
        )
        seconds = time.perf_counter() - began
        return Program(**known, **nothing, peak=needed, capacity=capacity, seconds=seconds)
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(
        **known,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        capacity=None,
        xla_flops=cost.get("flops"),
        xla_bytes=cost.get("bytes accessed"),
        reading=hlo.read(compiled.as_text()),
        seconds=seconds,
    )


def _exceeded(message: str) -> tuple[int, int] | None:
    """The bytes that a program needs and those that there are, if that is what XLA complains of."""
    size = r"([\d.]+)([KMGT]?)"
    # What is called temporaries there has the arguments in it.
    found = re.search(rf"Used {size} of {size} hbm|temporaries \({size}\) exceeds available HBM \({size}\)", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    parts = [part for part in found.groups() if part is not None]
    needed, capacity = (int(float(parts[i]) * _UNITS[parts[i + 1]]) for i in (0, 2))
    return needed, capacity


def _is_learner(leaf: Any) -> bool:
    return isinstance(leaf, Learner)


def _on_one(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    return _bytes(leaf, leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))


def _size(tree: Any) -> int:
    return sum(_bytes(leaf, leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: Any, shape: tuple[int, ...]) -> int:
    return int(math.prod(shape)) * leaf.dtype.itemsize
