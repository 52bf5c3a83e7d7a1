"""SimCLR's views: what each part drew is read off test images; PIL and loops in NumPy do the same to other images."""

import colorsys
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from jaxgen import random
from jaxgen.contrastive.views import random_view

KEY = jax.random.key(0)
BATCH, HEIGHT, WIDTH = 256, 10, 14
X = np.random.default_rng(0).uniform(-1, 1, (BATCH, HEIGHT, WIDTH, 3))
OFF = {"area": 1, "flip": 0, "jitter": 0, "grey": 0, "blur": 0}
PARTS = [{"area": 0.08}, {"flip": 0.5}, {"jitter": 0.8}, {"grey": 0.2}, {"blur": 0.5}]  # in their order

compiled = functools.partial(jax.jit, static_argnames=["area", "aspect", "flip", "jitter", "strength", "grey", "blur"])
viewed = compiled(random_view)


def only(x, **options):
    with jax.enable_x64(True):
        return np.asarray(viewed(KEY, jnp.broadcast_to(jnp.asarray(x), (BATCH, *np.shape(x)[-3:])), **OFF | options))


def assert_distributed(drawn, distribution):
    assert stats.kstest(drawn, distribution).pvalue > 1e-3


def uniform(low, high):
    return stats.uniform(low, high - low).cdf


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"jitter": 1, "strength": 0}])
def test_all_parts_off_are_the_identity(channels, options):
    np.testing.assert_array_equal(only(X[..., :channels], **options), X[..., :channels])


def windows(**options):
    """What the crops drew, in parts of the sides: the upper left corners [batch, 2] and the sides [batch, 2].

    Between pixels, a ramp tells where each pixel came from.
    """
    rows, columns = np.meshgrid((np.arange(40) + 0.5) / 40, (np.arange(50) + 0.5) / 50, indexing="ij")
    seen = only(np.stack([rows, columns], axis=-1), **options)[:, [10, 30], [10, 40]]
    sides = (seen[:, 1] - seen[:, 0]) / [20 / 40, 30 / 50]
    return seen[:, 0] - sides * [10.5 / 40, 10.5 / 50], sides


def test_crops_are_pils():
    (corners, sides), y = windows(area=0.08), only(X, area=0.08)
    for image, cropped, corner, side in zip(X[:64], y, corners, sides, strict=False):
        top, left, bottom, right = np.clip([*corner, *(corner + side)], 0, 1) * [HEIGHT, WIDTH, HEIGHT, WIDTH]
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            expected = plane.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
            np.testing.assert_allclose(cropped[..., channel], expected, atol=1e-4)


@pytest.mark.parametrize(("area", "aspect"), [(0.08, 4 / 3), (0.5, 1), (0.3, 2)])
def test_windows_are_drawn_as_the_paper_says(area, aspect):
    corners, sides = windows(area=area, aspect=aspect)
    assert np.all(corners > -1e-5)
    assert np.all(corners + sides < 1 + 1e-5)
    a, r = np.random.default_rng(1).uniform([area, -1], [1, 1], (200_000, 2)).T
    r = r * math.log(aspect)
    fits = (a * np.exp(r) <= 1) & (a * np.exp(-r) <= 1)
    areas, stretches = np.prod(sides, axis=1), np.log(sides[:, 1] / sides[:, 0])
    assert stats.ks_2samp(areas, a[fits]).pvalue > 1e-3
    if aspect == 1:
        np.testing.assert_allclose(stretches, 0, atol=1e-4)
    else:
        assert stats.ks_2samp(stretches, r[fits]).pvalue > 1e-3
    small = np.all(sides < 0.99, axis=1)
    for axis in range(2):
        assert_distributed((corners / (1 - sides))[small, axis], uniform(0, 1))


def count_is(happened, probability):
    deviation = np.sqrt(len(happened) * probability * (1 - probability))
    assert abs(np.sum(happened) - len(happened) * probability) <= 4 * deviation


def happened(y, image, changed):
    """Whether each image is the changed one; else it must be itself."""
    same, other = (np.max(np.abs(y - z), axis=(1, 2, 3)) for z in (image, changed))
    assert np.all(np.minimum(same, other) < 1e-6)
    return other < same


@pytest.mark.parametrize("probability", [0.5, 0.1, 1])
def test_flips_mirror_columns(probability):
    count_is(happened(only(X, flip=probability), X, X[:, :, ::-1]), probability)


@pytest.mark.parametrize("probability", [0.2, 1])
def test_grey_is_the_luma_in_all_channels(probability):
    luma = np.repeat(X @ [[0.299], [0.587], [0.114]], 3, axis=3)
    count_is(happened(only(X, grey=probability), X, luma), probability)


