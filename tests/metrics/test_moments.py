"""Moments in pieces against those of all rows at once in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxgen import metrics
from jaxgen.metrics import moments
from tests.metrics import pieces

FEATURES, ROWS = 6, 8

update = jax.jit(moments.update)
merge = jax.jit(moments.merge)
of = jax.jit(moments.of)


def rows(count, *, seed=0, offset=0.0):
    """Features that depend on each other, as features do."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(FEATURES, FEATURES)) * np.geomspace(1, 1e-2, FEATURES)
    return (rng.normal(size=(count, FEATURES)) @ mixing + offset).astype(np.float32)


def gathered(x, sizes):
    return pieces.gathered(moments.init(FEATURES), update, x, sizes, rows=ROWS)


def assert_moments(state, x, *, rtol=1e-5):
    """The count exactly, the mean to the data's own rounding, the scatter to that of its largest entry."""
    x = np.asarray(x, np.float64)
    assert state.rows == len(x)
    mean = x.sum(0) / max(len(x), 1)
    around = x - mean
    np.testing.assert_allclose(state.mean, mean, rtol=2e-7, atol=2e-7)
    root = np.asarray(state.root, np.float64)
    np.testing.assert_allclose(root.T @ root, around.T @ around, atol=rtol * np.square(around).sum(0).max(initial=0))


@pytest.mark.parametrize("sizes", [[8] * 5, [1] * 40, [3, 8, 0, 7, 1, 8, 8, 5], [0, 8, 8, 8, 8, 0, 8]])
@pytest.mark.parametrize("offset", [0, 1000])
def test_pieces_make_the_whole(sizes, offset):
    """An offset common to all features costs no digits of the scatter."""
    x = rows(40, offset=offset)
    assert_moments(gathered(x, sizes), x)


def test_many_rows_far_from_the_origin():
    x = rows(40_000, offset=3000)
    np.testing.assert_allclose(update(moments.init(FEATURES), x).mean, x.mean(0, dtype=np.float64), rtol=1e-7)


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_fewer_rows_than_features(count):
    x = rows(count, offset=3)
    assert_moments(gathered(x, [1] * count), x)
    assert_moments(of(x), x)


def test_merging_in_any_order():
    x = rows(36, offset=-20)
    bounds = [0, 8, 9, 17, 17, 25, 33, 36]
    parts = [gathered(x[a:b], [b - a]) for a, b in itertools.pairwise(bounds)]
    a, b, c, d, e, f, g = parts
    assert_moments(functools.reduce(merge, parts), x)
    assert_moments(functools.reduce(merge, parts[::-1]), x)
    assert_moments(merge(merge(merge(g, d), merge(a, f)), merge(merge(c, e), b)), x)


def test_nothing_changes_nothing():
    nothing, x = moments.init(FEATURES), rows(7)
    assert_moments(merge(nothing, nothing), x[:0])
    state = gathered(x, [7])
    for same in (merge(state, nothing), merge(nothing, state), update(state, np.zeros((0, FEATURES), np.float32))):
        np.testing.assert_array_equal(same.mean, state.mean)
        assert_moments(same, x)


def test_hundreds_of_updates_do_not_drift():
    x = rows(1000, offset=10).reshape(500, 2, FEATURES)
    state, _ = jax.jit(
        lambda x: jax.lax.scan(lambda state, piece: (moments.update(state, piece), None), moments.init(FEATURES), x)
    )(x)
    assert_moments(state, x.reshape(-1, FEATURES), rtol=1e-5)


def test_under_vmap():
    x = np.stack([rows(ROWS, seed=seed) for seed in range(3)])
    states = jax.jit(jax.vmap(moments.update, (None, 0)))(moments.init(FEATURES), x)
    for i in range(3):
        assert_moments(jax.tree.map(lambda leaf, i=i: leaf[i], states), x[i])


