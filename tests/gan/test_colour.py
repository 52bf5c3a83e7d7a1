"""Maps of colours against the paper's homogeneous matrices in NumPy, and what they leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import random
from jaxgen.gan.colour import Colour, draw_colour, recolour

X = jax.random.uniform(jax.random.key(1), (6, 8, 8, 3), minval=-1, maxval=1)
PLAIN = Colour(0.0, 1.0, 1, 0.0, 1.0)


def paper_colours(c):
    """The 4 x 4 matrix of (red, green, blue, 1) by the pseudocode of appendix B; the hue by Rodrigues' formula."""
    v = np.array([1, 1, 1, 0]) / np.sqrt(3)
    luma, identity = np.outer(v, v), np.eye(4)
    cross = np.zeros((4, 4))
    cross[:3, :3] = np.cross(v[:3], np.eye(3)).T  # column i is v x e_i
    brightness = identity.copy()
    brightness[:3, 3] = c.brightness
    steps = [
        brightness,
        np.diag([c.contrast] * 3 + [1]),
        identity - (1 - c.luma) * luma,
        identity + np.sin(c.hue) * cross + (1 - np.cos(c.hue)) * cross @ cross,
        luma + (identity - luma) * c.saturation,
    ]
    matrix = functools.reduce(lambda matrix, step: step @ matrix, steps)
    matrix[3] = [0, 0, 0, 1]
    return matrix


def test_colours_are_the_papers_matrices():
    draw = functools.partial(
        draw_colour, brightness=0.2, contrast=0.5, luma_flip=True, hue=np.pi, saturation=1.0, probability=1.0
    )
    colours = jax.tree.map(np.float64, jax.vmap(draw)(random.example_keys(jax.random.key(0), 40)))
    image = np.asarray(X[0], np.float64)
    with jax.enable_x64(True):
        for c in (Colour(*values) for values in zip(*colours, strict=True)):
            expected = image @ paper_colours(c)[:3, :3].T + paper_colours(c)[:3, 3]
            np.testing.assert_allclose(recolour(jnp.asarray(image), c), expected, atol=1e-12)


def test_hue_and_saturation_leave_grey_and_the_luma():
    grey = jnp.broadcast_to(X[..., :1], X.shape)
    for c in (PLAIN._replace(hue=1.2), PLAIN._replace(saturation=3.0), PLAIN._replace(hue=-2.0, saturation=0.1)):
        np.testing.assert_allclose(recolour(grey, c), grey, atol=1e-6)
        np.testing.assert_allclose(jnp.mean(recolour(X, c), -1), jnp.mean(X, -1), atol=1e-6)


def test_flips_of_the_luma_undo_themselves_and_no_saturation_is_grey():
    flip = PLAIN._replace(luma=-1)
    once = recolour(X, flip)
    np.testing.assert_allclose(jnp.mean(once, -1), -jnp.mean(X, -1), atol=1e-6)
    np.testing.assert_allclose(recolour(once, flip), X, atol=1e-6)
    means = jnp.broadcast_to(jnp.mean(X, -1, keepdims=True), X.shape)
    np.testing.assert_allclose(recolour(X, PLAIN._replace(saturation=0.0)), means, atol=1e-6)


def test_a_third_of_a_turn_of_the_hue_permutes_the_channels():
    np.testing.assert_allclose(
        recolour(X, PLAIN._replace(hue=2 * np.pi / 3)), jnp.roll(X, 1, axis=-1), atol=1e-6
    )  # red -> green -> blue


def test_other_numbers_of_channels():
    one, four = X[..., :1], jnp.concatenate([X, X[..., :1]], -1)
    coloured = PLAIN._replace(hue=1.0, saturation=2.0)
    np.testing.assert_allclose(recolour(one, coloured), one, atol=1e-6)
    np.testing.assert_allclose(recolour(one, PLAIN._replace(luma=-1)), -one, atol=1e-6)
    mean = jnp.mean(four, -1, keepdims=True)
    np.testing.assert_allclose(recolour(four, coloured), mean + 2 * (four - mean), atol=1e-6)