def test_grey_of_other_numbers_of_channels():
    np.testing.assert_array_equal(only(X[..., :1], grey=1), X[..., :1])
    np.testing.assert_allclose(only(X[..., :2], grey=1), X[..., :2].mean(3, keepdims=True).repeat(2, 3), atol=1e-6)


def factors(strength):
    """Brightness, contrast, saturation and hue that were drawn, read off images which they do not clip."""

    def jittered(*pixels):
        """Of two pixels, each half of the image, as colours in [0, 1]."""
        image = np.repeat(np.array(pixels)[None], 2, axis=0)
        return (only(2 * image - 1, jitter=1, strength=strength)[:, 0] + 1) / 2

    grey = np.full(3, 0.3)
    b = jittered(grey, grey)[:, 0, 0] / 0.3
    light, dark = np.moveaxis(jittered(grey + 0.01, grey - 0.01), 1, 0)[..., 0]
    c = (light - dark) / (0.02 * b)
    colours = jittered([0.31, 0.3, 0.3], [0.31, 0.3, 0.3])[:, 0]
    hues, saturations, values = np.transpose([colorsys.rgb_to_hsv(*colour) for colour in colours])
    t = saturations * values / (0.01 * b)  # contrast leaves an image of one colour as it is but for its chroma
    return b, c, t / c, (hues + 0.5) % 1 - 0.5


def jittered_in_loops(image, b, c, t, h):
    """In colours from 0 to 1, pixel by pixel."""
    luma = [0.299, 0.587, 0.114]
    y = np.clip(b * (image + 1) / 2, 0, 1)
    mean = np.mean([pixel @ luma for row in y for pixel in row])
    y = np.clip(mean + c * (y - mean), 0, 1)
    for row in y:
        for pixel in row:
            pixel[:] = np.clip(pixel @ luma + t * (pixel - pixel @ luma), 0, 1)
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            pixel[:] = colorsys.hsv_to_rgb((hue + h) % 1, saturation, value)
    return 2 * y - 1


@pytest.mark.parametrize("strength", [1, 0.5])
def test_colours_are_the_papers_in_its_first_order(strength):
    drawn = factors(strength)
    for factor in drawn[:3]:
        assert_distributed(factor, uniform(1 - 0.8 * strength, 1 + 0.8 * strength))
    assert_distributed(drawn[3], uniform(-0.2 * strength, 0.2 * strength))
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 5 / np.sqrt(BATCH)
    y = only(X, jitter=1, strength=strength)
    for i in range(16):
        np.testing.assert_allclose(y[i], jittered_in_loops(X[i], *np.array(drawn)[:, i]), atol=1e-5)


def test_factors_of_great_strength_are_not_negative():
    grey = np.full((2, 2, 3), -0.5)  # 0.25 from 0 to 1
    assert_distributed((only(grey, jitter=1, strength=2)[:, 0, 0, 0] + 1) / 0.5, uniform(0, 2.6))


def test_jitter_happens_with_its_probability():
    y, always = only(X, jitter=0.8), only(X, jitter=1)
    count_is(happened(y, X, always), 0.8)


def test_one_channel_has_brightness_and_contrast_alone():
    image = X[..., :1]
    np.testing.assert_allclose(
        only(image, jitter=1), only(np.repeat(image, 3, axis=3), jitter=1)[..., :1], atol=1e-6
    )  # colours of a grey image are grey


