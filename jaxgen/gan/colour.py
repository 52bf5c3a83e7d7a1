"""Random affine maps of a pixel's channels that treat the grey axis and what is orthogonal to it apart.

With m the mean of a pixel's channels (its luma) and d = x - m its colour, all of brightness b, contrast c, the flip
f = -1 or 1 of the luma, the rotation R(h) of the hue about the grey axis and saturation s, in this order the maps

    x + b,   c x,   f m + d,   m + R(h) d,   m + s d                                                    (1)

of Karras et al. 2020 (arXiv:2006.06676, appendix B), compose to y = f c (m + b) + c s R(h) d. Of three channels
R(h) d = d cos h + [v, d] sin h with the cross product by v = (1, 1, 1) / sqrt(3), and [v, d] = [v, x], hence

    y = p x + q m + r [v, x] + f c b,    p = c s cos h,   q = f c - p,   r = c s sin h                  (2)

which is the identity exactly where every part is: p = 1, q = r = 0. Any number of channels but three has no hue; one
channel is all luma, so that its flip is the negative and its saturation the identity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.typing import Array, Key


class Colour(NamedTuple):
    """One map of colours, Eq. 1; all scalars.

    Attributes:
        brightness: b.
        contrast: c.
        luma: f, 1 or -1.
        hue: h in radians.
        saturation: s.
    """

    brightness: Array
    contrast: Array
    luma: Array
    hue: Array
    saturation: Array


def draw_colour(
    key: Key,
    probability: Array,
    *,
    brightness: float,
    contrast: float,
    luma_flip: bool,
    hue: float,
    saturation: float,
) -> Colour:
    """Draws a map of colours, each part with a probability, else its identity.

    The strengths are those of `jaxgen.gan.ada`. A strength leaves the draws of the other parts as they are.
    """
    uniform_key, normal_key = jax.random.split(key)
    u = jax.random.uniform(uniform_key, (7,), jnp.float32)
    n = jax.random.normal(normal_key, (3,), jnp.float32)
    brightened, contrasted, flipped, turned, saturated = (u[2:] < probability).astype(jnp.float32)
    return Colour(
        brightness=brightened * brightness * n[0],
        contrast=jnp.exp2(contrasted * contrast * n[1]),
        luma=1 - 2 * luma_flip * flipped * jnp.floor(2 * u[0]),
        hue=turned * hue * (2 * u[1] - 1),
        saturation=jnp.exp2(saturated * saturation * n[2]),
    )


def recolour(image: Array, colour: Colour) -> Array:
    """Maps the colours of an image by Eq. 2.

    Args:
        image: [..., channels], floating; ``colour.hue`` counts where there are three.
        colour: the map.

    Returns:
        [..., channels].
    """
    level = colour.luma * colour.contrast
    spread = colour.contrast * colour.saturation
    if image.shape[-1] == 3:
        along, across = spread * jnp.cos(colour.hue), spread * jnp.sin(colour.hue)
        crossed = (jnp.roll(image, 1, axis=-1) - jnp.roll(image, -1, axis=-1)) / jnp.sqrt(3.0).astype(image.dtype)
        turned = along * image + across * crossed
    else:
        along, turned = spread, spread * image
    mean = jnp.mean(image, axis=-1, keepdims=True)
    return turned + (level - along) * mean + level * colour.brightness
