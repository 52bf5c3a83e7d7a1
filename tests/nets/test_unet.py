"""The published network: its parameter count and, with the same weights, its outputs in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nets import UNet, convolve, init

SMALL = UNet(out_channels=2, channels=32, multipliers=(1, 2), blocks=1, attention=(4,), groups=8, zero_init=False)
TINY = SMALL.clone(multipliers=(1,), attention=())
X = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
T = jnp.array([0.0, 10.0, 999.0])


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def diffusers_unet(widths, blocks, attention_level, size):
    """The arrangement of google/ddpm-cifar10-32, weights at random."""
    torch = pytest.importorskip("torch", reason="peer: torch is not installed")
    diffusers = pytest.importorskip("diffusers", reason="peer: diffusers is not installed")
    torch.manual_seed(0)
    down = ["AttnDownBlock2D" if i == attention_level else "DownBlock2D" for i in range(len(widths))]
    up = ["AttnUpBlock2D" if i == attention_level else "UpBlock2D" for i in reversed(range(len(widths)))]
    network = diffusers.UNet2DModel(
        sample_size=size,
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=down,
        up_block_types=up,
        downsample_padding=0,
        norm_eps=1e-6,
        attention_head_dim=None,
        freq_shift=1,
        flip_sin_to_cos=False,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:  # neither scale nor bias may hide behind ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    return torch, network


def converted(network, levels, blocks):
    """diffusers' state dict as our tree."""
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}

    def layer(name):
        weight, bias = jnp.asarray(state[f"{name}.weight"]), jnp.asarray(state[f"{name}.bias"])
        axes = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[weight.ndim]
        return {"scale" if weight.ndim == 1 else "kernel": weight.transpose(axes), "bias": bias}

    def block(name):
        ours = {
            "norm_0": "norm1",
            "conv_0": "conv1",
            "embedding": "time_emb_proj",
            "norm_1": "norm2",
            "conv_1": "conv2",
            "shortcut": "conv_shortcut",
        }
        return {a: layer(f"{name}.{b}") for a, b in ours.items() if f"{name}.{b}.weight" in state}

    def attention(name):
        ours = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
        tree = {a: layer(f"{name}.{b}") for a, b in ours.items()}
        for role in ("query", "key", "value", "out"):  # linear layers are 1 x 1 convolutions
            tree[role]["kernel"] = tree[role]["kernel"][None, None]
        return tree

    params = {
        "time_0": layer("time_embedding.linear_1"),
        "time_1": layer("time_embedding.linear_2"),
        "conv_in": layer("conv_in"),
        "middle_block_0": block("mid_block.resnets.0"),
        "middle_attention": attention("mid_block.attentions.0"),
        "middle_block_1": block("mid_block.resnets.1"),
        "norm_out": layer("conv_norm_out"),
        "conv_out": layer("conv_out"),
    }
    for side, index in [("down", i) for i in range(levels)] + [("up", i) for i in range(levels)]:
        level = index if side == "down" else levels - 1 - index
        theirs = f"{side}_blocks.{index}"
        for i in range(blocks + (side == "up")):
            params[f"{side}_{level}_block_{i}"] = block(f"{theirs}.resnets.{i}")
            if f"{theirs}.attentions.{i}.to_q.weight" in state:
                params[f"{side}_{level}_attention_{i}"] = attention(f"{theirs}.attentions.{i}")
        sampler = f"{theirs}.{side}samplers.0.conv"
        if f"{sampler}.weight" in state:
            params[f"{side}_{level}_sample"] = layer(sampler)
    return {"params": params}


@pytest.mark.filterwarnings("default")  # diffusers' own
@pytest.mark.parametrize(
    ("model", "widths", "blocks", "size"),
    [
        pytest.param(UNet(out_channels=3), (128, 256, 256, 256), 2, 32, id="google/ddpm-cifar10-32"),
        pytest.param(
            UNet(out_channels=3, channels=32, multipliers=(1, 2, 3), blocks=1, attention=(8,)),
            (32, 64, 96),
            1,
            16,
            id="small",
        ),
    ],
)
def test_agrees_with_diffusers(model, widths, blocks, size):
    torch, network = diffusers_unet(widths, blocks, 1, size)
    x, t = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32), np.array([3, 871])
    with torch.no_grad():
        expected = network(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample.numpy()
    params = converted(network, len(widths), blocks)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    ours = jax.jit(model.apply)(params, x, t)
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 3, 1), atol=1e-4 * np.abs(expected).max())


