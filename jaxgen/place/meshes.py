"""Meshes: which devices there are, and along which axes arrays are split over them.

    data     the batch is split, the state copied                         data parallel
    fsdp     the batch is split, and so is the state, leaf by leaf        fully sharded (ZeRO)
    tensor   the batch is copied, the state split where a rule says so    within a layer (Megatron)

What is split over "fsdp" is what lasts: a step gathers the parameters once, as it begins, and has them whole until it
ends; the optimiser's state and averages never are.

The later the axis, the more it carries, so the last is laid over the nearest neighbours. Several slices of a TPU are
joined by the data centre's network alone: they lie along "data", outermost, which carries one sum of gradients a step.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen import checks
from jaxgen.typing import Batch

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # how a batch is split


def devices(platform: str | None = None) -> list[jax.Device]:
    """The devices of a platform, of all hosts.

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


def mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of axes "data" x "fsdp" x "tensor" over the devices.

    Args:
        devices: all of JAX's by default, those of other hosts included.
        fsdp: over how many of them the state is split, at least 1.
        tensor: over how many layers are split, at least 1; a divisor of the attention's heads.

    Raises:
        ValueError: ``fsdp`` x ``tensor`` does not divide the number of devices, or that of a slice where there are
            several.
    """
    checks.positive_integer("fsdp", fsdp)
    checks.positive_integer("tensor", tensor)
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    whole = len(devices) // slices
    if whole % (fsdp * tensor):
        split = f"`fsdp` x `tensor`, {fsdp} x {tensor}," if tensor > 1 else "`fsdp`"
        of = f"of each of {slices} slices" if slices > 1 else "of devices"
        got = "" if tensor > 1 else f", got {fsdp}"
        raise ValueError(f"{split} must divide the number {of}, {whole}{got}")
    shape = (whole // (fsdp * tensor), fsdp, tensor)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto: XLA propagates shardings. The default of new JAX, Explicit, asks every function to name its output's.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split over a mesh."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def share(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Which rows of a global batch this process is to load.

    Args:
        mesh: from `mesh`.

    Returns:
        Numbers of parts, ascending, and of how many equal parts: ``((1,), 4)`` is the second quarter. Several where the
        rows of this process's devices do not lie together, as on TPU slices whose rings pass through all hosts.

    >>> share(mesh())  # a single process loads everything
    ((0,), 1)
    """
    held, parts = sorted(_row_blocks(mesh)), row_parts(mesh)
    for together in range(parts, 0, -1):
        numbers = sorted({block // together for block in held})
        if parts % together == 0 and len(numbers) * together == len(held):
            return tuple(numbers), parts // together
    raise AssertionError("blocks of one always fit")


def split_rows(batch: Batch, mesh: Mesh) -> Batch:
    """A batch of NumPy arrays, this process's share, as global arrays; JAX arrays are taken to be global."""
    held, parts = len(_row_blocks(mesh)), row_parts(mesh)
    sharding = NamedSharding(mesh, ROWS)

    def placed(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return _divisible(path, leaf, parts)
        rows = _divisible(path, leaf, held).shape[0] // held * parts
        return jax.make_array_from_process_local_data(sharding, leaf, (rows, *leaf.shape[1:]))

    return jax.tree_util.tree_map_with_path(placed, batch)


def divisible(batch: Batch, parts: int) -> Batch:
    """The batch, whose rows must divide into so many parts.

    Raises:
        ValueError: they do not.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _divisible(path, leaf, parts), batch)


def _divisible(path: Any, leaf: Any, parts: int) -> Any:
    if not leaf.ndim or leaf.shape[0] % parts:
        raise ValueError(
            f"`batch{jax.tree_util.keystr(path)}` must divide among {parts} devices along its first axis, "
            f"got shape {list(leaf.shape)}"
        )
    return leaf


def _row_blocks(mesh: Mesh) -> set[int]:
    """Which of a batch's `row_parts` parts lie on this process's devices."""
    blocks = mesh.devices.reshape(row_parts(mesh), -1)
    own = jax.process_index()
    return {i for i, block in enumerate(blocks) if any(device.process_index == own for device in block)}
