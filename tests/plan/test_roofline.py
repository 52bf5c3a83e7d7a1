"""Times by hand, and what helps a program that does not fit."""

import json

import pytest

from jaxgen import plan
from jaxgen.plan.hlo import Collective, Reading
from jaxgen.plan.topology import GiB

CHIP = plan.Chip(hbm=16 * GiB, flops=100e12, bandwidth=1e12, link=50e9, wraps=4, dollars=(1.0, 2.0))
SLICE = plan.Topology("v0:4x2", CHIP, (4, 2), 1, [])  # three ways out: 150 GB/s


def program(flops=8e14, traffic=2e9, moved=3e9, **fields):
    collectives = (Collective("all-reduce", 1, 2 * 10**9, moved),) if moved else ()
    known = {
        "devices": 8, "rows": 64, "parameters": 10**9, "state": 12 * 10**9, "whole": 12 * 10**9,
        "gradients": 4 * 10**9, "arguments": 12 * 10**9, "outputs": 12 * 10**9, "aliased": 12 * 10**9,
        "temporaries": 10**9, "peak": 13 * 10**9, "capacity": None, "flops": flops, "xla_flops": 1e14, "xla_bytes": 1e9,
        "reading": Reading(collectives, traffic, True, (), 0, 0, 1), "seconds": 1.0,
    }  # fmt: skip
    return plan.Program(**{**known, **fields})


@pytest.mark.parametrize(
    ("changes", "seconds", "bound"),
    [({}, 1.0, "compute"), ({"traffic": 3e12}, 3.0, "memory"), ({"moved": 300e9}, 2.0, "interconnect")],
)
def test_the_longest_of_three_binds(changes, seconds, bound):
    roof = plan.roofline(program(**changes), SLICE)
    assert (roof.seconds, roof.bound) == (pytest.approx(seconds), bound)


def test_terms():
    # 8e14 operations on 8 chips of 1e14 a second; 2 GB at 1 TB/s; 3 GB at 150 GB/s
    assert plan.roofline(program(), SLICE) == pytest.approx((1.0, 0.002, 0.02))


def test_cores_of_a_chip_share_it():
    halves = SLICE._replace(chip=CHIP._replace(cores=2))
    # The operations of all are those of all; what a core reads and sends takes twice as long.
    assert plan.roofline(program(), halves) == pytest.approx((1.0, 0.004, 0.04))


def test_one_chip_waits_for_nobody_and_several_slices_are_not_estimated():
    alone = SLICE._replace(shape=(1, 1))
    assert plan.roofline(program(moved=0), alone).interconnect == 0
    assert plan.roofline(program(), SLICE._replace(slices=2)).interconnect is None


def test_an_estimate_is_a_range():
    least, most = plan.EFFICIENCY
    seconds, per_second, dollars = plan.estimate(plan.roofline(program(), SLICE), SLICE, rows=64)
    assert seconds == pytest.approx((1 / most, 1 / least))
    assert per_second == pytest.approx((64 * least, 64 * most))
    # Eight chips at $1 and 64 x most rows a second, or at $2 and 64 x least
    assert dollars == pytest.approx((8 / 3600 * 1e6 / (64 * most), 16 / 3600 * 1e6 / (64 * least)))
    free = SLICE._replace(chip=CHIP._replace(dollars=None))
    assert plan.estimate(plan.roofline(program(), SLICE), free, rows=64).dollars is None


def too_large(peak, **fields):
    return program(reading=None, aliased=None, peak=peak, capacity=16 * 10**9, **fields)


def test_a_program_that_fits_needs_nothing():
    assert plan.remedies(program(), 1) == []


def test_a_large_state_is_split():
    # 16 GB of state and gradients alone are too much; 8, 4 of gathered parameters and 3 are not
    said = plan.remedies(too_large(19 * 10**9), 1)
    assert any(line.startswith("fsdp=2 instead of 1 makes room, 7.5 GiB") for line in said)
    assert not any("devices instead of" in line or "microbatches" in line for line in said)


def test_gathered_parameters_need_room():
    # 8 GB a half and 3 GB of activations would fit; the 6 GB of whole parameters beside them do not, until fsdp=4
    said = plan.remedies(too_large(19 * 10**9, state=10 * 10**9, whole=10 * 10**9, gradients=6 * 10**9), 1)
    assert any(line.startswith("fsdp=4 instead of 1 makes room, 3.7 GiB") for line in said)


def test_many_activations_are_spread():
    # 2 GB of state and gradients, 20 GB of activations: 11.4 devices' worth, or two parts of each batch
    said = plan.remedies(too_large(22 * 10**9, state=10**9, whole=10**9, gradients=10**9), 1)
    assert any(line.startswith("16 devices instead of 8 hold it, 8 more") for line in said)
    assert any(line.startswith("microbatches=2 makes room, 9.3 GiB") for line in said)
    assert not any("fsdp=" in line for line in said)
    assert any("remat" in line and "at most 13.0 GiB of the 18.6 GiB" in line for line in said)


def test_where_nothing_alone_helps_devices_and_a_split_do():
    # 20 GB of state and gradients and 24 GB of activations a device: 192 + 20 GB, on devices of 16 that gather 4
    said = plan.remedies(too_large(44 * 10**9, state=16 * 10**9, whole=16 * 10**9), 1)
    assert any(line == "32 devices with fsdp=32 hold it" for line in said)
    assert not any("makes room, " in line or "more" in line.split() for line in said)


def test_layers_that_are_split_count():
    # 32 GB over tensor=2 are 16; over fsdp=2 besides they are 8 and leave room for 4 of parameters and 3 GB
    program = too_large(19 * 10**9, state=12 * 10**9, whole=24 * 10**9, gradients=8 * 10**9)
    said = plan.remedies(program, 1, tensor=2)
    assert any(line.startswith("fsdp=2 instead of 1 makes room, 7.5 GiB") for line in said)


def test_a_table_and_a_record_have_all_programs():
    programs = {"training step": program(), "sampler": too_large(22 * 10**9)}
    planned = plan.Plan("some_experiment", SLICE, programs, fsdp=1)
    table = plan.table(planned)
    for words in (
        "some_experiment on v0:4x2: 8 chip(s) of 16.0 GiB and 100 TFLOP/s", "fits ", "NO", "1 all-reduce", "bound by",
        "compute", "estimate: rows a second", "sampler does not fit: it needs 20.5 GiB of 14.9 GiB",
        "Compiled, not run", "20% to 60%",
    ):  # fmt: skip
        assert words in table
    found = json.loads(plan.record(planned))
    assert found["programs"]["training step"]["roofline"]["bound"] == "compute"
    assert found["programs"]["training step"]["reading"]["collectives"][0]["bytes"] == 2 * 10**9
    assert found["programs"]["sampler"]["fits"] is False
    assert found["programs"]["sampler"]["remedies"]
