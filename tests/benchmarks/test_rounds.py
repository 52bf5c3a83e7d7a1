"""Measuring: turns and their numbers, and each kind of lie refused."""

import os

import numpy as np
import pytest

from benchmarks import rounds
from tests.benchmarks import liars

MODULE = "tests.benchmarks.liars"
(CASE,) = liars.cases(quick=False)


def measured(*sides, **options):
    return rounds.measure("liars", MODULE, CASE, sides, **{"threads": 1, "repeats": 8, "budget": 60.0, **options})


@pytest.fixture(scope="module")
def honest():
    return measured("honest", "slower")


def test_what_is_measured(honest):
    ours, theirs = honest
    assert (ours.side, theirs.side) == ("honest", "slower")
    assert len(ours.seconds) == len(theirs.seconds) == 8
    assert ours.p50 >= 0.004  # two of 2 ms, and of 6
    assert theirs.p50 >= 0.012
    assert theirs.ratio == np.median(np.divide(theirs.seconds, ours.seconds))
    assert theirs.ratio_low <= theirs.ratio <= theirs.ratio_high
    assert ours.ratio is None
    assert theirs.alike == 1.0
    assert ours.low <= ours.p50 <= ours.high
    assert ours.p50 <= ours.p90 <= ours.p99 <= max(ours.seconds)
    assert ours.per_second == pytest.approx(2 / ours.p50)
    assert ours.flops == 20.0
    assert (ours.quality, theirs.quality) == ({"largest": 1.0}, {})
    assert ours.peak_flops is None  # of a side that is not JAX's
    assert ours.phases.keys() == {"import", "build", "first"}
    assert ours.context.threads == 1
    assert ours.config == theirs.config


def test_the_budget_ends_it_but_not_before_five_rounds():
    (ours,) = measured("honest", repeats=30, budget=0.0)
    assert len(ours.seconds) == rounds.LEAST


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        ("at once", "at once: time does not grow with the batch.*64 x the batch"),
        ("not finite", "not finite: outputs are not finite"),
        ("not finite later", "not finite later: outputs are not finite"),
        ("other work", "only 0.00% of its output agree with honest's"),
        ("other shape", r"outputs of shape \(49,\), but \(50,\) of honest"),
        ("compiling", r"compiling: [1-9]\d* programs compiled in a run that was timed"),
        ("leaving", "leaving ended"),
    ],
)
def test_refused(side, reason, capfd):
    with pytest.raises(rounds.RefusedError, match=reason):
        measured("honest", side, repeats=5)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_more_cores_than_told_are_refused():
    with pytest.raises(rounds.RefusedError, match="on all cores: `cores` must be 1"):
        measured("honest", "on all cores")


def test_threads_and_devices_of_all_sides_are_the_same():
    side = {"device": "a", "cores": 2, "torch_threads": 2}
    rounds.check_threads({"ours": {"device": "a", "cores": 2}, "theirs": side}, 2)
    with pytest.raises(rounds.RefusedError, match="theirs: `torch_threads` must be 2 as for all sides, got 1"):
        rounds.check_threads({"theirs": {**side, "torch_threads": 1}}, 2)
    with pytest.raises(rounds.RefusedError, match="different devices"):
        rounds.check_threads({"ours": side, "theirs": {**side, "device": "b"}}, 2)


def test_growth_is_looked_for_until_it_is_seen():
    asked = []

    def larger():
        for factor in (2, 4, 8):
            asked.append(factor)
            yield factor, 1.0 if factor < 4 else 2.0

    rounds.check_growth("side", 1.0, larger())
    assert asked == [2, 4]


def test_agreement_is_a_share():
    ours = np.array([1.0, -1.0, 1.0, -1.0])
    found = rounds.check_outputs(
        {"a": ours, "b": ours + np.array([0, 0, 0, 0.5])}, liars.Case("c", {}, {}, 1, alike=0.75)
    )
    assert found == {"a": 1.0, "b": 0.75}


def test_who_begins_changes_with_each_round():
    order = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def ask(self, **_):
            order.append(self.name)
            return {"seconds": 1.0, "compilations": 0}

    found = rounds.take_turns({name: Noted(name) for name in "abc"}, repeats=4, budget=60.0)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert found == {name: [1.0] * 4 for name in "abc"}


@pytest.mark.parametrize(
    ("against", "sides"),
    [
        (None, ["ours", "peer", "peer-compiled", "other"]),
        ([], ["ours"]),
        (["peer"], ["ours", "peer"]),
        (["peer-c", "other"], ["ours", "peer-compiled", "other"]),
        (["p", "peer"], ["ours", "peer", "peer-compiled"]),
    ],
)
def test_who_is_named(against, sides):
    case = liars.Case("c", {}, dict.fromkeys(["ours", "peer", "peer-compiled", "other"], liars.sleeping), 1)
    assert rounds.sides_of(case, against) == (sides, {})


def test_who_is_not_installed():
    case = liars.Case("c", {}, dict.fromkeys(["ours", "peer"]), 1, libraries={"peer": ("numpy", "no_such_library")})
    assert rounds.sides_of(case, None) == (["ours"], {"peer": "no_such_library"})


def test_memory_is_that_of_the_case_and_not_of_larger_batches():
    (one,) = measured("large", repeats=5)
    assert 14 * 2**20 < one.peak_bytes < 26 * 2**20  # two examples, of 8 MiB; growth has had 32 at least


def test_why_a_side_ended_is_seen(capfd):
    with pytest.raises(rounds.RefusedError, match="failing ended"):
        measured("failing")
    assert "ValueError: of all things" in capfd.readouterr().err
