"""The kernel distance against a double loop in float64, and on sets whose distance is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.metrics import KernelDistance, kernel_distance, subset_kernel_distance
from tests.metrics import peers

distance = jax.jit(kernel_distance, static_argnames="block_size")
of_subsets = jax.jit(subset_kernel_distance, static_argnames=("subsets", "size"))
KEY = jax.random.key(0)


def naive(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def mean(x, y, *, distinct):
        kernels = [
            (sum(u * v for u, v in zip(p, q, strict=True)) / len(p) + 1) ** 3
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not distinct or i != j
        ]
        return np.mean(kernels)

    return mean(a, a, distinct=True) + mean(b, b, distinct=True) - 2 * mean(a, b, distinct=False)


def features(rows, *, seed=0, offset=0.0, spread=1.0):
    return (np.random.default_rng(seed).normal(size=(rows, 4)) * spread + offset).astype(np.float32)


@pytest.mark.parametrize(("n", "m"), [(13, 17), (17, 2), (2, 13)])
@pytest.mark.parametrize("offset", [0, 1])
def test_agrees_with_a_double_loop(n, m, offset):
    a, b = features(n, offset=offset, spread=0.7), features(m, seed=1, offset=offset + 0.2)
    got = distance(a, b)
    assert got.shape == ()
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, naive(a, b), rtol=1e-5)


@pytest.mark.parametrize("offset", [3, 100])
def test_small_distances_keep_their_digits(offset):
    """A millionth of the kernels that Eq. 2 is of, and less."""
    a, b = features(40, offset=offset, spread=0.1), features(40, seed=1, offset=offset, spread=0.12)
    expected = naive(a, b)
    assert abs(expected) < 1e-3 * (1 + offset**2) ** 3
    np.testing.assert_allclose(distance(a, b), expected, rtol=2e-4)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_block_size_changes_nothing(block_size):
    a, b = features(13), features(17, seed=1, offset=0.3)
    np.testing.assert_allclose(distance(a, b, block_size=block_size), naive(a, b), rtol=1e-5)


def test_memory_grows_with_the_block_and_not_with_the_rows():
    shapes = [jax.ShapeDtypeStruct((rows, 4), jnp.float32) for rows in (2048, 1000)]
    memory = distance.lower(*shapes, block_size=16).compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * 2048 * 1000 / 10


def test_points_of_known_distance():
    """All of one set at x, all of the other at y: k(x, x) + k(y, y) - 2 k(x, y)."""
    x, y = np.array([1.0, -2, 0, 3], np.float32), np.array([0.0, 1, 1, 5], np.float32)
    expected = (14 / 4 + 1) ** 3 + (27 / 4 + 1) ** 3 - 2 * (13 / 4 + 1) ** 3
    np.testing.assert_allclose(distance(np.tile(x, (5, 1)), np.tile(y, (3, 1))), expected, rtol=1e-6)
    np.testing.assert_allclose(distance(np.tile(x, (5, 1)), np.tile(x, (3, 1))), 0, atol=1e-5)


def test_is_unbiased():
    """Of sets from one distribution it is 0 on average, however small they are, where the biased mean is not."""
    sets = features(2 * 5 * 4000).reshape(2, 4000, 5, 4)
    distances = jax.jit(jax.vmap(kernel_distance))(*sets)
    assert abs(distances.mean()) < 4 * distances.std() / 4000**0.5
    assert distances.std() / 4000**0.5 < 0.03


def test_subsets_as_large_as_the_sets_are_the_sets():
    a, b = features(13), features(13, seed=1, offset=0.3)
    got = of_subsets(KEY, a, b, subsets=3, size=13)
    assert isinstance(got, KernelDistance)
    assert got.mean.shape == got.deviation.shape == ()
    np.testing.assert_allclose(got.mean, naive(a, b), rtol=1e-5)
    np.testing.assert_allclose(got.deviation, 0, atol=1e-6)


def test_a_subset_follows_from_the_key_and_its_number():
    a, b = features(30), features(20, seed=1, offset=0.3)
    one, two = (of_subsets(KEY, a, b, subsets=subsets, size=5) for subsets in (1, 2))
    assert one.deviation == 0
    np.testing.assert_allclose(abs(two.mean - one.mean), two.deviation, rtol=1e-4)
    assert two.deviation > 0
    other = of_subsets(jax.random.key(1), a, b, subsets=1, size=5)
    assert abs(other.mean - one.mean) > 1e-3


def test_subsets_scatter_about_the_whole():
    """As those that NumPy draws do: of both sets, each drawn anew."""
    a = features(100)
    b = a + np.float32(0.3)
    got = of_subsets(KEY, a, b, subsets=400, size=5)
    assert abs(got.mean - distance(a, b)) < 4 * got.deviation / 20
    rng = np.random.default_rng(0)
    drawn = [[x[rng.choice(len(x), 5, replace=False)] for x in (a, b)] for _ in range(400)]
    np.testing.assert_allclose(got.deviation, np.std([naive(*pair) for pair in drawn]), rtol=0.25)


def test_half_precision_is_computed_in_float32():
    a, b = jnp.asarray(features(13), jnp.bfloat16), jnp.asarray(features(17, seed=1), jnp.bfloat16)
    got = distance(a, b)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, naive(a, b), rtol=1e-4)


def test_nan_comes_out():
    a = features(13)
    a[3, 1] = np.nan
    assert np.isnan(distance(a, features(17, seed=1)))


def test_agrees_with_torch_fidelity():
    peer = peers.torch_fidelity("kid")
    import torch

    a, b = features(50), features(50, seed=1, offset=0.3)
    options = {"kid_subsets": 1, "kid_subset_size": 50, "verbose": False}
    expected = peer.kid_features_to_metric(torch.tensor(a).double(), torch.tensor(b).double(), **options)
    np.testing.assert_allclose(distance(a, b), expected["kernel_inception_distance_mean"], rtol=1e-5)


ONES = jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("a", "b", "options", "error", "message"),
    [
        (jnp.ones(3), ONES, {}, ValueError, r"`a` must have shape \[any, any\], got \[3\]"),
        (ONES, jnp.ones((4, 3), int), {}, TypeError, "`b` must be floating-point.*, got dtype int32"),
        (ONES, ONES[:1], {}, ValueError, "`b` must hold at least 2 rows of features, got 1"),
        (ONES, jnp.ones((4, 5)), {}, ValueError, "`a` and `b` must hold features of one length, got 3 and 5"),
        (ONES, ONES, {"block_size": 0}, ValueError, "`block_size` must be an integer of at least 1, got 0"),
        (ONES, ONES[:3], {"size": 4}, ValueError, "`b` must hold at least 4 rows of features, got 3"),
        (ONES, ONES, {"size": 1}, ValueError, "`size` must be at least 2, got 1"),
        (ONES, ONES, {"size": 2.0}, ValueError, "`size` must be an integer of at least 1, got 2.0"),
        (ONES, ONES, {"size": 2, "subsets": 0}, ValueError, "`subsets` must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(a, b, options, error, message):
    with pytest.raises(error, match=message):
        subset_kernel_distance(KEY, a, b, **options) if "size" in options else kernel_distance(a, b, **options)


def test_a_key_is_asked_for():
    with pytest.raises(TypeError, match="`key` must be a typed PRNG key"):
        subset_kernel_distance(0, ONES, ONES, size=2)
