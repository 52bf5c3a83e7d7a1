"""Blockwise and around a ring: the values, the gradients and the memory of losses of all pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxgen import contrastive, place, train

N, D = 8, 3
NAMES = ["nt_xent", "dcl", "info_nce", "siglip", "supcon"]


def data():
    """Two views, classes, and a weight for each anchor of each example, so that every anchor's gradient shows."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(N, 2))
    return (*(jnp.asarray(x) for x in random.normal(size=(2, N, D))), jnp.arange(N) // 3 % 4, jnp.asarray(weights))


def loss(name, temperature, bias, first, second, labels, weights, **options):
    """The weighted mean over examples of one loss."""
    options["temperature"] = temperature
    if name == "supcon":
        values = contrastive.supcon(jnp.concatenate([first, second]), jnp.tile(labels, 2), **options)
    else:
        options |= {"bias": bias} if name == "siglip" else {}
        values = getattr(contrastive, name)(first, second, **options)
    return jnp.mean(weights.T[: len(values) // len(first)] * values.reshape(-1, len(first)))


def gradients(name, **options):
    return jax.value_and_grad(lambda *arguments: loss(name, *arguments, **options), argnums=(0, 1, 2, 3))


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), actual, expected)


def arguments():
    return (jnp.asarray(0.3), jnp.asarray(-1.5), *data())


@pytest.mark.parametrize("name", NAMES)
def test_blocks_change_nothing(name):
    with jax.enable_x64(True):
        expected = jax.jit(gradients(name))(*arguments())
        # 3 does not divide, 8 does; 1 and 100 are the ends.
        for block_size in (1, 3, 8, 100) if name == "nt_xent" else (3,):
            assert_close(jax.jit(gradients(name, block_size=block_size))(*arguments()), expected)


def mapped(mapping, name, devices, **options):
    """The gradients of the mean over devices, as `train.minimise` takes them, of a batch that is split among them."""
    function = gradients(name, axis_name="data", **options)

    def local(*arguments):
        value, (by_temperature, by_bias, *by_rows) = function(*arguments)
        value, by_temperature, by_bias = jax.lax.pmean((value, by_temperature, by_bias), "data")
        if mapping == "shard_map":  # The gradient of what all devices share is summed as it comes.
            by_temperature, by_bias = by_temperature / devices, by_bias / devices
        return value, (by_temperature, by_bias, *(rows / devices for rows in by_rows))

    if mapping == "pmap":
        run = jax.pmap(local, "data", in_axes=(None, None, 0, 0, 0, 0), devices=jax.devices()[:devices])

        def split(*arguments):
            scalars, rows = arguments[:2], arguments[2:]
            value, parts = run(*scalars, *(leaf.reshape(devices, -1, *leaf.shape[1:]) for leaf in rows))
            by_temperature, by_bias, *by_rows = parts
            return value[0], (by_temperature[0], by_bias[0], *(leaf.reshape(N, D) for leaf in by_rows))

        return split
    spec = PartitionSpec
    return jax.jit(
        jax.shard_map(
            local,
            mesh=jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]),
            in_specs=(spec(), spec(), *[spec("data")] * 4),
            out_specs=(spec(), (spec(), spec(), spec("data"), spec("data"))),
            check_vma=mapping == "shard_map",
        )
    )


@pytest.mark.parametrize(
    ("name", "mapping"),
    [(name, "shard_map") for name in NAMES]
    + [("supcon", "pmap"), ("siglip", "pmap"), ("siglip", "shard_map unchecked")],
)
def test_a_ring_of_devices_changes_nothing(name, mapping):
    """One example on each of eight: what it is compared with is elsewhere."""
    with jax.enable_x64(True):
        expected = jax.jit(gradients(name))(*arguments())
        assert_close(mapped(mapping, name, 8)(*arguments()), expected)


@pytest.mark.parametrize(("devices", "block_size"), [(1, None), (2, 3), (4, 4)])
def test_rings_of_any_size_in_any_blocks(devices, block_size):
    with jax.enable_x64(True):
        expected = jax.jit(gradients("nt_xent"))(*arguments())
        assert_close(mapped("shard_map", "nt_xent", devices, block_size=block_size)(*arguments()), expected)


