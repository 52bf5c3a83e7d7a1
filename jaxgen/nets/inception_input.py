"""What the Inception network is fed: images of any size become 299 x 299, as the programs that published scores did it.

Three do so in three ways, each of which moves every score: compare only what one of them made. Along an axis of n
pixels, output i is the linear interpolation of the image at

    p_i = (i + 1/2) n / 299 - 1/2     edges on edges: pytorch-fid                                        (1)
    p_i = i n / 299                   first pixel on first pixel: TensorFlow 1                           (2)

where pixels beyond the border equal the nearest one inside. (1) and (2) see two pixels an axis whatever n, so that
large images are aliased. clean-fid (Parmar et al. 2021, arXiv:2104.11222) has Pillow's bicubic filter, which widens as
the image shrinks. And the range: with v in [0, 255] the values of 8 bits,

    x = v / 127.5 - 1                 pytorch-fid                                                        (3)
    x = (v - 128) / 128               the others                                                         (4)

Published scores are of images of 8 bits: round generated ones, as in a file, before they are resized.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks
from jaxgen.typing import Array

_SIZE = 299


def pytorch_fid_input(x: Array) -> Array:
    """Resizes images for `Inception` as pytorch-fid does (Eqs. 1 and 3), bilinearly.

    Args:
        x: [batch, height, width, 3] in [-1, 1].

    Returns:
        [batch, 299, 299, 3] in [-1, 1].

    Raises:
        ValueError: ``x`` has another shape or is empty.
        TypeError: ``x`` is not floating.

    >>> pytorch_fid_input(jnp.zeros((2, 32, 32, 3))).shape
    (2, 299, 299, 3)
    """
    _check(x)
    for axis in (1, 2):
        n = x.shape[axis]
        x = _interpolate(x, axis, (np.arange(_SIZE) + 0.5) * n / _SIZE - 0.5)
    return x


def tensorflow_fid_input(x: Array) -> Array:
    """Resizes images for `Inception` as its graph in TensorFlow 1 does (Eqs. 2 and 4), bilinearly.

    The graph made the scores of Heusel et al. 2017 (arXiv:1706.08500) and of Dhariwal & Nichol 2021 (arXiv:2105.05233).

    Args:
        x: [batch, height, width, 3] in [-1, 1].

    Returns:
        [batch, 299, 299, 3] in [-1, 1 - 1/128].

    Raises:
        ValueError: ``x`` has another shape or is empty.
        TypeError: ``x`` is not floating.

    >>> float(tensorflow_fid_input(jnp.ones((1, 32, 32, 3))).max())  # 255 of 8 bits
    0.9921875
    """
    _check(x)
    for axis in (1, 2):
        x = _interpolate(x, axis, np.arange(_SIZE) * x.shape[axis] / _SIZE)
    return _of_eight_bits(x)


def clean_fid_input(x: Array) -> Array:
    """Resizes images for `Inception` as clean-fid does by default (Eq. 4), with Pillow's bicubic filter.

    Args:
        x: [batch, height, width, 3] in [-1, 1].

    Returns:
        [batch, 299, 299, 3] in [-1, 1 - 1/128]; what the filter overshoots at edges is cut off.

    Raises:
        ValueError: ``x`` has another shape or is empty.
        TypeError: ``x`` is not floating.
    """
    _check(x)
    shape = (x.shape[0], _SIZE, _SIZE, 3)
    return _of_eight_bits(jnp.clip(jax.image.resize(x, shape, "cubic", antialias=True), -1.0, 1.0))


def _check(x: Array) -> None:
    checks.floating("x", x)
    checks.shape("x", x, (None, None, None, 3))
    if 0 in x.shape[1:3]:
        raise ValueError(f"`x` must have a height and width of at least 1, got shape {list(x.shape)}")


def _interpolate(x: Array, axis: int, positions: np.ndarray) -> Array:
    """The image at positions along an axis, linearly between pixels."""
    last = x.shape[axis] - 1
    at = np.clip(positions, 0, last)
    before = np.floor(at).astype(int)
    after = np.minimum(before + 1, last)
    share = jnp.asarray(np.expand_dims(at - before, [other for other in range(4) if other != axis]), x.dtype)
    low, high = jnp.take(x, before, axis), jnp.take(x, after, axis)
    return low + share * (high - low)


def _of_eight_bits(x: Array) -> Array:
    """Eq. 4 of v = 127.5 (x + 1)."""
    return (x + 1) * (255 / 256) - 1
