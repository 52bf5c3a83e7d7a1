"""The benchmarks' command line.

    python -m benchmarks                                    lists them and their cases
    python -m benchmarks sampling --against diffusers       measures one, beside sides that are called or begin so
    python -m benchmarks compare BEFORE AFTER               ends with 1 if a side has become slower
    python -m benchmarks report results/                    tables and pictures of what was measured

Every measurement is a line in results/NAME.jsonl. What cannot be trusted is refused: the reason is printed instead of a
number, and the command ends with 1.
"""

import argparse
import importlib
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import compare, record, report, rounds
from benchmarks.case import Case

SUITES = {  # name: module, purpose
    "sampling": ("sampling", "images a second and latency, by network, solver, steps, batch and precision"),
    "training": ("training", "steps of diffusion, GAN, contrastive and adversarial training"),
    "attacks": ("attacks", "adversarial examples: images a second, many radii in one program"),
    "contrastive": ("contrastive", "the contrastive loss and its gradient: pairs a second, memory"),
    "frechet": ("frechet", "the Fréchet distance: seconds, and how much of the result is wrong"),
    "data": ("pipeline", "the input pipeline alone: images a second, nothing on a device"),
    "compile": ("compilation", "from a process's start to its first image: import, trace, lower, compile, run"),
    "quality": ("quality", "what samples are worth, by solver, evaluations and time"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["compare"]:
        return _compare(words[1:])
    if words[:1] == ["report"]:
        return _report(words[1:])
    return _measure(words)


def _measure(words: list[str]) -> int:
    parser = argparse.ArgumentParser("benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", nargs="?", choices=SUITES, help="which benchmark; none to list all")
    parser.add_argument("--against", nargs="*", default=None, metavar="PEER", help="sides beside jaxgen; default: all")
    parser.add_argument("--case", default="", help="the case of this name, or those that hold it")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder that the records are added to")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores of each side")
    parser.add_argument("--repeats", type=int, default=30, help="rounds, at most")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for a case's rounds; five are made anyway")
    parser.add_argument("--run", type=Path, help="quality: directory of a run of digits_diffusion; trained if need be")
    parser.add_argument("--quick", action="store_true", help="toy sizes: to see that it works, not to quote")
    options = parser.parse_args(words)
    for field in ("threads", "repeats", "budget"):
        if getattr(options, field) <= 0:
            parser.error(f"--{field} must be above 0, got {getattr(options, field)}")
    if options.threads > (os.cpu_count() or 1):
        parser.error(f"--threads must be at most the machine's {os.cpu_count()}, got {options.threads}")
    if options.name is None:
        for name, (module, purpose) in SUITES.items():
            print(f"{name}: {purpose}")
            for case in getattr(importlib.import_module(f"benchmarks.{module}"), "cases", no_cases)(options.quick):
                print(f"    {case.name:36}{' '.join(case.sides)}")
        return 0
    module = f"benchmarks.{SUITES[options.name][0]}"
    suite = importlib.import_module(module)
    if hasattr(suite, "records"):
        return _measure_itself(suite, options)
    cases = {case.name: case for case in suite.cases(options.quick)}
    wanted = [cases[name] for name in rounds.named(list(cases), options.case, str.__contains__)]
    if not wanted:
        parser.error(f"--case must be part of a case's name, got {options.case!r}")
    refused = False
    for case in wanted:
        sides = rounds.present(case, options.against)
        try:
            found = rounds.measure(
                options.name, module, case, sides, threads=options.threads, repeats=options.repeats,
                budget=options.budget, quick=options.quick,
            )  # fmt: skip
        except rounds.RefusedError as reason:
            refused = True
            print(f"{case.name:36}REFUSED: {reason}", flush=True)
            continue
        for one in found:
            record.append(options.out / f"{options.name}.jsonl", one)
            print(report.line(one), flush=True)
    return int(refused)


def _measure_itself(suite: Any, options: argparse.Namespace) -> int:
    file, found = options.out / f"{options.name}.jsonl", 0
    try:
        for found, one in enumerate(suite.records(options), 1):  # noqa: B007 - how many there were
            record.append(file, one)
            print(report.line(one), flush=True)
    except rounds.RefusedError as reason:
        print(f"REFUSED: {reason}", flush=True)
        return 1
    if not found:
        print(f"--case must be part of a case's name, got {options.case!r}", file=sys.stderr)
        return 2
    if hasattr(suite, "plot"):
        suite.plot(file.with_suffix(".png"), record.read(file))
    return 0


def no_cases(quick: bool) -> list[Case]:
    """Of a suite that measures by itself."""
    return []


def _compare(words: list[str]) -> int:
    parser = argparse.ArgumentParser("benchmarks compare", description=compare.__doc__)
    parser.add_argument("before", type=Path, help="a file of records, or a folder of such")
    parser.add_argument("after", type=Path, help="likewise")
    options = parser.parse_args(words)
    try:
        found = compare.changes(record.read(options.before), record.read(options.after))
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(compare.table(found))
    return int(any(change.verdict == "slower" for change in found))


def _report(words: list[str]) -> int:
    parser = argparse.ArgumentParser("benchmarks report", description=report.__doc__)
    parser.add_argument("folder", type=Path, help="of records; pictures are written beside them")
    options = parser.parse_args(words)
    try:
        found = sorted(record.read(options.folder), key=lambda r: r.suite)
        for suite, group in groupby(found, key=lambda r: r.suite):
            records = list(group)
            print(f"## {suite}\n\n{report.table(records)}\n")
            module = importlib.import_module(f"benchmarks.{SUITES[suite][0]}") if suite in SUITES else report
            getattr(module, "plot", report.plot)(options.folder / f"{suite}.png", records)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
