"""The Fréchet distance against covariances in float64, and against Gaussians whose distance is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.metrics import frechet_distance

distance = jax.jit(frechet_distance)


def oracle(a, b):
    """The definition, in float64: the trace of (C1 C2)^(1/2) from the eigenvalues of C1^(1/2) C2 C1^(1/2)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    c1, c2 = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c2 @ root), 0)).sum()
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c1) + np.trace(c2) - 2 * cross


def gaussians(seed, rows, features, *, condition=1e2, offset=0.0):
    """Rows whose standard deviations fall from 1 to 1 / ``condition`` along the axes of a random rotation."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, 1 / condition, features)
    rotation = np.linalg.qr(rng.normal(size=(features, features)))[0]
    return jnp.asarray(rng.normal(size=(rows, features)) * scales @ rotation + offset, jnp.float32)


@pytest.mark.parametrize(
    ("rows", "features", "condition", "offset"),
    [
        (50, 1, 1, 3),
        (40, 6, 10, 0),
        (300, 120, 1e4, 0),
        (300, 120, 1e4, 1000),
        (120, 120, 1e2, 0),
        (20, 120, 1e2, 0),  # fewer samples than features: a root of the covariance itself would lose half of the digits
    ],
)
def test_agrees_with_the_definition_in_float64(rows, features, condition, offset):
    a = gaussians(0, rows, features, condition=condition, offset=offset)
    b = gaussians(1, 300, features, condition=1, offset=offset)
    got = distance(a, b)
    assert got.shape == ()
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle(a, b), rtol=2e-5)


def test_small_distances_keep_their_digits():
    """Two halves of one data set, far from the origin: nearly all of Eq. 1 cancels."""
    a = gaussians(0, 2000, 60, condition=1e4, offset=100)
    np.testing.assert_allclose(distance(a[::2], a[1::2]), oracle(a[::2], a[1::2]), rtol=1e-3)


@pytest.mark.parametrize(("rows", "features"), [(80, 12), (6, 12)])
def test_gaussians_of_known_distance(rows, features):
    a = np.asarray(gaussians(0, rows, features))
    mean, variance = a.mean(0), a.var(0, ddof=1).sum()
    shift = np.linspace(-1, 2, features)
    np.testing.assert_allclose(distance(a, a), 0, atol=1e-5 * variance)
    np.testing.assert_allclose(distance(a, a + shift), np.sum(shift**2), rtol=1e-4)
    np.testing.assert_allclose(distance(a, mean + 3 * (a - mean)), 4 * variance, rtol=1e-4)
    np.testing.assert_allclose(distance(a, np.broadcast_to(mean, a.shape)), variance, rtol=1e-4)


def test_independent_features_add_up():
    """Of one feature the distance is (m1 - m2)^2 + (s1 - s2)^2; of orthogonal features, the sum over them."""
    signs = jnp.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1.0]])[:, 1:]
    stretched = signs * jnp.array([2, 1, 5.0]) + jnp.array([0, 1, -1.0])
    np.testing.assert_allclose(distance(signs, stretched), (4 / 3) * (1 + 0 + 16) + (0 + 1 + 1), rtol=1e-5)


def test_is_symmetric_and_does_not_see_rotations_shifts_or_the_order_of_rows():
    a, b = gaussians(0, 70, 9), gaussians(1, 90, 9, condition=5) + 0.3
    rotation = jnp.linalg.qr(gaussians(2, 9, 9))[0]
    expected = distance(a, b)
    for one, other in ((b, a), (a @ rotation, b @ rotation), (a + 7, b + 7), (a[::-1], b)):
        np.testing.assert_allclose(distance(one, other), expected, rtol=2e-5)


def test_under_vmap():
    a, b = (jnp.stack([gaussians(seed + i, 30, 5, condition=3) for i in range(3)]) for seed in (0, 3))
    batched = jax.vmap(frechet_distance)(a, b)
    np.testing.assert_allclose(batched, [oracle(*pair) for pair in zip(a, b, strict=True)], rtol=1e-4)


def test_gradients():
    """At equal covariances only the means pull; d(a, s a) = (1 - s)^2 (|m|^2 + tr C) has its slope in s."""
    a = gaussians(0, 40, 6, condition=3) + 1
    shift = jnp.linspace(-1, 2, 6)
    pull = jax.jit(jax.grad(frechet_distance))(a, a + shift)
    np.testing.assert_allclose(pull, jnp.broadcast_to(-2 * shift / 40, a.shape), atol=1e-5)
    slope = jax.grad(lambda s: frechet_distance(a, s * a))(1.5)
    np.testing.assert_allclose(slope, jnp.sum(a.mean(0) ** 2) + jnp.var(a, axis=0, ddof=1).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (jnp.ones((4, 3)), jnp.ones(3), ValueError, r"`b` must have shape \[any, any\], got \[3\]"),
        (jnp.ones((4, 2, 2, 3)), jnp.ones((4, 3)), ValueError, r"`a` must have shape \[any, any\], got \[4, 2, 2, 3\]"),
        (jnp.ones((4, 3), int), jnp.ones((4, 3)), TypeError, "`a` must be floating-point.*, got dtype int32"),
        (jnp.ones((4, 3)), jnp.ones((1, 3)), ValueError, "`b` must hold at least 2 rows of features, got 1"),
        (jnp.ones((4, 3)), jnp.ones((4, 5)), ValueError, "`a` and `b` must hold features of one length, got 3 and 5"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(a, b, error, message):
    for function in (frechet_distance, distance):
        with pytest.raises(error, match=message):
            function(a, b)
