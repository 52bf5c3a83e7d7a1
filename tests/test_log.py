"""The log: whole JSON lines up to the step a run goes on from, and progress as terminals and files want it."""

import io
import json
import math
import types

import pytest

from jaxgen import log
from jaxgen.log import Log


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """What is to be seen: a carriage return goes back to the start of a line, and erases nothing."""
        lines = []
        for written in self.getvalue().split("\n"):
            line = ""
            for part in written.split("\r"):
                line = part + line[len(part) :]
            lines.append(line.rstrip())
        return lines


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until ``now`` is set."""
    clock = types.SimpleNamespace(now=1000.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(log, "time", clock)
    return clock


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_are_json(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"
    records = Log(path, out=io.StringIO())
    records.begin(0, 10, batch=3)
    clock.now += 4
    records.metrics(2, {"loss": 0.1, "count": 7})
    records.record(2, {"solver": "heun", "shape": [8, 8]})
    records.record(3, {"loss": math.nan, "low": -math.inf, "high": math.inf})
    assert lines(path) == [
        {"step": 2, "loss": 0.1, "count": 7, "examples_per_second": 1.5},
        {"step": 2, "solver": "heun", "shape": [8, 8]},
        {"step": 3, "loss": None, "low": None, "high": None},
    ]


@pytest.mark.parametrize(("value", "error"), [([1.0, math.nan], ValueError), (print, TypeError)])
def test_what_json_cannot_hold_leaves_no_line(tmp_path, value, error):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(error, match="JSON"):
        Log(path, out=io.StringIO()).record(1, {"value": value})
    assert not path.exists()


def test_a_resumed_run_drops_later_lines_and_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 5, "loss": 1.0}', '{"step": 10, "loss": null}']
    dropped = ['{"step": 15, "loss": 0.5}', '{"loss": 1.0}', '{"step": null}', '["step"]', "12", '{"step": 9, "lo']
    path.write_bytes("\n".join(kept[:1] + dropped[:1] + kept[1:] + dropped[1:]).encode() + b"\0\xff")
    records = Log(path, out=io.StringIO())
    records.begin(10, 20, batch=1)
    assert path.read_text().splitlines() == kept
    records.record(15, {"loss": 0.25})
    assert lines(path) == [*map(json.loads, kept), {"step": 15, "loss": 0.25}]
    records.begin(0, 20, batch=1)
    assert path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}')
    records = Log(path, out=io.StringIO())
    records.begin(5, 20, batch=1)
    records.record(6, {})
    assert lines(path) == [{"step": 5}, {"step": 6}]


def test_a_terminal_gets_one_live_line_and_what_is_said_below_it(clock):
    out = Terminal()
    records = Log(None, out=out)
    records.say("digits")
    records.begin(100, 300, batch=64)
    clock.now += 10
    records.metrics(200, {"loss": 0.123456, "norm": 1234.5})
    assert out.screen() == ["digits", "step 200/300  loss 0.1235 norm 1234  640 images/s  0:10 left"]
    clock.now += 1
    records.metrics(210, {"loss": 0.1})  # shorter: nothing of the longer line stays
    live = "step 210/300  loss 0.1  640 images/s  0:09 left"
    assert out.screen() == ["digits", live]
    records.say("saved")
    records.say("twice")
    assert out.screen() == ["digits", live, "saved", "twice", ""]
    records.metrics(300, {})
    assert out.screen()[-2:] == ["twice", "step 300/300    1164 images/s  0:00 left"]


def test_a_file_gets_plain_lines_now_and_then_and_the_last_step(clock):
    out = io.StringIO()
    records = Log(None, out=out)
    records.begin(0, 100, batch=1)
    for step in (1, 50, 99, 100):
        clock.now += {1: 1, 50: 9.9, 99: 0.1, 100: 1}[step]
        records.metrics(step, {"loss": 1.0})
    records.say("done")
    assert "\r" not in out.getvalue()
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == [
        "step 1/100", "step 99/100", "step 100/100", "done",
    ]  # fmt: skip


def test_speed_and_time_left_count_training_alone(tmp_path, clock):
    out = Terminal()
    records = Log(tmp_path / "metrics.jsonl", out=out)
    records.begin(40, 100, batch=8)
    clock.now += 5 + 3600  # five seconds of training, an hour of drawing
    records.aside(3600)
    records.metrics(50, {})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 50, "examples_per_second": 16.0}]
    assert out.screen() == ["step 50/100    16 images/s  0:25 left"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.6, "1:00:00"), (3661, "1:01:01"), (100 * 3600, "100:00:00")],
)
def test_time_left_reads_as_a_clock(clock, seconds, shown):
    out = Terminal()
    records = Log(None, out=out)
    records.begin(0, 2, batch=1)
    clock.now += seconds
    records.metrics(1, {})  # the second half takes as long as the first
    assert out.screen()[0].endswith(f"  {shown} left")


def test_before_the_first_step_nobody_knows_the_time_left(clock):
    out = Terminal()
    records = Log(None, out=out)
    records.begin(7, 10, batch=1)
    records.metrics(7, {})
    assert out.screen() == ["step 7/10    0 images/s  ? left"]


def test_output_goes_to_standard_output_unless_told(capsys):
    Log(None).say("hello")
    assert capsys.readouterr().out == "hello\n"
