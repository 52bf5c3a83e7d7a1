"""Bilinear resampling by two: images doubled and halved, differentiable to every order at the cost of a few additions.

Along each axis, with pixels beyond the border equal to the nearest one inside,

    doubled:  y_2i = (3 x_i + x_(i-1)) / 4,    y_(2i+1) = (3 x_i + x_(i+1)) / 4                       (1)
    halved:   x_i = (y_(2i-1) + 3 y_2i + 3 y_(2i+1) + y_(2i+2)) / 8                                   (2)

(1) interpolates linearly between centres of pixels. (2) is its transpose over two, borders included, and the filter
[1, 3, 3, 1] of Karras et al. 2020 (arXiv:1912.04958): each keeps constants and means.
"""

import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array


def bilinear_upsample(x: Array) -> Array:
    """Doubles images by bilinear interpolation (Eq. 1).

    Args:
        x: [batch, height, width, channels], floating.

    Returns:
        [batch, 2 height, 2 width, channels], in the dtype of ``x``.

    Raises:
        ValueError: ``x`` is not a batch of images.
        TypeError: ``x`` is not floating.

    >>> bilinear_upsample(jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1))[0, 0, :, 0]
    Array([0., 1., 3., 4.], dtype=float32)
    """
    _check(x)
    for axis in (1, 2):
        before, after = _beyond(x, axis)
        n = x.shape[axis]
        previous = jnp.concatenate([before, _cut(x, axis, 0, n - 1)], axis)
        following = jnp.concatenate([_cut(x, axis, 1, n), after], axis)
        pairs = jnp.stack([0.75 * x + 0.25 * previous, 0.75 * x + 0.25 * following], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


def bilinear_downsample(x: Array) -> Array:
    """Halves images with the filter [1, 3, 3, 1] / 8 (Eq. 2).

    Args:
        x: [batch, height, width, channels], floating, height and width even.

    Returns:
        [batch, height / 2, width / 2, channels], in the dtype of ``x``.

    Raises:
        ValueError: ``x`` is not a batch of images of even height and width.
        TypeError: ``x`` is not floating.

    >>> bilinear_downsample(jnp.array([0.0, 0.0, 8.0, 8.0]).reshape(1, 2, 2, 1).repeat(2, 1))[0, :, 0, 0]
    Array([1., 7.], dtype=float32)
    """
    _check(x)
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f"`x` must have an even height and width, got shape {list(x.shape)}")
    for axis in (1, 2):
        n = x.shape[axis]
        before, after = _beyond(x, axis)
        padded = jnp.concatenate([before, x, after], axis)
        taps = [_cut(padded, axis, k, k + n, 2) for k in range(4)]
        x = 0.125 * (taps[0] + taps[3]) + 0.375 * (taps[1] + taps[2])
    return x


def _check(x: Array) -> None:
    checks.floating("x", x)
    checks.shape("x", x, (None, None, None, None))
    if 0 in x.shape[1:3]:
        raise ValueError(f"`x` must have a height and width of at least 1, got shape {list(x.shape)}")


def _cut(x: Array, axis: int, start: int, stop: int, step: int = 1) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _beyond(x: Array, axis: int) -> tuple[Array, Array]:
    """The pixels beyond the border."""
    n = x.shape[axis]
    return _cut(x, axis, 0, 1), _cut(x, axis, n - 1, n)
