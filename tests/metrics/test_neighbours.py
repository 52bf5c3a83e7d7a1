"""Nearest neighbours against a double loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.metrics import nearest_neighbours

search = jax.jit(nearest_neighbours, static_argnames="block_size")


def naive(queries, references):
    queries, references = np.asarray(queries, np.float64), np.asarray(references, np.float64)
    distances = np.array([[np.linalg.norm(query - reference) for reference in references] for query in queries])
    return distances.min(axis=1), distances.argmin(axis=1)


def features(rows, *, seed=0, offset=0.0):
    return (np.random.default_rng(seed).normal(size=(rows, 12)) + offset).astype(np.float32)


def assert_nearest(got, queries, references):
    distances, indices = naive(queries, references)
    np.testing.assert_allclose(got[0], distances, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], indices)


@pytest.mark.parametrize(("n", "m"), [(23, 31), (31, 23), (5, 1), (1, 40), (0, 3)])
@pytest.mark.parametrize("offset", [0, 3000])
def test_agrees_with_a_double_loop(n, m, offset):
    """An offset common to all features costs no digits."""
    queries, references = features(n, offset=offset), features(m, seed=1, offset=offset)
    got = search(queries, references)
    assert got[0].shape == got[1].shape == (n,)
    if n:
        assert_nearest(got, queries, references)


@pytest.mark.parametrize("block_size", [1, 4, 7, 23, 64])
def test_block_size_changes_nothing(block_size):
    queries, references = features(23), features(40, seed=1)
    assert_nearest(search(queries, references, block_size=block_size), queries, references)


def test_narrow_clusters_keep_their_digits():
    """Ten modes, a thousand times narrower than they are apart, where |r|^2 - 2 q . r has no digits left."""
    modes = features(10)
    queries, references = (modes[np.arange(n) % 10] + 1e-3 * features(n, seed=n) for n in (30, 80))
    assert_nearest(search(queries, references), queries, references)


def test_half_precision_is_computed_in_float32():
    queries, references = jnp.asarray(features(6), jnp.bfloat16), jnp.asarray(features(9, seed=1), jnp.bfloat16)
    assert search(queries, references)[0].dtype == jnp.float32
    assert_nearest(search(queries, references), queries, references)


def test_nan_comes_out():
    queries, references = features(6), features(9, seed=1)
    queries[2, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(search(queries, references)[0]), np.arange(6) == 2)
    references[4, 1] = np.nan
    assert np.isnan(search(queries, references)[0]).all()


def test_memory_grows_with_the_block_and_not_with_the_queries():
    shapes = [jax.ShapeDtypeStruct((rows, 12), jnp.float32) for rows in (4096, 1000)]
    memory = search.lower(*shapes, block_size=16).compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * 4096 * 1000 / 10


@pytest.mark.parametrize("convert", [jnp.asarray, np.asarray])
def test_without_jit(convert):
    queries, references = features(6), features(9, seed=1)
    assert_nearest(nearest_neighbours(convert(queries), convert(references)), queries, references)


def test_copies_are_found_at_distance_zero():
    references = features(50, offset=100)
    distances, indices = search(references[[41, 7, 7]], references)
    np.testing.assert_array_equal(distances, 0)
    np.testing.assert_array_equal(indices, [41, 7, 7])


def test_the_first_of_equals_wins():
    references = jnp.array([[5.0], [1.0], [3.0], [1.0], [3.0]])
    np.testing.assert_array_equal(search(jnp.array([[1.0], [3.0], [9.0]]), references)[1], [1, 2, 0])
    np.testing.assert_array_equal(search(jnp.ones((3, 2)), jnp.ones((5, 2)))[1], 0)


@pytest.mark.parametrize(
    ("queries", "references", "options", "error", "message"),
    [
        (jnp.ones(3), jnp.ones((4, 3)), {}, ValueError, r"`queries` must have shape \[any, any\], got \[3\]"),
        (jnp.ones((4, 3)), jnp.ones((4, 3, 1)), {}, ValueError, r"`references` must have shape \[any, any\], got \[4, 3, 1\]"),
        (jnp.ones((4, 3), jnp.uint8), jnp.ones((4, 3)), {}, TypeError, "`queries` must be floating-point.*, got dtype uint8"),
        (jnp.ones((4, 3)), jnp.ones((4, 3), int), {}, TypeError, "`references` must be floating-point.*, got dtype int32"),
        (jnp.ones((4, 3)), jnp.ones((0, 3)), {}, ValueError, r"`references` must be at least 1 row of 3 features, got shape \[0, 3\]"),
        (jnp.ones((4, 3)), jnp.ones((4, 5)), {}, ValueError, r"`references` must be at least 1 row of 3 features, got shape \[4, 5\]"),
        (jnp.ones((4, 3)), jnp.ones((4, 3)), {"block_size": 0}, ValueError, "`block_size` must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(queries, references, options, error, message):
    for function in (nearest_neighbours, search):
        with pytest.raises(error, match=message):
            function(queries, references, **options)
