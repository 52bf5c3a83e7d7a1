"""What Google's compiler makes of the networks for TPUs that are not there: kernels, arithmetic, no needless traffic."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxgen import nets, place, plan, train

pytest.importorskip("libtpu", reason="Google's compiler for TPUs is not installed: pip install jaxgen[tpu-aot]")

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
FAST = {"exec_time_optimization_effort": -1.0} if jax.__version_info__ < (0, 11) else {}


def over_rows(attention, mesh):
    """Each device attends within its own rows of the batch."""
    rows = jax.P(mesh.axis_names)
    return jax.shard_map(attention, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


def compiled(function, mesh, *shapes):
    """For a mesh over whose devices the batch is split."""
    rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for x in shapes]
    return jax.jit(function, out_shardings=rows).lower(*arguments).compile(compiler_options=FAST)


def gradients(attention):
    return lambda *qkv: jax.vjp(attention, *qkv)[1](qkv[0])


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("tokens", "features"), [(256, 72), (1024, 64)])
def test_flash_attention_compiles_and_gathers_nothing(topology, tokens, features):
    """DiT-XL's and DiT-B's heads: two kernels on each of four chips, that exchange nothing."""
    mesh = place.mesh(plan.topology(topology).devices)
    x = jax.ShapeDtypeStruct((8, tokens, 4, features), jnp.bfloat16)
    program = compiled(gradients(over_rows(nets.flash_attention, mesh)), mesh, x, x, x)
    text = program.as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 2
    assert plan.hlo.read(text).collectives == ()
    if tokens == 1024:
        plain = compiled(gradients(jax.nn.dot_product_attention), mesh, x, x, x)
        logits = 2 * 4 * tokens**2 * 4
        needed, needed_plain = (each.memory_analysis().temp_size_in_bytes for each in (program, plain))
        assert needed < 0.7 * logits < logits < needed_plain


def test_a_kernel_is_not_split_by_guess():
    mesh = place.mesh(plan.topology("v5e:2x2").devices)
    x = jax.ShapeDtypeStruct((8, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="shard_map"):
        compiled(nets.flash_attention, mesh, x, x, x)


def test_a_transformer_with_flash_attention_over_four_chips():
    """Its training step adds up gradients and exchanges no activations; parameters stay float32 and where they are."""
    mesh = place.mesh(plan.topology("v5e:2x2").devices)
    model = nets.DiT(3, 128, 2, 2, patch=1, dtype=jnp.bfloat16, attention=over_rows(nets.flash_attention, mesh))
    program = plan.step(training(model), mesh, jax.ShapeDtypeStruct((8, 16, 8, 3), jnp.float32))
    assert {collective.kind for collective in program.reading.collectives} == {"all-reduce"}
    assert sum(collective.bytes for collective in program.reading.collectives) < 1.1 * program.gradients + 1024
    assert program.state <= program.aliased < 1.01 * program.state  # in place; the chip rounds sizes up
    assert (program.reading.float64, program.reading.dynamic, program.reading.transfers) == (0, 0, ())


def training(model):
    def loss(params, x, key):
        return jnp.mean((model.apply(params, x, x[:, 0, 0, 0]) - x) ** 2), {}

    one = jnp.zeros((4, 16, 8, 3))
    return train.minimise(loss, optax.adam(1e-4), lambda key: nets.init(model, key, one, one[:, 0, 0, 0]))


def operands(text):
    """(opcode, dtype of the result, dtypes of the operands, the rest of the line) of each instruction."""
    dtypes = dict(re.findall(r"%([\w.-]+) = (\w+)\[", text))
    for dtype, opcode, names, rest in re.findall(r"= (\w+)\[\S* ([\w-]+)\(([^()]*)\)(.*)", text):
        yield opcode, dtype, [dtypes.get(name) for name in re.findall(r"%([\w.-]+)", names)], rest


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bfloat16_convolutions_and_float32_statistics(topology):
    """A residual block's gradient as the chip computes it: kernels as JAX numbers their dimensions, and what is summed."""
    mesh = place.mesh(plan.topology(topology).devices[:1])
    kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)
    x = jax.ShapeDtypeStruct((8, 8, 8, 128), jnp.bfloat16)

    def loss(kernel, x):
        h = nets.convolve(x, kernel.astype(jnp.bfloat16))
        return jnp.sum(nets.GroupNorm(dtype=jnp.bfloat16).apply({"params": scales(128)}, h).astype(jnp.float32) ** 2)

    everywhere = jax.NamedSharding(mesh, jax.P())
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere) for a in (kernel, x)]
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile(compiler_options=FAST).as_text()
    convolutions = [(inputs, rest) for opcode, _, inputs, rest in operands(text) if opcode == "convolution"]
    assert len(convolutions) == 3
    assert all(inputs == ["bf16", "bf16"] for inputs, _ in convolutions)
    labels = {re.search(r"dim_labels=(\w+)->", rest)[1] for _, rest in convolutions}
    assert labels == {"b01f_01io", "b01f_01oi", "f01b_i01o"}
    sums = [inputs for opcode, _, inputs, _ in operands(text) if opcode == "reduce"]
    assert sums
    assert all(set(inputs) == {"f32"} for inputs in sums)
    assert "f64[" not in text


def scales(channels):
    return {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}
