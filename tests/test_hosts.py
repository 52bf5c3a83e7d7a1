"""Two real processes on loopback: they meet or say who is missing, train as one, and survive the loss of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxgen import hosts

WORKER = Path(__file__).with_name("hosts_worker.py")


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(*words, devices=1, steps=120):
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "STEPS": str(steps),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def together(*words, **settings):
    """Two processes of one run."""
    coordinator = f"127.0.0.1:{free_port()}"
    return [start(*words, coordinator, 2, process, **settings) for process in range(2)]


def finished(process, timeout=120):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


def wait_for_step(step, workdir, process):
    deadline = time.monotonic() + 100
    while not (workdir / "metrics.jsonl").exists() or step not in [line["step"] for line in records(workdir)]:
        assert time.monotonic() < deadline
        assert process.poll() is None, finished(process)
        time.sleep(0.01)


def final(workdir):
    with np.load(workdir / "final.npz") as leaves:
        return dict(leaves)


JOIN = (
    "import sys; from jaxgen import hosts; hosts.join(sys.argv[1], processes=3, process=int(sys.argv[2]), timeout=15)"
)


def call(address, said):
    host, port = address.split(":")
    for _ in range(300):
        try:
            with socket.create_connection((host, int(port)), timeout=1) as caller:
                caller.sendall(said)
                return
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise AssertionError("nobody listens")


def test_missing_hosts_are_counted_and_named():
    coordinator = f"127.0.0.1:{free_port()}"
    waiting = [start("-c", JOIN, coordinator, 0), start("-c", JOIN, coordinator, 1)]
    for said in (b"3\n", b"0\n", b"GET / HTTP/1.1\r\n\r\n"):  # strangers are not counted
        call(coordinator, said)
    ended = [finished(process) for process in waiting]
    for code, _, err in ended:
        assert code != 0
        assert "TimeoutError: 2 of 3 hosts arrived within 15 s, missing: process 2" in err


def test_a_coordinator_that_is_not_there():
    coordinator = f"127.0.0.1:{free_port()}"
    code, _, err = finished(start("-c", JOIN, coordinator, 1))
    assert code != 0
    assert f"ConnectionError: the first host cannot be reached at {coordinator} within 15 s" in err


def test_alone_nothing_happens():
    hosts.join()
    assert hosts.first()
    assert not hosts.stopping()
    hosts.join(processes=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    for process in together(WORKER, workdir):
        code, _, err = finished(process)
        assert code == 0, err
    return workdir


def test_a_run_that_lost_a_host_and_is_started_again_ends_bit_by_bit_the_same(tmp_path, undisturbed):
    first, second = together(WORKER, tmp_path)
    wait_for_step(70, tmp_path, first)
    second.send_signal(signal.SIGKILL)
    code, _, err = finished(first)
    assert code not in (0, None), err
    assert finished(second)[0] == -signal.SIGKILL
    assert not (tmp_path / "final.npz").exists()
    for process in together(WORKER, tmp_path):
        code, _, err = finished(process)
        assert code == 0, err
    assert records(tmp_path) == records(undisturbed)
    for name, wanted in final(undisturbed).items():
        np.testing.assert_array_equal(final(tmp_path)[name], wanted)


def test_one_process_computes_the_same(tmp_path, undisturbed):
    code, _, err = finished(start(WORKER, tmp_path, devices=2))
    assert code == 0, err
    for name, wanted in final(undisturbed).items():
        np.testing.assert_allclose(final(tmp_path)[name], wanted, rtol=1e-3, atol=1e-4)


def test_a_sigterm_to_one_host_has_all_stop_after_the_same_step(tmp_path):
    # So many that it does not end before the others have heard, a second later.
    first, second = processes = together(WORKER, tmp_path, steps=20_000)
    wait_for_step(20, tmp_path, first)
    second.send_signal(signal.SIGTERM)
    told = []
    for process in processes:
        _, _, err = finished(process)
        told.append([line for line in err.splitlines() if "Stopped: stopped by SIGTERM after step" in line])
    assert told[0] == told[1] != []
    step = int(told[0][0].split()[-1])
    assert (tmp_path / "checkpoints" / str(step)).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 2, "process": 0}, "`coordinator`, `processes` and `process` belong together, got no `coordinator`"),
        ({"coordinator": "a:1", "process": 0}, "belong together, got no `processes`"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, r"`process` must lie in \[0, `processes`\), \[0, 2\), got 2"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "`processes` must be an integer of at least 1"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "`coordinator` must be HOST:PORT, got 'a'"),
        ({"timeout": 0}, "`timeout` must be an integer of at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        hosts.join(**options)


@pytest.mark.slow
def test_an_experiment_on_two_hosts_is_that_of_one(tmp_path):
    """Trains, loses a host, goes on, draws and judges; the state is split over both hosts."""
    options = ["--smoke", "--network", "dit", "--steps", 60, "--save-every", 20, "--log-every", 5, "--grid-every", 1000]
    options += ["--judge-steps", 1]

    def run(name, *more, **settings):
        return start("-m", "experiments.digits_diffusion", *options, "--workdir", tmp_path / name, *more, **settings)

    def on_two(name):
        where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--fsdp", 4]
        return [run(name, *where, "--process", process, devices=2) for process in range(2)]

    for process in [run("one", devices=4), *on_two("two")]:
        code, _, err = finished(process)
        assert code == 0, err
    first, second = on_two("lost")
    wait_for_step(30, tmp_path / "lost", first)
    second.send_signal(signal.SIGKILL)
    code, _, err = finished(first)
    assert code == 1
    assert "error: this is what one host sees when another is gone" in err
    finished(second)
    for process in on_two("lost"):
        code, _, err = finished(process)
        assert code == 0, err
    assert records(tmp_path / "lost") == records(tmp_path / "two")
    for line, wanted in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert line == pytest.approx(wanted, rel=1e-3)
    assert (tmp_path / "lost" / "samples.png").read_bytes() == (tmp_path / "two" / "samples.png").read_bytes()
    assert json.loads((tmp_path / "two" / "quality.json").read_text())["judge_accuracy"] > 0
