"""Draws images of given classes in batches of one size, by one compiled program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen import place, plan, random
from jaxgen.typing import Array, Key, Params, Table


class Draws:
    """Draws from a network; another seed, number of images or ``how`` compiles nothing."""

    def __init__(self, draw: Callable[[Params, Any, Key, Array], Array], mesh: Mesh) -> None:
        """Prepares ``draw(params, how, keys [batch], labels [batch]) -> images``; ``how`` is any tree of arrays."""
        self.draw = draw
        self._mesh = mesh
        self._function = lambda shared, rows: draw(*shared, *rows)
        self._draw = place.rows(self._function, mesh)

    def __call__(self, params: Params, labels: np.ndarray, how: Any, *, seed: int, batch_size: int = 100) -> np.ndarray:
        """Draws one image [height, width, channels] in [-1, 1] per label [n]."""
        labels = np.asarray(labels, np.int32)
        batch_size = self._divisible(batch_size)
        padded = np.append(labels, np.zeros(-len(labels) % batch_size, np.int32))
        drawn = []
        for start in range(0, len(padded), batch_size):
            keys = random.example_keys(jax.random.key(seed), batch_size, start=start)
            drawn.append(self._draw((params, how), (keys, padded[start : start + batch_size])))
        return np.concatenate([place.gathered(part) for part in drawn])[: len(labels)]

    def compiled(self, params: Params, how: Any, effort: plan.Effort, *, batch_size: int = 100) -> plan.Program:
        """Compiles for a mesh whose devices need not be there, from the shapes of ``params``.

        Solvers' tables are cut to the rows that call the network: what a run skips is no part of its time.
        """
        how = jax.tree.map(lambda leaf: _cut(leaf) if _is_table(leaf) else leaf, how, is_leaf=_is_table)
        size = self._divisible(batch_size)
        rows = lambda: (random.example_keys(jax.random.key(0), size), jnp.zeros(size, jnp.int32))  # noqa: E731
        shared = (params, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, how)))
        return plan.rows(self._function, self._mesh, shared, jax.eval_shape(rows), effort=effort)

    def _divisible(self, batch_size: int) -> int:
        parts = place.row_parts(self._mesh)
        return -(-batch_size // parts) * parts


def _is_table(leaf: Any) -> bool:
    return isinstance(leaf, Table)


def _cut(table: Table) -> Table:
    """Without the rows of padding, which have no weight for the network's output."""
    times, weights = (np.asarray(leaf) for leaf in table)
    used = np.flatnonzero(np.any(weights[:, :, weights.shape[1]], axis=1))
    return Table(times[: used[-1] + 1], weights[: used[-1] + 1])
