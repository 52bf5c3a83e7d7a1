"""Random affine warps of an image, composed first and sampled once.

A pixel q of the image, (row, column) relative to the centre, moves to

    y = R(b) A R(a) s (Q F q + n) + t                                                                   (1)

in the order of Karras et al. 2020 (arXiv:2006.06676, appendix B): F mirrors columns, Q turns by right angles, n is a
translation by whole pixels; s scales, R(a) rotates, A = diag(1 / r, r) stretches columns by r and rows by 1 / r, R(b)
rotates again, and t translates. Rotations are counterclockwise. What is seen at y thus comes from

    q = M (y - t) - F Q' n,    M = F Q' R(-a) A^-1 R(-b) / s                                            (2)

(Q' the inverse turn), between pixels by bilinear interpolation. Outside of its frame the image is its own mirror image
in its outermost pixels, without end: a constant image stays constant. F and Q are matrices of exact integers and the
identity is exact in every other factor, so that mirrors, right angles and whole translations of square images move
pixels without touching their values.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from jaxgen.typing import Array, Key


class Geometry(NamedTuple):
    """One warp, Eq. 1.

    Attributes:
        flip: 1 where columns are mirrored, else 0.
        turns: the number of right angles, 0 to 3.
        steps: [2], n in pixels, integers.
        scale: s; above 1 the image grows.
        before: a in radians.
        stretch: r.
        after: b in radians.
        shift: [2], t in pixels.
    """

    flip: Array
    turns: Array
    steps: Array
    scale: Array
    before: Array
    stretch: Array
    after: Array
    shift: Array


def draw_geometry(
    key: Key,
    probability: Array,
    sides: Sequence[int],
    *,
    flip: bool,
    quarter_turns: bool,
    integer_translation: float,
    scale: float,
    rotation: float,
    stretch: float,
    translation: float,
) -> Geometry:
    """Draws the warp of an image of ``sides`` (height, width), each part with a probability, else its identity.

    The strengths are those of `jaxgen.gan.ada`. The two rotations share the probability: one of them or both happen
    with it. A strength leaves the draws of the other parts as they are.
    """
    uniform_key, normal_key = jax.random.split(key)
    u = jax.random.uniform(uniform_key, (14,), jnp.float32)
    n = jax.random.normal(normal_key, (4,), jnp.float32)
    half = 1 - jnp.sqrt(1 - probability)
    chances = jnp.stack([probability] * 6 + [half] * 2)
    happens = (u[6:] < chances).astype(jnp.float32)
    flipped, turned, stepped, scaled, stretched, shifted, before, after = happens
    pixels = jnp.array(sides, jnp.float32)
    return Geometry(
        flip=flip * flipped * jnp.floor(2 * u[0]),
        turns=(quarter_turns * turned * jnp.floor(4 * u[1])).astype(jnp.int32),
        steps=jnp.round(stepped * integer_translation * pixels * (2 * u[2:4] - 1)),
        scale=jnp.exp2(scaled * scale * n[0]),
        before=before * rotation * (2 * u[4] - 1),
        stretch=jnp.exp2(stretched * stretch * n[1]),
        after=after * rotation * (2 * u[5] - 1),
        shift=shifted * translation * pixels * n[2:],
    )


def warp(image: Array, geometry: Geometry) -> Array:
    """Warps an image by Eq. 2; linear in the image.

    Args:
        image: [height, width, channels], floating.
        geometry: the warp.

    Returns:
        [height, width, channels].
    """
    # Coordinates in bfloat16, which accelerators may make of a product of matrices, would miss by pixels.
    product = functools.partial(jnp.matmul, precision="highest")
    cosine, sine = jnp.array([[1.0, 0, -1, 0], [0, 1, 0, -1]])[:, geometry.turns]
    blit = jnp.array([[1], [1 - 2 * geometry.flip]]) * _back(cosine, sine)
    inner = _back(jnp.cos(geometry.before), jnp.sin(geometry.before)) / geometry.scale
    outer = _back(jnp.cos(geometry.after), jnp.sin(geometry.after))
    matrix = product(product(blit, inner), jnp.array([[geometry.stretch], [1 / geometry.stretch]]) * outer)
    offset = -product(matrix, geometry.shift) - product(blit, geometry.steps)

    centre = [(side - 1) / 2 for side in image.shape[:2]]
    row, column = (jnp.arange(image.shape[i], dtype=image.dtype) - centre[i] for i in range(2))
    rows, columns = (matrix[i, 0] * row[:, None] + matrix[i, 1] * column + (offset[i] + centre[i]) for i in range(2))
    sample = functools.partial(map_coordinates, coordinates=[rows, columns], order=1, mode="mirror")
    return jax.vmap(sample, in_axes=2, out_axes=2)(image)


def _back(cosine: Array, sine: Array) -> Array:
    """R(-angle)."""
    return jnp.array([[cosine, sine], [-sine, cosine]])
