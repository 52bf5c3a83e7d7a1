"""How a transformer knows where in the image a token lies: by waves added to it, or by rotated queries and keys.

Sines and cosines (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; in two dimensions He et al. 2021,
https://arxiv.org/abs/2111.06377) are added to a token of d features in row i and column j once, before the
first layer:

    p(i, j) = (wave(j), wave(i)),    wave(i) = (sin(omega i), cos(omega i)),  omega_k = 10000^(-4 k / d)     (1)

Rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864; along the axes of images Heo et al. 2024,
https://arxiv.org/abs/2403.13298) turns each pair of a head's d features, in every layer, by an angle
proportional to the row, for half of the pairs, or to the column, for the other half:

    R(i, j) = rotation by (omega i, omega j),    omega_k = base^(-4 k / d),  k = 0 .. d/4 - 1                (2)
    <R(i, j) q, R(i', j') k> = <q, R(i' - i, j' - j) k>                                                      (3)

so that the logits of attention depend on where tokens lie relative to each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxgen import checks
from jaxgen.nets.embedding import time_embedding
from jaxgen.typing import Array


class Positions(NamedTuple):
    """A way of telling positions to a transformer.

    Attributes:
        add: (height, width, features) -> [height width, features], added to the tokens; or None.
        rotate: (x [batch, height width, heads, features], height, width) -> the same shape, applied to the
            queries and keys of every layer; or None.
    """

    add: Callable[[int, int, int], Array] | None = None
    rotate: Callable[[Array, int, int], Array] | None = None


def sincos(height: int, width: int, features: int) -> Array:
    """Waves of the column and of the row, Eq. 1.

    Args:
        height: rows of tokens.
        width: columns of tokens.
        features: a multiple of 4.

    Returns:
        [height width, features] float32.

    Raises:
        ValueError: 4 does not divide ``features``.
    """
    if features % 4:
        raise ValueError(f"`features` must be a multiple of 4 for sines and cosines of two axes, got {features}")
    rows, columns = _grid(height, width)
    waves = (time_embedding(axis, features // 2, freq_shift=0.0) for axis in (columns, rows))
    return jnp.concatenate(list(waves), axis=-1)


def rotate(x: Array, height: int, width: int, *, base: float = 100.0) -> Array:
    """Rotates features by their token's row and column, Eq. 2. Feature k is paired with feature k + d/2.

    Args:
        x: [batch, height width, heads, features], features a multiple of 4.
        height: rows of tokens.
        width: columns of tokens.
        base: the ratio of the fastest rotation, 1 per token, to the slowest; 100 suits the tens of tokens that a
            side of an image has.

    Returns:
        The shape and dtype of ``x``; computed in float32 at least.

    Raises:
        ValueError: the shapes do not suit, or ``base`` is not above 0.
    """
    checks.positive("base", base)
    checks.shape("x", x, (None, height * width, None, None))
    quarter, left = divmod(x.shape[-1], 4)
    if left:
        raise ValueError(f"`x` must have a multiple of 4 features per head to rotate, got {x.shape[-1]}")
    rates = base ** (-jnp.arange(quarter, dtype=jnp.float32) / max(quarter, 1))
    angles = jnp.concatenate([axis[:, None] * rates for axis in _grid(height, width)], axis=-1)[:, None]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def _grid(height: int, width: int) -> tuple[Array, Array]:
    """Row and column of every token, [height width] each."""
    rows, columns = jnp.indices((height, width), jnp.float32)
    return rows.reshape(-1), columns.reshape(-1)


sincos_positions = Positions(add=sincos)
"""Waves added to the tokens, as in DiT's paper."""

rotary_positions = Positions(rotate=rotate)
"""Rotated queries and keys."""