def deviations(height):
    """Of the Gaussians that were drawn, read off an impulse."""
    dot = np.zeros((height, 8, 1))
    dot[height // 2, 4] = 1
    seen = only(dot, blur=1)[:, height // 2, :, 0]
    with np.errstate(divide="ignore"):
        return np.sqrt(-1 / (2 * np.log(seen[:, 5] / seen[:, 4])))


@pytest.mark.parametrize(("height", "radius"), [(60, 3), (10, 1)])
def test_blurs_are_gaussian(height, radius):
    sigmas = deviations(height)
    assert_distributed(sigmas, uniform(0.1, 2))
    image = X.ravel()[: height * 8].reshape(height, 8, 1)
    blurred = only(image, blur=1)
    offsets = np.arange(-radius, radius + 1)
    for i in range(8):
        kernel = np.exp(-(offsets**2) / (2 * sigmas[i] ** 2))
        kernel /= kernel.sum()
        expected = np.zeros((height, 8))
        for row in range(height):
            for column in range(8):
                rows, columns = np.clip(row + offsets, 0, height - 1), np.clip(column + offsets, 0, 7)
                expected[row, column] = kernel @ image[np.ix_(rows, columns)][..., 0] @ kernel
        np.testing.assert_allclose(blurred[i, ..., 0], expected, atol=1e-6)


def test_blurs_happen_with_their_probability():
    blurred = only(X, blur=1)
    visible = np.any(blurred != X, axis=(1, 2, 3))  # a Gaussian of a tenth of a pixel is none
    assert np.mean(visible) > 0.9
    count_is(happened(only(X, blur=0.5), X, blurred)[visible], 0.5)


def test_parts_draw_independent_numbers():
    corners, sides = windows(area=0.08)
    places = corners[:, 0] / (1 - sides[:, 0]), corners[:, 1] / (1 - sides[:, 1])
    windows_drawn = np.prod(sides, axis=1), sides[:, 0] / sides[:, 1], *places
    happen = [np.any(only(X, **part) != X, axis=(1, 2, 3)) for part in PARTS[1:]]
    correlations = np.corrcoef([*windows_drawn, *happen, *factors(1), deviations(10)])
    assert np.abs(correlations - np.eye(13)).max() < 5 / np.sqrt(BATCH)


def test_parts_compose_in_the_papers_order():
    """And no option changes what another part draws."""
    in_turn = functools.reduce(lambda x, part: only(x, **part), PARTS, X)
    np.testing.assert_allclose(only(X, **functools.reduce(dict.__or__, PARTS)), in_turn, atol=1e-5)


def test_an_example_depends_on_its_key_and_itself_alone():
    x = jnp.asarray(X, jnp.float32)
    y = viewed(KEY, x)
    few = viewed(random.example_keys(KEY, BATCH)[5:7], x[5:7])
    np.testing.assert_allclose(few, y[5:7], atol=1e-5)  # programs of other shapes round otherwise
    np.testing.assert_array_equal(viewed(KEY, x.at[0].set(0.9))[1:], y[1:])


def test_two_keys_give_two_views():
    first, second = (viewed(half, jnp.asarray(X, jnp.float32)) for half in jax.random.split(KEY))
    assert jnp.all(jnp.any(first != second, axis=(1, 2, 3)))
    for view in (first, second):
        assert jnp.all(jnp.abs(view) <= 1 + 1e-6)  # and finite


def test_dtypes_keep_and_draw_the_same():
    x = jnp.asarray(X, jnp.bfloat16)
    y = viewed(KEY, x)
    assert y.dtype == jnp.bfloat16
    wide = viewed(KEY, x.astype(jnp.float32))
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    with jax.enable_x64(True):
        widest = viewed(KEY, x.astype(jnp.float64))
    assert widest.dtype == jnp.float64
    np.testing.assert_allclose(wide, widest, atol=1e-4)


def test_refusals():
    x = jnp.zeros((4, 8, 8, 3))
    with pytest.raises(ValueError, match=r"`x` must have shape \[any, any, any, any\], got \[8, 8, 3\]"):
        random_view(KEY, x[0])
    with pytest.raises(TypeError, match="`x` must be floating-point"):
        random_view(KEY, x.astype(jnp.uint8))
    with pytest.raises(TypeError, match="`key` must be a typed PRNG key"):
        random_view(jnp.zeros(2, jnp.uint32), x)
    with pytest.raises(ValueError, match=r"`key` must have shape \[4\], got \[3\]"):
        random_view(random.example_keys(KEY, 3), x)
    for name in ("area", "flip", "jitter", "grey", "blur"):
        for bad in (-0.1, 1.5):
            with pytest.raises(ValueError, match=rf"`{name}` must lie in \[0, 1\], got {bad}"):
                random_view(KEY, x, **{name: bad})
    with pytest.raises(ValueError, match="`area` must be above 0 and finite, got 0"):
        random_view(KEY, x, area=0)
    with pytest.raises(ValueError, match=r"`aspect` must lie in \[1, inf\], got 0.75"):
        random_view(KEY, x, aspect=0.75)
    with pytest.raises(ValueError, match=r"`strength` must lie in \[0, inf\], got -1"):
        random_view(KEY, x, strength=-1)
    for name in ("area", "aspect", "flip", "jitter", "strength", "grey", "blur"):
        with pytest.raises(ValueError, match=f"`{name}` must be finite, got nan"):
            random_view(KEY, x, **{name: np.nan})
        with pytest.raises(ValueError, match=f"`{name}` must be a number, known while tracing, got True"):
            random_view(KEY, x, **{name: True})
        with pytest.raises(ValueError, match=f"`{name}` must be a number, known while tracing, got .*Tracer"):
            jax.jit(lambda value, name=name: random_view(KEY, x, **{name: value}))(0.5)
