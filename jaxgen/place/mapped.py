"""Methods under ``jax.pmap``, for code that is built on it: a copy of the state on each device."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxgen.place.meshes import divisible
from jaxgen.train import Method
from jaxgen.typing import Batch, Key, Metrics


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
            lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:]), divisible(batch, len(devices))
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


def _check_uses_axis(method: Method, arguments: tuple[Any, Batch], key: Key, axis_name: str) -> None:
    try:
        jax.eval_shape(method.step, *arguments, key)
    except NameError:  # JAX's error for an axis that nothing has bound: the method does use one.
        return
    raise ValueError(
        f"`method` does not average over the axis {axis_name!r}: its copies would drift apart. "
        f"Build it with `axis_name={axis_name!r}`"
    )
