"""Batches as pure functions of the step.

Row r of the batch of step s is example number k = s batch_size + r of an endless sequence of epochs; it lies
in epoch e = k div n at position k mod n, and epoch e visits the n examples in an order drawn from (seed, e)
alone. So every step is reached directly, nothing need be saved to resume, each example comes once in an
epoch, and batches cross the borders of epochs rather than drop what is left over.

Of several processes each takes consecutive rows of that same batch: the global batch does not depend on their
number.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxgen import checks
from jaxgen.data.images import unit_images
from jaxgen.typing import Batch

Transform = Callable[[dict[str, np.ndarray]], Batch]
"""What is done to a batch of NumPy arrays once gathered."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """``step -> batch``: what ``batches`` and ``stream`` return.

    Attributes:
        examples: how many examples an epoch has.
        batch_size: how many rows the global batch has.
        rows: those of its rows that are this process's.
    """

    examples: int
    batch_size: int
    rows: range
    _order: Callable[[int, int], np.ndarray] = dataclasses.field(repr=False)
    _gather: Callable[[np.ndarray], dict[str, np.ndarray]] = dataclasses.field(repr=False)
    _transform: Transform = dataclasses.field(repr=False)

    def __call__(self, step: int) -> Batch:
        """Returns this process's rows of the batch of ``step``.

        Raises:
            TypeError: ``step`` is not an integer.
            ValueError: ``step`` is negative.
        """
        start = _natural("step", step) * self.batch_size
        return self._transform(self._gather(self._order(start + self.rows.start, start + self.rows.stop)))


def batches(
    arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    transform: Transform = unit_images,
) -> Batches:
    """Makes batches of arrays in memory.

    Args:
        arrays: by name, each [n, ...], as ``load`` returns.
        batch_size: rows of the global batch; may exceed n.
        seed: of the order, in [0, 2^32).
        process_index: which of the processes this is.
        process_count: how many processes share the global batch; must divide ``batch_size``.
        transform: applied to each gathered batch. By default uint8 arrays become float32 in [-1, 1]; give a
            function of your own to do more, or ``lambda batch: batch`` to have images as uint8.

    Returns:
        ``step -> {name: [batch_size / process_count, ...]}``.

    Raises:
        ValueError: an argument is out of range, ``arrays`` are empty or differ in length.

    >>> of_step = batches({"x": np.arange(4)}, batch_size=4, seed=0)
    >>> sorted(of_step(0)["x"].tolist()), sorted(of_step(10**9)["x"].tolist())
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    lengths = {name: len(array) if np.ndim(array) else None for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"`arrays` must be at least one array [n, ...] and all of one length, got lengths {lengths}")
    examples = len(next(iter(arrays.values())))
    held = {name: np.asarray(array) for name, array in arrays.items()}

    # Two epochs, because a batch may cross a border.
    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        # NumPy promises that a bit generator's raw numbers stay the same from version to version, and does
        # not promise it of Generator.permutation: a run resumed after an upgrade must go on with the same
        # batches.
        raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(examples)
        return np.argsort(raw, kind="stable")

    def order(start: int, stop: int) -> np.ndarray:
        pieces = []
        while start < stop:
            epoch, position = divmod(start, examples)
            pieces.append(permutation(epoch)[position : position + stop - start])
            start += len(pieces[-1])
        return np.concatenate(pieces)

    def gather(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.take(array, indices, axis=0) for name, array in held.items()}

    return _made(examples, batch_size, seed, process_index, process_count, order, gather, transform)


