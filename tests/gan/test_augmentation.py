"""DiffAugment: each part against all the transformations that it may draw, written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import gan, random
from jaxgen.gan.augmentation import diffaugment

KEY = jax.random.key(0)
BATCH, HEIGHT, WIDTH = 256, 8, 12
X = jax.random.uniform(jax.random.key(1), (BATCH, HEIGHT, WIDTH, 3), minval=-1, maxval=1)
OFF = dict.fromkeys(["brightness", "saturation", "contrast", "translation", "cutout"], 0)


@functools.partial(jax.jit, static_argnames=list(OFF))
def augmented(key, x, **options):
    return diffaugment(key, x, **options)


def only(**options):
    return np.asarray(augmented(KEY, X, **OFF | options), np.float64)


def test_all_parts_off_are_the_identity():
    np.testing.assert_array_equal(only(), X)


def same_numbers(drawn, low, high):
    """Uniform draws: inside, near both ends, of the right mean (five standard errors)."""
    assert low <= drawn.min() < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < drawn.max() <= high
    assert abs(drawn.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * len(drawn))


@pytest.mark.parametrize(
    ("part", "strength", "low", "high"),
    [
        ("saturation", 1, 0, 2),
        ("saturation", 0.5, 0.5, 1.5),
        ("contrast", 0.5, 0.5, 1.5),
        ("contrast", 0.25, 0.75, 1.25),
    ],
)
def test_factors_of_saturation_and_contrast(part, strength, low, high):
    x, y = np.asarray(X, np.float64), only(**{part: strength})
    centre = x.mean(axis=3 if part == "saturation" else (1, 2, 3), keepdims=True)
    factors = np.sum((y - centre) * (x - centre), axis=(1, 2, 3)) / np.sum((x - centre) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(y, centre + factors[:, None, None, None] * (x - centre), atol=1e-6)
    same_numbers(factors, low - 1e-6, high + 1e-6)


def test_brightness_adds_one_number_to_an_image():
    added = only(brightness=0.5) - X
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1, :1], X.shape), atol=1e-6)
    same_numbers(added[:, 0, 0, 0], -0.5 - 1e-6, 0.5 + 1e-6)


def test_one_channel_has_no_saturation():
    np.testing.assert_array_equal(augmented(KEY, X[..., :1], **OFF | {"saturation": 1}), X[..., :1])


def found(images, candidates):
    """Of every image the index of the candidate that it equals bitwise; candidates [count, batch, ...]."""
    equal = np.all(images == candidates, axis=(2, 3, 4))
    assert np.all(np.any(equal, axis=0)), "an image is no candidate"
    return np.argmax(equal, axis=0)


def test_translations_are_the_zero_padded_shifts_and_each_happens():
    x, (down, right) = np.asarray(X), (1, 2)  # 1/8 of 8 is 1, and 1/8 of 12 rounds to 2
    padded = np.pad(x, ((0, 0), (down, down), (right, right), (0, 0)))
    shifts = [(i, j) for i in range(2 * down + 1) for j in range(2 * right + 1)]
    candidates = np.stack([padded[:, i : i + HEIGHT, j : j + WIDTH] for i, j in shifts])
    counts = np.bincount(found(only(translation=0.125), candidates), minlength=len(shifts))
    assert np.all(np.abs(counts - BATCH / 15) < 5 * np.sqrt(BATCH / 15))


def windows(side, cut):
    """The paper's cutouts of one side: the centre is anywhere in the image, what sticks out is lost."""
    for centre in range(side + 1 - cut % 2):
        pixels = np.clip(np.arange(cut) + centre - cut // 2, 0, side - 1)
        yield np.isin(np.arange(side), pixels)


@pytest.mark.parametrize(("ratio", "cuts"), [(0.5, (4, 6)), (0.4, (3, 5))])
def test_cutouts_are_the_papers_rectangles_and_each_happens(ratio, cuts):
    masks = [rows[:, None] & columns for rows in windows(HEIGHT, cuts[0]) for columns in windows(WIDTH, cuts[1])]
    candidates = np.stack([np.where(mask[..., None], 0, X) for mask in masks])
    counts = np.bincount(found(only(cutout=ratio), candidates), minlength=len(masks))
    expected = BATCH / len(masks)
    assert counts.max() < expected + 8 * np.sqrt(expected)
    assert np.mean(counts > 0) > 0.8  # 1 - exp(-256 / 117) = 0.89 of them on average


def test_colours_come_before_the_zeros():
    y = np.asarray(augmented(KEY, jnp.ones_like(X)))
    covered = np.mean(y == 0, axis=(1, 2, 3))
    assert np.all((covered >= 2 * 3 / 96) & (covered < 0.7))  # a corner of the rectangle at least
    for image in y:
        assert len(np.unique(image.round(5))) <= 2  # a constant image is its brightness, or zero


def test_colours_keep_the_mean_on_average():
    y = only(brightness=0.5, saturation=1, contrast=0.5)
    shifts = np.mean(y - X, axis=(1, 2, 3))  # saturation and contrast keep every mean
    assert abs(shifts.mean()) < 5 * 0.5 / np.sqrt(3 * BATCH)


def test_an_example_depends_on_its_key_and_itself_alone():
    y = augmented(KEY, X)
    few = augmented(random.example_keys(KEY, BATCH)[5:7], X[5:7])
    np.testing.assert_allclose(few, y[5:7], atol=1e-6)  # programs of other shapes round otherwise
    np.testing.assert_array_equal(augmented(KEY, X.at[0].set(9.0))[1:], y[1:])


def test_one_key_gives_data_and_samples_the_same_transformations():
    """Then the augmentation is one affine map for both."""
    data, samples = X, jnp.roll(X, 1, axis=0)
    mixed = augmented(KEY, 0.25 * data + 0.75 * samples)
    np.testing.assert_allclose(mixed, 0.25 * augmented(KEY, data) + 0.75 * augmented(KEY, samples), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_dtypes_keep_and_draw_the_same(dtype):
    with jax.enable_x64(True):
        y = augmented(KEY, X.astype(dtype))
    assert y.dtype == dtype
    tolerance = 0.02 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.asarray(y, np.float64), augmented(KEY, X), atol=tolerance)


def test_gradient_penalties_go_through_it():
    """The critic's gradient, and that of R1 by a parameter of the critic, against differences."""
    with jax.enable_x64(True):
        x = X[:2, :6, :6].astype(jnp.float64)
        direction = jax.random.normal(jax.random.key(2), x.shape, jnp.float64)

        @jax.jit
        def evaluated(scale, t):
            """The logits' sum and its slope by t, R1's sum and its slope by the scale."""

            def penalty(scale):
                critic = lambda x: jnp.sum(jnp.sin(scale * diffaugment(KEY, x)), axis=(1, 2, 3))  # noqa: E731
                logits, norms = gan.penalised(critic, x + t * direction)
                return jnp.sum(norms), (jnp.sum(logits), jax.grad(lambda x: jnp.sum(critic(x)))(x + t * direction))

            (norms, (logits, gradient)), slope = jax.value_and_grad(penalty, has_aux=True)(scale)
            return logits, jnp.sum(direction * gradient), norms, slope

        h, (_, along, _, slope) = 1e-5, evaluated(1.5, 0.0)
        by_t = (evaluated(1.5, h)[0] - evaluated(1.5, -h)[0]) / (2 * h)
        by_scale = (evaluated(1.5 + h, 0.0)[2] - evaluated(1.5 - h, 0.0)[2]) / (2 * h)
        np.testing.assert_allclose(along, by_t, rtol=1e-7)
        np.testing.assert_allclose(slope, by_scale, rtol=1e-7)


def test_refusals():
    with pytest.raises(ValueError, match=r"`x` must have shape \[any, any, any, any\], got \[8, 12, 3\]"):
        diffaugment(KEY, X[0])
    with pytest.raises(TypeError, match="`x` must be floating-point"):
        diffaugment(KEY, X.astype(jnp.uint8))
    with pytest.raises(TypeError, match="`key` must be a typed PRNG key"):
        diffaugment(jnp.zeros(2, jnp.uint32), X)
    with pytest.raises(ValueError, match=r"`key` must have shape \[256\], got \[3\]"):
        diffaugment(random.example_keys(KEY, 3), X)
    for name in OFF:
        for bad in (-0.1, np.nan, np.inf):
            with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0, got {bad}"):
                diffaugment(KEY, X, **{name: bad})
    with pytest.raises(ValueError, match=r"`contrast` must be a finite number of at least 0, got .*Tracer"):
        jax.jit(lambda c: diffaugment(KEY, X, contrast=c))(0.5)
    for name in ("translation", "cutout"):
        with pytest.raises(ValueError, match=rf"`{name}` must lie in \[0, 1\], got 1.5"):
            diffaugment(KEY, X, **{name: 1.5})
