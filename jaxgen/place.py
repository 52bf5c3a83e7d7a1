"""Where arrays live: one training method, placed on one device or on many.

A `Method` is written for the global batch and knows of no device. `jit` compiles it over a mesh of two axes:

    data   the batch is split, the state copied                        data parallel
    fsdp   the batch is split, and so is the state, leaf by leaf       fully sharded (ZeRO-3)

and XLA inserts the collectives. `pmap` serves code that is built on ``jax.pmap``. Either gives the parameters that a
single device would, to the rounding of sums.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen import checks
from jaxgen.train import Method
from jaxgen.typing import Batch, Key, Metrics

# Splitting a small leaf costs a collective and saves nothing.
SMALLEST_SHARDED_LEAF = 2**14


def devices(platform: str | None = None) -> list[jax.Device]:
    """The devices of a platform.

    Args:
        platform: "cpu", "gpu" or "tpu"; JAX's choice by default.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        found = jax.devices()
        raise ValueError(
            f"`platform` is {platform!r}, but JAX finds none here; it has {len(found)} device(s) of platform "
            f"{found[0].platform!r}. ({str(error).splitlines()[0]})"
        ) from error


def mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh of axes "data" x "fsdp" over the devices.

    Args:
        devices: all of JAX's by default.
        fsdp: over how many of them the state is split, at least 1; it must divide their number.

    Raises:
        ValueError: ``fsdp`` does not divide the number of devices.
    """
    checks.positive_integer("fsdp", fsdp)
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) % fsdp:
        raise ValueError(f"`fsdp` must divide the number of devices, {len(devices)}, got {fsdp}")
    # Auto: XLA propagates shardings. The default of new JAX, Explicit, asks every function to name its output's.
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp), ("data", "fsdp"), (AxisType.Auto, AxisType.Auto), devices=devices
    )


def state_shapes(method: Method, mesh: Mesh) -> Any:
    """The state's shapes, dtypes and shardings on a mesh, nothing computed: what a checkpoint is restored into.

    Args:
        method: a method for the global batch.
        mesh: from `mesh`.

    Returns:
        A tree of ``jax.ShapeDtypeStruct`` like the state.
    """
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_leaf_sharding(leaf, mesh)), shapes
    )


def jit(method: Method, mesh: Mesh) -> Method:
    """The same method, compiled over a mesh.

    The state is donated: after ``state, metrics = placed.step(state, ...)`` the old one is gone. A batch of NumPy
    arrays is this process's share of the global batch, and is put on the mesh; a batch of JAX arrays is taken to be the
    global one.

    Args:
        method: a method for the global batch.
        mesh: from `mesh`.

    Returns:
        A Method whose init and step are compiled, once for each shape of batch.

    Raises:
        ValueError: (from its step) the batch does not divide among the devices.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(method, mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    init = jax.jit(method.init, in_shardings=everywhere, out_shardings=state_shardings)
    compiled = jax.jit(
        method.step,
        in_shardings=(state_shardings, rows, everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )

    def step(state: Any, batch: Batch, key: Key) -> tuple[Any, Metrics]:
        return compiled(state, _on_mesh(batch, rows), key)

    return Method(init, step)


def rows(function: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
    """Compiles a function of something shared and of rows, such as parameters and keys to sample from, over a mesh.

    Args:
        function: ``(shared, rows) -> rows``, trees of arrays; the leading axis of each leaf of ``rows`` is the batch,
            in and out.
        mesh: from `mesh`.

    Returns:
        The compiled function: ``shared`` is used where it lies (NumPy arrays are copied to every device), the rows are
        split. A process that does not hold all devices gives, and gets, global arrays.

    Raises:
        ValueError: (when called) the rows do not divide among the devices.
    """
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    compiled = jax.jit(function, in_shardings=(None, split), out_shardings=split)
    return lambda shared, rows: compiled(shared, _divisible(rows, mesh.size))


def pmap(method: Method, *, axis_name: str = "data", devices: Sequence[jax.Device] | None = None) -> Method:
    """The same method under ``jax.pmap``: a copy of the state on each device, a share of the batch to each.

    Args:
        method: built with this ``axis_name`` (as `train.minimise` and `train.alternate` take it), so that it averages
            over the devices.
        axis_name: the mapped axis.
        devices: all of JAX's local ones by default.

    Returns:
        A Method. Its state has a leading axis of devices (`first_copy` takes one), is donated, and its step takes this
        process's batch, [batch, ...], and one key, as any method does.

    Raises:
        ValueError: (from its step) the method does not use ``axis_name``, so that copies would drift apart; or the
            batch does not divide among the devices.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    # pmap wants something mapped, be it a number that nobody uses.
    copies = jax.pmap(lambda _, key: method.init(key), axis_name, in_axes=(0, None), devices=devices)
    compiled = jax.pmap(method.step, axis_name, in_axes=(0, 0, None), devices=devices, donate_argnums=0)
    checked = False

    def step(state: Any, batch: Batch, key: Key) -> tuple[Any, Metrics]:
        nonlocal checked
        split = jax.tree.map(
            lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:]), _divisible(batch, len(devices))
        )
        if not checked:
            _check_uses_axis(method, jax.tree.map(lambda leaf: leaf[0], (state, split)), key, axis_name)
            checked = True
        state, metrics = compiled(state, split, key)
        return state, first_copy(metrics)

    return Method(lambda key: copies(np.arange(len(devices)), key), step)


def first_copy(state: Any) -> Any:
    """Takes the first device's copy of a tree that `pmap` has replicated."""
    return jax.tree.map(lambda leaf: leaf[0], state)


def _leaf_sharding(leaf: Any, mesh: Mesh) -> NamedSharding:
    # The longest axis that divides is split over "fsdp"; ties go to the last, which holds a kernel's output features.
    parts = mesh.shape["fsdp"]
    axes = [axis for axis, length in enumerate(leaf.shape) if length % parts == 0]
    if parts == 1 or not axes or np.prod(leaf.shape) < SMALLEST_SHARDED_LEAF:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*([None] * longest), "fsdp"))


def _on_mesh(batch: Batch, sharding: NamedSharding) -> Batch:
    local = len(sharding.mesh.local_devices)
    _divisible(batch, local)
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.make_array_from_process_local_data(sharding, leaf),
        batch,
    )


def _divisible(batch: Batch, parts: int) -> Batch:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not leaf.ndim or leaf.shape[0] % parts:
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` must divide among {parts} devices along its first axis, "
                f"got shape {list(leaf.shape)}"
            )
    return batch


def _check_uses_axis(method: Method, arguments: tuple[Any, Batch], key: Key, axis_name: str) -> None:
    try:
        jax.eval_shape(method.step, *arguments, key)
    except NameError:  # JAX's error for an axis that nothing has bound: the method does use one.
        return
    raise ValueError(
        f"`method` does not average over the axis {axis_name!r}: its copies would drift apart. "
        f"Build it with `axis_name={axis_name!r}`"
    )
