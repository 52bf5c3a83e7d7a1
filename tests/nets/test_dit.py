"""The published transformer: its parameter counts, NumPy's arithmetic, diffusers' outputs, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import nets, place, train

SMALL = nets.DiT(out_channels=2, features=32, depth=3, heads=2, patch=2, num_classes=4)
PLAIN = SMALL.clone(num_classes=None)
X = jax.random.normal(jax.random.key(0), (3, 8, 4, 2))
T = jnp.array([0.0, 10.0, 999.0])
LABELS = jnp.array([0, 4, 2])


def perturbed(params, std=0.1):
    """Nothing may hide behind zeros."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: leaf + std * rng.normal(size=leaf.shape).astype(np.float32), params)


@functools.cache
def drawn(model):
    arguments = (X, T) if model.num_classes is None else (X, T, LABELS)
    params = perturbed(nets.init(model, jax.random.key(1), *arguments))
    return params, arguments


def output(model, params=None):
    own, arguments = drawn(model)
    return np.asarray(jax.jit(model.apply)(own if params is None else params, *arguments))


@pytest.mark.parametrize(
    ("make", "counts"),
    [
        (nets.DiT_S, (32_963_360, 32_945_024, 33_148_160)),
        (nets.DiT_B, (130_512_416, 130_475_648, 130_881_536)),
        (nets.DiT_L, (458_102_816, 458_053_760, 458_594_816)),
        (nets.DiT_XL, (675_129_632, 675_074_432, 675_683_072)),
    ],
)
def test_parameter_counts_of_the_paper(make, counts):
    """Peebles & Xie's count includes the fixed positions. Their formula, with D features and L blocks, and the numbers."""
    x, one = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    for patch, count in zip((2, 4, 8), counts, strict=True):
        model = make(patch=patch, out_channels=8, num_classes=1000)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x, one, one)
        d, positions = model.features, (32 // patch) ** 2 * model.features
        formula = model.depth * (18 * d**2 + 15 * d) + 3 * d**2 + (256 + 1001 + 12 * patch**2 + 5) * d + 8 * patch**2
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == formula == count - positions


def test_starts_at_zero_with_blocks_that_do_nothing():
    params = nets.init(SMALL, jax.random.key(0), X, T, LABELS)
    np.testing.assert_array_equal(output(SMALL, params), 0.0)
    params["params"]["out"] = perturbed(params["params"]["out"])
    deep = output(SMALL, params)
    params["params"]["blocks"] = jax.tree.map(lambda leaf: leaf[:1], params["params"]["blocks"])
    np.testing.assert_allclose(output(SMALL.clone(depth=1), params), deep, atol=2e-6)
    assert np.abs(deep).max() > 0.1


def test_first_draws_have_the_papers_variances():
    model = SMALL.clone(features=128, heads=4, num_classes=200)
    tree = nets.init(model, jax.random.key(0), X, T, LABELS)["params"]
    block = tree["blocks"]
    for kernel, std in (
        (tree["time_0"]["kernel"], 0.02),
        (tree["time_1"]["kernel"], 0.02),
        (tree["label"]["embedding"], 0.02),
        (block["attention"]["qkv"]["kernel"], np.sqrt(2 / (4 * 128))),
        (block["attention"]["out"]["kernel"], np.sqrt(1 / 128)),
        (block["mlp_0"]["kernel"], np.sqrt(2 / (5 * 128))),
        (block["mlp_1"]["kernel"], np.sqrt(2 / (5 * 128))),
    ):
        assert float(jnp.std(kernel)) == pytest.approx(std, rel=0.03)
    for zero in (tree["out"], tree["modulation"], block["modulation"]):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero))


