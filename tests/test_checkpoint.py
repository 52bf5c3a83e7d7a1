"""Checkpoints: every bit comes back, on any devices, after any death; what is wrong is said in one line."""

import os
import shutil
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.checkpoint import Checkpoints


class State(NamedTuple):
    params: Any
    ema: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    nothing: Any = None
    empty: Any = ()


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (16, 8)), "bias": jnp.full(8, jnp.nan)},
        "half": jax.random.normal(keys[1], (8,), jnp.bfloat16),
        "layers": [jnp.ones(()), jnp.arange(3)],
    }
    floats = {name: params[name] for name in ("dense", "half")}
    opt_state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(floats)
    return State(params, jax.tree.map(lambda x: x + 0, params), opt_state, jnp.int32(seed), keys[2])


def bits(tree):
    def of(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return jax.tree.map(of, tree)


def assert_same(came, expected):
    assert jax.tree.structure(came) == jax.tree.structure(expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), came) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert bits(came) == bits(expected)


def saved(directory, steps=(1,), **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def test_every_bit_comes_back(tmp_path):
    saved(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        like = jax.eval_shape(make_state)
        assert_same(checkpoints.restore(like), make_state(1))
        assert_same(checkpoints.restore(make_state(7)), make_state(1))


def test_numbers_and_host_arrays_come_back_as_such(tmp_path):
    state = {"epoch": 7, "loss": 2.5, "host": np.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        checkpoints.wait()
        came = checkpoints.restore({"epoch": 0, "loss": 0.0, "host": np.zeros(3)})
    assert (came["epoch"], came["loss"]) == (7, 2.5)
    assert isinstance(came["epoch"], int)
    assert isinstance(came["host"], np.ndarray)
    np.testing.assert_array_equal(came["host"], state["host"])


def test_newest_are_kept_and_found(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (3, 10, 200):
            checkpoints.save(step, make_state(step))
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.latest()) == ([10, 200], 200)
        assert_same(checkpoints.restore(make_state(), step=10), make_state(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "200"]


def on(devices, spec):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return NamedSharding(mesh, spec)


def sharded(state, devices):
    """Splits the first axis of what it divides; replicates the rest."""

    def put(leaf):
        split = leaf.ndim and leaf.shape[0] % devices == 0
        return jax.device_put(leaf, on(devices, PartitionSpec("data") if split else PartitionSpec()))

    return jax.tree.map(put, state)


def test_state_goes_from_eight_devices_to_four_to_one_and_back(tmp_path):
    expected = make_state(5)
    state = sharded(expected, 8)
    for step, devices in enumerate((4, 1, 8)):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(step, state)
            checkpoints.wait()
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                sharded(make_state(0), devices),
            )
            state = checkpoints.restore(like)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
        assert_same(state, expected)
    assert len(state.params["dense"]["kernel"].sharding.device_set) == 8


@pytest.mark.parametrize("devices", [1, 8])
def test_state_may_be_donated_as_soon_as_save_returns(tmp_path, devices):
    def make(step):
        return {
            "a": jnp.full((1024, 1024), step, jnp.float32),
            "b": [jnp.full((512, 512), step + i) for i in range(4)],
        }

    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(5):
            state = sharded(make(step), devices)
            checkpoints.save(step, state)
            for _ in range(3):
                state = overwrite(state)
        checkpoints.wait()
        for step in range(5):
            assert_same(checkpoints.restore(make(0), step=step), make(step))


KILLED = """
import os, signal, sys, threading
import jax.numpy as jnp
from jaxgen.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": jnp.arange(10.0)})
checkpoints.wait()

import pathlib
def kill_in_the_middle():
    while not list(pathlib.Path(sys.argv[1]).glob("2.*tmp*/**/manifest.ocdbt")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill_in_the_middle, daemon=True).start()
checkpoints.save(2, {"w": jnp.ones((4000, 4000))})
checkpoints.wait()
"""


def test_killed_save_leaves_the_step_before_and_is_cleaned(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    leftovers = [path.name for path in tmp_path.iterdir() if "tmp" in path.name]
    assert leftovers
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    assert leftovers == [path.name for path in tmp_path.iterdir() if "tmp" in path.name]  # a reader cleans nothing
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        came = checkpoints.restore({"w": jnp.zeros(10)})
        np.testing.assert_array_equal(came["w"], np.arange(10.0))
        checkpoints.save(3, {"w": jnp.ones(10)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_mismatches_name_the_leaf_what_came_and_what_was_expected(tmp_path):
    saved(tmp_path)
    good = make_state()

    def with_params(**changes):
        return good._replace(params={**good.params, **changes})

    with Checkpoints(tmp_path) as checkpoints:
        for like, message in [
            (
                with_params(half=jnp.zeros(9, jnp.bfloat16)),
                r"'params.half' is stored as bfloat16\[8\], `like` has bfloat16\[9\]",
            ),
            (
                with_params(half=jnp.zeros(8)),
                r"'params.half' is stored as bfloat16\[8\], `like` has float32\[8\]",
            ),
            (with_params(more=jnp.zeros(1)), r"'params.more' is not stored"),
            (with_params(layers=[jnp.ones(())]), r"'params.layers.1' is stored and not in `like`"),
            (
                good._replace(opt_state=optax.sgd(0.1).init(good.params)),
                r"'opt_state.1.0.mu.half' is stored .*; and \d+ more",
            ),
            (
                good._replace(key=jax.random.key(0, impl="rbg")),
                r"'key' is stored as uint32\[2\], `like` has uint32\[4\]",
            ),
            (good._replace(nothing=jnp.zeros(2)), r"'nothing' is not stored"),
        ]:
            with pytest.raises(ValueError, match=rf"step 1 in {tmp_path} does not fit `like`: .*{message}") as info:
                checkpoints.restore(like)
            assert len(str(info.value).splitlines()) == 1
        assert_same(checkpoints.restore(good), make_state(1))


def test_absent_steps_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}"):
            checkpoints.restore(make_state())
        checkpoints.save(4, make_state())
        checkpoints.wait()
        with pytest.raises(FileNotFoundError, match=rf"no checkpoint of step 3 in {tmp_path}, only \[4\]"):
            checkpoints.restore(make_state(), step=3)


def test_steps_that_orbax_would_skip_in_silence_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5))
        for step in (5, 4):
            with pytest.raises(ValueError, match=rf"`step` must be greater than the latest in .*, 5, got {step}"):
                checkpoints.save(step, make_state())
        with pytest.raises(ValueError, match=r"`step` must be greater than .*, got -1"):
            checkpoints.save(-1, make_state())
        assert_same(checkpoints.restore(make_state()), make_state(5))


# When a read fails, TensorStore's other reads report to an event loop that Orbax has closed by then.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d"])
def test_unreadable_step_is_named_with_what_to_do(tmp_path, name):
    saved(tmp_path, steps=(1, 2))
    for path in (tmp_path / "2").rglob(name):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.write_bytes(b"\x00 damaged")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            RuntimeError, match=rf"step 2 in {tmp_path}/2 cannot be read .* `step`, one of \[1\]"
        ) as info:
            checkpoints.restore(make_state())
        assert len(str(info.value).splitlines()) == 1
        assert_same(checkpoints.restore(make_state(), step=1), make_state(1))


FULL = """
import resource, sys
import jax.numpy as jnp, numpy as np
from jaxgen.checkpoint import Checkpoints
noise = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1000)))
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": jnp.ones(10)})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # as a full disk would
try:
    checkpoints.save(2, {"w": noise})
    print("returned")
    getattr(checkpoints, sys.argv[2])(*([3, {"w": noise}] if sys.argv[2] == "save" else []))
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if sys.argv[2] != "close":
    checkpoints.save(4, {"w": noise})  # the disk has room again
    checkpoints.close()
"""


@pytest.mark.parametrize("call", ["wait", "close", "save", "latest"])
def test_failure_in_the_background_is_told_by_the_next_call(tmp_path, call):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), call],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith(f"saving step 2 in {tmp_path} failed ("), done.stdout
    assert len(lines) <= 2
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == ([1] if call == "close" else [1, 4])


