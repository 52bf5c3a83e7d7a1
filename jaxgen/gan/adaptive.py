"""Adaptive discriminator augmentation: transformations with a probability that follows the overfitting.

After ADA (Karras et al. 2020, "Training generative adversarial networks with limited data", arXiv:2006.06676). Each of
many transformations happens to an image with probability p. While the untouched image stays likely enough, T(samples)
is distributed as T(data) only where the samples are as the data, and no augmentation leaks into the samples; in
practice, the paper finds, while p is below 0.8.

How much a data set needs, training tells: the more the discriminator overfits, the more of its logits of the data are
positive. With r the mean sign of D(T(x)) over the B images of a step, and N images for the whole way from 0 to 1,

    p <- clip(p + sign(r - target) B / N, 0, 1)                                                         (1)

(section 3.1; the paper averages r over four steps and then moves p for all four).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.gan.augmentation import check_strengths
from jaxgen.gan.colour import draw_colour, recolour
from jaxgen.gan.geometry import draw_geometry, warp
from jaxgen.typing import Array, ArrayLike, Key


def ada(
    key: Key,
    x: Array,
    probability: ArrayLike,
    *,
    flip: bool = True,
    quarter_turns: bool = True,
    integer_translation: float = 0.125,
    scale: float = 0.2,
    rotation: float = math.pi,
    stretch: float = 0.2,
    translation: float = 0.125,
    brightness: float = 0.2,
    contrast: float = 0.5,
    luma_flip: bool = True,
    hue: float = math.pi,
    saturation: float = 1.0,
) -> Array:
    """Blits, warps and recolours images, each part of it with a probability: the paper's 'bgc' and its strengths.

    Every option is the strength of one part in the part's own unit, and 0 or False switches it off. Digits and text,
    say, want ``flip=False, quarter_turns=False, rotation=0.2, luma_flip=False``. Affine in ``x``, so that gradient
    penalties go through it: ``critic = lambda x: apply(params, ada(key, x, probability))``. At probability 0 it is
    exactly the identity. The same ``key`` gives data and samples the same transformations.

    Departures from the paper: bilinear interpolation in place of resampling by a wavelet's filter at twice the
    resolution, so that warped images are a little softer, data and samples alike; and the mirrored border has no end.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``.
        x: [batch, height, width, channels] in [-1, 1], floating. One channel has no hue and saturation, and its luma
            flip is the negative; any other number than three has no hue.
        probability: scalar in [0, 1], of every part; may be traced, and one program serves all values.
        flip: left and right are exchanged, in half of the cases.
        quarter_turns: 0 to 3 right angles; an image that is not square is cropped and mirrored to its frame.
        integer_translation: the largest, in parts of the side; uniform, rounded to whole pixels.
        scale: the standard deviation of log2 of the scale.
        rotation: the largest angle in radians, uniform to both sides, once before and once after the stretch.
        stretch: the standard deviation of log2 of the factor by which the width grows and the height shrinks.
        translation: the standard deviation in parts of the side; normal, not rounded.
        brightness: the standard deviation of what is added.
        contrast: the standard deviation of log2 of the factor.
        luma_flip: the luma becomes its negative, the colours stay, in half of the cases.
        hue: the largest angle in radians, uniform to both sides.
        saturation: the standard deviation of log2 of the factor of the colours.

    Returns:
        [batch, height, width, channels] in the dtype of ``x``; colours may leave [-1, 1].

    Raises:
        ValueError: ``x`` is not of rank 4, ``probability`` is no scalar in [0, 1], a strength is no finite number of at
            least 0, or a switch no bool.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> x = jnp.linspace(-1, 1, 48).reshape(1, 4, 4, 3)
    >>> bool(jnp.all(ada(jax.random.key(0), x, 0.0) == x))
    True
    """
    geometry: dict[str, Any] = {
        "flip": flip,
        "quarter_turns": quarter_turns,
        "integer_translation": integer_translation,
        "scale": scale,
        "rotation": rotation,
        "stretch": stretch,
        "translation": translation,
    }
    colour: dict[str, Any] = {
        "brightness": brightness,
        "contrast": contrast,
        "luma_flip": luma_flip,
        "hue": hue,
        "saturation": saturation,
    }
    check_strengths(**geometry, **colour)
    for name, switch in (("flip", flip), ("quarter_turns", quarter_turns), ("luma_flip", luma_flip)):
        if not isinstance(switch, bool):
            raise ValueError(f"`{name}` must be True or False, got {switch!r}")
    _check_probability(probability)
    chance = jnp.asarray(probability, jnp.float32)

    def augment(key: Key, image: Array) -> Array:
        geometry_key, colour_key = jax.random.split(key)
        if any(geometry.values()):
            image = warp(image, draw_geometry(geometry_key, chance, x.shape[1:3], **geometry))
        if any(colour.values()):
            image = recolour(image, draw_colour(colour_key, chance, **colour))
        return image

    return random.per_image(augment, key, x)


def adapt_probability(
    probability: ArrayLike,
    sign: ArrayLike,
    *,
    batch_size: int,
    images: int = 500_000,
    target: float = 0.6,
) -> Array:
    """The probability of `ada` for the next step, Eq. 1: up by B / N where overfitting exceeds its target, else down.

    Only a loss that ties D(x) to 0 gives its sign a meaning. `relativistic` and `wasserstein` leave D a free constant:
    take the sign of D(x) - D(y) there, of data and samples that a step has paired anyway.

    Args:
        probability: scalar in [0, 1], this step's; carry it as state, from 0.
        sign: r, scalar in [-1, 1], the step's ``mean(sign(real_logits))`` of augmented data.
        batch_size: B, the data of a step over all devices.
        images: N, after how many the probability can have crossed from 0 to 1.
        target: in [-1, 1]; 0.6 is the paper's.

    Returns:
        A scalar in [0, 1], in the dtype of ``probability``, float32 at least.

    Raises:
        ValueError: ``probability``, ``sign`` or ``target`` is no scalar in its range, or ``batch_size`` or
            ``images`` is not an integer of at least 1.

    >>> adapt_probability(0.5, jnp.mean(jnp.sign(jnp.array([3.0, 2.0, 1.0]))), batch_size=64, images=256)
    Array(0.75, dtype=float32)
    """
    _check_probability(probability)
    for name, value in (("sign", sign), ("target", target)):
        checks.shape(name, value, ())
        checks.interval(name, value, -1, 1)
    checks.positive_integer("batch_size", batch_size)
    checks.positive_integer("images", images)
    dtype = jnp.promote_types(jnp.result_type(probability), jnp.float32)
    step = batch_size / images * jnp.sign(jnp.asarray(sign, dtype) - target)
    return jnp.clip(jnp.asarray(probability, dtype) + step, 0, 1)


def _check_probability(probability: ArrayLike) -> None:
    checks.shape("probability", probability, ())
    checks.interval("probability", probability, 0, 1)