def wave(t, features, period=10_000.0):
    angles = np.asarray(t)[:, None] * period ** (-np.arange(features // 2) / (features // 2))
    return np.sin(angles), np.cos(angles)


def by_hand(model, params, x, t, labels):
    """Eq. 1 to 3 in float64, one image, one head and one token at a time where that is clearer."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    dense = lambda h, w: h @ w["kernel"] + w["bias"]  # noqa: E731
    silu = lambda h: h / (1 + np.exp(-h))  # noqa: E731
    gelu = lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))  # noqa: E731

    def norm(h):
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)

    side, heads = model.patch, model.heads
    rows, columns = x.shape[1] // side, x.shape[2] // side
    images = []
    for image, sin, cos, label in zip(np.asarray(x, np.float64), *wave(t, 256), labels, strict=True):
        condition = dense(silu(dense(np.concatenate([cos, sin]), p["time_0"])), p["time_1"])
        condition = silu(condition + p["label"]["embedding"][label])
        cells = [(i, j) for i in range(rows) for j in range(columns)]
        tokens = [image[i * side : (i + 1) * side, j * side : (j + 1) * side].reshape(-1) for i, j in cells]
        waves = [[np.concatenate(wave([axis], model.features // 2), -1)[0] for axis in (j, i)] for i, j in cells]
        h = dense(np.stack(tokens), p["patches"]) + np.stack([np.concatenate(pair) for pair in waves])
        for layer in range(model.depth):
            b = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
            s0, c0, g0, s1, c1, g1 = np.split(dense(condition, b["modulation"]), 6)
            query, key, value = np.split(dense(norm(h) * (1 + c0) + s0, b["attention"]["qkv"]), 3, axis=-1)
            mixed = []
            for q, k, v in zip(*(np.split(part, heads, axis=-1) for part in (query, key, value)), strict=True):
                weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
                mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
            h = h + g0 * dense(np.concatenate(mixed, -1), b["attention"]["out"])
            h = h + g1 * dense(gelu(dense(norm(h) * (1 + c1) + s1, b["mlp_0"])), b["mlp_1"])
        shift, scale = np.split(dense(condition, p["modulation"]), 2)
        out = dense(norm(h) * (1 + scale) + shift, p["out"])
        whole = np.empty((*image.shape[:2], model.out_channels))
        for (i, j), token in zip(cells, out, strict=True):
            whole[i * side : (i + 1) * side, j * side : (j + 1) * side] = token.reshape(side, side, -1)
        images.append(whole)
    return np.stack(images)


def test_agrees_with_numpy_in_float64():
    params, arguments = drawn(SMALL)
    expected = by_hand(SMALL, params, *map(np.asarray, arguments))
    # The tightest that float32 allows: the exact GELU is 5e-5 away, ours 3e-6.
    np.testing.assert_allclose(output(SMALL), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.filterwarnings("default")  # diffusers' own
def test_agrees_with_diffusers():
    torch = pytest.importorskip("torch", reason="peer: torch is not installed")
    diffusers = pytest.importorskip("diffusers", reason="peer: diffusers is not installed")
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    blocks = theirs.transformer_blocks
    for block in blocks:
        # One embedding for all blocks and DDPM's frequencies without a shift, as in the original.
        block.norm1.emb = blocks[0].norm1.emb
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, labels = np.random.default_rng(0).normal(size=(2, 16, 16, 4)).astype(np.float32), [3, 871], [1, 10]
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(x.transpose(0, 3, 1, 2)), timestep=torch.tensor(t), class_labels=torch.tensor(labels)
        ).sample.numpy()

    def layer(*modules, axis=-1):
        weights = [np.moveaxis(module.weight.detach().numpy(), 0, -1) for module in modules]
        return {
            "kernel": np.concatenate(weights, -1),
            "bias": np.concatenate([module.bias.detach().numpy() for module in modules]),
        }

    def block_of(block):
        attention = block.attn1
        return {
            "modulation": layer(block.norm1.linear),
            "attention": {
                "qkv": layer(attention.to_q, attention.to_k, attention.to_v),
                "out": layer(attention.to_out[0]),
            },
            "mlp_0": layer(block.ff.net[0].proj),
            "mlp_1": layer(block.ff.net[2]),
        }

    embedder, patches = blocks[0].norm1.emb, layer(theirs.pos_embed.proj)
    patches["kernel"] = patches["kernel"].transpose(1, 2, 0, 3).reshape(16, 48)
    params = {
        "patches": patches,
        "time_0": layer(embedder.timestep_embedder.linear_1),
        "time_1": layer(embedder.timestep_embedder.linear_2),
        "label": {"embedding": embedder.class_embedder.embedding_table.weight.detach().numpy()},
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *map(block_of, blocks)),
        "modulation": layer(theirs.proj_out_1),
        "out": layer(theirs.proj_out_2),
    }
    model = nets.DiT(out_channels=8, features=48, depth=2, heads=2, patch=2, num_classes=10)
    arguments = (x, np.array(t), np.array(labels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    ours = jax.jit(model.apply)({"params": params}, *arguments)
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 3, 1), atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_unrolled_and_recomputed_are_the_same_network():
    (params, arguments), variants = drawn(SMALL), ({"unroll": 3}, {"remat": jax.checkpoint_policies.nothing_saveable})

    def value_and_gradient(model):
        loss = lambda params: jnp.mean(jnp.sin(model.apply(params, *arguments)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradient = value_and_gradient(SMALL)
    for fields in (*variants, {**variants[0], **variants[1]}):
        other, other_gradient = value_and_gradient(SMALL.clone(**fields))
        np.testing.assert_allclose(other, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), other_gradient, gradient)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-6


def test_recomputing_keeps_less():
    """What the backward pass keeps of the blocks: their inputs alone."""
    params, arguments = drawn(SMALL)

    def kept(model):
        _, pullback = jax.eval_shape(lambda params: jax.vjp(lambda p: model.apply(p, *arguments), params), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    remat = SMALL.clone(remat=jax.checkpoint_policies.nothing_saveable)
    assert kept(remat) - weights < 0.4 * (kept(SMALL) - weights)


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, 2), (4, 12, 4), (6, 4, 1)])
def test_patches_are_pieces_and_fit_together(height, width, patch):
    x = jnp.arange(2 * height * width * 3.0).reshape(2, height, width, 3)
    tokens = nets.patchify(x, patch)
    columns = width // patch
    for k in range(tokens.shape[1]):
        i, j = patch * (k // columns), patch * (k % columns)
        np.testing.assert_array_equal(tokens[:, k].reshape(2, patch, patch, 3), x[:, i : i + patch, j : j + patch])
    np.testing.assert_array_equal(nets.unpatchify(tokens, height, width), x)


def test_rotated_logits_depend_on_relative_positions_alone():
    height, width, features = 4, 5, 12
    query, key = jax.random.normal(jax.random.key(0), (2, features))
    everywhere = lambda vector: jnp.broadcast_to(vector, (1, height * width, 1, features))  # noqa: E731
    q, k = (nets.rotate(everywhere(vector), height, width)[0, :, 0] for vector in (query, key))
    logits = np.asarray(q @ k.T).reshape(height, width, height, width)
    seen = {}
    for (i, j, a, b), logit in np.ndenumerate(logits):
        seen.setdefault((a - i, b - j), []).append(logit)
    for values in seen.values():
        np.testing.assert_allclose(values, values[0], atol=1e-5)
    firsts = np.array([values[0] for values in seen.values()])
    assert len(np.unique(np.round(firsts, 4))) == len(firsts) == (2 * height - 1) * (2 * width - 1)
    np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), jnp.linalg.norm(query), rtol=1e-5)
    np.testing.assert_allclose(q[0], query)  # the first token is not turned


def test_rotation_angles():
    """Eq. 2 by complex numbers."""
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 8))
    pairs = x[..., :4] + 1j * x[..., 4:]
    rates = 50.0 ** (-np.arange(2) / 2)
    for token in range(6):
        angles = np.concatenate([token // 3 * rates, token % 3 * rates])
        pairs[:, token] *= np.exp(1j * angles)
    ours = nets.rotate(jnp.asarray(x, jnp.float32), 2, 3, base=50.0)
    np.testing.assert_allclose(ours, np.concatenate([pairs.real, pairs.imag], -1), atol=1e-5)


@pytest.mark.parametrize("positions", [nets.sincos_positions, nets.rotary_positions, nets.Positions()])
def test_positions_tell_tokens_apart(positions):
    """Without any, the same patches in another order give the same results in that order."""
    model = PLAIN.clone(positions=positions)
    params, _ = drawn(model)
    apply = jax.jit(model.apply)
    shifted = np.roll(apply(params, jnp.roll(X, 4, axis=1), T), -4, axis=1)
    close = np.allclose(shifted, apply(params, X, T), atol=1e-4)
    assert close == (positions == nets.Positions())


def test_normalised_queries_and_keys():
    """Their size does not matter, their direction does; the arithmetic is NumPy's."""
    module = nets.SelfAttention(heads=2, qk_norm=True)
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    params = perturbed(nets.init(module, jax.random.key(1), x), 0.3)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    qkv = (x[0] @ p["qkv"]["kernel"] + p["qkv"]["bias"]).reshape(5, 3, 2, 4)
    mixed = np.empty((5, 2, 4))
    for head in range(2):
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        q, k = (
            part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"]
            for part, name in ((q, "query_norm"), (k, "key_norm"))
        )
        weights = np.exp(q @ k.T / 2)
        mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v
    expected = mixed.reshape(5, 8) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)(params, x)[0], expected, atol=1e-5)


