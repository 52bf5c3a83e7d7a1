"""Sampling: one `jax.lax.scan` over the rows of a table.

The table is an argument like any other, so a compiled sampler serves every solver, number of steps, eta and grid of
times whose tables have one shape (`pad` gives them one); `jax.vmap` compares samplers in one call, and `jax.grad`
reaches the table as well as the start. Each row is a `jax.checkpoint`: the gradient through a sampler keeps one state
per row, not one network's activations.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.diffusion.path import Path
from jaxgen.diffusion.tables import check_made_for
from jaxgen.typing import Array, Denoiser, Key, Table


def prior(key: Key, path: Path, time: float | Array, shape: Sequence[int], *, dtype: jnp.dtype = jnp.float32) -> Array:
    """The start of sampling: noise of the path's standard deviation at ``time``.

    Args:
        key: a single key, or [batch] keys, one per example. The same key may be given to `sample`: their draws differ.
        path: the Gaussian path.
        time: where sampling starts, ``times[0]``, in [0, path.t_max].
        shape: [batch, ...].
        dtype: floating dtype of the state.

    Returns:
        An array of ``shape``; example i depends on (key, i) alone.

    Raises:
        ValueError: the time is out of range, or ``shape`` is empty.
        TypeError: ``key`` is not a typed key.
    """
    if len(shape) < 1:
        raise ValueError("`shape` must hold the batch as its first axis, got an empty shape")
    checks.interval("time", time, 0.0, path.t_max)
    keys = random.fold(random.keys_for(key, shape[0]), 0)
    eps = random.normal(keys, shape[1:], dtype=dtype)
    return (path.sigma(jnp.asarray(time, jnp.promote_types(dtype, jnp.float32))) * eps).astype(dtype)


def sample(key: Key, denoise: Denoiser, table: Table, x: Array, *, path: Path | None = None, unroll: int = 1) -> Array:
    """Runs a sampler from the state ``x``.

    Args:
        key: a single key, or [batch] keys, one per example; deterministic tables do not use it.
        denoise: ``(x [batch, ...], t [batch]) -> x0``.
        table: the sampler: from one of the solvers, or of your own making.
        x: [batch, ...], the state at the table's first time, such as `prior` draws; floating.
        path: the denoiser's path, to have a table that is known (not traced) checked against it: a solver's table for
            another one is refused.
        unroll: rows per iteration of the scan, at least 1.

    Returns:
        The state after the last row, of the shape and dtype of ``x``. Example i depends on (key, i) and x[i] alone, if
        the denoiser treats examples apart.

    Raises:
        ValueError: the table's shapes, or that of the denoiser's output, do not fit, or it is known to be for another
            path.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> from jaxgen import diffusion
    >>> path = diffusion.edm()
    >>> table = diffusion.dpmpp_2m(path, diffusion.karras_times(path, 10))
    >>> x = diffusion.prior(jax.random.key(0), path, table.times[0], (4, 2))
    >>> diffusion.sample(jax.random.key(0), lambda x, t: jnp.zeros_like(x), table, x).shape  # all data at 0
    (4, 2)
    """
    return _scan(key, denoise, table, x, path, unroll, emit=lambda state: None)[0]


def trajectory(
    key: Key, denoise: Denoiser, table: Table, x: Array, *, path: Path | None = None, unroll: int = 1
) -> Array:
    """Runs a sampler as `sample` does and keeps every state.

    Args:
        key: as in `sample`.
        denoise: as in `sample`.
        table: as in `sample`.
        x: as in `sample`.
        path: as in `sample`.
        unroll: as in `sample`.

    Returns:
        [rows + 1, batch, ...]: the start, then the state after each row. Between the two evaluations of a two-stage
        solver the state is its predictor's.

    Raises:
        ValueError: as in `sample`.
        TypeError: as in `sample`.
    """
    _, states = _scan(key, denoise, table, x, path, unroll, emit=lambda state: state)
    return jnp.concatenate([x[None], states])


def _scan(
    key: Key,
    denoise: Denoiser,
    table: Table,
    x: Array,
    path: Path | None,
    unroll: int,
    *,
    emit: Callable[[Array], Any],
) -> tuple[Array, Any]:
    """The state after the last row, and what ``emit`` makes of the state after each row, stacked."""
    checks.floating("x", x)
    checks.rank_at_least("x", x, 1)
    checks.positive_integer("unroll", unroll)
    batch = x.shape[0]
    keys = random.keys_for(key, batch)
    clock = jnp.promote_types(x.dtype, jnp.float32)
    times, weights = jnp.asarray(table.times, clock), jnp.asarray(table.weights, clock)
    slots = weights.shape[1] if weights.ndim == 3 else 0
    checks.shape("table.times", times, (None,))
    checks.shape("table.weights", weights, (times.shape[0], slots, slots + 2))
    if path is not None and not any(isinstance(leaf, jax.core.Tracer) for leaf in table):
        check_made_for(path, table)

    def evaluate(state: Array, time: Array) -> Array:
        x0 = denoise(state, jnp.full((batch,), time))
        checks.same_shape("denoise(x, t)", x0, "x", x)
        return x0.astype(x.dtype)

    def draw(row: Array) -> Array:
        return random.normal(random.fold(keys, row + 1), x.shape[1:], dtype=x.dtype)

    def step(buffer: tuple[Array, ...], row: tuple[Array, Array, Array]) -> tuple[tuple[Array, ...], Any]:
        index, time, weight = row
        # A row that ignores the denoiser (padding) or the noise (deterministic solvers) does not pay for it.
        x0 = jax.lax.cond(
            jnp.any(weight[:, slots] != 0), evaluate, lambda state, _: jnp.zeros_like(state), buffer[0], time
        )
        eps = jax.lax.cond(jnp.any(weight[:, slots + 1] != 0), draw, lambda _: jnp.zeros_like(x), index)
        terms = (*buffer, x0, eps)
        # Sums of products, elementwise: a dot would run in bfloat16 on a TPU.
        mixed = [
            functools.reduce(jnp.add, (w * term for w, term in zip(weight[i], terms, strict=True)))
            for i in range(slots)
        ]
        buffer = tuple(state.astype(x.dtype) for state in mixed)
        return buffer, emit(buffer[0])

    start = (x, *(jnp.zeros_like(x) for _ in range(slots - 1)))
    rows = (jnp.arange(times.shape[0]), times, weights)
    buffer, emitted = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, rows, unroll=unroll)
    return buffer[0], emitted
