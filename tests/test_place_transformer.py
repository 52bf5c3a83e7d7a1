"""A transformer over every kind of mesh: the parameters of one device, a share of the bytes, no activation moved."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import nets, place, train
from jaxgen.checkpoint import Checkpoints

KEY = jax.random.key(0)
SHAPES = [
    pytest.param((1, 8, 1), id="fsdp"),
    pytest.param((4, 2, 1), id="data x fsdp", marks=pytest.mark.slow),
    pytest.param((4, 1, 2), id="data x tensor", marks=pytest.mark.slow),
    pytest.param((2, 2, 2), id="all"),
]


def mesh_of(shape):
    return place.mesh(fsdp=shape[1], tensor=shape[2])


def method(features=64, depth=2, heads=4, optimiser=None):
    model = nets.DiT(out_channels=2, features=features, depth=depth, heads=heads, num_classes=4)

    def loss(params, batch, key):
        y = model.apply(params, batch["x"], batch["t"], batch["label"])
        return jnp.mean((y - batch["x"]) ** 2), {}

    def init(key):
        # A fresh one is the identity: nothing would pass through its blocks.
        params = nets.init(model, key, jnp.zeros((1, 8, 8, 2)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
        keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))
        return jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(next(keys), leaf.shape), params)

    # Plain momentum: Adam divides by the gradient's size, which turns rounding into steps where a gradient is nearly 0.
    optimiser = (
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9)) if optimiser is None else optimiser
    )
    return train.minimise(loss, optimiser, init, average=train.ema(0.9))


def batch(step, size=16):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(size, 8, 8, 2)).astype(np.float32),
        "t": rng.uniform(0, 999, size).astype(np.float32),
        "label": rng.integers(0, 5, size).astype(np.int32),
    }


def trained(placed, state=None, steps=range(3)):
    state = placed.init(KEY) if state is None else state
    for step in steps:
        state, metrics = placed.step(state, batch(step), KEY)
    return state, metrics


def agree(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


@pytest.fixture(scope="module")
def alone():
    return trained(place.jit(method(), place.mesh(jax.devices()[:1])))


@pytest.fixture(autouse=True)
def everything_is_split(monkeypatch):
    monkeypatch.setattr("jaxgen.place.rules.SMALLEST_SHARDED_LEAF", 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mesh_trains_as_one_device(shape, alone):
    mesh = mesh_of(shape)
    assert mesh.devices.shape == shape
    state, metrics = trained(place.jit(method(), mesh))
    agree(state, alone[0])
    agree(metrics, alone[1])
    on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert on_first == sum(leaf.bytes for leaf in place.explain(method(), mesh))
    assert on_first < 1.05 * whole / shape[1]
    split = {1: (2, 256 // shape[1], 64), 2: (2, 128, 64 // shape[1])}[shape[2]]
    kernel = state.average["params"]["blocks"]["mlp_1"]["kernel"]
    assert kernel.sharding.shard_shape((2, 256, 64)) == split


def collectives(mesh, ours, size=48):
    """What a compiled step sends: (operation, shape) of every array."""
    placed, rows = place.jit(ours, mesh), NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch(0, size))
    step = jax.jit(lambda *args: placed.step(*args))
    text = step.lower(place.state_shapes(ours, mesh), batches, KEY).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return [
        (kind, tuple(int(n) for n in shape.split(",") if n))
        for results, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
        for shape in re.findall(r"[a-z0-9]+\[([0-9,]*)\]", results)
    ]


# The batch of 48 and a device's share of it, 6 or 12, are no lengths of any parameter.
def test_fully_sharded_parameters_are_sent_and_activations_are_not():
    sent = collectives(place.mesh(fsdp=8), method())
    parameters = {
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(method().init, KEY).learner.params) if leaf.size >= 64
    }
    assert parameters <= {shape for kind, shape in sent if kind == "all-gather"}
    assert {(64, 192), (192, 64)} & {shape for kind, shape in sent if kind == "all-reduce"}  # a gradient
    activations = [shape for _, shape in sent if {6, 48} & set(shape)]
    # Labels and their embeddings' gradients alone: a table is split by features.
    assert sum(math.prod(shape) for shape in activations) <= 48 * (64 + 1)
    assert not [shape for kind, shape in sent if kind == "collective-permute"]


def test_split_layers_send_what_megatrons_do():
    sent = collectives(place.mesh(tensor=2), method())
    activations = sorted((kind, shape) for kind, shape in sent if {12, 48} & set(shape))
    # Of each block one sum for the attention and one for the MLP, forwards and backwards; and queries, keys and values.
    assert activations == [
        ("all-gather", (12, 16, 3, 4, 16)),
        ("all-gather", (12, 16, 192)),
        *[("all-reduce", (12, 16, 64))] * 4,
    ]


def linear():
    """Two layers, as rules know them."""

    def loss(params, batch, key):
        return jnp.mean((batch["x"].reshape(-1, 128) @ params["mlp_0"]["kernel"] @ params["mlp_1"]["kernel"]) ** 2), {}

    shapes = {"mlp_0": {"kernel": (128, 32)}, "mlp_1": {"kernel": (32, 8)}}
    draw = lambda key: jax.tree.map(lambda s: jax.random.normal(key, s), shapes, is_leaf=lambda s: isinstance(s, tuple))  # noqa: E731
    return train.minimise(loss, optax.sgd(0.01, momentum=0.9), draw, average=train.ema(0.9))


def test_checkpoints_go_from_mesh_to_mesh(tmp_path):
    ours, one = linear(), place.mesh(jax.devices()[:1])
    meshes = [place.mesh(fsdp=8), place.mesh(fsdp=2), place.mesh(fsdp=2, tensor=2), one]
    for step, mesh in enumerate(meshes):
        with Checkpoints(tmp_path) as checkpoints:
            state = checkpoints.restore(place.state_shapes(ours, mesh)) if step else None
            state, _ = trained(place.jit(ours, mesh), state, [step])
            checkpoints.save(step, state)
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
    agree(state, trained(place.jit(ours, one), steps=range(4))[0])


def test_explanation():
    lines = [str(leaf) for leaf in place.explain(method(optimiser=optax.adam(1e-3)), place.mesh(fsdp=2, tensor=2))]
    # Parameter, average, and Adam's two moments.
    assert lines[0].startswith(
        "params/blocks/modulation/kernel: 4 x float32[2, 64, 384 / fsdp], 393,216 bytes per device"
    )
    told = {line.split(":")[0]: line.split(":", 1)[1] for line in lines}
    assert told["params/blocks/mlp_1/kernel"] == (
        " 4 x float32[2, 256 / tensor, 64 / fsdp], 131,072 bytes per device: rule 'mlp_1/kernel$'; longest axis over \"fsdp\""
    )
    assert told["step"] == ' int32[], 4 bytes per device: no rule; too small for "fsdp"'


def test_rules_are_data():
    ours = train.minimise(
        lambda params, batch, key: (0.0, {}),
        optax.sgd(0.1),
        lambda key: {"a": {"w": jnp.zeros((4, 8, 6))}, "b": jnp.zeros((8, 16))},
    )

    def axes(*rules, fsdp=1, tensor=1):
        leaves = place.explain(ours, place.mesh(fsdp=fsdp, tensor=tensor), rules=rules)
        return {leaf.path: leaf.axes for leaf in leaves if leaf.path != "step"}

    assert axes(fsdp=2) == {"a/w": (None, "fsdp", None), "b": (None, "fsdp")}
    assert axes(("^b$|a/w", (None, "fsdp")), fsdp=2) == {"a/w": (None, None, "fsdp"), "b": (None, "fsdp")}
    assert axes(("w$", ("tensor", None)), ("w$", ()), fsdp=2, tensor=4) == {
        "a/w": (None, "tensor", "fsdp"),
        "b": (None, "fsdp"),
    }
    assert axes(("b$", ()), fsdp=2)["b"] == (None, None)
    assert axes(("b$", ("tensor",)), fsdp=2)["b"] == (None, "fsdp")  # this mesh splits nothing over "tensor"
    assert axes(("b$", (None, None, "fsdp")), fsdp=4)["b"] == (None, "fsdp")  # for leaves of three axes or more


SIMPLE = train.minimise(lambda params, batch, key: (0.0, {}), optax.sgd(0.1), lambda key: {"w": jnp.zeros((2, 6))})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: place.mesh(fsdp=2, tensor=3), "`fsdp` x `tensor`, 2 x 3, must divide the number of devices, 8"),
        (lambda: place.mesh(tensor=0), "`tensor` must be an integer of at least 1"),
        (lambda: place.jit(SIMPLE, place.mesh(tensor=4), rules=[("w$", ("tensor",))]), r"`tensor` must divide axis 1 of learner/params/w, \[2, 6\], by rule 'w\$', got 4"),
        (lambda: place.state_shapes(SIMPLE, place.mesh(), rules=[("w$", ("rows",))]), r"`rules` may name the axes fsdp, tensor, got 'rows' in that of 'w\$'"),
        (lambda: place.jit(method(), place.mesh(tensor=2)).step(None, batch(0, 6), KEY), r"`batch\['label'\]` must divide among 4 devices"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Chip:
    """As much of a device as decides where it goes."""

    def __init__(self, number, chip_slice, process):
        self.id, self.slice_index, self.process_index = number, chip_slice, process
        self.platform = self.device_kind = "cpu"

    def __repr__(self):
        return f"{self.slice_index}.{self.id}"


def test_slices_lie_along_data():
    chips = [Chip(i, i // 8, i // 4) for i in range(16)][::-1]
    mesh = place.mesh(chips, fsdp=4, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 2}
    assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="`fsdp` must divide the number of each of 2 slices, 8, got 16"):
        place.mesh(chips, fsdp=16)


@pytest.mark.parametrize(
    ("processes", "tensor", "share"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], 1, ((0,), 2)),
        ([1, 1, 0, 0, 0, 0, 1, 1], 2, ((1, 2), 4)),  # a ring through the hosts
        ([1, 0, 1, 0, 1, 0, 1, 0], 2, ((0,), 1)),  # layers split over the hosts: each needs all rows
        ([1, 1, 1, 1, 1, 1, 0, 0], 1, ((3,), 4)),
    ],
)
def test_a_process_loads_the_rows_that_its_devices_hold(processes, tensor, share):
    mesh = place.mesh([Chip(i, 0, process) for i, process in enumerate(processes)], tensor=tensor)
    assert place.share(mesh) == share


@pytest.mark.slow
def test_at_the_width_of_xl():
    """Two blocks of DiT-XL over a mesh of all axes."""
    ours = method(features=1152, heads=16)
    one, many = (place.jit(ours, mesh) for mesh in (place.mesh(jax.devices()[:1]), place.mesh(fsdp=2, tensor=2)))
    agree(trained(many, steps=range(2))[0], trained(one, steps=range(2))[0])