def test_parameter_count_of_ddpm_cifar10():
    shapes = jax.eval_shape(UNet(out_channels=3).init, jax.random.key(0), jnp.ones((1, 32, 32, 3)), jnp.ones(1))
    assert count(shapes) == 35_746_307


def test_folded_upsampling_changes_nothing():
    def nearest(x, kernel):
        return convolve(x.repeat(2, axis=1).repeat(2, axis=2), kernel)

    params = init(SMALL, jax.random.key(0), X, T)
    plain = SMALL.clone(upsample=nearest)
    ours, theirs = (jax.jit(model.apply)(params, X, T) for model in (SMALL, plain))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_time_labels_and_both_kinds_of_conditioning_matter():
    for scale_shift in (False, True):
        model = TINY.clone(num_classes=4, scale_shift=scale_shift)
        labels = jnp.array([0, 4, 2])
        params = init(model, jax.random.key(0), X, T, labels)
        run = jax.jit(model.apply)
        y = run(params, X, T, labels)
        assert not np.allclose(y[1:], run(params, X, T + 1, labels)[1:], atol=1e-4)
        other = run(params, X, T, labels.at[1].set(3))
        assert not np.allclose(y[1], other[1], atol=1e-4)
        np.testing.assert_allclose(y[::2], other[::2], atol=1e-5)  # neighbours do not see it
        np.testing.assert_allclose(
            jax.jit(model.clone(time_scale=1000.0).apply)(params, X, T / 1000, labels), y, atol=1e-4
        )


def test_scale_and_shift_of_zero_is_no_conditioning():
    """Eq. 2 with W_s = W_b = 0 is plain normalisation, as Eq. 1 with W = 0 is."""
    additive, scaled = TINY, TINY.clone(scale_shift=True)
    params = init(scaled, jax.random.key(0), X, T)
    silent = jax.tree.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "'embedding'" in str(path) else leaf, params
    )
    like_additive = jax.tree.map_with_path(
        lambda path, leaf: leaf[..., : leaf.shape[-1] // 2] if "'embedding'" in str(path) else leaf, silent
    )
    np.testing.assert_allclose(
        jax.jit(scaled.apply)(silent, X, T), jax.jit(additive.apply)(like_additive, X, T), atol=1e-5
    )


def test_starts_at_zero():
    model = TINY.clone(zero_init=True)
    params = init(model, jax.random.key(0), X, T)
    np.testing.assert_array_equal(jax.jit(model.apply)(params, X, T), 0.0)


def test_dropout_acts_with_a_key_only_and_per_example():
    model = TINY.clone(dropout=0.5)
    params = init(model, jax.random.key(0), X, T)
    run = jax.jit(model.apply)
    still = jax.jit(TINY.apply)(params, X, T)
    np.testing.assert_array_equal(run(params, X, T), still)
    dropped = run(params, X, T, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(dropped, still, atol=1e-3)
    first = run(params, X[:1], T[:1], rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(first, dropped[:1], atol=1e-5)
    assert not np.allclose(run(params, X, T, rngs={"dropout": jax.random.key(2)}), dropped, atol=1e-3)


def test_bfloat16_is_close_and_parameters_stay_float32():
    model = SMALL.clone(dtype=jnp.bfloat16, head_dim=16)
    params = init(model, jax.random.key(0), X, T)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    y = jax.jit(model.apply)(params, X, T)
    assert y.dtype == jnp.float32
    exact = jax.jit(SMALL.clone(head_dim=16).apply)(params, X, T)
    assert float(jnp.sqrt(jnp.mean((y - exact) ** 2) / jnp.mean(exact**2))) < 0.03


def test_heads_split_the_channels():
    params = init(SMALL, jax.random.key(0), X, T)
    one, two, by_dim = (
        jax.jit(SMALL.clone(**fields).apply)(params, X, T) for fields in ({}, {"heads": 2}, {"head_dim": 32})
    )
    assert not np.allclose(one, two, atol=1e-4)
    np.testing.assert_array_equal(two, by_dim)


def test_levels_by_number_are_those_of_their_height():
    params = init(SMALL, jax.random.key(0), X, T)
    by_number = SMALL.clone(attention=(), attention_levels=(1,))
    run = jax.jit(by_number.apply)
    np.testing.assert_array_equal(run(params, X, T), jax.jit(SMALL.apply)(params, X, T))
    run(params, X[:, :4, :4], T)  # the same parameters serve every size
    without = jax.eval_shape(by_number.clone(middle_attention=False).init, jax.random.key(0), X, T)["params"]
    assert params["params"].keys() - without.keys() == {"middle_attention"}


@pytest.mark.slow
def test_forward_mode_inside_reverse_mode():
    """MeanFlow's derivative along the path, differentiated by the parameters."""
    model = TINY.clone(channels=8, groups=4)
    x = X[:, ::2, ::2]
    params = init(model, jax.random.key(0), x, T)

    def loss(params):
        y, dy = jax.jvp(lambda x, t: model.apply(params, x, t), (x, T), (x, jnp.ones_like(T)))
        return jnp.mean((y - dy) ** 2)

    gradient = jax.jit(jax.grad(loss))(params)
    direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(5), leaf.shape), params)
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    moved = [jax.jit(loss)(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)) for s in (1e-3, -1e-3)]
    np.testing.assert_allclose((moved[0] - moved[1]) / 2e-3, slope, rtol=0.02)


