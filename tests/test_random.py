"""Example i draws from fold_in(key, i) and from nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import random

KEY = jax.random.key(5)


def assert_equal_keys(got, expected):
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(expected))


def folded(indices):
    return jnp.stack([jax.random.fold_in(KEY, i) for i in indices])


@pytest.mark.parametrize(("batch", "start"), [(1, 0), (8, 0), (5, 3), (2, 1000)])
def test_example_keys_are_folded_from_the_global_index(batch, start):
    expected = folded(range(start, start + batch))
    assert_equal_keys(random.example_keys(KEY, batch, start=start), expected)
    traced = jax.jit(lambda key, start: random.example_keys(key, batch, start=start))
    assert_equal_keys(traced(KEY, start), expected)


def test_no_two_examples_share_a_key():
    assert len(np.unique(jax.random.key_data(random.example_keys(KEY, 4096)), axis=0)) == 4096


@pytest.mark.parametrize("start", [0, 100])
def test_devices_that_share_the_batch_draw_what_one_would(start):
    devices, share = jax.device_count(), 3
    local = lambda key: random.example_keys(key, share, start=start, axis_name="data")  # noqa: E731
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec(), out_specs=spec("data")))
    expected = random.example_keys(KEY, devices * share, start=start)
    assert devices == 8
    assert_equal_keys(mapped(KEY), expected)
    replicated = jax.pmap(lambda _, key: local(key), "data", in_axes=(0, None))(np.zeros(devices), KEY)
    assert_equal_keys(replicated.reshape(-1), expected)


def test_keys_for_takes_one_key_or_one_per_example():
    assert_equal_keys(random.keys_for(KEY, 4), random.example_keys(KEY, 4))
    keys = random.example_keys(KEY, 4, start=7)
    assert random.keys_for(keys, 4) is keys


def test_fold_folds_into_each_key():
    keys = random.example_keys(KEY, 3)
    expected = jnp.stack([jax.random.fold_in(key, 9) for key in keys])
    assert_equal_keys(random.fold(keys, 9), expected)
    assert_equal_keys(jax.jit(random.fold)(keys, 9), expected)


@pytest.mark.parametrize("sampler", [jax.random.uniform, jax.random.rademacher, jax.random.normal])
def test_draw_gives_each_example_its_own_keys_numbers(sampler):
    keys = random.example_keys(KEY, 5)
    got = random.draw(sampler, keys, [4, 3], jnp.float16)
    assert got.dtype == jnp.float16
    np.testing.assert_array_equal(got, [sampler(key, (4, 3), jnp.float16) for key in keys])
    np.testing.assert_array_equal(random.draw(sampler, keys[2:4], (4, 3), jnp.float16), got[2:4])


def test_normal_numbers_are_normal_and_independent_between_examples():
    x = np.asarray(random.normal(random.example_keys(KEY, 500), (20, 20)))
    assert x.shape == (500, 20, 20)
    assert x.dtype == np.float32
    moments = [np.mean(x.astype(np.float64) ** power) for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.05)
    correlations = np.corrcoef(x.reshape(500, -1)) - np.eye(500)
    assert np.abs(correlations).max() < 6 / np.sqrt(400)
    assert random.normal(random.example_keys(KEY, 2), (), dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("function", [random.example_keys, random.keys_for])
@pytest.mark.parametrize(("key", "came"), [(np.zeros(2, np.uint32), r"uint32\[2\]"), (0, "int")])
def test_what_is_no_typed_key_is_refused(function, key, came):
    with pytest.raises(TypeError, match=rf"`key` must be a typed PRNG key, jax\.random\.key\(seed\), got {came}"):
        function(key, 4)


@pytest.mark.parametrize(
    ("function", "keys", "message"),
    [
        (random.example_keys, 4, r"`key` must have shape \[\], got \[4\]"),
        (random.keys_for, 3, r"`key` must have shape \[4\], got \[3\]"),
        (random.keys_for, (4, 2), r"`key` must have shape \[4\], got \[4, 2\]"),
    ],
)
def test_a_wrong_number_of_keys_is_refused(function, keys, message):
    with pytest.raises(ValueError, match=message):
        function(jax.random.split(KEY, keys), 4)
