"""Against NumPy in float64, cancellation included; calibrated statistics against the data they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxgen.nets import BatchNorm, Conv, GroupNorm, calibrate, init


def group_norm(x, groups, eps, scale, bias):
    x = np.asarray(x, np.float64)
    g = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + eps)
    return g.reshape(x.shape) * scale + bias


def batch_norm(x, mean, var, eps=1e-5):
    return (np.asarray(x, np.float64) - mean) / np.sqrt(var + eps)


@pytest.mark.parametrize("offset", [0.0, 300.0], ids=["centred", "mean far above the spread"])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm(offset, silu):
    rng = np.random.default_rng(0)
    # The channels of a group have means of their own: what Eq. 2 adds to the variance.
    x = jnp.asarray(
        rng.normal(size=(3, 5, 4, 12)) * rng.uniform(0.5, 2, 12) + rng.normal(size=12) + offset, jnp.float32
    )
    scale, bias = rng.normal(size=(2, 12))
    module = GroupNorm(groups=3, eps=1e-3, silu=silu)
    y = module.apply({"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}, x)
    expected = group_norm(x, 3, 1e-3, scale, bias)
    expected = expected / (1 + np.exp(-expected)) if silu else expected
    np.testing.assert_allclose(y, expected, atol=2e-6 * (1 + offset))


def test_group_norm_gradient():
    """Flax's two-pass normalisation in float64."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 3, 3, 8), jnp.float64) + 5
        params = {"params": {"scale": jnp.linspace(0.5, 2, 8), "bias": jnp.linspace(-1, 1, 8)}}
        reference = nn.GroupNorm(num_groups=4, use_fast_variance=False)
        ours = GroupNorm(groups=4, dtype=jnp.float64)
        gradients = [jax.grad(lambda x, m=m: jnp.sum(jnp.sin(m.apply(params, x))))(x) for m in (ours, reference)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-7)  # parameters and statistics: float32 at least


def test_statistics_are_float32_whatever_the_dtype():
    """In bfloat16 a mean of 4,096 numbers near 100 would be off by tens of per cent."""
    x = (100 + jax.random.normal(jax.random.key(0), (1, 64, 64, 2))).astype(jnp.bfloat16)
    for module in (GroupNorm(groups=2, dtype=jnp.bfloat16), BatchNorm(dtype=jnp.bfloat16)):
        y = module.apply(init(module, jax.random.key(0), x), x)
        assert y.dtype == jnp.bfloat16
        y = np.asarray(y, np.float64)
        np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=5e-3)
        np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=5e-3)


def test_one_image_does_not_see_another_through_group_norm():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    module = GroupNorm(groups=4)
    params = init(module, jax.random.key(0), x)
    np.testing.assert_array_equal(module.apply(params, x)[:1], module.apply(params, x.at[1].set(7.0))[:1])


class Network(nn.Module):
    """Two normalisations, the second of which sees what the first made; the last is called twice."""

    @nn.compact
    def __call__(self, x, gain=1.0):
        x = nn.relu(BatchNorm(name="first")(x * gain))
        x = Conv(4, 1, name="mix")(x)
        second = BatchNorm(name="second")
        return second(x) + second(2 * x)


def test_training_normalises_by_the_batch_and_keeps_nothing():
    x = 3 + jax.random.normal(jax.random.key(0), (4, 6, 6, 5))
    module = BatchNorm()
    params = module.init(jax.random.key(0), x)
    assert set(params) == set(init(module, jax.random.key(0), x)) == {"params"}
    y, state = module.apply(params, x, mutable="batch_stats")
    assert not state
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(y, batch_norm(x, x.mean((0, 1, 2)), x.var((0, 1, 2))), atol=1e-5)


def test_calibrated_on_one_batch_inference_is_training():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 6, 6, 5))
    module = BatchNorm()
    params = init(module, jax.random.key(1), x)
    calibrated = calibrate(module.apply, params, [x])
    np.testing.assert_allclose(module.apply(calibrated, x), module.apply(params, x), atol=1e-6)
    # ... and an image's result then no longer depends on its neighbours.
    np.testing.assert_allclose(module.apply(calibrated, x[:1]), module.apply(params, x)[:1], atol=1e-6)


def test_calibration_is_exact_over_unequal_batches_and_layer_by_layer():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(n, 3, 3, 5)).astype(np.float32) * n + 50 * n for n in (2, 5, 3)]
    module = Network()
    params = init(module, jax.random.key(0), batches[0])
    statistics = calibrate(jax.jit(module.apply, static_argnames="mutable"), params, batches)["batch_stats"]

    everything = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(statistics["first"]["mean"], everything.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(statistics["first"]["var"], everything.var((0, 1, 2)), rtol=1e-5)

    mix = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"]["mix"])
    hidden = [batch_norm(b, b.mean((0, 1, 2), np.float64), b.var((0, 1, 2), np.float64)) for b in batches]
    hidden = np.concatenate([np.maximum(h, 0) @ mix["kernel"][0, 0] + mix["bias"] for h in hidden])
    hidden = np.concatenate([hidden, 2 * hidden])
    np.testing.assert_allclose(statistics["second"]["mean"], hidden.mean((0, 1, 2)), atol=2e-4)
    np.testing.assert_allclose(statistics["second"]["var"], hidden.var((0, 1, 2)), rtol=1e-3)


def test_calibration_again_replaces_and_takes_more_arguments():
    x = jax.random.normal(jax.random.key(0), (4, 3, 3, 5))
    module = Network()
    params = init(module, jax.random.key(0), x)
    once = calibrate(module.apply, params, [(x, 2.0)])
    again = calibrate(module.apply, calibrate(module.apply, params, [x + 9]), [(x, 2.0)])
    jax.tree.map(np.testing.assert_array_equal, once, again)
    np.testing.assert_allclose(once["batch_stats"]["first"]["mean"], 2 * np.mean(x, (0, 1, 2)), atol=1e-6)
    assert set(once) == {"params", "batch_stats"}


def test_batch_norm_sees_the_whole_batch_across_devices():
    x = jnp.arange(8.0)[:, None, None, None] + jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    module = BatchNorm(axis_name="data")
    params = init(module, jax.random.key(0), x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    split = jax.jit(jax.shard_map(lambda x: module.apply(params, x), mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(split(x), BatchNorm().apply(params, x), atol=1e-5)


def test_bad_input_is_refused():
    x = jnp.ones((2, 4, 4, 6))
    with pytest.raises(ValueError, match=r"`groups` must divide the 6 channels of `x`, got 4"):
        GroupNorm(groups=4).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="`x` must be floating-point"):
        BatchNorm().init(jax.random.key(0), x.astype(jnp.int32))
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        calibrate(BatchNorm().apply, init(BatchNorm(), jax.random.key(0), x), [])
    with pytest.raises(ValueError, match="`apply` must be a network with BatchNorm"):
        calibrate(GroupNorm(groups=2).apply, init(GroupNorm(groups=2), jax.random.key(0), x), [x])
