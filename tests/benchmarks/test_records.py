"""Records: written and read, compared, and put into tables and pictures."""

import dataclasses
import json

import pytest
from PIL import Image

from benchmarks import compare, record, report
from benchmarks.__main__ import main
from benchmarks.record import Context, Record
from benchmarks.statistics import median_interval

CONTEXT = Context(
    device="a chip", devices=1, threads=2, versions={"jax": "1"}, flags={}, commit="abc", python="3.11", load=(0.0, 0.1),
    time="2026-01-01T00:00:00",
)  # fmt: skip


def made(seconds, side="jaxgen", case="one", **fields):
    median, low, high = median_interval(seconds)
    return Record(
        suite="s", case=case, side=side, settings={"batch": 4}, config=record.digest("s", case), unit="images", batch=4,
        phases={"first": 1.0}, seconds=tuple(seconds), p50=median, p90=max(seconds), p99=max(seconds), low=low, high=high,
        per_second=4 / median, **{"context": CONTEXT, **fields},
    )  # fmt: skip


SLOW, FAST = made([2.0, 2.1, 2.2, 2.1, 2.0]), made([1.0, 1.1, 1.0, 1.2, 1.1])


def test_written_and_read(tmp_path):
    file = tmp_path / "new" / "s.jsonl"
    peer = dataclasses.replace(SLOW, side="peer", ratio=2.0, ratio_low=1.9, ratio_high=2.1)
    for one in (SLOW, peer, FAST):
        record.append(file, one)
    assert record.read(file) == [FAST, peer]  # the newest of each
    assert record.read(file.parent) == [FAST, peer]
    assert len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "s.jsonl:1 is no record"), ('{"schema": 0}', "schema 0"), ('{"schema": 1}', "is no record")],
)
def test_what_is_no_record(text, message, tmp_path):
    (tmp_path / "s.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        record.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        record.read(tmp_path / "nowhere")


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.append(tmp_path / "s.jsonl", dataclasses.replace(FAST, utilisation=float("nan")))


@pytest.mark.parametrize(("after", "status", "verdict"), [(SLOW, 1, "slower"), (FAST, 0, "same")])
def test_compare_ends_with_one_where_it_is_slower(after, status, verdict, tmp_path, capsys):
    record.append(tmp_path / "a.jsonl", FAST)
    record.append(tmp_path / "b.jsonl", after)
    assert main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == status
    assert verdict in capsys.readouterr().out
    assert compare.changes([SLOW], [FAST])[0].verdict == "faster"


def test_intervals_that_meet_are_no_regression():
    noisy = made([1.0, 1.1, 1.2, 1.3, 1.4])
    assert noisy.p50 > FAST.p50
    assert compare.changes([FAST], [noisy])[0].verdict == "same"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dataclasses.replace(FAST, kind="estimate"), "one number is measured, the other estimate"),
        (dataclasses.replace(FAST, context=dataclasses.replace(CONTEXT, threads=1)), "other circumstances"),
        (
            dataclasses.replace(FAST, context=dataclasses.replace(CONTEXT, flags={"XLA_FLAGS": "x"})),
            "other circumstances",
        ),
        (dataclasses.replace(FAST, side="another"), "no side of a case in common"),
    ],
)
def test_what_is_not_compared(other, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        compare.changes([FAST], [other])
    record.append(tmp_path / "a.jsonl", FAST)
    record.append(tmp_path / "b.jsonl", other)
    assert main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 2


def test_tables_and_pictures(tmp_path, capsys):
    peer = dataclasses.replace(SLOW, side="peer", ratio=2.0, ratio_low=1.9, ratio_high=2.1, peak_bytes=3 * 2**20)
    for one in (FAST, peer, made([0.5], case="two", quality={"relative_error": 0.0125})):
        record.append(tmp_path / "s.jsonl", one)
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| one | peer | 1.905 images | 2100 |" in printed
    assert "| 2.00 (1.90 to 2.10) |" in printed
    assert "| memory, MiB | relative error |" in printed
    assert "|  | 0.0125 |\n" in printed
    assert "| 3 |  |\n" in printed
    assert "a chip, 2 threads, commit abc; jax 1." in printed
    with Image.open(tmp_path / "s.png") as image:
        assert min(image.size) > 100


def test_estimates_are_not_mixed_with_measurements(tmp_path, capsys):
    record.append(tmp_path / "s.jsonl", FAST)
    record.append(tmp_path / "s.jsonl", dataclasses.replace(FAST, kind="estimate"))
    assert main(["report", str(tmp_path)]) == 2
    assert "some of the numbers are measured and some are estimates" in capsys.readouterr().err
    assert not (tmp_path / "s.png").exists()
    with pytest.raises(ValueError, match="there are no records"):
        report.table([])


def test_the_context_names_what_is_there():
    assert record.versions()["jax"]
    assert json.dumps(record.flags())
    assert record.processor()
