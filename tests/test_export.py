"""Functions in files: the same numbers in a process without their code, and nothing that does not fit goes by."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from jax import monitoring
from safetensors.numpy import save_file

from jaxgen import attacks, diffusion, export, nets
from jaxgen.export import file as export_file

PATH = diffusion.linear_beta()


def sampler(network):
    """A guided sampler of a network: the table, the guidance and the labels are data."""

    def draw(params, key, table, guidance, labels):
        def denoiser(labels):
            return diffusion.denoiser(PATH, diffusion.noise, lambda x, t: network.apply(params, x, t, labels))

        denoise = diffusion.cfg(denoiser(labels), denoiser(jnp.full_like(labels, 10)), guidance)
        x = diffusion.prior(key, PATH, jnp.asarray(table.times)[0], (labels.shape[0], 8, 8, 1))
        return diffusion.sample(key, denoise, table, x)

    return draw


def table(solver, steps, **options):
    return diffusion.pad(solver(PATH, diffusion.uniform_times(PATH, steps), **options), rows=4, slots=2)


def drawn(batch=2):
    return jax.random.key(3), table(diffusion.ddim, 3), 2.0, np.arange(batch)


def params_of(network, *args):
    """Parameters none of which is zero."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *args)
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(numbers.normal(size=leaf.shape) / 4), shapes)


def denoisers():
    x, t, labels = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    unet = nets.UNet(out_channels=1, channels=8, multipliers=(1, 2), blocks=1, groups=4, attention=(4,), num_classes=10)
    dit = nets.DiT(out_channels=1, features=16, depth=2, heads=2, patch=2, num_classes=10)
    return {"unet": (unet, params_of(unet, x, t, labels)), "dit": (dit, params_of(dit, x, t, labels))}


def gan():
    network, z = (
        nets.DCGANGenerator(size=8, channels=1, widths=(8, 16), norm=partial(nets.GroupNorm, groups=4)),
        jnp.zeros((2, 4)),
    )
    return network.apply, params_of(network, z), (np.random.default_rng(1).normal(size=(2, 4)),)


def attack():
    network, x = (
        nets.ResNet(blocks=(1,), stem=nets.cifar_stem, width=8, num_classes=3, norm=partial(nets.GroupNorm, groups=4)),
        jnp.zeros((2, 8, 8, 1)),
    )

    def attacked(params, key, x, labels, eps):
        threat = attacks.ThreatModel(jnp.inf, eps=eps, low=-1.0, high=1.0)
        objective = attacks.cross_entropy(lambda x: network.apply(params, x), labels)
        return attacks.pgd(key, objective, x, threat, steps=2)

    return attacked, params_of(network, x), (jax.random.key(1), x, np.array([0, 2]), 0.1)


def denoising(name):
    network, params = denoisers()[name]
    return sampler(network), params, drawn()