def test_time_labels_and_neighbours():
    params, (x, t, labels) = drawn(SMALL)
    run = jax.jit(SMALL.apply)
    y = run(params, x, t, labels)
    assert not np.allclose(y[1], run(params, x, t + 1, labels)[1], atol=1e-4)
    other = run(params, x, t, labels.at[1].set(3))
    assert not np.allclose(y[1], other[1], atol=1e-4)
    np.testing.assert_allclose(y[::2], other[::2], atol=1e-5)
    np.testing.assert_allclose(jax.jit(SMALL.clone(time_scale=1000.0).apply)(params, x, t / 1000, labels), y, atol=1e-3)


def test_several_times():
    params, (x, t) = drawn(PLAIN)
    assert params["params"]["time_0"]["kernel"].shape == (256, 32)
    both = jnp.stack([t, t / 2], axis=1)
    wider = perturbed(nets.init(PLAIN, jax.random.key(1), x, both))
    assert wider["params"]["time_0"]["kernel"].shape == (512, 32)
    run = jax.jit(PLAIN.apply)
    moved = run(wider, x, both.at[1, 1].add(3.0)) - run(wider, x, both)
    assert np.abs(moved[1]).max() > 1e-3
    np.testing.assert_allclose(moved[::2], 0.0, atol=1e-5)


