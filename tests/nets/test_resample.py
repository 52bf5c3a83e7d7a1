"""Against loops in NumPy, JAX's own bilinear resize, and each other: halving is the transpose of doubling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nets import bilinear_downsample, bilinear_upsample

X = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)


def naive(x, rows):
    """Each new row, then each new column, from the (source, weight) pairs that ``rows(length)`` lists."""
    x = np.asarray(x, np.float64)
    for axis in (1, 2):
        x = np.moveaxis(x, axis, 0)
        n = len(x)
        x = np.stack([sum(w * x[min(max(source, 0), n - 1)] for source, w in pairs) for pairs in rows(n)])
        x = np.moveaxis(x, 0, axis)
    return x


def doubled(n):
    return [[(i // 2, 0.75), (i // 2 + (1 if i % 2 else -1), 0.25)] for i in range(2 * n)]


def halved(n):
    return [[(2 * i + k - 1, w) for k, w in enumerate((0.125, 0.375, 0.375, 0.125))] for i in range(n // 2)]


@pytest.mark.parametrize(("ours", "rows"), [(bilinear_upsample, doubled), (bilinear_downsample, halved)])
def test_against_loops(ours, rows):
    np.testing.assert_allclose(ours(X), naive(X, rows), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 1, 2)])
def test_doubling_is_jaxs_bilinear_resize(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    expected = jax.image.resize(x, (shape[0], 2 * shape[1], 2 * shape[2], shape[3]), "linear")
    np.testing.assert_allclose(bilinear_upsample(x), expected, atol=1e-6)


def test_halving_is_the_transpose_of_doubling():
    x = jnp.asarray(X[:, :2, :3])
    (transposed,) = jax.linear_transpose(bilinear_upsample, x)(jnp.asarray(X))
    np.testing.assert_allclose(bilinear_downsample(X), transposed / 4, atol=1e-6)


@pytest.mark.parametrize("resample", [bilinear_upsample, bilinear_downsample])
def test_keeps_constants_means_and_dtype(resample):
    np.testing.assert_allclose(resample(jnp.full((1, 2, 8, 1), 0.3)), 0.3, rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(resample(X), (1, 2)), X.mean((1, 2)), atol=1e-6)
    assert resample(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bilinear_downsample(X[:, :3]),
            ValueError,
            r"`x` must have an even height and width, got shape \[2, 3",
        ),
        (lambda: bilinear_upsample(X[0]), ValueError, r"`x` must have shape \[any, any, any, any\], got \[4, 6, 3\]"),
        (lambda: bilinear_upsample(X[:, :0]), ValueError, "`x` must have a height and width of at least 1"),
        (lambda: bilinear_upsample(X.astype(int)), TypeError, "`x` must be floating-point"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
