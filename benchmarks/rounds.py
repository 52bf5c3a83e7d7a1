"""Sides of a case take turns, one run each, and a result that cannot be trusted is refused instead of reported.

Refused is what would be a lie:

    a side bound to other cores than it was told, or that uses another number of threads than the others      (1)
    outputs that are not finite, or that differ between sides: other work                                     (2)
    a program compiled in the time that is measured                                                           (3)
    time that does not grow with the batch: work that nobody waited for, or that was optimised away           (4)
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.case import Case
from benchmarks.record import Context, Record
from benchmarks.statistics import median_interval, quantile

LEAST = 5  # rounds, whatever the budget
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # variables that libraries read
LONG = 1.0  # seconds: a run that noise does not make a third longer
GROWTH = 1.3  # of the time, at the least, somewhere between twice and 64 times the batch


class RefusedError(Exception):
    """A number that would be a lie."""


class Process:
    """A side's process, from which one line comes back for each that is sent."""

    def __init__(self, module: str, case: str, side: str, *, threads: int, quick: bool, file: Path) -> None:
        variables = dict.fromkeys(THREADS, str(threads))
        words = [module, case, side, str(threads), "quick" if quick else "full", str(file)]
        self.name = side
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.side", *words],
            env={**os.environ, **variables}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()  # it has closed its end, but may not have said why yet
            raise RefusedError(f"{self.name} ended: see what it printed above")
        told: dict[str, Any] = json.loads(line)
        return told

    def ask(self, **order: Any) -> dict[str, Any]:
        """Tells it what to do and waits for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.communicate()


def named(names: Sequence[str], word: str, alike: Callable[[str, str], bool]) -> list[str]:
    """The one that is called so; if there is none, those that are alike."""
    return [word] if word in names else [name for name in names if alike(name, word)]


def sides_of(case: Case, against: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """The first side, and those that ``against`` names, or whose names begin so; all where it is None.

    Returns:
        Sides that can run, and of the others the library that is missing.
    """
    first, *others = case.sides
    peers = others if against is None else [name for word in against for name in named(others, word, str.startswith)]
    wanted = list(dict.fromkeys([first, *peers]))
    missing = {}
    for name in wanted:
        absent = [library for library in case.libraries.get(name, ()) if importlib.util.find_spec(library) is None]
        if absent:
            missing[name] = absent[0]
    return [name for name in wanted if name not in missing], missing


def present(case: Case, against: list[str] | None) -> list[str]:
    """The sides that can run; which ones are left out, and why, is said."""
    sides, missing = sides_of(case, against)
    for name, library in missing.items():
        print(f"{case.name:36}{name:18}left out: {library} is not installed", flush=True)
    return sides


def measure(
    suite: str,
    module: str,
    case: Case,
    sides: Sequence[str],
    *,
    threads: int,
    repeats: int,
    budget: float,
    quick: bool = False,
) -> list[Record]:
    """Measures a case.

    Args:
        suite: the benchmark's name.
        module: the module that has it, as ``cases(quick)``.
        case: the case.
        sides: those that take part; the others are compared with the first.
        threads: cores of each side.
        repeats: rounds, at most.
        budget: seconds that all of them may take together; five rounds are made in any case.
        quick: what ``cases`` was called with.

    Returns:
        A record for each side.

    Raises:
        RefusedError: what was measured cannot be trusted.
    """
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        files = {name: Path(folder) / f"{number}.npy" for number, name in enumerate(sides)}
        processes, told = {}, {}
        for name in sides:  # one after the other: compilers are not to meet
            processes[name] = Process(module, case.name, name, threads=threads, quick=quick, file=files[name])
            running.callback(processes[name].close)
            told[name] = processes[name].answer()
        check_threads(told, threads)
        alike = check_outputs({name: np.load(file) for name, file in files.items()}, case)
        seconds = take_turns(processes, repeats=repeats, budget=budget)
        for name, process in processes.items():
            usual = quantile(seconds[name], 0.5)
            check_growth(name, usual, grown(process, times=3 if usual < LONG else 1))
        ends = {name: process.ask(do="end") for name, process in processes.items()}
    for name, end in ends.items():
        if not end["finite"]:
            raise RefusedError(f"{name}: outputs are not finite")
    loads = load_before, os.getloadavg()[0]
    return records_of(suite, case, seconds, told, ends, alike, threads=threads, loads=loads)


def take_turns(processes: Mapping[str, Process], *, repeats: int, budget: float) -> dict[str, list[float]]:
    """Seconds of every run of every side; who begins a round changes with each.

    Raises:
        RefusedError: a side compiled while its time was taken.
    """
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for order in turns(list(processes), repeats=repeats, budget=budget):
        for name in order:
            answer = processes[name].ask(do="run")
            if answer["compilations"]:
                raise RefusedError(f"{name}: {answer['compilations']} programs compiled in a run that was timed")
            seconds[name].append(answer["seconds"])
    return seconds


def turns(names: Sequence[str], *, repeats: int, budget: float) -> Iterator[list[str]]:
    """The order of sides in each round, until the budget's seconds are over; who begins changes with each.

    Args:
        names: of the sides.
        repeats: rounds, at most.
        budget: seconds that all of them may take together; five rounds are made in any case.
    """
    start = time.perf_counter()
    for number in range(repeats):
        if number >= LEAST and time.perf_counter() - start > budget:
            return
        first = number % len(names)
        yield [*names[first:], *names[:first]]


def grown(process: Process, *, times: int) -> Iterator[tuple[int, float]]:
    """Seconds at 2, 4, ... 64 times the batch, each when it is asked for."""
    for power in range(1, 7):
        yield 2**power, process.ask(do="grow", factor=2**power, times=times)["seconds"]


def check_growth(name: str, seconds: float, larger: Iterator[tuple[int, float]]) -> None:
    """Raises RefusedError if no larger batch takes longer."""
    seen = []
    for factor, longer in larger:
        if longer > GROWTH * seconds:
            return
        seen.append(f"{factor} x the batch {longer:.3g} s")
    raise RefusedError(f"{name}: time does not grow with the batch: {seconds:.3g} s, {', '.join(seen)}")


def check_threads(told: Mapping[str, Mapping[str, Any]], threads: int) -> None:
    """Raises RefusedError if a side has other cores or threads than it was told."""
    for name, one in told.items():
        for what in ("cores", "torch_threads"):
            if one.get(what) is not None and one[what] != threads:
                raise RefusedError(f"{name}: `{what}` must be {threads} as for all sides, got {one[what]}")
    devices = {name: one["device"] for name, one in told.items()}
    if len(set(devices.values())) > 1:
        raise RefusedError(f"sides are on different devices: {devices}")


def check_outputs(outputs: Mapping[str, np.ndarray], case: Case) -> dict[str, float]:
    """The share of numbers that agree with the first side's.

    Raises:
        RefusedError: an output is not finite, has another shape, or agrees in too few.
    """
    names = list(outputs)
    ours = outputs[names[0]]
    shares = {}
    for name, output in outputs.items():
        if not np.isfinite(output).all():
            raise RefusedError(f"{name}: outputs are not finite")
        if output.shape != ours.shape:
            raise RefusedError(f"{name}: outputs of shape {output.shape}, but {ours.shape} of {names[0]}")
        close = np.abs(output - ours) <= case.tolerance * np.sqrt(np.mean(np.square(ours)))
        shares[name] = float(close.mean())
        if shares[name] < case.alike:
            raise RefusedError(
                f"{name}: only {shares[name]:.2%} of its output agree with {names[0]}'s to {case.tolerance:g}, "
                f"{case.alike:.0%} have to: it does other work"
            )
    return shares


def context_of(told: Mapping[str, Any], threads: int, loads: tuple[float, float]) -> Context:
    """The circumstances of a side."""
    return Context(
        device=told["device"],
        devices=told["devices"],
        threads=threads,
        versions=record.versions(),
        flags=record.flags(),
        commit=record.commit(),
        python=platform.python_version(),
        load=loads,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def records_of(
    suite: str,
    case: Case,
    seconds: Mapping[str, Sequence[float]],
    told: Mapping[str, Mapping[str, Any]],
    ends: Mapping[str, Mapping[str, Any]],
    alike: Mapping[str, float],
    *,
    threads: int,
    loads: tuple[float, float],
) -> list[Record]:
    """What was measured, a record for each side.

    Args:
        suite: the benchmark's name.
        case: the case.
        seconds: by side, the first one's first: of every run, those of one round in one place.
        told: by side, what it said when it was ready (`benchmarks.side`); what is missing is unknown.
        ends: by side, what it said at its end; likewise.
        alike: from `check_outputs`.
        threads: cores of each side.
        loads: of the machine, before and after.
    """
    first, *_ = seconds
    flops = None if case.flops is None else case.flops() * case.batch
    records = []
    for name, runs in seconds.items():
        median, low, high = median_interval(runs)
        peak = ends[name].get("peak_flops")
        one = Record(
            suite=suite,
            case=case.name,
            side=name,
            settings=dict(case.settings),
            config=record.digest(suite, case.name, dict(case.settings), case.batch),
            unit=case.unit,
            batch=case.batch,
            phases=told[name]["phases"],
            seconds=tuple(runs),
            p50=median,
            p90=quantile(runs, 0.9),
            p99=quantile(runs, 0.99),
            low=low,
            high=high,
            per_second=case.batch / median,
            context=context_of(told[name], threads, loads),
            flops=flops,
            compiler_flops=told[name].get("flops"),
            peak_flops=peak,
            utilisation=None if flops is None or peak is None else flops / median / peak,
            peak_bytes=ends[name].get("peak_bytes"),
            temporary_bytes=told[name].get("temporary_bytes"),
            quality=told[name].get("quality", {}),
        )
        if name != first:
            ratio, least, most = median_interval([b / a for a, b in zip(seconds[first], runs, strict=True)])
            one = dataclasses.replace(one, ratio=ratio, ratio_low=least, ratio_high=most, alike=alike[name])
        records.append(one)
    return records