@pytest.mark.parametrize("positions", [nets.sincos_positions, nets.rotary_positions])
def test_bfloat16_is_close_and_what_must_be_float32_is(positions):
    exact = SMALL.clone(positions=positions, qk_norm=True)
    model = exact.clone(dtype=jnp.bfloat16)
    params, arguments = drawn(exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    y, expected = output(model, params), output(exact)
    assert y.dtype == np.float32
    assert np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2)) < 0.03
    text = str(jax.make_jaxpr(model.apply)(params, *arguments))
    for operation in ("exp", "rsqrt", "reduce_sum", "sin", "cos"):
        lines = [line for line in text.splitlines() if f" = {operation}" in line or f" = {operation}[" in line]
        assert lines, operation
        assert not any("bf16" in line.split("=")[0] for line in lines), operation
    assert any("bf16" in line.split("=")[0] for line in text.splitlines() if "dot_general" in line)


def test_forward_mode_inside_reverse_mode():
    """The derivative along a path, differentiated by the parameters."""
    params, (x, t) = drawn(PLAIN)

    def loss(params):
        y, dy = jax.jvp(lambda x, t: PLAIN.apply(params, x, t / 100), (x, t), (x, jnp.ones_like(t)))
        return jnp.mean((y - dy) ** 2)

    gradient = jax.jit(jax.grad(loss))(params)
    direction = perturbed(jax.tree.map(jnp.zeros_like, params), 1.0)
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    compiled = jax.jit(loss)
    moved = [compiled(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)) for s in (1e-3, -1e-3)]
    np.testing.assert_allclose((moved[0] - moved[1]) / 2e-3, slope, rtol=0.02)


