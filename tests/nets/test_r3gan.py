"""Against the equations in NumPy float64, and what initialisation and penalties promise."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import gan
from jaxgen.nets import R3GANDiscriminator, R3GANGenerator, bilinear_downsample, bilinear_upsample, convolve, init

KEY = jax.random.key(0)
SMALL = {"channels": 2, "num_classes": 3, "widths": (4, 6), "blocks": 1, "group_size": 4}
Z = jax.random.normal(KEY, (3, 5))
X = jax.random.uniform(KEY, (3, 8, 8, 2), minval=-1.0)
LABELS = jnp.array([0, 2, 1])


def random_params(model, *args):
    """Of a network in training: no kernel or bias is zero."""
    leaves, tree = jax.tree.flatten(init(model, KEY, *args))
    rng = np.random.default_rng(1)
    return tree.unflatten([leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


G, D = R3GANGenerator(**SMALL), R3GANDiscriminator(**SMALL)
G_PARAMS, D_PARAMS = random_params(G, Z, LABELS), random_params(D, X, LABELS)
generate, judge = jax.jit(G.apply), jax.jit(D.apply)


# --- Eqs. 1-4 in NumPy


def leaky(h):
    return np.where(h > 0, h, 0.2 * h)


def naive_convolution(x, kernel, groups):
    taps, _, inputs, features = kernel.shape
    reach = taps // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    y = np.zeros((*x.shape[:3], features))
    for o in range(features):
        group = o // (features // groups)
        for i, j in np.ndindex(taps, taps):
            window = padded[:, i : i + x.shape[1], j : j + x.shape[2], group * inputs : (group + 1) * inputs]
            y[..., o] += window @ kernel[i, j, :, o]
    return y


def naive_stage(h, tree, blocks, group_size):
    for i in range(blocks):
        layers = [tree[f"block_{i}_{k}"] for k in range(3)]
        inner = naive_convolution(h, layers[0]["kernel"], 1) + layers[0]["bias"]
        groups = inner.shape[-1] // group_size
        inner = naive_convolution(leaky(inner), layers[1]["kernel"], groups) + layers[1]["bias"]
        h = h + naive_convolution(leaky(inner), layers[2]["kernel"], 1)
    return h


def naive_generator(model, params, z, labels, blocks=2):
    tree = float64(params)["params"]
    z = np.asarray(z, np.float64)
    if labels is not None:
        z = np.concatenate([z, tree["label"]["embedding"][np.asarray(labels)]], axis=1)
    h = tree["basis"] * (z @ tree["latent"]["kernel"])[:, None, None]
    for i in range(len(model.widths)):
        if f"width_{i}" in tree:
            h = naive_convolution(h, tree[f"width_{i}"]["kernel"], 1)
        if i:
            h = np.asarray(bilinear_upsample(h))
        h = naive_stage(h, tree[f"stage_{i}"], blocks, model.group_size)
    return naive_convolution(h, tree["out"]["kernel"], 1)


def naive_discriminator(model, params, x, labels, blocks=2):
    tree = float64(params)["params"]
    h = naive_convolution(np.asarray(x, np.float64), tree["in"]["kernel"], 1)
    for i in reversed(range(len(model.widths))):
        if i < len(model.widths) - 1:
            h = np.asarray(bilinear_downsample(h))
        if f"width_{i}" in tree:
            h = naive_convolution(h, tree[f"width_{i}"]["kernel"], 1)
        h = naive_stage(h, tree[f"stage_{i}"], blocks, model.group_size)
    features = np.einsum("bhwc,hwc->bc", h, tree["basis"]) @ tree["logit"]["kernel"]
    if labels is None:
        return features[:, 0]
    return np.sum(features * tree["label"]["embedding"][np.asarray(labels)], axis=1)


EQUATIONS = pytest.mark.parametrize(
    ("kind", "naive", "given"),
    [
        pytest.param(R3GANGenerator, naive_generator, Z, id="generator"),
        pytest.param(R3GANDiscriminator, naive_discriminator, jnp.tile(X, (1, 2, 2, 1)), id="discriminator"),
    ],
)


@pytest.mark.parametrize("labels", [LABELS, None], ids=["classes", "no classes"])
@EQUATIONS
def test_against_the_equations(kind, naive, given, labels):
    """Three stages, two of one width."""
    model = kind(2, None if labels is None else 3, (4, 6, 6), group_size=4)
    params = random_params(model, given, labels)
    with jax.enable_x64(True):
        ours = jax.jit(model.clone(dtype=jnp.float64).apply)(float64(params), float64(given), labels)
        np.testing.assert_allclose(ours, naive(model, params, given, labels), rtol=1e-9, atol=1e-9)


@EQUATIONS
def test_every_block_starts_as_the_identity(kind, naive, given):
    model = kind(2, 3, (4, 6, 6), group_size=4)
    params = init(model, KEY, given, LABELS)
    expected = naive(model, params, given, LABELS, blocks=0)
    np.testing.assert_allclose(jax.jit(model.apply)(params, given, LABELS), expected, rtol=1e-4, atol=1e-5)


def test_initial_standard_deviations():
    """Fix-up: by L^(-1/4) less in each branch, L being all blocks; other layers keep the variance."""
    options = {"channels": 3, "num_classes": 50, "widths": (64, 96), "blocks": 3}
    fixup = math.sqrt(2 / 1.04) * 6**-0.25
    labels = jnp.array([0])
    trees = [
        init(model, KEY, given, labels)["params"]
        for model, given in (
            (R3GANGenerator(**options), jnp.zeros((1, 128))),
            (R3GANDiscriminator(**options), jnp.zeros((1, 8, 8, 3))),
        )
    ]
    kernels = [
        {"latent": 256**-0.5, "width_1": 64**-0.5, "out": 96**-0.5},
        {"in": 3**-0.5, "width_0": 96**-0.5, "logit": 64**-0.5},
    ]
    for tree, expected, basis, label in zip(trees, kernels, (1.0, 0.25), (1.0, 64**-0.5), strict=True):
        for name, std in expected.items():
            np.testing.assert_allclose(np.std(tree[name]["kernel"]), std, rtol=0.15)
        np.testing.assert_allclose(np.std(tree["basis"]), basis, rtol=0.1)
        np.testing.assert_allclose(np.std(tree["label"]["embedding"]), label, rtol=0.1)
        for (stage, width), i in itertools.product(enumerate((64, 96)), range(3)):
            layers = [tree[f"stage_{stage}"][f"block_{i}_{k}"] for k in range(3)]
            stds = [np.std(layer["kernel"]) for layer in layers]
            np.testing.assert_allclose(stds[:2], [fixup * width**-0.5, fixup * 144**-0.5], rtol=0.05)
            assert not np.any(layers[2]["kernel"])


def count(model, *args):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(model.init, KEY, *args)))


@pytest.mark.parametrize(
    ("widths", "classes"), [((768,) * 4, None), ((768,) * 4, 10), ((768,) * 4 + (384,), None), ((32, 64), 10)]
)
def test_parameter_counts(widths, classes):
    """A block has 2 w^2 e + e w (9 group_size + 2) parameters; kernels but for those have no bias."""
    size = 4 * 2 ** (len(widths) - 1)
    labels = None if classes is None else jnp.array([1])
    shared = sum(2 * (4 * w**2 + 2 * w * (9 * 16 + 2)) for w in widths) + widths[-1] * 3 + 16 * widths[0]
    shared += sum(a * b for a, b in itertools.pairwise(widths) if a != b)
    joined = 64 if classes is None else 128
    table, out = (0, 1) if classes is None else (classes + 1, widths[0])
    generator, discriminator = R3GANGenerator(3, classes, widths), R3GANDiscriminator(3, classes, widths)
    assert count(generator, jnp.zeros((1, 64)), labels) == shared + joined * widths[0] + table * 64
    x = jnp.zeros((1, size, size, 3))
    assert count(discriminator, x, labels) == shared + (out + table) * widths[0]


@pytest.mark.parametrize("stages", range(2, 7))
def test_sizes(stages):
    size = 4 * 2 ** (stages - 1)
    model, z = R3GANGenerator(1, widths=(16, 8) * (stages // 2) + (8,) * (stages % 2)), jnp.zeros((2, 7))
    params = jax.eval_shape(model.init, KEY, z)
    images = jax.eval_shape(model.apply, params, z)
    assert (images.shape, images.dtype) == ((2, size, size, 1), jnp.float32)
    judging = R3GANDiscriminator(1, widths=model.widths)
    logits = jax.eval_shape(judging.apply, jax.eval_shape(judging.init, KEY, images), images)
    assert (logits.shape, logits.dtype) == ((2,), jnp.float32)


def test_each_logit_and_each_image_depends_on_its_own_example():
    """And each logit's gradient: what penalties of the gradient rely on."""
    slope = jax.jit(jax.grad(lambda x: jnp.sum(D.apply(D_PARAMS, x, LABELS))))
    others = X.at[1:].set(-(X[1:] ** 2))
    np.testing.assert_allclose(judge(D_PARAMS, X, LABELS)[0], judge(D_PARAMS, others, LABELS)[0], rtol=1e-5)
    np.testing.assert_allclose(slope(X)[0], slope(others)[0], rtol=1e-4, atol=1e-5)
    images, others = generate(G_PARAMS, Z, LABELS), generate(G_PARAMS, Z.at[1:].set(-Z[1:]), LABELS)
    np.testing.assert_allclose(images[0], others[0], rtol=1e-4, atol=1e-5)


