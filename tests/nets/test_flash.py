"""Attention by blocks: its kernel against NumPy, every mode of differentiation, and what it becomes on each platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pallas_tpu

from jaxgen import nets
from jaxgen.nets import flash

PLAIN = jax.nn.dot_product_attention
# tokens, keys, features: DiT-XL's heads, more keys than a block, and heads of two registers' width.
SHAPES = [
    (256, 256, 72, jnp.float32),
    (256, 256, 72, jnp.bfloat16),
    (128, 640, 128, jnp.float32),
    (128, 128, 256, jnp.bfloat16),
]


def drawn(tokens=128, keys=128, features=16, *, batch=2, heads=2, dtype=jnp.float32, count=3):
    rng = np.random.default_rng(tokens + keys + features)
    sizes = [tokens, keys, keys, tokens][:count]
    return [jnp.asarray(rng.normal(size=(batch, n, heads, features)), dtype) for n in sizes]


def by_hand(query, key, value, cotangent):
    """Eq. 1 and its gradients in float64: softmax's is p (dp - sum p dp)."""
    q, k, v, ct = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (query, key, value, cotangent))
    scale = 1 / np.sqrt(q.shape[-1])
    p = np.exp(scale * q @ k.swapaxes(-1, -2))
    p /= p.sum(-1, keepdims=True)
    dp = ct @ v.swapaxes(-1, -2)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    results = p @ v, ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ ct
    return [x.transpose(0, 2, 1, 3) for x in results]


def error(ours, expected):
    """The largest, against the largest value."""
    return np.abs(np.asarray(ours, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("tokens", "keys", "features", "dtype"), SHAPES)
def test_kernel_agrees_with_numpy_in_float64(tokens, keys, features, dtype):
    """Values and gradients, on a simulated TPU: to rounding, and no further from the truth than ordinary JAX is."""
    *qkv, ct = drawn(tokens, keys, features, batch=1, heads=1, dtype=dtype, count=4)
    expected = by_hand(*qkv, ct)
    with pallas_tpu.force_tpu_interpret_mode():
        value, gradients = jax.jit(flash._attend_by_kernel)(*qkv), jax.jit(flash._pull_by_kernel)(ct, *qkv)
    plain = (PLAIN(*qkv), *jax.vjp(PLAIN, *qkv)[1](ct))
    tolerance = 5e-6 if dtype == jnp.float32 else 1e-2
    for ours, theirs, truth in zip((*value, *gradients), plain, expected, strict=True):
        assert ours.dtype == dtype
        assert error(ours, truth) < tolerance
        assert error(ours, np.asarray(theirs, np.float64)) < tolerance


def modes(attention):
    """Each a function of (query, key, value): first and second order, forward, reverse and mixed."""
    loss = lambda *qkv: jnp.sum(jnp.sin(3 * attention(*qkv)))  # noqa: E731
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    forward = lambda *qkv: jax.jvp(attention, qkv, qkv[::-1])  # noqa: E731
    return {
        "reverse": gradient,
        "one argument": jax.grad(loss, argnums=1),
        "forward": forward,
        "forward in one": lambda q, k, v: jax.jvp(lambda k: attention(q, k, v), (k,), (v,)),
        "forward over reverse": lambda *qkv: jax.jvp(gradient, qkv, qkv[::-1]),
        "reverse over forward": jax.grad(lambda *qkv: jnp.sum(forward(*qkv)[1] ** 2), argnums=(0, 1, 2)),
        "reverse over reverse": jax.grad(lambda *qkv: sum(jnp.sum(g**2) for g in gradient(*qkv)), argnums=(0, 2)),
        "transposed twice": lambda *qkv: jax.linear_transpose(
            jax.linear_transpose(jax.linearize(attention, *qkv)[1], *qkv), qkv[0]
        )(qkv[::-1]),
        "checkpointed": jax.grad(lambda *qkv: jax.checkpoint(loss)(*qkv), argnums=(0, 1, 2)),
        "vmap": jax.vmap(attention),
        "vmap of one": lambda q, k, v: jax.vmap(attention, (None, 1, None), 2)(q[0], jnp.moveaxis(k, 0, 1), v[0]),
        "vmap of gradients": jax.vmap(gradient),
        "gradient of vmap": jax.grad(lambda *qkv: jnp.sum(jax.vmap(attention)(*qkv) ** 2), argnums=(0, 1, 2)),
        "in a scan": jax.grad(
            lambda q, k, v: jnp.sum(jax.lax.scan(lambda h, _: (attention(h, k, v), None), q, None, length=3)[0] ** 2)
        ),
    }


@pytest.mark.parametrize("mode", modes(PLAIN))
def test_every_mode_of_differentiation(mode):
    qkv = drawn(features=8, heads=1)
    if "vmap" in mode:
        qkv = [jnp.stack([x, x[:, ::-1]]) for x in qkv]
    ours, expected = (jax.jit(modes(attention)[mode])(*qkv) for attention in (nets.flash_attention, PLAIN))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_outside_of_jit():
    qkv = drawn()
    np.testing.assert_allclose(nets.flash_attention(*qkv), PLAIN(*qkv), atol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(nets.flash_attention(*qkv), PLAIN(*qkv), atol=1e-6)


def test_the_gradient_keeps_no_logits():
    qkv = drawn(features=8)
    kept = lambda attention: sum(  # noqa: E731
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attention, *x)[1], *qkv))
    )
    assert kept(nets.flash_attention) == sum(x.size for x in qkv)
    assert kept(PLAIN) > 2 * 2 * 128**2


