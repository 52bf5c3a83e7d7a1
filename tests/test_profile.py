"""Profiles: the steps of the window and no others, whole or begun within, written whatever happens."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from experiments import digits_diffusion, image_settings, image_training, learned_solver
from jaxgen import data, loop, place, profile, train
from jaxgen.checkpoint import Checkpoints
from tests.test_loop import BATCHES, KEY, MESH, method


class PowerError(Exception):
    """Somebody has pulled the plug."""


@pytest.fixture
def events(monkeypatch):
    """What happens in its order: the profiler, which records nothing, and waiting for the device."""
    seen, started = [], []
    wait = jax.block_until_ready

    def start(directory):
        seen.append("start")
        started.append(directory)

    def stop():
        seen.append("stop")
        made = started[-1] + "/plugins/profile/now"
        os.makedirs(made)
        with open(made + "/host.xplane.pb", "w") as file:
            file.write("recorded")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: seen.append("wait") or wait(tree))
    return seen


def run(directory, events, window, *, steps=10, every=(), checkpoints=None):
    ours = method()
    placed = place.jit(ours, MESH)

    def step(state, batch, key):
        events.append(int(state.step))
        return placed.step(state, batch, key)

    recorder = profile.Profile(window, directory / "profile")
    like = place.state_shapes(ours, MESH)
    return loop.run(
        train.Method(placed.init, step), BATCHES, key=KEY, steps=steps, profile=recorder, every=every, like=like,
        checkpoints=checkpoints, save_every=5,
    )  # fmt: skip


def recorded(directory):
    return [str(file.relative_to(directory)) for file in sorted(directory.rglob("*")) if file.is_file()]


FILE = "profile/plugins/profile/now/host.xplane.pb"


@pytest.mark.parametrize(
    ("window", "wanted"),
    [
        (range(3, 5), [0, 1, 2, "wait", "start", 3, 4, "wait", "stop", 5, 6, 7, 8, 9]),
        (range(1), ["wait", "start", 0, "wait", "stop", 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (range(8, 10), [0, 1, 2, 3, 4, 5, 6, 7, "wait", "start", 8, 9, "wait", "stop"]),
    ],
)
def test_the_window_is_recorded_and_the_device_waited_for_at_its_ends_alone(window, wanted, events, tmp_path):
    run(tmp_path, events, window)
    assert events == wanted
    assert recorded(tmp_path) == [FILE]


def test_a_run_that_goes_on_within_the_window_records_the_rest(events, tmp_path):
    for window, steps in ((range(50, 60), 5), (range(3, 8), 10), (range(3, 8), 15)):
        events.clear()
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            run(tmp_path, events, window, steps=steps, checkpoints=checkpoints)
        marks = [event for event in events if event != "wait"]
        wanted = {5: [0, 1, 2, 3, 4], 10: ["start", 5, 6, 7, "stop", 8, 9], 15: [10, 11, 12, 13, 14]}
        assert marks == wanted[steps]


def test_what_was_recorded_until_a_crash_is_written(events, tmp_path):
    def crash(step, state):
        raise PowerError

    with pytest.raises(PowerError):
        run(tmp_path, events, range(3, 9), every=[loop.Every(6, crash)])
    assert events[-1] == "stop"
    assert recorded(tmp_path) == [FILE]


def test_a_real_recording_holds_the_steps(tmp_path):
    ours, steps = method(), data.batches({"x": np.ones((30, 4), np.float32)}, batch_size=8, seed=0)
    recorder = profile.Profile(range(2, 4), tmp_path)
    loop.run(place.jit(ours, MESH), steps, key=KEY, steps=6, profile=recorder)
    (file,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    content = file.read_bytes()
    assert b"train" in content
    assert b"step_num" in content


@pytest.mark.parametrize("text", ["10", "10:", ":10", "a:b", "1:2:3", "-1:5", "1.5:3", "1 :3", ""])
def test_what_is_no_window_is_refused(text):
    with pytest.raises(ValueError, match="`profile` must be START:STOP, two steps counted from 0 such as 100:110, got"):
        profile.window(text, steps=100)


@pytest.mark.parametrize("text", ["10:10", "20:10", "90:101", "100:110"])
def test_a_window_that_holds_no_steps_of_the_run_is_refused(text):
    with pytest.raises(ValueError, match="START < STOP <= `steps`, 100, got"):
        profile.window(text, steps=100)


def test_the_window_may_end_with_the_run():
    assert profile.window("0:100", steps=100) == range(100)


def test_experiments_refuse_it_before_any_work_and_it_is_no_part_of_what_a_run_is():
    config = dataclasses.replace(digits_diffusion.CONFIG, steps=100)
    wrong, right = (dataclasses.replace(config, profile=text) for text in ("50:200", "50:60"))
    with pytest.raises(ValueError, match="`profile` must be"):
        image_settings.check(wrong)
    image_settings.check(right)
    assert image_training.identity(right, (8, 8, 1), 10) == image_training.identity(config, (8, 8, 1), 10)
    with pytest.raises(ValueError, match="`profile` must be"):
        learned_solver.fit(dataclasses.replace(learned_solver.SMOKE, profile="4:5"))