@pytest.mark.parametrize("placed", ["shard_map", "pmap"])
def test_devices_that_saw_different_rows(placed):
    """Each its own, some of which do not count: all end with the state of the whole."""
    x, mask = rows(64, offset=5), np.arange(64) % 5 > 0

    def share(x, mask):
        state = moments.update(moments.init(FEATURES), x, mask=mask)
        return metrics.merge_across(moments.merge, state, "data")

    if placed == "pmap":
        states = jax.pmap(share, axis_name="data")(x.reshape(8, 8, -1), mask.reshape(8, 8))
        state = jax.tree.map(lambda leaf: leaf[0], states)
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape)), states)
    else:
        mesh, spec = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec
        state = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=spec("data"), out_specs=spec()))(x, mask)
    assert_moments(state, x[mask])


def test_dtypes():
    """The state's is kept; bfloat16 is computed with in float32."""
    x = jnp.asarray(rows(20), jnp.bfloat16)
    state = update(moments.init(FEATURES), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("int32"), jnp.dtype("float32")}
    assert_moments(state, np.asarray(x, np.float64))
    assert_moments(of(x), np.asarray(x, np.float64))
    with jax.enable_x64(True):
        wide = np.random.default_rng(0).normal(size=(30, FEATURES))
        state = update(moments.init(FEATURES, dtype=jnp.float64), wide)
        np.testing.assert_allclose(state.root.T @ state.root, np.cov(wide, rowvar=False) * 29, rtol=1e-12, atol=1e-12)
        # Rounded before anything is computed, not after.
        narrow = update(moments.init(FEATURES, dtype=jnp.float64), np.float32(wide))
        exact = np.cov(np.float32(wide).astype(np.float64), rowvar=False) * 29
        np.testing.assert_allclose(narrow.root.T @ narrow.root, exact, rtol=1e-12, atol=1e-12)
        assert update(moments.init(FEATURES), wide).root.dtype == jnp.float32


@pytest.mark.parametrize("sizes", [[8, 8, 8], [5]])
def test_compute(sizes):
    x = rows(sum(sizes), offset=2)
    mean, root = jax.jit(moments.compute)(gathered(x, sizes))
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(root.T @ root, np.cov(np.float64(x), rowvar=False), atol=1e-4 * x.var(0).max())


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_needs_two_rows(count):
    state, other = gathered(rows(count), [count]), of(rows(9))
    with pytest.raises(ValueError, match=f"`state` must hold at least 2 rows of features, got {count}"):
        moments.compute(state)
    with pytest.raises(ValueError, match=f"`b` must hold at least 2 rows of features, got {count}"):
        metrics.frechet_distance(other, state)
    assert np.isnan(jax.jit(moments.compute)(state)[1]).all()
    assert np.isnan(jax.jit(metrics.frechet_distance)(other, state))


def test_nan_comes_out():
    x = rows(ROWS)
    x[2, 3] = np.nan
    state = update(update(moments.init(FEATURES), rows(ROWS)), x)
    assert np.isnan(state.mean[3])
    assert np.isnan(jax.jit(metrics.frechet_distance)(state, of(rows(9))))


ONES = jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moments.init(0), ValueError, "`features` must be an integer of at least 1, got 0"),
        (lambda: moments.of(jnp.ones(3)), ValueError, r"`features` must have shape \[any, any\], got \[3\]"),
        (lambda: moments.of(jnp.ones((4, 3), int)), TypeError, "`features` must be floating-point.*, got dtype int32"),
        (lambda: moments.of(ONES, mask=jnp.ones(3, bool)), ValueError, r"`mask` must have shape \[4\], got \[3\]"),
        (lambda: moments.of(ONES, mask=jnp.ones(4)), TypeError, "`mask` must be bool, got dtype float32"),
        (lambda: moments.update(moments.init(5), ONES), ValueError, "rows of one length, got 5 and 3"),
        (lambda: moments.merge(moments.init(5), moments.init(3)), ValueError, "rows of one length, got 5 and 3"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    for function in (call, jax.jit(call)):
        with pytest.raises(error, match=message):
            function()
