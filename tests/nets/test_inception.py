"""Published sizes and counts, refusals; images resized as NumPy, PyTorch and Pillow do.

What the network computes is compared with PyTorch in ``tests/test_pretrained_inception.py``.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxgen.nets import Inception, calibrate, clean_fid_input, init, pytorch_fid_input, tensorflow_fid_input

KEY = jax.random.key(0)
X = jax.random.uniform(KEY, (3, 75, 81, 3), minval=-1.0)
EARLY = Inception(features=64)


@pytest.fixture(scope="module")
def variables():
    """The shapes of all parameters and statistics."""
    network, x = Inception(), jnp.zeros((1, 75, 75, 3))
    return jax.eval_shape(lambda: calibrate(network.apply, network.init(KEY, x), [x]))


@pytest.fixture(scope="module")
def early():
    """The first layers, jitted, with parameters."""
    apply = jax.jit(EARLY.apply, static_argnames="mutable")
    return apply, calibrate(apply, init(EARLY, KEY, X), [X])


def test_parameter_counts_are_the_published_ones(variables):
    """Keras counts 23,851,784 in its InceptionV3 of 1,000 classes, torchvision 27,161,264 with 3,326,696 of a second
    classifier; each logit has 2,049. Keras has no scale and counts mean and variance; torchvision has, and does not."""
    learned, fixed = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables[kind])) for kind in ("params", "batch_stats")
    )
    channels = fixed // 2
    assert channels == 17_216
    assert learned == 23_850_960 == 27_161_264 - 3_326_696 + 8 * 2_049
    assert learned - 8 * 2_049 - channels + fixed == 23_851_784


def test_sizes_are_the_papers(variables):
    """Table 1 of Szegedy et al."""
    apply = functools.partial(Inception().apply, capture_intermediates=True)
    features, captured = jax.eval_shape(apply, variables, jnp.zeros((2, 299, 299, 3)))
    assert (features.shape, features.dtype) == ((2, 2048), jnp.float32)
    layers = {name: tree for name, tree in captured["intermediates"].items() if name != "__call__"}
    came = {name: layer["__call__"][0].shape for name, layer in layers.items()}
    assert came == {
        "Conv2d_1a_3x3": (2, 149, 149, 32),
        "Conv2d_2a_3x3": (2, 147, 147, 32),
        "Conv2d_2b_3x3": (2, 147, 147, 64),
        "Conv2d_3b_1x1": (2, 73, 73, 80),
        "Conv2d_4a_3x3": (2, 71, 71, 192),
        "Mixed_5b": (2, 35, 35, 256),
        "Mixed_5c": (2, 35, 35, 288),
        "Mixed_5d": (2, 35, 35, 288),
        **{f"Mixed_6{letter}": (2, 17, 17, 768) for letter in "abcde"},
        "Mixed_7a": (2, 8, 8, 1280),
        "Mixed_7b": (2, 8, 8, 2048),
        "Mixed_7c": (2, 8, 8, 2048),
    }


def test_an_image_does_not_see_the_others(early):
    apply, params = early
    features = apply(params, X)
    assert features.shape == (3, 64)
    assert float(jnp.max(jnp.abs(features[0] - features[1]))) > 1e-2
    np.testing.assert_allclose(apply(params, X.at[1:].set(-(X[1:] ** 2)))[0], features[0], rtol=1e-5, atol=1e-5)


def test_later_layers_parameters_are_not_needed(variables, early):
    _, params = early
    assert params["params"].keys() == {"Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"} < variables["params"].keys()


@pytest.mark.parametrize(
    ("network", "x", "error", "message"),
    [
        (EARLY, jnp.zeros((75, 75, 3)), ValueError, r"`x` must have shape \[any, any, any, 3\], got \[75, 75, 3\]"),
        (EARLY, jnp.zeros((1, 75, 75, 1)), ValueError, r"`x` must have shape \[any, any, any, 3\]"),
        (EARLY, jnp.zeros((1, 75, 75, 3), jnp.uint8), TypeError, "`x` must be floating-point"),
        (EARLY, jnp.zeros((1, 74, 75, 3)), ValueError, r"`x` must be at least 75 pixels high and wide, got shape \[1, 74, 75, 3\]"),
        (EARLY, jnp.zeros((1, 75, 74, 3)), ValueError, "`x` must be at least 75 pixels"),
        (Inception(features=1024), X, ValueError, r"`features` must be one of \(64, 192, 768, 2048\), got 1024"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(network, x, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(network.init, KEY, x)


def test_parameters_without_statistics_are_refused(variables):
    with pytest.raises(ValueError, match=r"`params` must hold 'batch_stats' beside 'params', got \['params'\]"):
        jax.eval_shape(EARLY.apply, {"params": variables["params"]}, X)


def test_features_of_earlier_layers_have_no_logits(variables):
    logits = functools.partial(Inception().apply, method="logits")
    assert jax.eval_shape(logits, variables, jnp.zeros((2, 2048))).shape == (2, 1008)
    with pytest.raises(ValueError, match=r"`features` must have shape \[any, 2048\], got \[2, 768\]"):
        jax.eval_shape(logits, variables, jnp.zeros((2, 768)))
    with pytest.raises(TypeError, match="`features` must be floating-point"):
        jax.eval_shape(logits, variables, jnp.zeros((2, 2048), int))


# --- What it is fed

INPUTS = (pytorch_fid_input, tensorflow_fid_input, clean_fid_input)
SIZES = [(32, 32), (75, 401), (598, 1), (299, 300)]


def eight_bits(height, width):
    """Noise, and the same in [-1, 1]."""
    v = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    return v, (v / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_bilinear_interpolation(height, width):
    """Eqs. 1 to 4 in float64."""
    v, x = eight_bits(height, width)

    def resized(at):
        rows = np.apply_along_axis(lambda pixels: np.interp(at(height), np.arange(height), pixels), 1, v)
        return np.apply_along_axis(lambda pixels: np.interp(at(width), np.arange(width), pixels), 2, rows)

    i = np.arange(299)
    expected = resized(lambda n: (i + 0.5) * n / 299 - 0.5) / 127.5 - 1
    np.testing.assert_allclose(pytorch_fid_input(x), expected, rtol=0, atol=2e-6)
    expected = (resized(lambda n: i * n / 299) - 128) / 128
    np.testing.assert_allclose(tensorflow_fid_input(x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pytorch_fid_input_is_pytorchs(height, width):
    torch = pytest.importorskip("torch", reason="install the extra [peers] to compare with PyTorch")
    v, x = eight_bits(height, width)
    images = torch.from_numpy(v.transpose(0, 3, 1, 2)) / 255
    expected = 2 * torch.nn.functional.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) - 1
    np.testing.assert_allclose(pytorch_fid_input(x), expected.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clean_fid_input_is_pillows(height, width):
    """Each channel by itself, not rounded, cut off where it overshoots."""
    v, x = eight_bits(height, width)
    expected = np.empty((2, 299, 299, 3))
    for image, channel in np.ndindex(2, 3):
        pixels = Image.fromarray(v[image, :, :, channel].astype(np.float32))
        expected[image, :, :, channel] = pixels.resize((299, 299), Image.Resampling.BICUBIC)
    expected = (expected.clip(0, 255) - 128) / 128
    np.testing.assert_allclose(clean_fid_input(x), expected, rtol=0, atol=1e-4)


def test_images_of_the_size_stay():
    v, x = eight_bits(299, 299)
    np.testing.assert_array_equal(pytorch_fid_input(x), x)
    for made in (tensorflow_fid_input(x), clean_fid_input(x)):
        np.testing.assert_allclose(made, (v - 128.0) / 128, rtol=0, atol=1e-5)


@pytest.mark.parametrize("made", INPUTS)
def test_inputs_are_refused(made):
    with pytest.raises(TypeError, match="`x` must be floating-point"):
        made(jnp.zeros((1, 32, 32, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"`x` must have shape \[any, any, any, 3\], got \[1, 3, 32, 32\]"):
        made(jnp.zeros((1, 3, 32, 32)))
    with pytest.raises(ValueError, match=r"`x` must have a height and width of at least 1, got shape \[1, 0, 9, 3\]"):
        made(jnp.zeros((1, 0, 9, 3)))
