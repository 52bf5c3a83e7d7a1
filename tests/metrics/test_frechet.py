"""The Fréchet distance against covariances in float64, and against Gaussians whose distance is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.metrics import frechet_distance, moments
from tests.metrics import peers

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


def natural(seed, rows, features, *, spread=1.0, shift=0.0, power=1.0):
    """Rows whose variances fall by a power of their number, as networks' features do; some below 0 and cut off."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(features, features)))[0]
    x = rng.normal(size=(rows, features)) * np.arange(1, features + 1.0) ** -power @ rotation * features**0.5
    return np.maximum(0.3 + shift + 0.3 * spread * x, 0).astype(np.float32)


def in_float64(a, b):
    """The definition where `oracle` runs out of digits too: the trace is the sum of singular values of X1 X2^T."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.sum((mean_a - mean_b) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * cross


@pytest.mark.parametrize("rows", [700, 80])
def test_small_distances_keep_their_digits(rows):
    """Sets that are alike: nearly all of Eq. 1 cancels, and what is left comes of many small directions."""
    a, b = (natural(seed, size, 200, power=1.5, shift=1.0) for seed, size in ((0, rows), (1, 700)))
    expected = in_float64(a, b)
    assert expected < 0.12 * np.var(a, axis=0).sum()
    np.testing.assert_allclose(distance(a, b), expected, rtol=1e-5)


def test_two_halves_far_from_the_origin():
    a = gaussians(0, 2000, 60, condition=1e4, offset=100)
    np.testing.assert_allclose(distance(a[::2], a[1::2]), oracle(a[::2], a[1::2]), rtol=1e-3)


def test_a_direction_that_outweighs_all_others():
    a, b = natural(0, 300, 50), natural(1, 300, 50)
    a[:, 7], b[:, 7] = (1000 * x[:, 7] for x in (a, b))
    differences = b[:, 7].std(ddof=1, dtype=float) - a[:, 7].std(ddof=1, dtype=float)
    b[:, 7] = (b[:, 7] - b[:, 7].mean()) * (1 - differences / b[:, 7].std(ddof=1, dtype=float)) + a[:, 7].mean()
    np.testing.assert_allclose(distance(a, b), in_float64(a, b), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [10_000, 800])
def test_at_full_size_against_scipy(rows):
    """2,048 features, of more and of fewer samples: float32 in one go, and in pieces, against sqrtm in float64."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = natural(0, rows, 2048), natural(1, rows, 2048, spread=1.1, shift=0.02)
    c1, c2 = (np.cov(x.astype(np.float64), rowvar=False) for x in (a, b))
    means = np.sum((a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)) ** 2)
    expected = means + np.trace(c1) + np.trace(c2) - 2 * np.trace(linalg.sqrtm(c1 @ c2)).real
    got = {"at once": float(distance(a, b))}
    update, state = jax.jit(moments.update), moments.init(2048)
    for piece in np.split(a, 8):
        state = update(state, piece)
    got["in pieces"] = float(distance(state, b))
    print({name: value / expected - 1 for name, value in got.items()})
    np.testing.assert_allclose(list(got.values()), expected, rtol=1e-4)


def test_agrees_with_torch_fidelity():
    peer = peers.torch_fidelity("fid")
    import torch

    a, b = gaussians(0, 90, 9), gaussians(1, 40, 9, condition=3) + 0.5
    statistics = (peer.fid_features_to_statistics(torch.tensor(np.asarray(x, np.float64))) for x in (a, b))
    expected = peer.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    np.testing.assert_allclose(distance(a, b), expected, rtol=2e-5)


@pytest.mark.parametrize("rows", [90, 7])
def test_moments_stand_for_rows(rows):
    """Gathered from pieces; the same in either place."""
    a, b = gaussians(0, rows, 9), gaussians(1, 40, 9, condition=3) + 0.5
    first, second = jnp.split(a, [rows // 2])
    state = jax.jit(lambda: moments.update(moments.update(moments.init(9), first), second))()
    np.testing.assert_allclose(distance(state, b), oracle(a, b), rtol=2e-5)
    np.testing.assert_allclose(distance(moments.of(b), state), oracle(a, b), rtol=2e-5)


def test_half_precision_is_computed_in_float32():
    a, b = (jnp.asarray(gaussians(seed, 60, 5), jnp.bfloat16) for seed in (0, 1))
    got = distance(a, b)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle(np.asarray(a, np.float64), np.asarray(b, np.float64)), rtol=1e-4)


def test_nan_comes_out():
    a = gaussians(0, 30, 4).at[2, 3].set(jnp.nan)
    assert np.isnan(distance(a, a + 1))


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
    batched = jax.jit(jax.vmap(frechet_distance))(a, b)
    np.testing.assert_allclose(batched, [oracle(*pair) for pair in zip(a, b, strict=True)], rtol=1e-4)


def test_gradients():
    """At equal covariances only the means pull; d(a, s a) = (1 - s)^2 (|m|^2 + tr C) has its slope in s."""
    a = gaussians(0, 40, 6, condition=3) + 1
    shift = jnp.linspace(-1, 2, 6)
    pull = jax.jit(jax.grad(frechet_distance))(a, a + shift)
    np.testing.assert_allclose(pull, jnp.broadcast_to(-2 * shift / 40, a.shape), atol=1e-5)
    slope = jax.jit(jax.grad(lambda s: frechet_distance(a, s * a)))(1.5)
    np.testing.assert_allclose(slope, jnp.sum(a.mean(0) ** 2) + jnp.var(a, axis=0, ddof=1).sum(), rtol=1e-4)


@pytest.mark.parametrize("rows", [12, 4])
def test_gradients_against_differences(rows):
    """Of a set that equals the other in some directions, and of fewer rows than features."""
    a, b = gaussians(0, rows, 5, condition=2), gaussians(1, 15, 5, condition=2) + 0.2
    toward = jnp.sin(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
    slope = jnp.vdot(jax.jit(jax.grad(frechet_distance))(a, b), toward)
    wide, step = np.asarray(a, np.float64), 1e-5 * np.asarray(toward, np.float64)
    expected = (in_float64(wide + step, b) - in_float64(wide - step, b)) / 2e-5
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (jnp.ones((4, 3)), jnp.ones(3), ValueError, r"`b` must have shape \[any, any\], got \[3\]"),
        (jnp.ones((4, 2, 2, 3)), jnp.ones((4, 3)), ValueError, r"`a` must have shape \[any, any\], got \[4, 2, 2, 3\]"),
        (jnp.ones((4, 3), int), jnp.ones((4, 3)), TypeError, "`a` must be floating-point.*, got dtype int32"),
        (jnp.ones((4, 3)), jnp.ones((1, 3)), ValueError, "`b` must hold at least 2 rows of features, got 1"),
        (jnp.ones((4, 3)), jnp.ones((4, 5)), ValueError, "`a` and `b` must hold features of one length, got 3 and 5"),
        (jnp.ones((4, 3)), moments.of(jnp.ones((4, 5))), ValueError, "`a` and `b` must hold features of one length, got 3 and 5"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(a, b, error, message):
    for function in (frechet_distance, distance):
        with pytest.raises(error, match=message):
            function(a, b)