def stream(
    source: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    transform: Transform = unit_images,
) -> Batches:
    """Makes batches of records that are read when they are needed; for data that does not fit into memory.

    The contract is that of ``batches``. The order is grain's, whose shuffle computes each index by itself and
    keeps no permutation, so that n may be in the billions; it is not the order of ``batches``.

    Args:
        source: records by index: what ``source`` returns, or anything with a length and items that are dicts
            of arrays of one shape (for example ``grain.MapDataset.source(records).map(resize)``). Records are
            read together where it has ``__getitems__``.
        batch_size: rows of the global batch.
        seed: of the order, in [0, 2^32).
        process_index: which of the processes this is.
        process_count: how many processes share the global batch; must divide ``batch_size``.
        transform: applied to each gathered batch; see ``batches``.

    Returns:
        ``step -> {name: [batch_size / process_count, ...]}``.

    Raises:
        ValueError: an argument is out of range or ``source`` is empty; at a step, its records differ in
            shape.
    """
    import grain

    examples = len(source)
    _check_seed(seed)
    # The indices alone go through grain: they need no workers, no flags and no iterator, and the records of a
    # batch can then be read in one call.
    shuffled = grain.MapDataset.range(examples).seed(seed).shuffle().repeat() if examples else None

    def order(start: int, stop: int) -> np.ndarray:
        assert shuffled is not None  # _made has refused an empty source
        return np.array([shuffled[k] for k in range(start, stop)])

    def gather(indices: np.ndarray) -> dict[str, np.ndarray]:
        together = getattr(source, "__getitems__", None)
        records = together(indices.tolist()) if together else [source[int(index)] for index in indices]
        batch = {}
        for name in records[0]:
            shapes = {np.shape(record[name]) for record in records}
            if len(shapes) > 1:
                raise ValueError(f"`source` must have records of one shape, got {name!r} of shapes {sorted(shapes)}")
            batch[name] = np.stack([record[name] for record in records])
        return batch

    return _made(examples, batch_size, seed, process_index, process_count, order, gather, transform)


def prefetched(batches: Callable[[int], Batch], *, ahead: int = 2) -> Callable[[int], Batch]:
    """Makes the batches of the next steps in threads of its own while the caller works on this one.

    It is a cache and nothing else: any step may be asked for at any time, and gives what ``batches`` gives,
    errors included. For one caller at a time.

    Args:
        batches: ``step -> batch``, a pure function; any, not only those of this module.
        ahead: how many steps are made ahead.

    Returns:
        ``step -> batch``.

    Raises:
        ValueError: ``ahead`` is less than 1.
    """
    checks.positive_integer("ahead", ahead)
    # The threads end with the function that holds them, which is when nobody can ask for a step any more.
    threads = ThreadPoolExecutor(ahead, thread_name_prefix="jaxgen-data")
    pending: dict[int, Future[Batch]] = {}

    def of_step(step: int) -> Batch:
        wanted = range(step, step + ahead + 1)
        for stale in [k for k in pending if k not in wanted]:
            pending.pop(stale).cancel()
        for k in wanted:
            if k not in pending:
                pending[k] = threads.submit(batches, k)
        return pending.pop(step).result()

    return of_step


def _made(
    examples: int,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    order: Callable[[int, int], np.ndarray],
    gather: Callable[[np.ndarray], dict[str, np.ndarray]],
    transform: Transform,
) -> Batches:
    """Checks what ``batches`` and ``stream`` have in common and joins the parts."""
    checks.positive_integer("batch_size", batch_size)
    checks.positive_integer("process_count", process_count)
    _check_seed(seed)
    if examples < 1:
        raise ValueError("`arrays` or `source` must hold at least one example, got none")
    if batch_size % process_count:
        raise ValueError(f"`batch_size` must be a multiple of `process_count`, {process_count}, got {batch_size}")
    if not 0 <= _natural("process_index", process_index) < process_count:
        raise ValueError(f"`process_index` must lie in [0, {process_count}), got {process_index}")
    share = batch_size // process_count
    rows = range(process_index * share, (process_index + 1) * share)
    return Batches(examples, batch_size, rows, order, gather, transform)


def _check_seed(seed: int) -> None:
    if not 0 <= _natural("seed", seed) < 2**32:
        raise ValueError(f"`seed` must lie in [0, 2^32), got {seed}")


def _natural(name: str, x: Any) -> int:
    try:
        number = operator.index(x)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, got {x!r}") from None
    if number < 0:
        raise ValueError(f"`{name}` must not be negative, got {number}")
    return number
