"""The same networks in PyTorch, with the same weights; published sizes; what normalisation couples."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxgen.nets import (
    BatchNorm,
    GroupNorm,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    Stem,
    WideResNet,
    calibrate,
    cifar_stem,
    imagenet_stem,
    init,
)

KEY = jax.random.key(0)
X = jax.random.uniform(KEY, (4, 19, 14, 3), minval=-1.0)
BASIC = ResNet(blocks=(2, 1), num_classes=5, stem=cifar_stem, width=4)
BOTTLENECK = ResNet(blocks=(1, 2), bottleneck=True, num_classes=5, stem=imagenet_stem, width=4)
WIDE = WideResNet(depth=10, widening=2, num_classes=5, width=4)
MODELS = [
    pytest.param(model, id=name) for name, model in (("basic", BASIC), ("bottleneck", BOTTLENECK), ("wide", WIDE))
]


def shapes(model, size):
    """Of parameters, result and every layer's result, without computing any."""
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    params = jax.eval_shape(model.init, KEY, x)
    y, layers = jax.eval_shape(functools.partial(model.apply, capture_intermediates=True), params, x)
    return params, y.shape, of_layers(layers)


def of_layers(variables):
    tree = variables["intermediates"]
    return {name: layer["__call__"][0] for name, layer in tree.items() if name != "__call__"}


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@functools.cache
def random_params(model):
    """Of a network in training: no scale or bias is zero."""
    leaves, tree = jax.tree.flatten(init(model, KEY, X))
    rng = np.random.default_rng(1)
    return tree.unflatten([leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@functools.cache
def compiled(model):
    return jax.jit(model.apply, static_argnames="mutable")


@pytest.mark.parametrize(
    ("model", "parameters"), [(ResNet18, 11_689_512), (ResNet34, 21_797_672), (ResNet50, 25_557_032)]
)
def test_parameter_counts_are_the_published_ones(model, parameters):
    """torchvision's, of 1,000 classes."""
    params, shape, _ = shapes(model(num_classes=1000), 224)
    assert count(params) == parameters
    assert shape == (2, 1000)


@pytest.mark.parametrize(("depth", "widening", "millions"), [(28, 10, 36.5), (16, 8, 11.0), (40, 1, 0.6)])
def test_parameter_counts_of_wide_networks(depth, widening, millions):
    """Kernels; scale and bias before each; 1 x 1 kernels where the width changes; the classifier."""
    blocks = (depth - 4) // 6
    total, before = 27 * 16, 16
    for width in (16 * widening, 32 * widening, 64 * widening):
        total += 9 * before * width + (2 * blocks - 1) * 9 * width**2
        total += 2 * before + (2 * blocks - 1) * 2 * width
        total += before * width if before != width else 0
        before = width
    total += 2 * before + 10 * before + 10
    assert round(total / 1e6, 1) == millions  # the paper's table 4
    params, shape, _ = shapes(WideResNet(depth, widening, num_classes=10), 32)
    assert count(params) == total
    assert shape == (2, 10)


@pytest.mark.parametrize(
    ("stem", "size", "sizes"),
    [
        (imagenet_stem, 224, (112, 56, 28, 14, 7)),
        (imagenet_stem, 33, (17, 9, 5, 3, 2)),
        (imagenet_stem, 1, (1, 1, 1, 1, 1)),
        (cifar_stem, 32, (32, 32, 16, 8, 4)),
        (cifar_stem, 9, (9, 9, 5, 3, 2)),
        (Stem(kernel_size=3, strides=2, pool=False), 64, (32, 32, 16, 8, 4)),
    ],
)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_sizes_after_the_stem_and_each_stage(stem, size, sizes, bottleneck):
    model = ResNet(blocks=(1, 1, 1, 1), bottleneck=bottleneck, stem=stem, width=8)
    params, shape, layers = shapes(model, size)
    came = [layers[name].shape[1:3] for name in ("stem", *(f"stage_{i}_block_0" for i in range(4)))]
    assert came == [(n, n) for n in sizes]
    assert shape == (2, 256 if bottleneck else 64)
    assert params["params"]["stem"]["kernel"].shape == (stem.kernel_size, stem.kernel_size, 3, 8)


def test_sizes_of_wide_networks():
    _, shape, layers = shapes(WideResNet(depth=10, widening=2), 32)
    assert [layers[f"stage_{i}_block_0"].shape for i in range(3)] == [(2, 32, 32, 32), (2, 16, 16, 64), (2, 8, 8, 128)]
    assert shape == (2, 128)


# --- The networks in PyTorch


class Theirs:
    """Layers by the names of ours, on weights in PyTorch's layout."""

    def __init__(self, torch, variables):
        self.functional = torch.nn.functional
        self.weights, self.statistics = (
            jax.tree.map(lambda a: torch.from_numpy(np.array(a.transpose(3, 2, 0, 1) if a.ndim == 4 else a)), tree)
            for tree in (variables["params"], variables.get("batch_stats"))
        )

    def conv(self, h, block, name, strides=1):
        kernel = (block or self.weights)[name]["kernel"]
        return self.functional.conv2d(h, kernel, stride=strides, padding=kernel.shape[-1] // 2)

    def norm(self, h, block, name):
        weights, statistics = self.weights, self.statistics
        for step in (*([block] if block else []), name):
            weights, statistics = weights[step], statistics and statistics[step]
        mean, var = (statistics["mean"], statistics["var"]) if statistics else (None, None)
        return self.functional.batch_norm(h, mean, var, weights["scale"], weights["bias"], training=not statistics)

    def block(self, h, name, strides):
        weights, inner = self.weights[name], h
        for i, stride in enumerate(strides):
            inner = self.norm(self.conv(inner, weights, f"conv_{i}", stride), name, f"norm_{i}")
            inner = inner.relu() if i < len(strides) - 1 else inner
        if "shortcut" in weights:
            h = self.norm(self.conv(h, weights, "shortcut", max(strides)), name, "shortcut_norm")
        return (h + inner).relu()

    def wide_block(self, h, name, strides):
        weights = self.weights[name]
        active = self.norm(h, name, "norm_0").relu()
        inner = self.norm(self.conv(active, weights, "conv_0", strides), name, "norm_1").relu()
        shortcut = self.conv(active, weights, "shortcut", strides) if "shortcut" in weights else h
        return shortcut + self.conv(inner, weights, "conv_1")

    def __call__(self, model, x):
        h = x.permute(0, 3, 1, 2)
        if isinstance(model, WideResNet):
            h = self.conv(h, None, "stem")
            for i in range(3):
                h = self.wide_block(h, f"stage_{i}_block_0", 2 if i else 1)
            h = self.norm(h, None, "norm_out").relu()
        else:
            h = self.norm(self.conv(h, None, "stem", model.stem.strides), None, "stem_norm").relu()
            h = self.functional.max_pool2d(h, 3, 2, 1) if model.stem.pool else h
            for i, blocks in enumerate(model.blocks):
                for j in range(blocks):
                    stride = 2 if i and not j else 1
                    strides = (1, stride, 1) if model.bottleneck else (stride, 1)
                    h = self.block(h, f"stage_{i}_block_{j}", strides)
        return h.mean((2, 3)) @ self.weights["logits"]["kernel"] + self.weights["logits"]["bias"]


@pytest.mark.parametrize("model", MODELS)
def test_agrees_with_torch(model):
    """Logits and their gradient normalised by the batch; logits normalised by statistics of other images."""
    torch = pytest.importorskip("torch", reason="peer: torch is not installed")
    params = random_params(model)

    @jax.jit
    def ours(params, x):
        logits, pullback = jax.vjp(lambda x: model.apply(params, x), x)
        return logits, pullback(jnp.cos(logits))[0]

    x = torch.from_numpy(np.array(X)).requires_grad_()
    expected = Theirs(torch, params)(model, x)
    expected.sin().sum().backward()
    logits, gradient = ours(params, X)
    assert float(jnp.std(logits, axis=0).min()) > 1e-2
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-3, atol=2e-5)

    params = calibrate(compiled(model), params, [0.5 - X, 2 * X])
    expected = Theirs(torch, params)(model, x).detach()
    assert float(jnp.max(jnp.abs(logits - expected.numpy()))) > 1e-2
    np.testing.assert_allclose(compiled(model)(params, X), expected, rtol=1e-4, atol=1e-4)


# --- Beginnings


@pytest.mark.parametrize("norm", [BatchNorm, functools.partial(GroupNorm, groups=2)])
@pytest.mark.parametrize(("model", "last"), [(BASIC, "norm_1"), (BOTTLENECK, "norm_2")])
def test_the_last_scale_of_each_block_begins_at_zero(model, last, norm):
    """All else is as without ``zero_init``."""
    model = model.clone(norm=norm)
    zero, one = init(model, KEY, X), init(model.clone(zero_init=False), KEY, X)
    flat = dict(jax.tree.leaves_with_path(zero))
    for path, leaf in jax.tree.leaves_with_path(one):
        names = [entry.key for entry in path]
        np.testing.assert_array_equal(flat[path], 0 * leaf if names[-2:] == [last, "scale"] else leaf)
        assert names[-1] != "scale" or float(leaf.min()) == 1


def test_flax_begins_alike():
    scales = jax.jit(lambda: [BASIC.init(KEY, X)["params"]["stage_1_block_0"][f"norm_{i}"]["scale"] for i in (0, 1)])()
    np.testing.assert_array_equal(scales, [[1.0] * 8, [0.0] * 8])


def test_a_block_begins_as_the_identity():
    _, variables = jax.jit(functools.partial(BASIC.apply, capture_intermediates=True))(init(BASIC, KEY, X), X)
    layers = of_layers(variables)
    assert float(jnp.max(layers["stage_0_block_0"])) > 0.1
    np.testing.assert_array_equal(layers["stage_0_block_1"], layers["stage_0_block_0"])


def test_kernels_keep_the_variance_of_what_they_pass_back():
    params = init(WideResNet(depth=10, widening=4, num_classes=50), KEY, X)["params"]
    block = params["stage_1_block_0"]
    for layer, std in (
        (block["conv_0"], math.sqrt(2 / (9 * 128))),
        (block["shortcut"], math.sqrt(2 / 128)),
        (params["logits"], 0.01),
    ):
        assert math.isclose(float(jnp.std(layer["kernel"])), std, rel_tol=0.03)


# --- Normalisation


@pytest.mark.parametrize("model", MODELS)
def test_batch_norm_couples_images_until_calibrated(model):
    """On the one batch of the calibration inference is training; then an image no longer sees the others."""
    params, others = random_params(model), X.at[1:].set(-(X[1:] ** 2))
    logits = compiled(model)(params, X)
    assert float(jnp.max(jnp.abs(logits[0] - compiled(model)(params, others)[0]))) > 1e-2
    calibrated = calibrate(compiled(model), params, [X])
    np.testing.assert_allclose(compiled(model)(calibrated, X), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(compiled(model)(calibrated, others)[0], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_group_norm_couples_no_images(model):
    model = model.clone(norm=functools.partial(GroupNorm, groups=2))
    params, others = random_params(model), X.at[1:].set(-(X[1:] ** 2))
    logits, changed = compiled(model)(params, X), compiled(model)(params, others)
    assert float(jnp.max(jnp.abs(logits[1] - changed[1]))) > 1e-2
    np.testing.assert_allclose(logits[0], changed[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_split_batch_is_one_batch(model):
    params = random_params(model)
    split = model.clone(norm=functools.partial(BatchNorm, axis_name="data"))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(lambda x: split.apply(params, x), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(X), compiled(model)(params, X), rtol=1e-4, atol=1e-4)


# --- What else is promised


@pytest.mark.parametrize("model", MODELS)
def test_features_are_what_the_classifier_sees(model):
    params = random_params(model)
    encoder = model.clone(num_classes=None)
    features = compiled(encoder)(params, X)
    logits = nn.Dense(5).apply({"params": params["params"]["logits"]}, features)
    np.testing.assert_allclose(logits, compiled(model)(params, X), rtol=1e-5, atol=1e-5)
    own = jax.eval_shape(encoder.init, KEY, X)["params"]
    assert set(own) == set(params["params"]) - {"logits"}


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_arithmetic(model):
    """In all layers but the classifier, the result being float32, and parameters."""
    params = random_params(model)
    fine = compiled(model)(params, X)
    model = model.clone(dtype=jnp.bfloat16)
    coarse, layers = jax.jit(functools.partial(model.apply, capture_intermediates=True))(params, X)
    assert 1e-4 < float(jnp.max(jnp.abs(coarse - fine)) / jnp.max(jnp.abs(fine))) < 0.1
    dtypes = {(path[1].key, leaf.dtype.name) for path, leaf in jax.tree.leaves_with_path(layers)}
    assert {name for name, dtype in dtypes if dtype != "bfloat16"} == {"__call__", "logits"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(model.init, KEY, X))} == {"float32"}


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (BASIC, X[0], ValueError, r"`x` must have shape \[any, any, any, any\], got \[19, 14, 3\]"),
        (WIDE, X > 0, TypeError, "`x` must be floating-point"),
        (BASIC, X[:, :0], ValueError, r"`x` must not be empty, got shape \[4, 0, 14, 3\]"),
        (WIDE, X[:0], ValueError, "`x` must not be empty"),
        (BASIC.clone(blocks=()), X, ValueError, r"`blocks` must hold at least one stage, got \(\)"),
        (BASIC.clone(blocks=(1, 0)), X, ValueError, "`blocks` must be an integer of at least 1, got 0"),
        (BASIC.clone(width=0), X, ValueError, "`width` must be an integer of at least 1"),
        (BASIC.clone(num_classes=0), X, ValueError, "`num_classes` must be an integer of at least 1"),
        (BASIC.clone(stem=Stem(4, 1, False)), X, ValueError, "`stem.kernel_size` must be odd, got 4"),
        (BASIC.clone(stem=Stem(3, 0, False)), X, ValueError, "`stem.strides` must be an integer of at least 1"),
        (BASIC.clone(norm=GroupNorm), X, ValueError, "`groups` must divide the 4 channels of `x`, got 32"),
        (
            BASIC.clone(norm=lambda **_: lambda h: h),
            X,
            ValueError,
            r"`zero_init` needs a `norm` whose parameters hold 'scale', got \[\]",
        ),
        (WIDE.clone(depth=27), X, ValueError, "`depth` must be 6 n \\+ 4 for n blocks per stage, got 27"),
        (WIDE.clone(depth=4), X, ValueError, "`depth` must be 6 n"),
        (WIDE.clone(widening=0), X, ValueError, "`widening` must be an integer of at least 1"),
    ],
)
def test_bad_input_is_refused(model, x, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(model.init, KEY, x)