@pytest.mark.parametrize(
    ("error", "message", "model", "arguments"),
    [
        (
            ValueError,
            r"`x` must have a height and width that 2 divides \(2 levels\), got shape \[3, 7",
            SMALL,
            (X[:, :7], T),
        ),
        (ValueError, r"`x` must have shape \[any, any, any, any\], got \[8, 8, 2\]", SMALL, (X[0], T)),
        (TypeError, "`x` must be floating-point", SMALL, (X.astype(jnp.uint8), T)),
        (ValueError, r"`t` must have shape \[3\], got \[2\]", SMALL, (X, T[:2])),
        (ValueError, r"`t` must have shape \[3\], got \[\]", SMALL, (X, T[0])),
        (ValueError, "`labels` must be None when `num_classes` is None", SMALL, (X, T, jnp.array([0, 1, 2]))),
        (
            ValueError,
            r"`labels` must be \[batch\] integers when `num_classes` is 4, got None",
            SMALL.clone(num_classes=4),
            (X, T),
        ),
        (
            ValueError,
            r"`labels` must have shape \[3\], got \[1\]",
            SMALL.clone(num_classes=4),
            (X, T, jnp.array([0])),
        ),
        (TypeError, "`labels` must be integers", SMALL.clone(num_classes=4), (X, T, T)),
        (ValueError, "`heads` must divide the 64 channels that attend, got 3", SMALL.clone(heads=3), (X, T)),
        (ValueError, r"`dropout` must lie in \[0, 1\), got 1", SMALL.clone(dropout=1.0), (X, T)),
        (ValueError, "`groups` must divide the 32 channels", SMALL.clone(groups=5), (X, T)),
        (ValueError, r"`attention_levels` must lie in \[0, 1\], got 2", SMALL.clone(attention_levels=(0, 2)), (X, T)),
        (
            ValueError,
            r"`downsample_padding` must be \(0, 1\) or \(1, 1\), got \(1, 0\)",
            SMALL.clone(downsample_padding=(1, 0)),
            (X, T),
        ),
    ],
)
def test_bad_input_is_refused(error, message, model, arguments):
    with pytest.raises(error, match=message):
        jax.eval_shape(model.init, jax.random.key(0), *arguments)
