"""One method, any placement: the same parameters on one device, on eight under jit, fully sharded, and under pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import diffusion, nets, place, train

KEY = jax.random.key(0)
NETWORK = nets.UNet(out_channels=1, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), num_classes=10, groups=4)
PATH = diffusion.cosine()


def method(axis_name=None, microbatches=1, optimiser=None):
    def loss(params, batch, key):
        net = lambda x, t: NETWORK.apply(params, x, t, batch["label"])  # noqa: E731
        losses = diffusion.denoising_loss(PATH, diffusion.v, net, batch["image"], key, axis_name=axis_name)
        return losses.mean(), {}

    example = (jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    return train.minimise(
        loss,
        # Plain momentum: Adam divides by the gradient's size, which turns rounding into steps where a gradient is nearly 0.
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9)) if optimiser is None else optimiser,
        lambda key: nets.init(NETWORK, key, *example),
        average=train.ema(0.9),
        axis_name=axis_name,
        microbatches=microbatches,
    )


def batch(step, size=16):
    rng = np.random.default_rng(step)
    return {
        "image": rng.uniform(-1, 1, (size, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }


def train_for(placed, steps=20):
    state = placed.init(KEY)
    for step in range(steps):
        state, metrics = placed.step(state, batch(step), KEY)
    return state, metrics


@pytest.fixture(
    scope="module", params=[pytest.param(1, id="whole"), pytest.param(2, id="microbatched", marks=pytest.mark.slow)]
)
def alone(request):
    """Twenty steps on one device, and the number of microbatches."""
    one = place.jit(method(microbatches=request.param), place.mesh(jax.devices()[:1]))
    return *train_for(one), request.param


def agree(state, metrics, alone):
    expected, expected_metrics, _ = alone
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-3)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("fsdp", [pytest.param(1, id="data", marks=pytest.mark.slow), pytest.param(4, id="fsdp")])
def test_eight_devices_under_jit(alone, fsdp, monkeypatch):
    monkeypatch.setattr("jaxgen.place.rules.SMALLEST_SHARDED_LEAF", 64)
    placed = place.jit(method(microbatches=alone[2]), place.mesh(fsdp=fsdp))
    state, metrics = train_for(placed)
    kernel = state.learner.params["params"]["down_1_block_0"]["conv_1"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (fsdp == 1)
    assert len(kernel.sharding.device_set) == 8
    agree(state, metrics, alone)


@pytest.mark.slow
def test_eight_devices_under_pmap(alone):
    placed = place.pmap(method(axis_name="data", microbatches=alone[2]))
    state, metrics = train_for(placed)
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))  # copies have not drifted
    agree(place.first_copy(state), metrics, alone)


def test_the_state_is_donated():
    loss = lambda params, batch, key: (jnp.sum((params - batch.mean(0)) ** 2), {})  # noqa: E731
    placed = place.jit(train.minimise(loss, optax.adam(0.1), lambda key: jnp.zeros(3)), place.mesh())
    old = placed.init(KEY)
    placed.step(old, np.ones((8, 3), np.float32), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_a_training_loop_compiles_once():
    traces = 0

    def loss(params, batch, key):
        nonlocal traces
        traces += 1
        return jnp.sum((params - batch.mean(0)) ** 2), {}

    placed = place.jit(train.minimise(loss, optax.adam(0.1), lambda key: jnp.zeros(3)), place.mesh())
    state = placed.init(KEY)
    for step in range(5):
        state, _ = placed.step(state, np.full((8, 3), step, np.float32), jax.random.key(step))
    assert traces == 1


def test_state_shapes_name_shardings():
    shapes = place.state_shapes(method(), place.mesh(fsdp=8))
    state = place.jit(method(), place.mesh(fsdp=8)).init(KEY)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)


def test_rows_are_split_and_come_back_in_order():
    function = place.rows(lambda shared, rows: shared * rows["x"], place.mesh())
    got = function(np.float32(2), {"x": np.arange(16, dtype=np.float32)})
    np.testing.assert_array_equal(got, 2 * np.arange(16))
    assert len(got.sharding.device_set) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: place.devices("tpu"), "`platform` is 'tpu', but JAX finds none here; it has 8 device.s. of platform 'cpu'"),
        (lambda: place.mesh(fsdp=3), "`fsdp` must divide the number of devices, 8, got 3"),
        (lambda: place.mesh(fsdp=0), "`fsdp` must be an integer of at least 1"),
        (lambda: train_on(place.jit(method(), place.mesh()), 12), r"`batch\['image'\]` must divide among 8 devices.*\[12, 8, 8, 1\]"),
        (lambda: train_on(place.pmap(method(axis_name="data")), 12), "must divide among 8 devices"),
        (lambda: train_on(place.pmap(method()), 16), "`method` does not average over the axis 'data'"),
        (lambda: place.rows(lambda s, r: r, place.mesh())(0.0, np.zeros(9)), "must divide among 8 devices"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def train_on(placed, size):
    placed.step(placed.init(KEY), batch(0, size), KEY)