def kernels(function, *arguments, platform="tpu"):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")


def test_kernels_on_tpus_alone():
    qkv = drawn(256, 256, 72, dtype=jnp.bfloat16)
    gradient = lambda *x: jax.vjp(nets.flash_attention, *x)[1](x[0])  # noqa: E731
    assert kernels(nets.flash_attention, *qkv) == 1
    assert kernels(gradient, *qkv) == 2  # the forward pass again, and one for all gradients
    for platform in ("cpu", "cuda"):
        assert kernels(nets.flash_attention, *qkv, platform=platform) == 0
        assert kernels(gradient, *qkv, platform=platform) == 0


@pytest.mark.parametrize(
    ("tokens", "keys", "features", "dtype"),
    [(100, 128, 16, "float32"), (128, 64, 16, "float32"), (128, 128, 192, "float32"), (128, 128, 16, "float16")],
)
def test_what_the_kernel_does_not_take_is_left_to_jax(tokens, keys, features, dtype):
    qkv = drawn(tokens, keys, features, dtype=dtype)
    assert kernels(nets.flash_attention, *qkv) == 0
    np.testing.assert_array_equal(nets.flash_attention(*qkv), PLAIN(*qkv))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, "`query` must have shape"),
        (lambda q, k, v: (q, k[:1], v), ValueError, "`key` must have shape"),
        (lambda q, k, v: (q, k, v[:, :64]), ValueError, "`value` must have shape"),
        (lambda q, k, v: (q, k.astype(jnp.bfloat16), v), TypeError, "`key` must have `query`'s dtype, float32"),
        (lambda q, k, v: (q.astype(int), k, v), TypeError, "`query`"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        nets.flash_attention(*change(*drawn()))


def meanflow(model, params, x, t):
    """The loss of Geng et al. 2025: the tangent along the path, without a gradient of its own."""
    velocity, tangent = jax.jvp(lambda x, t: model.apply(params, x, t), (x, t), (jnp.cos(x), jnp.ones_like(t)))
    return jnp.mean((velocity - jax.lax.stop_gradient(jnp.sin(x) - t[:, None, None, None] * tangent)) ** 2)


def test_a_transformer_with_it_trains_as_without():
    """MeanFlow differentiates forward within reverse, through a scan over blocks that are computed again."""
    model = nets.DiT(1, 16, 2, 2, patch=1, remat=jax.checkpoint_policies.nothing_saveable)
    x, t = jax.random.normal(jax.random.key(0), (2, 16, 8, 1)), jnp.array([0.2, 0.7])
    params = nets.init(model, jax.random.key(1), x, t)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), params)
    assert kernels(model.clone(attention=nets.flash_attention).apply, params, x, t) == 1
    values, gradients = zip(
        *(
            jax.jit(jax.value_and_grad(functools.partial(meanflow, model.clone(attention=attention))))(params, x, t)
            for attention in (nets.flash_attention, PLAIN)
        ),
        strict=True,
    )
    np.testing.assert_allclose(*values, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), *gradients)


def test_rows_and_heads_on_devices_of_their_own():
    mesh = jax.make_mesh((4, 2), ("data", "heads"), (jax.sharding.AxisType.Auto,) * 2)
    split = jax.P("data", None, "heads")
    attention = jax.shard_map(nets.flash_attention, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    qkv = drawn(batch=4)
    gradient = lambda attention: jax.jit(  # noqa: E731
        jax.grad(lambda *x: jnp.sum(attention(*x) ** 2), argnums=(0, 1, 2))
    )(*qkv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(attention), gradient(PLAIN))


def test_shared_keys_within_a_map_over_devices():
    """An operand that all devices share gets the sum of its gradients."""
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.P("data")

    def loss(attention, query, key, value):
        return jnp.sum(attention(query, jnp.tile(key, (query.shape[0], 1, 1, 1)), value) ** 2)

    q, k, v = drawn(features=8)
    k = k[:1]
    split = jax.shard_map(
        lambda *x: jax.lax.psum(loss(nets.flash_attention, *x), "data"),
        mesh=mesh, in_specs=(rows, jax.P(), rows), out_specs=jax.P(),
    )  # fmt: skip
    ours = jax.jit(jax.grad(split, argnums=1))(q, k, v)
    expected = jax.grad(functools.partial(loss, PLAIN), argnums=1)(q, k, v)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_one_export_for_every_platform():
    qkv = drawn(features=72)
    gradient = jax.jit(lambda *x: jax.vjp(nets.flash_attention, *x)[1](x[0]))
    exported = jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))(*qkv)
    assert "tpu_custom_call" in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again.call(*qkv), gradient(*qkv))
