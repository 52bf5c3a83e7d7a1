"""Methods and functions of the global batch, compiled over a mesh.

Shardings are given for what goes in and what comes out, and XLA inserts the collectives in between.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.place.meshes import ROWS, divisible, row_parts, split_rows
from jaxgen.place.rules import TRANSFORMER, Rule, state_shapes
from jaxgen.train import Learner, Method
from jaxgen.typing import Batch, Key, Metrics


def jit(method: Method, mesh: Mesh, *, rules: Sequence[Rule] = TRANSFORMER) -> Method:
    """The same method, compiled over a mesh.

    The state is donated: after ``state, metrics = placed.step(state, ...)`` the old one is gone. A batch of NumPy
    arrays is this process's `share` of the global batch, and is put on the mesh; a batch of JAX arrays is taken to be
    the global one.

    Args:
        method: a method for the global batch.
        mesh: from `mesh`.
        rules: how leaves of the state are split.

    Returns:
        A Method whose init and step are compiled, once for each shape of batch.

    Raises:
        ValueError: a rule does not fit; (from its step) the batch does not divide among the devices.
    """
    shapes = state_shapes(method, mesh, rules=rules)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, ROWS)
    init = jax.jit(method.init, in_shardings=everywhere, out_shardings=state_shardings)
    compiled = jax.jit(
        lambda state, batch, key: method.step(_gathered_parameters(state, shapes), batch, key),
        in_shardings=(state_shardings, rows, everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )

    def step(state: Any, batch: Batch, key: Key) -> tuple[Any, Metrics]:
        return compiled(state, split_rows(batch, mesh), key)

    return Method(init, step)


def rows(function: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
    """Compiles a function of something shared and of rows, such as parameters and keys to sample from, over a mesh.

    Args:
        function: ``(shared, rows) -> rows``, trees of arrays; the leading axis of each leaf of ``rows`` is the batch,
            in and out.
        mesh: from `mesh`.

    Returns:
        The compiled function: ``shared`` is put whole on every device, the rows are split. Every process gives all
        rows, the same ones, and gets global arrays: `gathered` has them on the host.

    Raises:
        ValueError: (when called) the rows do not divide among the devices.
    """
    split, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(
        lambda shared, rows: function(jax.lax.with_sharding_constraint(shared, everywhere), rows),
        in_shardings=(None, split),
        out_shardings=split,
    )

    def call(shared: Any, rows: Any) -> Any:
        if jax.process_count() > 1:  # where JAX splits arrays of its own alone
            rows = jax.tree.map(jnp.asarray, rows)
        return compiled(shared, divisible(rows, row_parts(mesh)))

    return call


def gathered(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, whole; where several processes hold the parts, every one of them calls this."""
    return jax.tree.map(
        lambda leaf: (
            multihost_utils.process_allgather(leaf, tiled=True)
            if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
            else np.asarray(leaf)
        ),
        tree,
    )


def _gathered_parameters(state: Any, shapes: Any) -> Any:
    """The state with parameters as a step computes with them: whole over "fsdp", once for all microbatches.

    Left to itself XLA follows the parameters' sharding through the network: what it then moves are the activations.
    """

    def gathered(node: Any, like: Any) -> Any:
        if not isinstance(node, Learner):
            return node
        return node._replace(
            params=jax.tree.map(lambda leaf, at: _without_fsdp(leaf, at.sharding), node.params, like.params)
        )

    return jax.tree.map(gathered, state, shapes, is_leaf=lambda node: isinstance(node, Learner))


def _without_fsdp(leaf: Any, sharding: NamedSharding) -> Any:
    kept = PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharding.spec))
    return leaf if kept == sharding.spec else jax.lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, kept))