def test_state_that_cannot_be_saved_is_told_and_the_next_is_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(RuntimeError, match=rf"saving step 1 in {tmp_path} failed .*Unsupported type"):
            checkpoints.save(1, {"w": object()})
        checkpoints.save(2, make_state(2))
        assert_same(checkpoints.restore(make_state()), make_state(2))


def test_host_arrays_may_be_overwritten_as_soon_as_save_returns(tmp_path):
    host = np.zeros((1000, 1000))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"host": host})
        host[:] = 1
        np.testing.assert_array_equal(checkpoints.restore({"host": host})["host"], 0)


def test_unwritable_directories_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"`directory` {tmp_path}/file/run cannot be written: Not a directory"):
        Checkpoints(tmp_path / "file" / "run")
    with pytest.raises(OSError, match=r"`directory` /proc/run cannot be written"):
        Checkpoints("/proc/run")
    with pytest.raises(ValueError, match="`keep` must be an integer of at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_reading_only(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"`directory` {tmp_path}/run does not exist"):
        Checkpoints(tmp_path / "run", read_only=True)
    with Checkpoints(tmp_path / "run") as writer, Checkpoints(tmp_path / "run", read_only=True) as reader:
        assert reader.latest() is None
        writer.save(1, make_state(1))
        writer.wait()
        assert reader.latest() == 1  # a reader sees what the writer has added
        assert_same(reader.restore(make_state()), make_state(1))
        with pytest.raises(ValueError, match=r"cannot save step 2: .* was opened with `read_only`"):
            reader.save(2, make_state(2))


def test_error_of_the_caller_is_not_hidden_by_closing(tmp_path, monkeypatch):
    def fails(self):
        raise RuntimeError("closing failed")

    checkpoints = Checkpoints(tmp_path)
    close = checkpoints.close
    monkeypatch.setattr(Checkpoints, "close", fails)
    with pytest.raises(KeyError, match="the caller's") as info, checkpoints:
        raise KeyError("the caller's")
    assert info.value.__notes__ == ["besides: closing failed"]
    close()


def test_other_files_in_the_directory_are_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "samples").mkdir()
    saved(tmp_path, steps=(1, 2, 3))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "config.json", "samples"]


def test_relative_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved("run")
    assert (tmp_path / "run" / "1").is_dir()


def test_importing_checkpoint_imports_no_orbax():
    code = "import sys, jaxgen.checkpoint, jaxgen.run; print({'orbax', 'tensorstore'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
