"""The loop: resumes bit by bit, reads metrics late, stops when asked, refuses what is not finite."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import data, loop, place, train
from jaxgen.checkpoint import Checkpoints
from jaxgen.log import Log

KEY = jax.random.key(5)
STEPS = 40
BATCHES = data.batches({"x": np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)}, batch_size=8, seed=3)


def method():
    """Noisy enough that any slip in keys, data or optimiser state shows in every bit."""

    def loss(params, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        return jnp.mean((batch["x"] @ params["w"] + noise) ** 2), {}

    return train.minimise(
        loss, optax.adam(0.05), lambda key: {"w": jax.random.normal(key, (4, 4))}, average=train.ema(0.9)
    )


MESH = place.mesh(jax.devices()[:1])


def run(directory, every=(), batches=BATCHES, ours=None, steps=STEPS):
    ours = method() if ours is None else ours
    with Checkpoints(directory / "checkpoints") as checkpoints:
        return loop.run(
            place.jit(ours, MESH), batches, key=KEY, steps=steps, like=place.state_shapes(ours, MESH),
            checkpoints=checkpoints, save_every=7, log=Log(directory / "metrics.jsonl"), log_every=3, every=every,
        )  # fmt: skip


def records(directory):
    """What was logged, without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return run(directory), records(directory)


def assert_same(state, directory, undisturbed):
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(undisturbed[0]), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert records(directory) == undisturbed[1]


class PowerError(Exception):
    """Somebody has pulled the plug."""


@pytest.mark.parametrize("step", [1, 6, 7, 8, 21, 39])
def test_a_run_cut_anywhere_and_started_again_ends_the_same(step, tmp_path, undisturbed):
    def cut(done, state):
        raise PowerError

    with pytest.raises(PowerError):
        run(tmp_path, every=[loop.Every(step, cut)])
    assert_same(run(tmp_path), tmp_path, undisturbed)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(signum, tmp_path, undisturbed):
    before = signal.getsignal(signum)
    with pytest.raises(loop.Stopped, match=f"{signum.name} after step 11") as stopped:
        run(tmp_path, every=[loop.Every(10, lambda done, state: signal.raise_signal(signum))])
    assert (stopped.value.step, stopped.value.signum) == (11, signum)  # the step after step 10's tasks
    assert signal.getsignal(signum) is before
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == stopped.value.step
    assert_same(run(tmp_path), tmp_path, undisturbed)


def test_a_second_signal_acts_at_once(tmp_path):
    def twice(done, state):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # A shell's background jobs ignore SIGINT, and so would this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, every=[loop.Every(5, twice)])
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_torn_line_is_dropped(tmp_path, undisturbed):
    def tear(done, state):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2')
        raise PowerError

    with pytest.raises(PowerError):
        run(tmp_path, every=[loop.Every(16, tear)])
    assert_same(run(tmp_path), tmp_path, undisturbed)


def test_a_finished_run_is_left_alone(tmp_path, undisturbed):
    run(tmp_path)
    seen = []
    state = run(tmp_path, batches=lambda step: seen.append(step))
    assert seen == []
    assert_same(state, tmp_path, undisturbed)


def test_onto_other_devices(tmp_path, undisturbed):
    """Stopped on one device, taken up on eight: the same data and noise, so the same up to rounding."""

    def cut(done, state):
        raise PowerError

    with pytest.raises(PowerError):
        run(tmp_path, every=[loop.Every(20, cut)])
    eight, ours = place.mesh(fsdp=2), method()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state = loop.run(
            place.jit(ours, eight), BATCHES, key=KEY, steps=STEPS,
            like=place.state_shapes(ours, eight), checkpoints=checkpoints,
        )  # fmt: skip
    assert len(state.step.sharding.device_set) == 8
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(undisturbed[0]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_metrics_are_read_when_the_next_step_is_on_its_way(monkeypatch):
    events = []
    placed = place.jit(method(), MESH)

    def step(state, batch, key):
        events.append("step")
        return placed.step(state, batch, key)

    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: events.append("read") or get(tree))
    loop.run(train.Method(placed.init, step), BATCHES, key=KEY, steps=5, log=Log(None), log_every=2)
    assert events == ["step", "step", "step", "read", "step", "step", "read", "read"]


def test_what_is_not_finite_is_not_saved(tmp_path):
    def poisoned(step):
        batch = BATCHES(step)
        return {"x": batch["x"] * np.float32(np.nan)} if step >= 15 else batch

    with pytest.raises(FloatingPointError, match="metrics are not finite at step 18"):
        run(tmp_path, batches=poisoned)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 14


@pytest.mark.parametrize("name", ["steps", "save_every", "log_every"])
def test_bad_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got 0"):
        loop.run(place.jit(method(), MESH), BATCHES, key=KEY, **{"steps": 5, name: 0})


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"`steps` must be at least 40, the checkpoint in .* got 30"):
        run(tmp_path, steps=30)
