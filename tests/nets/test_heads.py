"""Against Eq. 1 in NumPy float64; the parameters of the published heads; what normalisation couples."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nets import MLP, BatchNorm, RMSNorm, calibrate, init

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 5)) + 1


def random_params(model):
    leaves, tree = jax.tree.flatten(init(model, KEY, X))
    rng = np.random.default_rng(1)
    return tree.unflatten([leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.mark.parametrize(
    ("features", "widths", "parameters"),
    [
        (2048, (2048, 128), 2048 * 2048 + 2 * 2048 + 2048 * 128 + 128),  # SimCLR
        (2048, (4096, 256), 2048 * 4096 + 2 * 4096 + 4096 * 256 + 256),  # BYOL, projection
        (256, (4096, 256), 256 * 4096 + 2 * 4096 + 4096 * 256 + 256),  # BYOL, prediction
        (2048, (8192,) * 3, 2048 * 8192 + 2 * 8192**2 + 4 * 8192 + 8192),  # Barlow Twins, VICReg
        (512, (10,), 5130),
    ],
)
def test_parameter_counts(features, widths, parameters):
    """Kernels; scale and bias between linear layers; a bias at the end."""
    x = jax.ShapeDtypeStruct((4, features), jnp.float32)
    params = jax.eval_shape(MLP(widths).init, KEY, x)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters
    assert jax.eval_shape(MLP(widths).apply, params, x).shape == (4, widths[-1])


@pytest.mark.parametrize("norm", [BatchNorm, None])
@pytest.mark.parametrize("widths", [(3,), (7, 3), (7, 4, 3)])
def test_is_the_equation(norm, widths):
    model = MLP(widths, norm=norm)
    params = random_params(model)
    tree, h = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"]), np.asarray(X, np.float64)
    assert all(("bias" in tree[f"linear_{i}"]) == (norm is None or i == len(widths) - 1) for i in range(len(widths)))
    for i in range(len(widths)):
        h = h @ tree[f"linear_{i}"]["kernel"] + tree[f"linear_{i}"].get("bias", 0)
        if i < len(widths) - 1:
            if norm is not None:
                scale, bias = tree[f"norm_{i}"]["scale"], tree[f"norm_{i}"]["bias"]
                h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * scale + bias
            h = np.maximum(h, 0)
    np.testing.assert_allclose(model.apply(params, X), h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [None, RMSNorm, BatchNorm])
def test_only_batch_norm_couples_examples(norm):
    model = MLP((7, 3), norm=norm)
    params = random_params(model)
    one, other = model.apply(params, X)[0], model.apply(params, X.at[1:].set(X[1:] ** 2))[0]
    assert (norm is BatchNorm) == (float(jnp.max(jnp.abs(one - other))) > 1e-2)
    if norm is BatchNorm:
        calibrated = calibrate(model.apply, params, [X])
        np.testing.assert_allclose(model.apply(calibrated, X[:1])[0], one, rtol=1e-4, atol=1e-5)


def test_a_split_batch_is_one_batch():
    model, split = MLP((7, 3)), MLP((7, 3), norm=functools.partial(BatchNorm, axis_name="data"))
    params = random_params(model)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(lambda x: split.apply(params, x), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(X), model.apply(params, X), rtol=1e-4, atol=1e-5)


def test_kernels_keep_the_variance():
    params = init(MLP((300, 200)), KEY, jnp.zeros((1, 100)))["params"]
    for name, std in (("linear_0", math.sqrt(2 / 100)), ("linear_1", math.sqrt(1 / 300))):
        assert math.isclose(float(jnp.std(params[name]["kernel"])), std, rel_tol=0.03)


def test_bfloat16_arithmetic():
    """In every layer, the result being float32, and parameters."""
    model = MLP((7, 3))
    params = random_params(model)
    fine = model.apply(params, X)
    model = model.clone(dtype=jnp.bfloat16)
    coarse, layers = model.apply(params, X, capture_intermediates=True)
    assert 1e-4 < float(jnp.max(jnp.abs(coarse - fine)) / jnp.max(jnp.abs(fine))) < 0.05
    dtypes = {(path[1].key, leaf.dtype.name) for path, leaf in jax.tree.leaves_with_path(layers)}
    assert {name for name, dtype in dtypes if dtype != "bfloat16"} == {"__call__"}
    assert coarse.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(init(model, KEY, X))} == {"float32"}


@pytest.mark.parametrize(
    ("widths", "x", "error", "message"),
    [
        ((7, 3), X[0], ValueError, r"`x` must have shape \[any, any\], got \[5\]"),
        ((7, 3), X > 0, TypeError, "`x` must be floating-point"),
        ((7, 3), X[:0], ValueError, r"`x` must not be empty, got shape \[0, 5\]"),
        ((), X, ValueError, r"`widths` must hold at least one width, got \(\)"),
        ((7, 0), X, ValueError, "`widths` must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(widths, x, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(MLP(widths).init, KEY, x)