def method(model):
    def loss(params, batch, key):
        y = model.apply(params, batch["x"], batch["t"], batch["label"])
        return jnp.mean((y - batch["x"]) ** 2), {}

    init = lambda key: perturbed(nets.init(model, key, X, T, LABELS))  # noqa: E731
    return train.minimise(loss, optax.sgd(0.05, momentum=0.9), init)


def test_eight_devices_agree_with_one(monkeypatch):
    monkeypatch.setattr("jaxgen.place.rules.SMALLEST_SHARDED_LEAF", 64)
    model = SMALL.clone(qk_norm=True, remat=jax.checkpoint_policies.nothing_saveable)
    rng = np.random.default_rng(0)
    batches = [
        {
            "x": rng.normal(size=(16, 8, 4, 2)).astype(np.float32),
            "t": rng.uniform(0, 999, 16).astype(np.float32),
            "label": rng.integers(0, 5, 16).astype(np.int32),
        }
        for _ in range(3)
    ]
    states = []
    for mesh in (place.mesh(jax.devices()[:1]), place.mesh(fsdp=4)):
        placed = place.jit(method(model), mesh)
        state = placed.init(jax.random.key(0))
        for batch in batches:
            state, _ = placed.step(state, batch, jax.random.key(0))
        states.append(state.learner.params)
    kernel = states[1]["params"]["blocks"]["mlp_0"]["kernel"]
    assert kernel.shape == (3, 32, 128)
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 32, 32)
    for one, many in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(many, one, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("error", "message", "fields", "arguments"),
    [
        (ValueError, r"`x` must have a height and width that `patch` = 2 divides, got shape \[3, 7", {}, (X[:, :7], T, LABELS)),
        (ValueError, r"`x` must have shape \[any, any, any, any\], got \[8, 4, 2\]", {}, (X[0], T, LABELS)),
        (TypeError, "`x` must be floating-point", {}, (X.astype(jnp.uint8), T, LABELS)),
        (ValueError, r"`t` must have shape \[3\], got \[2\]", {}, (X, T[:2], LABELS)),
        (ValueError, r"`labels` must be \[batch\] integers when `num_classes` is 4, got None", {}, (X, T)),
        (ValueError, "`labels` must be None when `num_classes` is None", {"num_classes": None}, (X, T, LABELS)),
        (ValueError, r"`labels` must have shape \[3\], got \[1\]", {}, (X, T, LABELS[:1])),
        (TypeError, "`labels` must be integers", {}, (X, T, T)),
        (ValueError, "`heads` must divide the 32 features of a token, got 3", {"heads": 3}, (X, T, LABELS)),
        (ValueError, "`features` must be a multiple of 4 for sines", {"features": 30}, (X, T, LABELS)),
        (ValueError, "a multiple of 4 features per head to rotate, got 2", {"heads": 16, "positions": nets.rotary_positions}, (X, T, LABELS)),
        (ValueError, "`depth` must be an integer of at least 1, got 0", {"depth": 0}, (X, T, LABELS)),
        (ValueError, "`patch` must be an integer of at least 1, got 0", {"patch": 0}, (X, T, LABELS)),
    ],
)  # fmt: skip
def test_bad_input_is_refused(error, message, fields, arguments):
    with pytest.raises(error, match=message):
        jax.eval_shape(SMALL.clone(**fields).init, jax.random.key(0), *arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nets.unpatchify(jnp.zeros((1, 5, 4)), 4, 4), "`tokens` must be square patches of 4 x 4"),
        (lambda: nets.unpatchify(jnp.zeros((1, 4, 3)), 4, 4), r"`tokens` must have a length that 2\^2 divides"),
        (lambda: nets.rotate(jnp.zeros((1, 5, 1, 4)), 2, 2), r"`x` must have shape \[any, 4, any, any\]"),
        (lambda: nets.rotate(jnp.zeros((1, 4, 1, 4)), 2, 2, base=0.0), "`base` must be above 0"),
    ],
)
def test_bad_shapes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
