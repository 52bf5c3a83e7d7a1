"""Distributions, leaf by leaf, against those of flax's own initialisation; and what it costs, counted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxgen.nets import Conv, ConvTranspose, GroupNorm, UNet, constant, init, normal, variance_scaling


class Mixed(nn.Module):
    """Our leaves, those of plain Flax and a collection that is no parameter."""

    @nn.compact
    def __call__(self, x, scale=1.0):
        x = Conv(64, dtype=jnp.bfloat16, name="ours")(x * scale)
        x = ConvTranspose(32, kernel_init=normal(0.02), name="normal")(x.astype(jnp.float32))
        x = GroupNorm(groups=4, name="norm")(x)
        self.param("half", variance_scaling(2.0, mode="fan_out"), (50, 200), jnp.bfloat16)
        self.param("seven", constant(7.0), (3,))
        x = nn.Dense(128, name="foreign")(x)
        return nn.BatchNorm(use_running_average=False, name="foreign_norm")(x)


X = jnp.ones((1, 8, 8, 16))


def stds(params):
    return jax.tree.map(lambda leaf: float(jnp.std(leaf.astype(jnp.float32))), params)


def test_distributions_are_those_of_module_init():
    ours, theirs = init(Mixed(), jax.random.key(0), X), Mixed().init(jax.random.key(1), X)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(lambda a: (a.shape, a.dtype), theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05), stds(ours), stds(theirs))
    # ... which are these:
    expected = {"ours": 1 / math.sqrt(9 * 16), "normal": 0.02, "foreign": 1 / math.sqrt(32)}
    for name, std in expected.items():
        assert stds(ours["params"])[name]["kernel"] == pytest.approx(std, rel=0.05)
    assert stds(ours["params"])["half"] == pytest.approx(math.sqrt(2 / 200), rel=0.05)
    for leaf in jax.tree.leaves(ours["params"]):
        # Normal: kurtosis 3, where the leaf is large and random; foreign kernels are truncated normal.
        if leaf.size >= 9216 and float(jnp.std(leaf)) > 0:
            z = np.asarray(leaf, np.float64)
            assert np.mean((z - z.mean()) ** 4) / z.var() ** 2 == pytest.approx(3, abs=0.4)
    np.testing.assert_array_equal(ours["params"]["seven"], 7.0)
    np.testing.assert_array_equal(ours["params"]["norm"]["scale"], 1.0)
    np.testing.assert_array_equal(ours["params"]["ours"]["bias"], 0.0)
    np.testing.assert_array_equal(ours["batch_stats"]["foreign_norm"]["var"], 1.0)


def test_leaves_are_independent():
    params = init(Mixed(), jax.random.key(0), X)["params"]
    a, b = (np.ravel(params[name]["kernel"])[:9000] for name in ("ours", "normal"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.04


def test_pure_function_of_module_and_key():
    first, again, other = (init(Mixed(), jax.random.key(seed), X) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["params"]["ours"]["kernel"], other["params"]["ours"]["kernel"])
    assert not np.array_equal(first["params"]["foreign"]["kernel"], other["params"]["foreign"]["kernel"])
    compiled = jax.jit(lambda key: init(Mixed(), key, X))(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, compiled)
    abstract = init(Mixed(), jax.random.key(0), jax.ShapeDtypeStruct(X.shape, X.dtype), scale=2.0)
    jax.tree.map(np.testing.assert_array_equal, first, abstract)


def test_result_is_what_apply_takes():
    params = init(Mixed(), jax.random.key(0), X)
    assert type(params) is dict
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    y, _ = Mixed().apply(params, X, mutable=["batch_stats"])
    assert y.shape == (1, 16, 16, 128)


def test_scanned_layers_get_the_distribution_of_one():
    """Lifted transforms add an axis to the leaves; it must not count as a tap."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Conv(16, name="conv")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)
            return layers(name="layers")(x, None)[0]

    kernel = init(Stack(), jax.random.key(0), X)["params"]["layers"]["conv"]["kernel"]
    assert kernel.shape == (8, 3, 3, 16, 16)
    assert float(jnp.std(kernel)) == pytest.approx(1 / 12, rel=0.05)
    assert not np.array_equal(kernel[0], kernel[1])


def test_the_unet_compiles_one_program_only():
    """Not one per leaf: the seconds are in the count. A second network of the same shapes compiles none."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    module = UNet(out_channels=3, channels=64, attention=(8,))
    arguments = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    keys = jax.random.split(jax.random.key(0))
    init(Conv(3), keys[0], X)  # splitting a key is a program of its own, the first time
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        init(module, keys[0], *arguments)
        first = len(compiled)
        init(module, keys[1], *arguments)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first == 1
    assert len(compiled) == 1


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="`key` must be a typed PRNG key"):
        init(Mixed(), jax.random.PRNGKey(0), X)
    with pytest.raises(ValueError, match=r"`key` must have shape \[\], got \[2\]"):
        init(Mixed(), jax.random.split(jax.random.key(0)), X)
    with pytest.raises(ValueError, match="`mode` must be 'fan_in', 'fan_out' or 'fan_avg', got 'fan'"):
        variance_scaling(mode="fan")
    with pytest.raises(ValueError, match=r"`std` must lie in \[0, inf\], got -1"):
        normal(-1.0)