def test_the_class_changes_an_image_and_a_logit():
    others = LABELS.at[0].set(1)
    for apply, params, given in ((generate, G_PARAMS, Z), (judge, D_PARAMS, X)):
        change = apply(params, given, LABELS) - apply(params, given, others)
        assert float(jnp.max(jnp.abs(change[0]))) > 1e-2
        np.testing.assert_allclose(change[1:], 0, atol=1e-6)


def test_the_penalised_loss_has_its_gradient():
    """Second order, against central differences in float64, along one direction of all parameters."""
    with jax.enable_x64(True):
        model, params, x = D.clone(dtype=jnp.float64), float64(D_PARAMS), float64(X)

        @jax.jit
        def loss(params):
            logits, squares = gan.penalised(lambda x: model.apply(params, x, LABELS), x)
            return jnp.mean(jnp.sin(logits) + squares)

        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
        ahead = loss(jax.tree.map(lambda p, d: p + 1e-7 * d, params, direction))
        behind = loss(jax.tree.map(lambda p, d: p - 1e-7 * d, params, direction))
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, jax.jit(jax.grad(loss))(params), direction)))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-7, rtol=1e-6)


def test_the_grouped_convolutions_penalty_is_that_of_a_sum_over_taps():
    """The gradient of a gradient's norm through groups, against products that know no convolution, in float64."""

    def by_taps(x, kernel):
        groups = x.shape[3] // kernel.shape[2]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(2, 6, 7, groups, -1)
        kernel = kernel.reshape(3, 3, kernel.shape[2], groups, -1)
        taps = [jnp.einsum("bhwgc,cgo->bhwgo", x[:, i : i + 4, j : j + 5], kernel[i, j]) for i, j in np.ndindex(3, 3)]
        return sum(taps).reshape(2, 4, 5, -1)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, 4, 5, 6)), rng.normal(size=(3, 3, 2, 6))

        def penalty(kernel, convolution):
            return jnp.mean(gan.r1(lambda x: jnp.sum(jnp.sin(convolution(x, kernel)), axis=(1, 2, 3)), jnp.asarray(x)))

        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda kernel, f=f: penalty(kernel, f)))(kernel)
            for f in (functools.partial(convolve, groups=3), by_taps)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), ours, theirs)