FUNCTIONS = {"unet": partial(denoising, "unet"), "dit": partial(denoising, "dit"), "gan": gan, "attack": attack}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_function_is_saved_for_all_platforms_and_computes_the_same_bits(name, tmp_path):
    function, params, arguments = FUNCTIONS[name]()
    export.save(tmp_path / "program", function, params, *arguments)
    program = export.load(tmp_path / "program")
    assert program.platforms == ("cpu", "cuda", "tpu")
    expected = jax.jit(function)(params, *arguments)
    np.testing.assert_array_equal(program(*arguments), expected, strict=True)
    arrays, _ = export_file.read(tmp_path / "program")
    for platform in program.platforms:
        assert jax.export.deserialize(bytearray(arrays[f"program.{platform}"])).platforms == (platform,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sampler: its file, and the function with its parameters closed over, compiled."""
    network, params = denoisers()["dit"]
    file = tmp_path_factory.mktemp("export") / "sampler.jaxgen"
    export.save(file, sampler(network), params, *drawn())
    return file, partial(jax.jit(sampler(network)), params)


ELSEWHERE = """
import sys
import numpy as np
from jaxgen import export
import jax
jax.config.update("jax_num_cpu_devices", 8)
draw = export.load(sys.argv[1])
samples = {}
for name, arrays in np.load(sys.argv[2]).items():
    samples[name] = draw(jax.random.key(3), {"times": arrays[:, 0, -1], "weights": arrays[:, :, :-1]}, 2.0, np.arange(2))
assert not {"flax", "optax", "orbax", "jaxgen.nets", "jaxgen.diffusion"} & set(sys.modules), "the network's code is here"
np.savez(sys.argv[3], **samples)
"""


def test_a_process_without_the_networks_code_draws_the_same_samples(saved, tmp_path):
    file, live = saved
    tables = {"ddim": table(diffusion.ddim, 3), "euler": table(diffusion.dpmpp_2m, 2)}
    packed = {
        name: np.concatenate([one.weights, np.broadcast_to(one.times[:, None, None], (4, 2, 1))], axis=2)
        for name, one in tables.items()
    }
    np.savez(tmp_path / "tables.npz", **packed)
    files = [str(file), str(tmp_path / "tables.npz"), str(tmp_path / "samples.npz")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *files], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    samples = np.load(files[2])
    for name, one in tables.items():
        np.testing.assert_array_equal(samples[name], live(jax.random.key(3), one, 2.0, np.arange(2)))


@pytest.fixture
def compilations():
    """Counts programs as they are compiled."""
    count = []

    def heard(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            count.append(event)

    monitoring.register_event_duration_secs_listener(heard)
    yield count
    monitoring.unregister_event_duration_listener(heard)


def test_another_solver_steps_eta_guidance_or_seed_compile_nothing(saved, compilations):
    file, live = saved
    draw = export.load(file)
    arguments = [
        (jax.random.key(3), table(diffusion.ddim, 3), 2.0, np.arange(2)),
        (jax.random.key(4), table(diffusion.dpmpp_2m, 4), np.float64(1.5), jnp.array([4, 4])),
        (jax.random.key(5), table(diffusion.ddim, 2, eta=0.5), jnp.ones(()) * 3, np.array([9, 0], np.int32)),
        (jax.random.key(5), jax.tree.map(jnp.float32, table(diffusion.ddpm, 2)), jnp.asarray(0.5), np.array([9, 10])),
    ]
    draw(*arguments[0])
    assert compilations
    compilations.clear()
    results = [draw(*one) for one in arguments]
    assert not compilations
    for one, result in zip(arguments, results, strict=True):
        np.testing.assert_array_equal(result, live(*one))
    assert len({result.tobytes() for result in map(np.asarray, results)}) == 4


@pytest.mark.parametrize(("name", "batches"), [("unet", (3,)), ("dit", (1, 3))])
def test_a_batch_may_be_of_any_size(name, batches, tmp_path, compilations):
    network, params = denoisers()[name]
    (n,) = jax.export.symbolic_shape("n")
    labels = jax.ShapeDtypeStruct((n,), np.int32)
    export.save(tmp_path / "f", sampler(network), params, *drawn()[:3], labels, platforms=("cpu", "tpu"))
    draw = export.load(tmp_path / "f")
    assert draw.arguments["labels"] == {"labels": ("int32", ("n",))}
    live = jax.jit(sampler(network))
    for batch in batches:
        np.testing.assert_allclose(draw(*drawn(batch)), live(params, *drawn(batch)), rtol=0, atol=1e-5)
    assert compilations
    compilations.clear()
    draw(*drawn(batches[0]))
    assert not compilations


def test_it_compiles_inside_other_programs_with_parameters_as_an_argument(saved):
    file, live = saved
    draw, arguments = export.load(file), drawn()
    assert isinstance(jax.typeof(next(iter(draw.params.values()))), jax.core.ShapedArray)
    doubled = jax.jit(lambda params, *arguments: 2 * draw.apply(params, *arguments))
    np.testing.assert_allclose(doubled(draw.params, *arguments), 2 * live(*arguments), rtol=1e-5, atol=1e-5)
    zeros = jax.tree.map(jnp.zeros_like, draw.params)
    assert np.abs(np.asarray(draw.apply(zeros, *arguments)) - np.asarray(draw(*arguments))).max() > 0.1


class State(NamedTuple):
    mean: jax.Array
    history: list


def test_what_is_returned_keeps_its_form(tmp_path):
    def function(params, key, pair):
        first, second = pair
        state = State(params["w"] + first["a"], [second, None])
        return {"state": state, "key": jax.random.fold_in(key, 1), "all": (params["w"],), "b": params["flag"]}

    params = {
        "w": jnp.arange(3, dtype=jnp.bfloat16),
        "flag": np.bool_(True),
        "scale": 0.5,
        "none": None,
        "empty": np.zeros((0, 2)),
    }
    arguments = jax.random.key(7), ({"a": jnp.float16(2)}, np.int8(3))
    export.save(tmp_path / "f", function, params, *arguments)
    program = export.load(tmp_path / "f")
    assert program.params["params.scale"].dtype == np.float32
    expected, came = function(params, *arguments), program(*arguments)
    assert jax.tree.map(jax.typeof, came["state"]._asdict()) == jax.tree.map(jax.typeof, expected["state"]._asdict())
    assert type(came["state"]).__name__ == "State"
    assert type(came["state"]) is type(program(*arguments)["state"])
    np.testing.assert_array_equal(came["state"].mean, expected["state"].mean)
    assert came["state"].history[0] == 3
    assert came["state"].history[1] is None
    assert isinstance(came["all"], tuple)
    assert came["key"] == expected["key"]
    assert came["b"].dtype == bool


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "missing a required argument: 'labels'", lambda k, t, g, y: (k, t, g)),
        (TypeError, "too many positional arguments", lambda k, t, g, y: (k, t, g, y, y)),
        (TypeError, r"`key` must be key<fry>\[\], got uint32\[2\]", lambda k, t, g, y: (jax.random.key_data(k), t, g, y)),
        (TypeError, r"`key` must be key<fry>\[\], got key<rbg>\[\]", lambda k, t, g, y: (jax.random.key(0, impl="rbg"), t, g, y)),
        (ValueError, r"`key` must be key<fry>\[\], got key<fry>\[2\]", lambda k, t, g, y: (jax.random.split(k), t, g, y)),
        (ValueError, r"`table` must have the leaves table.times, table.weights, got table.0, table.1", lambda k, t, g, y: (k, tuple(t), g, y)),
        (ValueError, r"`table` must have the leaves table.times, table.weights, got None", lambda k, t, g, y: (k, None, g, y)),
        (ValueError, r"`table.times` must be float32\[4\], got float32\[5\]", lambda k, t, g, y: (k, t._replace(times=np.ones(5)), g, y)),
        (TypeError, r"`table.times` must be float32\[4\], got int32\[4\]", lambda k, t, g, y: (k, t._replace(times=np.arange(4)), g, y)),
        (TypeError, r"`guidance` must be float32\[\], got bfloat16\[\]", lambda k, t, g, y: (k, t, jnp.bfloat16(1), y)),
        (ValueError, r"`labels` must be int32\[2\], got int32\[3\]", lambda k, t, g, y: (k, t, g, np.arange(3))),
        (ValueError, r"`labels` must be int32\[2\], got int32\[2,1\]", lambda k, t, g, y: (k, t, g, y[:, None])),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(error, message, change, saved):
    draw = export.load(saved[0])
    with pytest.raises(error, match=message):
        draw(*change(*drawn()))
    with pytest.raises(error, match=message):
        jax.jit(lambda params, *arguments: draw.apply(params, *arguments))(draw.params, *change(*drawn()))


def test_lengths_that_vary_do_so_together(tmp_path):
    (n,) = jax.export.symbolic_shape("n")
    struct = jax.ShapeDtypeStruct((n, 2), np.float32)
    export.save(tmp_path / "f", lambda params, x, y: x + y, (), struct, struct)
    program = export.load(tmp_path / "f")
    assert program(np.ones((3, 2)), np.ones((3, 2))).shape == (3, 2)
    with pytest.raises(ValueError, match=r"`y` must be float32\[n,2\], with n = 3, got float32\[4,2\]"):
        program(np.ones((3, 2)), y=np.ones((4, 2)))


def test_it_says_what_it_is(saved):
    assert repr(export.load(saved[0])).startswith(
        "draw(key: key<fry>[], table.times: float32[4], table.weights: float32[4,2,4], guidance: float32[], "
        "labels: int32[2]), parameters: "
    )
    assert repr(export.load(saved[0])).endswith(f"for cpu, cuda, tpu, by JAX {jax.__version__}")


def test_a_file_is_one_of_safetensors_with_arrays_where_a_cpu_wants_them(saved):
    file, _ = saved
    program = export.load(file)
    with safetensors.safe_open(file, framework="numpy") as opened:
        for name, array in program.params.items():
            np.testing.assert_array_equal(opened.get_tensor(name), array)
    content = file.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:data]).items():
        if name != "__metadata__" and (entry["data_offsets"][1] - entry["data_offsets"][0]) % 64 == 0:
            assert (data + entry["data_offsets"][0]) % 64 == 0


def test_parameters_are_mapped_and_not_copied(saved):
    address = {}
    arrays, _ = export_file.read(saved[0])
    for name, array in arrays.items():
        if array.nbytes % 64 == 0 and not name.startswith("program"):
            address[name] = array.ctypes.data, jax.device_put(array).unsafe_buffer_pointer()
    assert address
    assert all(there == here for there, here in address.values())


@pytest.mark.parametrize("place", ["length", "header", "padding", "parameter", "program", "digest"])
def test_a_flipped_bit_anywhere_is_found(place, saved, tmp_path):
    content = bytearray(saved[0].read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:data])
    names = {"parameter": "params.params.time_0.kernel", "program": "program.cpu", "digest": "sha256"}
    where = {"length": 0, "header": 40, "padding": data - 1}
    content[where[place] if place in where else data + entries[names[place]]["data_offsets"][0] + 5] ^= 4
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged must be a whole file of `jaxgen.export.save`: it is damaged, or"):
        export.load(tmp_path / "damaged")


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 99])
def test_the_checksum_is_of_all_pieces_however_they_come(length, monkeypatch):
    monkeypatch.setattr(export_file, "_PIECE", 16)
    content = np.random.default_rng(length).bytes(length)
    digests = b"".join(hashlib.sha256(content[i : i + 16]).digest() for i in range(0, length, 16))
    assert export_file._digest(memoryview(content)) == hashlib.sha256(digests).digest()
    for part in (1, 7, 16, 31, 48, 99):
        digest = export_file._Digest()
        for start in range(0, length, part):
            digest.update(content[start : start + part])
        assert digest.whole() == hashlib.sha256(digests).digest()


@pytest.mark.parametrize("content", [b"", b"x", b"\x80\x04K*." * 99, None, "cut", "more"])
def test_files_of_other_kinds_are_refused(content, saved, tmp_path):
    whole = saved[0].read_bytes()
    if content is None:
        save_file({"w": np.ones(9)}, tmp_path / "other")
    else:
        (tmp_path / "other").write_bytes({"cut": whole[:-1], "more": whole + b"\0"}.get(content, content))
    with pytest.raises(ValueError, match=r"other must be a whole file of `jaxgen.export.save`"):
        export.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export.load(tmp_path / "nowhere")


def test_files_of_other_formats_platforms_and_versions_are_refused(tmp_path, monkeypatch):
    export.save(tmp_path / "f", lambda params, x: x, (), 0.0, platforms=("tpu",))
    with pytest.raises(ValueError, match="f must be for the platform 'cpu', got one for tpu"):
        export.load(tmp_path / "f")
    export.save(tmp_path / "f", lambda params, x: x, (), 0.0, platforms=("cpu",))
    assert export.load(tmp_path / "f", platform="cpu")(2.0) == 2
    monkeypatch.setattr(jax.export, "deserialize", lambda _: 1 / 0)
    with pytest.raises(ValueError, match=r"f, by JAX [\d.]+, cannot be read by JAX [\d.]+: division by zero"):
        export.load(tmp_path / "f")
    for metadata in ({}, {"jaxgen.export": json.dumps({"format": 2})}):
        export_file.write(tmp_path / "f", {}, metadata)
        with pytest.raises(ValueError, match=r"f must be a file of `jaxgen.export.save`, of format 1, got (2|None)"):
            export.load(tmp_path / "f")


class Odd(dict):
    """A container that the reader does not know."""


jax.tree_util.register_pytree_node(
    Odd, lambda odd: (tuple(odd.values()), tuple(odd)), lambda keys, values: Odd(zip(keys, values, strict=True))
)


@pytest.mark.parametrize(
    ("error", "message", "function", "params", "arguments", "options"),
    [
        (ValueError, "`platforms` must be of cpu, cuda, tpu, rocm, got 'gpu'", lambda p, x: x, (), (0.0,), {"platforms": ["gpu"]}),
        (ValueError, "`params.k` must be of a dtype that a file can hold, .*; got key<fry>", lambda p: p, {"k": jax.random.key(0)}, (), {}),
        (ValueError, "`x` must have a name for each of its leaves, got two of x.a.b", lambda p, x: x, (), ({"a.b": 1.0, "a": {"b": 2.0}},), {}),
        (TypeError, "`function` must return arrays in .*, got Odd", lambda p, x: Odd(x=x), (), (0.0,), {}),
        (TypeError, "`function` must return arrays in .*, got dict", lambda p, x: {1: x}, (), (0.0,), {}),
        (TypeError, "too many positional arguments", lambda p, x: x, (), (0.0, 1.0), {}),
        (TypeError, "str", lambda p, x: x, (), ("a word",), {}),
        (ValueError, "must be an integer of at least 1", lambda p, x: diffusion.sample(jax.random.key(0), None, None, x, unroll=0), (), (jnp.ones(1),), {}),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_and_leaves_no_file(
    error, message, function, params, arguments, options, tmp_path
):
    with pytest.raises(error, match=message):
        export.save(tmp_path / "f", function, params, *arguments, **options)
    assert not list(tmp_path.iterdir())


def test_saving_is_whole_or_nothing(tmp_path, monkeypatch):
    export.save(tmp_path / "deep" / "f", lambda params, *x: x[0] + params, 1.0, 2.0, 3.0)
    before = (tmp_path / "deep" / "f").read_bytes()
    old = export.load(tmp_path / "deep" / "f")
    assert list(old.arguments) == ["x_0", "x_1"]

    def full(self):
        raise OSError("no space left on device")

    class Digest:
        def update(self, part):
            pass

        digest = full

    with monkeypatch.context() as patched:
        patched.setattr(export_file.hashlib, "sha256", Digest)
        with pytest.raises(OSError, match="no space left"):
            export.save(tmp_path / "deep" / "f", lambda params, x: x - params, 1.0, 2.0)
    assert (tmp_path / "deep" / "f").read_bytes() == before
    export.save(tmp_path / "deep" / "f", lambda params, x: x - params, 1.0, 2.0)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["f"]
    assert old(2.0, 3.0) == 3  # who has loaded the old one keeps it
    assert export.load(tmp_path / "deep" / "f")(2.0) == 1
