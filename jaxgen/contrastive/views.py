"""Random views of images, drawn on the device: SimCLR's (Chen et al. 2020, arXiv:2002.05709, appendix A).

With pixels y in [0, 1], g the grey of a pixel and s the ``strength``, every image goes through, in this order,

    crop         a window of a parts of the area and r times the frame's width : height,
                 stretched to the frame     a uniform in [area, 1], log r uniform in +- log aspect          (1)
    flip         left and right exchanged   with probability ``flip``                                       (2)
    jitter       with probability ``jitter`` Eqs. 3-6, the pixels clipped to [0, 1] after each
    brightness   b y                        b uniform in 1 +- 0.8 s, not below 0, like c and t              (3)
    contrast     m + c (y - m)              c uniform in 1 +- 0.8 s, m the image's mean of g                (4)
    saturation   g + t (y - g)              t uniform in 1 +- 0.8 s                                         (5)
    hue          turned by h circles        h uniform in +- 0.2 s                                           (6)
    grey         g in all channels          with probability ``grey``                                       (7)
    blur         with probability ``blur`` a Gaussian of deviation sigma uniform in [0.1, 2] pixels,
                 cut off beyond 1/20 of the height, but not within a pixel                                  (8)

The paper writes the colours down twice, for two frameworks. From the first is the order, which stays the same: one that
is shuffled would have a compiled program compute all 24 of them for every image. From the second is the brightness as a
factor: as a sum it turns whole images white. Of our own are windows between pixels, proportions to the frame's (square
images do not tell), and blurs that repeat the border where the paper's darkens it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks, random
from jaxgen.typing import Array, Key

_TRIES = 10


def random_view(
    key: Key,
    x: Array,
    *,
    area: float = 0.08,
    aspect: float = 4 / 3,
    flip: float = 0.5,
    jitter: float = 0.8,
    strength: float = 1.0,
    grey: float = 0.2,
    blur: float = 0.5,
) -> Array:
    """Draws a random view of every image, Eqs. 1-8, for losses that compare two of them.

    ``first, second = (random_view(half, x) for half in jax.random.split(key))``, within the compiled step. Where pmap
    or shard_map split the batch, give it `random.example_keys` of ``half`` with the ``axis_name``.

    The defaults are the paper's for ImageNet; for CIFAR-10 it has ``strength=0.5, blur=0`` (appendix B.9). Digits and
    text, say, want ``area=0.5, flip=0, strength=0.5, blur=0``.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``.
        x: [batch, height, width, channels] in [-1, 1], floating. Grey is the luma of three channels, else their mean;
            any other number than three has no hue. One channel is grey: of its colours it has brightness and contrast.
        area: the smallest part of the image that a window has, in (0, 1]; 1 switches the crop off.
        aspect: the most by which a window's width grows against its height, or the reverse, at least 1.
        flip: a probability, as are those below; 0 switches a part off.
        jitter: the probability of Eqs. 3-6, all together.
        strength: s of Eqs. 3-6, at least 0; 0 switches them off.
        grey: the probability of Eq. 7.
        blur: the probability of Eq. 8.

    Returns:
        [batch, height, width, channels] in [-1, 1] but for rounding, in the dtype of ``x``.

    Raises:
        ValueError: ``x`` is not of rank 4, or an option is no number in its range, known while tracing.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> x = jnp.zeros((2, 8, 8, 3))
    >>> view = jax.jit(random_view)
    >>> first, second = (view(half, x) for half in jax.random.split(jax.random.key(0)))
    >>> first.shape
    (2, 8, 8, 3)
    """
    _check_number("area", area, 0, 1)
    checks.positive("area", area)
    _check_number("aspect", aspect, 1, math.inf)
    _check_number("strength", strength, 0, math.inf)
    for name, probability in (("flip", flip), ("jitter", jitter), ("grey", grey), ("blur", blur)):
        _check_number(name, probability, 0, 1)

    def view(key: Key, image: Array) -> Array:
        # All at once, since every call would be compiled anew; each part has its own, whatever the options.
        u = jax.random.uniform(key, (11 + 2 * _TRIES,), jnp.float32)
        if area < 1:
            image = _cropped(image, u[11:].reshape(2, _TRIES), u[9:11], area, aspect)
        if flip:
            image = jnp.where(u[0] < flip, image[:, ::-1], image)
        if jitter and strength:
            image = jnp.where(u[1] < jitter, _jittered(image, u[4:8], strength), image)
        if grey:
            image = jnp.where(u[2] < grey, _grey(image), image)
        if blur:
            image = jnp.where(u[3] < blur, _blurred(image, u[8]), image)
        return image

    return random.per_image(view, key, x)


def _cropped(image: Array, sizes: Array, place: Array, area: float, aspect: float) -> Array:
    """Eq. 1: of ten windows the first that fits into the image; else all of it, once in 3 x 10^8 by default."""
    parts, stretches = area + (1 - area) * sizes[0], math.log(aspect) * (2 * sizes[1] - 1)
    sides = jnp.sqrt(parts * jnp.exp(jnp.stack([-stretches, stretches])))  # of the frame's height and width
    fits = jnp.all(sides <= 1, axis=0)
    side = jnp.where(jnp.any(fits), sides[:, jnp.argmax(fits)], 1)
    shift = (1 / side - 1) * place * jnp.array(image.shape[:2], jnp.float32)
    return jax.image.scale_and_translate(image, image.shape, (0, 1), 1 / side, -shift, "linear")


def _jittered(image: Array, u: Array, strength: float) -> Array:
    """Eqs. 3-6."""
    low, high = max(0, 1 - 0.8 * strength), 1 + 0.8 * strength
    b, c, t = low + (high - low) * u[:3]
    y = jnp.clip(b * (image + 1) / 2, 0, 1)
    mean = jnp.mean(_grey(y))
    y = jnp.clip(mean + c * (y - mean), 0, 1)
    g = _grey(y)
    y = jnp.clip(g + t * (y - g), 0, 1)
    if y.shape[-1] == 3:
        y = _turned(y, 0.2 * strength * (2 * u[3] - 1))
    return 2 * y - 1


def _grey(image: Array) -> Array:
    """A pixel's luma (ITU-R BT.601) of three channels, else their mean, in all channels."""
    channels = image.shape[-1]
    weights = jnp.array([0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels, image.dtype)
    return jnp.broadcast_to(jnp.sum(weights * image, axis=-1, keepdims=True), image.shape)


def _turned(y: Array, circles: Array) -> Array:
    """Eq. 6: HSV's hue turned, its value and chroma kept.

    With the hue in sixths of a circle, red, green and blue are, for n = 5, 3 and 1,

        value - chroma max(0, min(k, 4 - k, 1)),    k = (hue + n) mod 6.
    """
    red, green, blue = y[..., 0], y[..., 1], y[..., 2]
    value = jnp.max(y, axis=-1)
    chroma = value - jnp.min(y, axis=-1)
    divisor = jnp.where(chroma > 0, chroma, 1)
    hue = jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = jnp.where(value == red, (green - blue) / divisor, hue)
    k = jnp.mod((hue + 6 * circles)[..., None] + jnp.array([5, 3, 1], y.dtype), 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def _blurred(image: Array, u: Array) -> Array:
    """Eq. 8: rows, then columns; the border repeats."""
    radius = max(1, image.shape[0] // 20)
    sigma = 0.1 + 1.9 * u
    kernel = jax.nn.softmax(-((jnp.arange(-radius, radius + 1) / sigma) ** 2) / 2).astype(image.dtype)
    for axis in (0, 1):
        pads = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
        padded, side = jnp.pad(image, pads, mode="edge"), image.shape[axis]
        shifted = (jax.lax.slice_in_dim(padded, i, i + side, axis=axis) for i in range(2 * radius + 1))
        image = sum((weight * part for weight, part in zip(kernel, shifted, strict=True)), jnp.zeros_like(image))
    return image


def _check_number(name: str, number: float, low: float, high: float) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float | np.number):
        raise ValueError(f"`{name}` must be a number, known while tracing, got {number!r}")
    checks.finite(name, number)
    checks.interval(name, number, low, high)
