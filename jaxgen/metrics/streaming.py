"""What examples in pieces have in common: some of a batch do not count, and devices merge what they gathered."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array

State = TypeVar("State")


def merge_across(merge: Callable[[State, State], State], state: State, axis_name: str) -> State:
    """The state of all devices' examples, from the state of each one's own.

    Args:
        merge: of two states, such as `moments.merge` or `predictions.merge`.
        state: this device's.
        axis_name: the mapped axis of pmap or shard_map whose devices saw different examples.

    Returns:
        The same state on every device: theirs, merged in the order of the devices.
    """
    states = jax.lax.all_gather(state, axis_name, to="invarying")
    first, others = (jax.tree.map(lambda leaf, part=part: leaf[part], states) for part in (0, slice(1, None)))
    return jax.lax.scan(lambda merged, other: (merge(merged, other), None), first, others)[0]


def counted(mask: Array | None, examples: int) -> Array:
    """Which of some examples to count, [examples] bool.

    Args:
        mask: likewise; None for all.
        examples: how many.

    Returns:
        The mask.

    Raises:
        ValueError: the mask is of another shape.
        TypeError: it is not bool.
    """
    if mask is None:
        return jnp.ones(examples, bool)
    checks.shape("mask", mask, (examples,))
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
        raise TypeError(f"`mask` must be bool, got dtype {jnp.result_type(mask)}")
    return jnp.asarray(mask)
