"""Augmentation of all that a discriminator sees: differentiable, since the generator learns through it.

With T a random transformation of an image, a discriminator that sees T(x) alone compares T(data) with T(samples): a
small data set is harder to learn by heart, and where the distribution of T(x) determines that of x the optimum stays.

DiffAugment (Zhao et al. 2020, arXiv:2006.10738) draws all of these for every image, in this order:

    brightness     x + b                       b uniform in [-1/2, 1/2]                                 (1)
    saturation     g + s (x - g)               s uniform in [0, 2], g the mean of a pixel's channels    (2)
    contrast       m + c (x - m)               c uniform in [1/2, 3/2], m the mean of the image         (3)
    translation    by whole pixels             up to 1/8 of each side, zeros move in                    (4)
    cutout         a rectangle becomes zeros   1/2 of each side, its centre anywhere in the image       (5)

``adaptive`` has the one whose probability follows the overfitting.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks, random
from jaxgen.typing import Array, Key


def diffaugment(
    key: Key,
    x: Array,
    *,
    brightness: float = 0.5,
    saturation: float = 1.0,
    contrast: float = 0.5,
    translation: float = 0.125,
    cutout: float = 0.5,
) -> Array:
    """DiffAugment, Eqs. 1-5: colours, translation and cutout of every image.

    Affine in ``x``, so that gradient penalties go through it. The same ``key`` gives data and samples the same
    transformations.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``.
        x: [batch, height, width, channels] in [-1, 1], floating; of one channel the saturation is the identity.
        brightness: the largest |b| of Eq. 1; 0 switches a part off, here as below.
        saturation: the largest |s - 1| of Eq. 2.
        contrast: the largest |c - 1| of Eq. 3.
        translation: the largest shift of Eq. 4 in parts of the side, in [0, 1].
        cutout: the sides of the rectangle of Eq. 5 in parts of the image's, in [0, 1].

    Returns:
        [batch, height, width, channels] in the dtype of ``x``; colours may leave [-1, 1].

    Raises:
        ValueError: ``x`` is not of rank 4, or an option is no finite number in its range.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> diffaugment(jax.random.key(0), jnp.ones((2, 8, 8, 3)), brightness=0, translation=0, cutout=0.5).min()
    Array(0., dtype=float32)
    """
    check_strengths(
        brightness=brightness, saturation=saturation, contrast=contrast, translation=translation, cutout=cutout
    )
    checks.interval("translation", translation, 0, 1)
    checks.interval("cutout", cutout, 0, 1)

    def augment(key: Key, image: Array) -> Array:
        colour_key, translation_key, cutout_key = jax.random.split(key, 3)
        b, s, c = jax.random.uniform(colour_key, (3,), jnp.float32, -1, 1)
        image = image + brightness * b
        image = image + saturation * s * (image - jnp.mean(image, axis=2, keepdims=True))
        image = image + contrast * c * (image - jnp.mean(image))
        return _cut_out(cutout_key, _translated(translation_key, image, translation), cutout)

    return random.per_image(augment, key, x)


def _translated(key: Key, image: Array, ratio: float) -> Array:
    """Eq. 4."""
    most = [_rounded(ratio * side) for side in image.shape[:2]] + [0]
    start = jax.random.randint(key, (3,), 0, 2 * jnp.array(most, jnp.int32) + 1, jnp.int32)
    return jax.lax.dynamic_slice(jnp.pad(image, [(n, n) for n in most]), start, image.shape)


def _cut_out(key: Key, image: Array, ratio: float) -> Array:
    """Eq. 5: a rectangle of ``cut`` pixels a side, of which the image's border may hide a half."""

    def inside(key: Key, side: int) -> Array:
        cut = _rounded(ratio * side)
        # One more position where the cut is even, so that both borders hide equally much.
        first = jax.random.randint(key, (), 0, side + 1 - cut % 2, jnp.int32) - cut // 2
        pixels = jnp.arange(side)
        return (pixels >= first) & (pixels < first + cut)

    row_key, column_key = jax.random.split(key)
    rows, columns = inside(row_key, image.shape[0]), inside(column_key, image.shape[1])
    return jnp.where((rows[:, None] & columns)[..., None], 0, image)


def _rounded(pixels: float) -> int:
    return math.floor(pixels + 0.5)


def check_strengths(**strengths: float) -> None:
    """Raises ValueError, by name, unless every strength is a finite number of at least 0, known while tracing."""
    for name, strength in strengths.items():
        if not isinstance(strength, int | float | np.number) or not 0 <= strength < math.inf:
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {strength!r}")
