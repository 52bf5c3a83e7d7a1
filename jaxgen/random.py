"""Randomness per example: example i of a batch draws from ``fold_in(key, i)`` and from nothing else.

Sample i therefore depends on (key, i) alone, never on the size of the batch, on its neighbours or on the devices
that share the work: draw 64 images at once, or 16 at a time on four machines, and image 37 is the same.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array, Key


def example_keys(key: Key, batch: int, *, start: int | Array = 0, axis_name: str | None = None) -> Key:
    """One key per example, folded from the example's global index.

    Args:
        key: a single key.
        batch: the number of examples here (under ``axis_name``: on this device).
        start: the global index of the first example (under ``axis_name``: of the first device's).
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any.

    Returns:
        [batch] keys.

    Raises:
        TypeError: ``key`` is not a typed key.
        ValueError: ``key`` is not a single one.
    """
    checks.key("key", key)
    checks.shape("key", key, ())
    if axis_name is not None:
        start = start + jax.lax.axis_index(axis_name) * batch
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(batch))


def keys_for(key: Key, batch: int) -> Key:
    """Takes what samplers take: a single key, from which ``example_keys`` are made, or [batch] keys as they are."""
    checks.key("key", key)
    if key.ndim == 0:
        return example_keys(key, batch)
    checks.shape("key", key, (batch,))
    return key


def fold(keys: Key, data: int | Array) -> Key:
    """Folds ``data`` into each of the [batch] ``keys``."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def draw(
    sampler: Callable[[Key, Sequence[int], jnp.dtype], Array],
    keys: Key,
    shape: Sequence[int],
    dtype: jnp.dtype,
) -> Array:
    """Draws [batch, *shape], example i from ``keys[i]`` by ``sampler(key, shape, dtype)``."""
    return jax.vmap(lambda key: sampler(key, tuple(shape), dtype))(keys)


def normal(keys: Key, shape: Sequence[int], *, dtype: jnp.dtype = jnp.float32) -> Array:
    """Standard normal numbers [batch, *shape], example i from ``keys[i]``."""
    return draw(jax.random.normal, keys, shape, dtype)


def per_image(function: Callable[[Key, Array], Array], key: Key, x: Array) -> Array:
    """Applies ``function(key, image [height, width, channels])`` to every image with a key of its own.

    Args:
        function: computes in float32 at least; its draws should not depend on the image's dtype.
        key: a single key, or [batch] keys.
        x: [batch, height, width, channels], floating.

    Returns:
        [batch, height, width, channels] in the dtype of ``x``.

    Raises:
        ValueError: ``x`` is not of rank 4.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.
    """
    checks.floating("x", x)
    checks.shape("x", x, (None, None, None, None))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.vmap(function)(keys_for(key, x.shape[0]), wide).astype(x.dtype)
