"""An encoder in chunks against the same encoder at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen import random
from jaxgen.contrastive.caching import grad_cached

BATCH, WIDTH = 48, 6


def params(width=WIDTH, layers=2, dtype=np.float32):
    kernels = np.random.default_rng(0).normal(size=(layers, width, width)) / width**0.5
    return [{"kernel": kernel.astype(dtype), "bias": np.ones(width, dtype)} for kernel in kernels]


def encode(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x


def images(batch=BATCH, width=WIDTH, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(batch, width)).astype(dtype)


def loss(embeddings):
    """Joins all examples, so that no chunk's gradient is right without the others' embeddings."""
    return jnp.mean(jax.nn.logsumexp(embeddings @ embeddings[::-1].T, axis=1))


def gradients(apply):
    return jax.jit(jax.value_and_grad(lambda params, x: loss(apply(params, x)), argnums=(0, 1)))


def assert_close(got, expected, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


@pytest.mark.parametrize("chunks", [1, 6, 48])
def test_values_and_gradients_are_exact(chunks):
    with jax.enable_x64(True):
        doubles = params(dtype=np.float64), images(dtype=np.float64)
        apply = grad_cached(encode, chunks=chunks)
        assert_close(jax.jit(apply)(*doubles), jax.jit(encode)(*doubles), rtol=1e-14, atol=1e-15)
        assert_close(gradients(apply)(*doubles), gradients(encode)(*doubles), rtol=1e-12, atol=1e-15)


def test_single_precision():
    assert_close(gradients(grad_cached(encode, chunks=6))(params(), images()), gradients(encode)(params(), images()))


def test_trees_in_and_out_with_a_key_for_each_example():
    def apply(params, x):
        noise = random.normal(x["keys"], (WIDTH,))
        return {"embeddings": encode(params, x["pair"][0] + noise), "norms": jnp.sum(x["pair"][1] ** 2, axis=1)}

    x = {"pair": (images(), 2 * images()), "keys": random.example_keys(jax.random.key(2), BATCH)}
    assert_close(jax.jit(grad_cached(apply, chunks=4))(params(), x), jax.jit(apply)(params(), x))

    def by_params(apply):
        return jax.jit(jax.grad(lambda params: loss(apply(params, x)["embeddings"])))(params())

    assert_close(by_params(grad_cached(apply, chunks=4)), by_params(apply))


def test_one_compilation_and_one_trace_of_the_encoder_forward():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return encode(params, x)

    step = gradients(grad_cached(counted, chunks=8))
    for seed in range(3):
        step(params(), images() + seed)
    assert step._cache_size() == 1
    assert set(traces) == {(BATCH // 8, WIDTH)}
    assert len(traces) <= 2


def memory(apply, argnums, batch=2048, width=64):
    shapes = jax.eval_shape(lambda: (params(width, layers=16), images(batch, width)))
    step = jax.jit(jax.grad(lambda params, x: jnp.sum(apply(params, x)[:, :1] ** 2), argnums=argnums))
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_memory_is_that_of_one_chunk(argnums):
    """One chunk's activations, and for each example its embedding and the embedding's gradient."""
    whole, chunked = memory(encode, argnums), memory(grad_cached(encode, chunks=16), argnums)
    embeddings = 4 * 2048 * 64
    assert chunked < whole / 16 + 3 * embeddings
    assert chunked < whole / 4


def test_the_batch_is_not_copied():
    """Images are larger than embeddings: of the batch there is the argument and nothing else."""

    def narrow(params, x):
        return encode(params, x[:, :64])

    shapes = jax.eval_shape(lambda: (params(64), images(2048, 1024)))
    step = jax.jit(jax.grad(lambda params, x: loss(grad_cached(narrow, chunks=16)(params, x)[:128])))
    assert step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 4 * 2048 * 1024 / 2


def gathered_loss(embeddings):
    """Of a shard's anchors against all devices' examples."""
    everyone = jax.lax.all_gather(embeddings, "data", tiled=True)
    return jnp.mean(jax.nn.logsumexp(embeddings @ everyone.T, axis=1))


def global_loss(params, x):
    return jnp.mean(jax.nn.logsumexp(encode(params, x) @ encode(params, x).T, axis=1))


def test_inside_a_loss_over_devices():
    devices, apply = 8, grad_cached(encode, chunks=3)

    def step(params, x):
        return jax.lax.pmean(jax.value_and_grad(lambda params: gathered_loss(apply(params, x)))(params), "data")

    expected = jax.jit(jax.value_and_grad(global_loss))(params(), images())
    shards = images().reshape(devices, -1, WIDTH)
    got = jax.pmap(step, "data", in_axes=(None, 0))(params(), shards)
    assert_close(jax.tree.map(lambda leaf: leaf[0], got), expected, atol=1e-6)

    @functools.partial(
        jax.shard_map,
        mesh=Mesh(jax.devices()[:devices], "data"),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    def total(params, x):
        return jax.lax.pmean(gathered_loss(apply(params, x)), "data")

    assert_close(jax.jit(jax.value_and_grad(total))(params(), images()), expected, atol=1e-6)


def test_on_a_mesh_chunks_stay_where_they_lie():
    """Under jit on eight devices each chunk is everybody's: no collective but the sum of the gradients."""
    mesh = Mesh(jax.devices()[:8], "data")
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def gradient(apply):
        return jax.grad(lambda params, x: jnp.mean(apply(params, x) ** 2))

    step = jax.jit(gradient(grad_cached(encode, chunks=3)), in_shardings=(everywhere, rows), out_shardings=everywhere)
    compiled = step.lower(params(), images()).compile()
    assert_close(
        compiled(*jax.device_put((params(), images()), (everywhere, rows))),
        jax.jit(gradient(encode))(params(), images()),
        rtol=1e-4,
    )
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grad_cached(encode, chunks=0), "`chunks` must be an integer of at least 1, got 0"),
        (lambda: grad_cached(encode, chunks=2.0), "`chunks` must be an integer of at least 1, got 2.0"),
        (lambda: grad_cached(encode, chunks=5)(params(), images()), r"`chunks` must divide the batch, got 5 chunks and `x` of shape \[48, 6\]"),
        (lambda: grad_cached(encode, chunks=2)(params(), {"a": images(), "b": 1.0}), r"`chunks` must divide .*`x\['b'\]` of shape \[\]"),
        (lambda: grad_cached(encode, chunks=2)(params(), (images(), images(8))), r"`x` must be a tree of arrays of one batch, got \(\(48, 6\), \(8, 6\)\)"),
        (lambda: grad_cached(lambda params, x: jnp.sum(x), chunks=2)((), images()), r"`apply\(params, x\)` must have shape \[24\], got \[\]"),
        (lambda: grad_cached(lambda params, x: x[:5], chunks=2)((), images()), r"`apply\(params, x\)` must have shape \[24, 6\], got \[5, 6\]"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