@pytest.mark.parametrize(
    ("model", "params", "given", "wide"),
    [
        pytest.param(G, G_PARAMS, Z, {"label", "latent", "out"}, id="generator"),
        pytest.param(D, D_PARAMS, X, {"label", "logit"}, id="discriminator"),
    ],
)
def test_bfloat16_arithmetic(model, params, given, wide):
    """In all layers but a few, the result being float32."""
    fine = jax.jit(model.apply)(params, given, LABELS)
    model = model.clone(dtype=jnp.bfloat16)
    coarse, layers = jax.jit(functools.partial(model.apply, capture_intermediates=True))(params, given, LABELS)
    assert 1e-4 < float(jnp.max(jnp.abs(coarse - fine)) / jnp.max(jnp.abs(fine))) < 0.03
    dtypes = {(path[1].key, leaf.dtype.name) for path, leaf in jax.tree.leaves_with_path(layers)}
    assert {name for name, dtype in dtypes if dtype != "bfloat16"} == {"__call__", *wide}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: judge(D_PARAMS, X[:, :4, :4], LABELS),
            ValueError,
            r"`x` must have shape \[any, 8, 8, 2\], got \[3, 4, 4, 2\]",
        ),
        (
            lambda: judge(D_PARAMS, X[..., :1], LABELS),
            ValueError,
            r"`x` must have shape \[any, 8, 8, 2\], got \[3, 8, 8, 1\]",
        ),
        (lambda: judge(D_PARAMS, X.astype(int), LABELS), TypeError, "`x` must be floating-point"),
        (
            lambda: judge(D_PARAMS, X),
            ValueError,
            r"`labels` must be \[batch\] integers when `num_classes` is 3, got None",
        ),
        (lambda: judge(D_PARAMS, X, LABELS[:2]), ValueError, r"`labels` must have shape \[3\], got \[2\]"),
        (lambda: generate(G_PARAMS, Z[0], LABELS), ValueError, r"`z` must have shape \[any, any\], got \[5\]"),
        (lambda: generate(G_PARAMS, Z > 0, LABELS), TypeError, "`z` must be floating-point"),
        (lambda: generate(G_PARAMS, Z), ValueError, "`labels` must be"),
        (
            lambda: G.clone(num_classes=None).init(KEY, Z, LABELS),
            ValueError,
            "`labels` must be None when `num_classes`",
        ),
        (
            lambda: G.clone(widths=()).init(KEY, Z, LABELS),
            ValueError,
            r"`widths` must hold at least one width, got \(\)",
        ),
        (lambda: D.clone(widths=(4, 0)).init(KEY, X, LABELS), ValueError, "`widths` must be an integer of at least 1"),
        (
            lambda: D.clone(group_size=8).init(KEY, X, LABELS),
            ValueError,
            "`group_size` must divide 2 times each width, got 8 and 6",
        ),
        (lambda: G.clone(blocks=0).init(KEY, Z, LABELS), ValueError, "`blocks` must be an integer of at least 1"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