def test_candidates_that_devices_share():
    """Blocks on each device by itself, against the same second view: its gradient is summed over devices."""
    with jax.enable_x64(True):
        _, _, first, second, *_ = arguments()
        second = second[: N // 2]
        by_both = jax.grad(lambda *views: contrastive.info_nce(*views, block_size=3).sum(), argnums=(0, 1))
        spec, mesh = PartitionSpec, jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        specs = (spec("data"), spec())
        run = jax.jit(jax.shard_map(by_both, mesh=mesh, in_specs=specs, out_specs=specs))
        plain = jax.jit(jax.grad(lambda *views: contrastive.info_nce(*views).sum(), argnums=(0, 1)))
        halves = [plain(half, second) for half in (first[: N // 2], first[N // 2 :])]
        expected = jnp.concatenate([halves[0][0], halves[1][0]]), halves[0][1] + halves[1][1]
        assert_close(run(first, second), expected)


@pytest.mark.parametrize("name", ["nt_xent", "siglip"])
def test_reverse_derivatives_are_those_of_the_values(name):
    with jax.enable_x64(True):
        _, _, first, second, labels, weights = arguments()

        def of(temperature, bias, first, second):
            return loss(name, temperature, bias, first, second, labels, weights, block_size=5)

        check_grads(jax.jit(of), (jnp.asarray(0.3), jnp.asarray(-1.5), first, second), order=1, modes=["rev"])


def test_dense_losses_have_forward_derivatives():
    with jax.enable_x64(True):
        _, _, first, second, *_ = arguments()
        check_grads(jax.jit(contrastive.nt_xent), (first, second), order=2, modes=["fwd"])


@pytest.mark.parametrize(("name", "block_size"), [("nt_xent", None), ("siglip", 3)])
def test_a_batch_split_under_jit(name, block_size):
    """Nothing is said about devices: the compiler splits the losses as it splits everything else."""
    with jax.enable_x64(True):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        split, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        placed = jax.device_put(arguments(), (everywhere, everywhere, *[split] * 4))
        run = jax.jit(gradients(name, block_size=block_size))
        assert_close(run(*placed), run(*arguments()))


def test_blocks_within_a_scan_and_under_vmap():
    with jax.enable_x64(True):
        temperatures = jnp.array([0.2, 0.5, 1.0])
        function = gradients("nt_xent", block_size=5)
        rest = arguments()[1:]
        compiled = jax.jit(function)
        expected = jax.tree.map(lambda *leaves: np.stack(leaves), *[compiled(t, *rest) for t in temperatures])
        assert_close(jax.jit(lambda ts: jax.lax.map(lambda t: function(t, *rest), ts))(temperatures), expected)
        assert_close(jax.jit(jax.vmap(lambda t: function(t, *rest)))(temperatures), expected)


def test_learned_temperatures_agree_wherever_they_train():
    """A linear encoder on one device, on eight under jit and on eight under pmap: the same after some steps."""

    def method(axis_name=None, block_size=None):
        def loss(params, batch, key):
            views, options = (view @ params["kernel"] for view in batch), {"axis_name": axis_name}
            options |= {"temperature": jnp.exp(params["log_temperature"]), "bias": params["bias"]}
            return contrastive.siglip(*views, block_size=block_size, **options).mean(), {}

        def init(key):
            return {"kernel": jax.random.normal(key, (D, 4)), "log_temperature": jnp.log(0.5), "bias": jnp.float32(-1)}

        return train.minimise(loss, optax.sgd(0.1), init, axis_name=axis_name)

    key, batch = jax.random.key(0), np.random.default_rng(1).normal(size=(2, N, D)).astype(np.float32)

    def trained(method):
        state = method.init(key)
        start = jax.tree.map(np.array, state.learner.params)
        for _ in range(5):
            state, metrics = method.step(state, tuple(batch), key)
        return start, state.learner.params, metrics["loss"]

    start, one, loss = trained(place.jit(method(), place.mesh(devices=jax.devices()[:1])))
    _, eight, _ = trained(place.jit(method(), place.mesh()))
    _, copies, mean = trained(place.pmap(method("data", 1)))
    for other in (eight, place.first_copy(copies)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), other, one)
    np.testing.assert_allclose(mean, loss, rtol=1e-5)
    assert all(abs(one[name] - start[name]) > 1e-3 for name in ("log_temperature", "bias"))


def temporaries(function, *shapes):
    """Bytes on each device beside arguments and results, of a program that is compiled and not run."""
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_blocks_and_of_the_ring():
    """NT-Xent and its gradient, 8,192 pairs of 128 features: the matrix of all pairs is 1 GiB."""

    def function(**options):
        return jax.value_and_grad(lambda *views: contrastive.nt_xent(*views, **options).mean(), argnums=(0, 1))

    shape, spec = (8192, 128), PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    here = jax.ShapeDtypeStruct(shape, jnp.float32)
    split = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    ring = jax.shard_map(
        lambda *views: jax.tree.map(lambda leaf: leaf[None], function(axis_name="data")(*views)),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    dense = temporaries(function(), here, here)
    assert dense > 2**30
    assert temporaries(function(block_size=512), here, here) < dense / 10
    on_mesh = temporaries(function(), split, split)
    assert temporaries(ring, split, split) < on_mesh / 5
