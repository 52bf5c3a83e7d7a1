"""The same layers in PyTorch, with the same weights; closed forms of the classes; penalties' derivatives."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import gan
from jaxgen.nets import (
    BatchNorm,
    ConvAutoencoder,
    DCGANDiscriminator,
    DCGANGenerator,
    GroupNorm,
    calibrate,
    convolve,
    init,
)

KEY = jax.random.key(0)
SMALL = {"size": 8, "channels": 2, "num_classes": 3, "widths": (6, 8)}
Z, X = jax.random.normal(KEY, (4, 5)), jax.random.uniform(KEY, (4, 8, 8, 2), minval=-1.0)
LABELS = jnp.array([0, 2, 1, 2])
G, D = DCGANGenerator(**SMALL), DCGANDiscriminator(**SMALL)
G_PARAMS, D_PARAMS = init(G, KEY, Z, LABELS), init(D, KEY, X, LABELS)
# Signals of order one, which 0.02 N(0, 1) would not give at these widths, and biases that are not zero.
D_PARAMS = jax.tree.map(lambda p: 10 * p + 0.05, D_PARAMS)
generate, judge = jax.jit(G.apply), jax.jit(D.apply)


def count(model, *args):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(model.init, KEY, *args)))


@pytest.mark.parametrize("size", [16, 48, 64, 128])
def test_sizes_and_parameter_counts(size):
    """Kernels of 16 taps and biases; a dense layer; scale and bias where there is BatchNorm; a class table of 11 rows."""
    z, x, labels = jnp.zeros((2, 100)), jnp.zeros((2, size, size, 3)), jnp.array([0, 9])
    smallest = (size // 16) ** 2
    generator, discriminator = DCGANGenerator(size, 3, 10), DCGANDiscriminator(size, 3, 10, norm=BatchNorm)
    up = 16 * (512 * 256 + 256 * 128 + 128 * 64 + 64 * 3) + 256 + 128 + 64 + 3
    norms = 2 * (512 + 256 + 128 + 64)
    assert count(generator, z, labels) == up + norms + (200 + 1) * smallest * 512 + 11 * 100
    down = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 64 + 128 + 256 + 512
    norms = 2 * (128 + 256 + 512)
    assert count(discriminator, x, labels) == down + norms + 512 * smallest + 1 + 11 * 512

    params = jax.eval_shape(generator.init, KEY, z, labels)
    assert jax.eval_shape(generator.apply, params, z, labels).shape == x.shape
    params = jax.eval_shape(discriminator.init, KEY, x, labels)
    assert jax.eval_shape(discriminator.apply, params, x, labels).shape == (2,)


def test_is_the_autoencoder_cut_in_two():
    params = [
        jax.eval_shape(model.init, KEY, jnp.zeros(shape))["params"]
        for model, shape in (
            (ConvAutoencoder(), (1, 32, 32, 3)),
            (DCGANDiscriminator(32, 3, norm=BatchNorm), (1, 32, 32, 3)),
            (DCGANGenerator(32, 3), (1, 100)),
        )
    ]
    whole, *halves = ({name: jax.tree.map(jnp.shape, leaf) for name, leaf in tree.items()} for tree in params)
    assert whole == {k: v for half in halves for k, v in half.items() if k.startswith(("up", "down"))}


def torch_pair(torch, size, norm):
    """Unconditional, with random scales and biases of the normalisation."""
    nn, smallest = torch.nn, size // 16
    generator, width = [nn.Linear(20, smallest**2 * 512), nn.Unflatten(1, (512, smallest, smallest))], 512
    for features in (256, 128, 64, 3):
        generator += [nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, features, 4, 2, 1)]
        width = features
    discriminator = []
    for features in (64, 128, 256, 512):
        discriminator.append(nn.Conv2d(width, features, 4, 2, 1))
        discriminator += [nn.BatchNorm2d(features)] if norm and width != 3 else []
        discriminator.append(nn.LeakyReLU(0.2))
        width = features
    pair = (
        nn.Sequential(*generator, nn.Tanh()),
        nn.Sequential(*discriminator, nn.Flatten(), nn.Linear(512 * smallest**2, 1)),
    )
    for network in pair:
        for layer in network:
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.2)
                nn.init.normal_(layer.bias, 0.0, 0.2)
    return pair


def converted(network, names, smallest):
    """Layers in order; the dense layer of channels first becomes one of channels last."""
    params = {}
    for layer in network:
        weights = [p.detach().numpy() for p in layer.parameters()]
        if not weights:
            continue
        kind, (weight, bias) = type(layer).__name__, weights
        name = next(names[kind])
        if kind == "Linear":
            grid = (512, smallest, smallest)
            if len(bias) == 1:
                weight = weight.reshape(*grid).transpose(1, 2, 0)[..., None]
            else:
                weight, bias = weight.reshape(*grid, 20).transpose(3, 1, 2, 0), bias.reshape(grid).transpose(1, 2, 0)
        elif weight.ndim == 4:
            weight = weight.transpose(2, 3, 1, 0)
        params[name] = {"scale" if weight.ndim == 1 else "kernel": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    return {"params": params}


@pytest.mark.parametrize("norm", [BatchNorm, None])
def test_agrees_with_torch(norm):
    torch = pytest.importorskip("torch", reason="peer: torch is not installed")
    torch.manual_seed(0)
    theirs = torch_pair(torch, 32, norm)
    names = {
        "Linear": iter(("latent", "logit")),
        "BatchNorm2d": iter(
            ("latent_norm", *(f"up_norm_{i}" for i in range(3)), *(f"down_norm_{i}" for i in (1, 2, 3)))
        ),
        "ConvTranspose2d": iter([f"up_{i}" for i in range(4)]),
        "Conv2d": iter([f"down_{i}" for i in range(4)]),
    }
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(3, 20)).astype(np.float32), rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)

    model, params = DCGANGenerator(32, 3), converted(theirs[0], names, 2)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(model.init, KEY, z))
    expected = theirs[0](torch.from_numpy(z)).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(jax.jit(model.apply)(params, z), expected, atol=1e-5)

    model, params = DCGANDiscriminator(32, 3, norm=norm), converted(theirs[1], names, 2)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(model.init, KEY, x))
    expected = theirs[1](torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()[:, 0]
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), expected, atol=1e-5)


def test_the_class_is_a_projection_of_the_pooled_features():
    """Eq. 3 by hand."""
    tree, phi = D_PARAMS["params"], X
    for i in range(2):
        layer = tree[f"down_{i}"]
        phi = jax.nn.leaky_relu(convolve(phi, layer["kernel"], strides=2, padding=1) + layer["bias"], 0.2)
    logits = jnp.tensordot(phi, tree["logit"]["kernel"], 3)[:, 0] + tree["logit"]["bias"]
    told = jnp.einsum("bhwc,bc->b", phi, tree["label"]["embedding"][LABELS])
    assert float(jnp.max(jnp.abs(told))) > 0.1
    np.testing.assert_allclose(judge(D_PARAMS, X, LABELS), logits + told, rtol=1e-5, atol=1e-5)


def test_the_class_changes_an_image():
    images, others = generate(G_PARAMS, Z, LABELS), generate(G_PARAMS, Z, LABELS.at[0].set(1))
    assert float(jnp.max(jnp.abs(images[0] - others[0]))) > 1e-3
    assert float(jnp.max(jnp.abs(images))) <= 1


@pytest.mark.parametrize("norm", [None, functools.partial(GroupNorm, groups=2), BatchNorm])
def test_only_batch_norm_couples_the_logits(norm):
    """Each logit and its gradient, when all other images are others: what penalties of the gradient rely on."""
    model = D.clone(norm=norm)
    params = jax.tree.map(lambda p: 10 * p, init(model, KEY, X, LABELS))

    @jax.jit
    def both(x):
        logits, pullback = jax.vjp(lambda x: model.apply(params, x, LABELS), x)
        return logits[0], pullback(jnp.ones_like(logits))[0][0]

    logits, gradients = zip(both(X), both(X.at[1:].set(-(X[1:] ** 2))), strict=True)
    if norm is BatchNorm:
        assert abs(float(logits[0] - logits[1])) > 1e-2
        assert float(jnp.max(jnp.abs(gradients[0] - gradients[1]))) > 1e-3
    else:
        np.testing.assert_allclose(*logits, rtol=1e-5)
        np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_images_of_a_calibrated_generator_depend_on_their_own_latents():
    params = calibrate(G.apply, G_PARAMS, [(Z, LABELS)])
    images = generate(params, Z, LABELS)
    np.testing.assert_allclose(images, generate(G_PARAMS, Z, LABELS), atol=1e-5)
    np.testing.assert_allclose(images[0], generate(params, Z.at[1:].set(0), LABELS)[0], atol=1e-5)


def test_the_penalised_loss_has_its_gradient():
    """Second order, against central differences in float64, along one direction of all parameters."""
    with jax.enable_x64(True):
        model, params = D.clone(dtype=jnp.float64), jax.tree.map(lambda p: np.asarray(p, np.float64), D_PARAMS)
        x = np.asarray(X, np.float64)

        @jax.jit
        def loss(params):
            logits, squares = gan.penalised(lambda x: model.apply(params, x, LABELS), x)
            return jnp.mean(jnp.sin(logits) + squares)

        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
        ahead = loss(jax.tree.map(lambda p, d: p + 1e-6 * d, params, direction))
        behind = loss(jax.tree.map(lambda p, d: p - 1e-6 * d, params, direction))
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, jax.jit(jax.grad(loss))(params), direction)))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "params", "given", "wide"),
    [
        pytest.param(G, G_PARAMS, Z, {"label"}, id="generator"),
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
            lambda: judge(D_PARAMS, X[:, :4], LABELS),
            ValueError,
            r"`x` must have shape \[any, 8, 8, 2\], got \[4, 4, 8, 2\]",
        ),
        (
            lambda: judge(D_PARAMS, X[..., :1], LABELS),
            ValueError,
            r"`x` must have shape \[any, 8, 8, 2\], got \[4, 8, 8, 1\]",
        ),
        (lambda: judge(D_PARAMS, X.astype(int), LABELS), TypeError, "`x` must be floating-point"),
        (
            lambda: judge(D_PARAMS, X),
            ValueError,
            r"`labels` must be \[batch\] integers when `num_classes` is 3, got None",
        ),
        (lambda: judge(D_PARAMS, X, LABELS[:2]), ValueError, r"`labels` must have shape \[4\], got \[2\]"),
        (lambda: generate(G_PARAMS, Z[0], LABELS), ValueError, r"`z` must have shape \[any, any\], got \[5\]"),
        (lambda: generate(G_PARAMS, Z > 0, LABELS), TypeError, "`z` must be floating-point"),
        (lambda: generate(G_PARAMS, Z), ValueError, "`labels` must be"),
        (
            lambda: G.clone(num_classes=None).init(KEY, Z, LABELS),
            ValueError,
            "`labels` must be None when `num_classes`",
        ),
        (
            lambda: G.clone(size=10).init(KEY, Z, LABELS),
            ValueError,
            r"`size` must be a multiple of 4 \(2 widths\), got 10",
        ),
        (
            lambda: D.clone(widths=()).init(KEY, X, LABELS),
            ValueError,
            r"`widths` must hold at least one width, got \(\)",
        ),
        (lambda: D.clone(widths=(4, 0)).init(KEY, X, LABELS), ValueError, "`widths` must be an integer of at least 1"),
        (lambda: G.clone(channels=0).init(KEY, Z, LABELS), ValueError, "`channels` must be an integer of at least 1"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
