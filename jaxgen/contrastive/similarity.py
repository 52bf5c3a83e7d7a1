"""Embeddings as the similarity losses see them: directions, and which example each is of.

    cos(a, b) = <a / |a|, b / |b|>                                                                 (1)

A row of zeros has no direction; it stays zero, with cosine 0 to every other.
"""

import jax.numpy as jnp
from jax import lax

from jaxgen import checks
from jaxgen.typing import Array


def normalise(x: Array) -> Array:
    """Scales rows to unit length, in float32 at least.

    Neither squares of large numbers overflow nor those of small ones vanish. A row of zeros stays zero, and its
    gradient is the cotangent as it came: finite, where x / |x| has none.

    Args:
        x: [..., features], floating.

    Returns:
        The shape of ``x``, float32 (float64 if ``x`` is).

    Raises:
        TypeError: ``x`` is not floating.

    >>> normalise(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    Array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    checks.floating("x", x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # The direction does not depend on this scale, so no gradient flows through it.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(x**2, -1, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 0, square, 1))


def sharpened(x: Array, temperature: float | Array) -> Array:
    """Unit rows divided by the temperature: their products with unit rows are the logits."""
    checks.shape("temperature", temperature, ())
    checks.positive("temperature", temperature)
    unit = normalise(x)
    return unit / jnp.asarray(temperature).astype(unit.dtype)


def example_indices(count: int, axis_name: str | None) -> Array:
    """The indices [count] of the examples here in the global batch."""
    start = 0 if axis_name is None else lax.axis_index(axis_name) * count
    return start + jnp.arange(count)


def check_embeddings(name: str, x: Array, axis_name: str | None) -> None:
    """Refuses what is no batch of embeddings, and a global batch of one, which has nothing to be told apart from."""
    checks.floating(name, x)
    checks.shape(name, x, (None, None))
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if x.shape[0] * devices < 2:
        raise ValueError(f"`{name}` must hold at least 2 examples, got shape {list(x.shape)}")


def check_views(first: Array, second: Array, axis_name: str | None) -> None:
    """Refuses what are no two views of one batch."""
    check_embeddings("first", first, axis_name)
    checks.floating("second", second)
    checks.same_shape("second", second, "first", first)
