"""Programs of known bytes on eight CPU devices: what is compiled is what `jaxgen.place` compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import place, plan, train
from jaxgen.plan.program import _exceeded

WIDTH = 256
BYTES = WIDTH * WIDTH * 4


def method():
    def loss(params, batch, key):
        return jnp.mean((jnp.tanh(batch @ params) - batch) ** 2), {}

    return train.minimise(loss, optax.adam(0.1), lambda key: jnp.zeros((WIDTH, WIDTH)), average=train.ema(0.9))


BATCH = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_state_of_known_bytes(fsdp):
    program = plan.step(method(), place.mesh(fsdp=fsdp), BATCH)
    assert program.fits
    assert (program.devices, program.rows, program.parameters) == (8, 64, WIDTH * WIDTH)
    assert program.gradients == BYTES
    assert program.whole == 4 * BYTES + 8  # parameters, Adam's two moments, the average; two counts
    assert program.state == 4 * BYTES / fsdp + 8
    assert program.aliased == program.state  # all of it is updated in place
    assert program.arguments == pytest.approx(program.state + BATCH.size * 4 / 8, abs=64)
    assert program.flops == 3 * 2 * 64 * WIDTH * WIDTH - 2 * 64 * WIDTH * WIDTH  # forward, and the parameters' gradient


def test_data_parallel_reduces_the_gradient_and_nothing_else():
    reading = plan.step(method(), place.mesh(), BATCH).reading
    kinds = {each.kind: each for each in reading.collectives}
    assert set(kinds) == {"all-reduce"}
    assert BYTES <= kinds["all-reduce"].bytes <= BYTES + 64  # and the loss
    assert reading.transfers == ()


def test_the_program_is_the_one_that_runs():
    """The same shardings of arguments and results as those of `place.jit`, and the same collectives."""
    mesh, ours = place.mesh(fsdp=4), method()
    placed = place.jit(ours, mesh)
    state = placed.init(jax.random.key(0))
    batch = np.zeros(BATCH.shape, np.float32)
    new, _ = placed.step(state, batch, jax.random.key(0))
    program = plan.step(ours, mesh, BATCH)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(new))
    assert program.state == held
    assert program.aliased == held


def test_rows_are_split_and_what_is_shared_lies_where_it_lies():
    mesh = place.mesh(fsdp=4)
    shared = place.state_shapes(method(), mesh).average
    program = plan.rows(lambda params, x: x @ params, mesh, shared, BATCH)
    assert (program.parameters, program.gradients) == (WIDTH * WIDTH, 0)
    assert (program.state, program.whole) == (BYTES / 4, BYTES)
    assert program.outputs == BATCH.size * 4 / 8
    assert program.flops == 2 * 64 * WIDTH * WIDTH
    assert {each.kind for each in program.reading.collectives} == {"all-gather"}


@pytest.mark.usefixtures("libtpu")
def test_on_tpus_the_traffic_is_what_xla_counts():
    """Of a program without loops, in which XLA misses nothing."""
    program = plan.step(method(), place.mesh(plan.topology("v5e:2x2").devices), BATCH)
    assert program.reading.traffic == pytest.approx(program.xla_bytes, rel=0.15)


@pytest.mark.usefixtures("libtpu")
def test_a_batch_that_is_too_large_does_not_fit():
    program = plan.step(
        method(), place.mesh(plan.topology("v5e:1x1").devices), jax.ShapeDtypeStruct((2**25, WIDTH), jnp.float32)
    )
    assert not program.fits
    assert program.peak > program.capacity > 15 * 2**30
    assert 2**25 * WIDTH * 4 <= program.peak <= 4 * 2**25 * WIDTH * 4
    assert plan.remedies(program, 1)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="must divide among 8 devices"):
        plan.step(method(), place.mesh(), jax.ShapeDtypeStruct((12, WIDTH), jnp.float32))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.51G of "
            "15.75G hbm. Exceeded hbm capacity by 4.76G.",
            (int(20.51 * 2**30), int(15.75 * 2**30)),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.13G) "
            "exceeds available HBM (15.75G).",
            (int(18.13 * 2**30), int(15.75 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.", None),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)
def test_what_xla_complains_of_is_read(message, expected):
    assert _exceeded(message) == expected
