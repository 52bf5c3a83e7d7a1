"""Tables of one size: padding and stacking, so that one compiled program serves many samplers.

What a table holds is said where the type is (`Table`); the solvers that build them are in the modules beside this one.
"""

from collections.abc import Sequence

import jax
import numpy as np

from jaxgen import checks
from jaxgen.diffusion.path import Path
from jaxgen.typing import ArrayLike, Table


def pad(table: Table, *, rows: int | None = None, slots: int | None = None) -> Table:
    """Gives a table more rows and slots that change nothing.

    One compiled sampler then serves tables of several sizes. Added rows come last, leave the state as it is and do not
    call the denoiser.

    Args:
        table: the table to pad.
        rows: number of rows wanted; as many as there are by default.
        slots: number of slots wanted; as many as there are by default.

    Returns:
        The padded Table, in NumPy float64.

    Raises:
        ValueError: the table is larger already, or its weights are not [rows, slots, slots + 2].

    >>> from jaxgen import diffusion
    >>> table = diffusion.ddim(diffusion.edm(), [80.0, 1.0, 0.0])
    >>> pad(table, rows=32, slots=3).weights.shape
    (32, 3, 5)
    """
    times, weights = np.asarray(table.times, np.float64), np.asarray(table.weights, np.float64)
    checks.shape("table.weights", weights, (times.size, None, weights.shape[1] + 2 if weights.ndim == 3 else None))
    old_rows, old_slots = weights.shape[:2]
    rows = old_rows if rows is None else rows
    slots = old_slots if slots is None else slots
    if rows < old_rows or slots < old_slots:
        raise ValueError(
            f"cannot pad a table of {old_rows} rows and {old_slots} slots to {rows} rows and {slots} slots"
        )
    padded = np.zeros((rows, slots, slots + 2))
    padded[:old_rows, :old_slots, :old_slots] = weights[:, :, :old_slots]
    padded[:old_rows, :old_slots, slots:] = weights[:, :, old_slots:]
    padded[old_rows:, :, :slots] = np.eye(slots)
    return Table(np.append(times, np.full(rows - old_rows, times[-1])), padded)


def stack(tables: Sequence[Table]) -> Table:
    """Pads tables to one size and stacks them, for ``jax.vmap`` over samplers.

    Args:
        tables: at least one table.

    Returns:
        A Table with a leading axis: times [tables, rows], weights [tables, rows, slots, slots + 2].

    Raises:
        ValueError: there is none.
    """
    if not tables:
        raise ValueError("`tables` must hold at least one table, got none")
    shapes = np.array([np.shape(table.weights)[:2] for table in tables])
    rows, slots = (int(n) for n in shapes.max(axis=0))
    padded = [pad(table, rows=rows, slots=slots) for table in tables]
    return Table(np.stack([t.times for t in padded]), np.stack([t.weights for t in padded]))


def check_made_for(path: Path, table: Table) -> None:
    """Raises ValueError unless the table is a solver's for this path.

    Every solver keeps data of 1 without noise at alpha(t) where the denoiser answers 1, and pure noise at standard
    deviation sigma(t) where it answers 0, whatever its order. (Deterministic solvers on `edm` and `rectified_flow` are
    the same numbers: sigma = t, and both flows read dx/dt = (x - d) / t. There the times' range alone tells.)

    Args:
        path: the path that is meant.
        table: the table, with values that are known; one whose times rise, an inversion, is checked for their range.

    Raises:
        ValueError: a time is beyond the path's, or the rows are for another alpha or sigma.
    """
    times, weights = np.asarray(table.times, np.float64), np.asarray(table.weights, np.float64)
    slots = weights.shape[1]
    evaluates = np.any(weights[:, :, slots] != 0, axis=1)
    times, weights = times[evaluates], weights[evaluates]
    checks.interval("table.times", times, 0.0, path.t_max)
    if len(times) > 1 and np.all(np.diff(times) > 0):
        return
    signal, noise = np.zeros(slots), np.zeros((slots, slots))
    for i, (time, row) in enumerate(zip(times, weights, strict=True)):
        alpha, sigma = path.alpha(time), path.sigma(time)
        if i == 0:
            signal[0], noise[0, 0] = alpha, sigma**2
        std = np.sqrt(max(noise[0, 0], 0.0))
        # Room for float32, and for noise that a stochastic solver inflates on purpose.
        if not (abs(signal[0] - alpha) <= 0.005 and abs(std - sigma) <= 0.02 * sigma):
            raise ValueError(
                f"`table` must be made for this path, of alpha {alpha:.4g} and sigma {sigma:.4g} at time {time:g}, "
                f"got rows for {signal[0]:.4g} and {std:.4g}"
            )
        signal = row @ np.array([*signal, 1.0, 0.0])
        noise = row[:, :slots] @ noise @ row[:, :slots].T + np.outer(row[:, -1], row[:, -1])


def grid(path: Path, times: ArrayLike) -> np.ndarray:
    """What every builder asks of its times, and hands on in float64.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].

    Returns:
        The times as a NumPy array.

    Raises:
        ValueError: the times are not decreasing, out of range or traced.
    """
    if isinstance(times, jax.core.Tracer):
        raise ValueError("`times` must be known when a table is built, got a traced array")
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"`times` must be a grid of at least 2 times, got shape {list(times.shape)}")
    checks.interval("times", times, 0.0, path.t_max)
    if not np.all(np.diff(times) < 0):
        raise ValueError("`times` must decrease strictly, from noise to data, got times that do not")
    return times


def check_order(order: int) -> None:
    """Raises ValueError unless ``order`` is one that multi-step solvers have: 1, 2 or 3."""
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise ValueError(f"`order` must be 1, 2 or 3, got {order!r}")


def with_history(heads: Sequence[np.ndarray], slots: int, *, remembered: np.ndarray | None = None) -> np.ndarray:
    """The weights of one row whose slots after the first few are a queue of what past rows remembered.

    Args:
        heads: the first slots' own weights, each [slots + 2].
        slots: number of slots.
        remembered: [slots + 2], what enters the queue; the denoiser's output by default.

    Returns:
        [slots, slots + 2].
    """
    weights = np.eye(slots, slots + 2, k=-1)  # each slot takes over the one before it
    weights[: len(heads)] = heads
    if len(heads) < slots:
        weights[len(heads)] = np.eye(slots + 2)[slots] if remembered is None else remembered
    return weights
