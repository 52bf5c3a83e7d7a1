"""Records as tables and pictures: ``python -m benchmarks report results/``."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.record import Record


def table(records: Sequence[Record]) -> str:
    """Markdown, a row for each side of each case.

    Raises:
        ValueError: some are measured and some are estimates.
    """
    _one_kind(records)
    scores = list(dict.fromkeys(name for r in records for name in r.quality))
    columns = [
        "case", "side", "a second", "p50, ms", "with 95 %", "p90", "p99", "time : the first's", "of peak",
        "memory, MiB",
        *(name.replace("_", " ") for name in scores),
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [
        f"| {r.case} | {r.side} | {r.per_second:.4g} {r.unit} | {r.p50 * 1e3:.4g} "
        f"| {r.low * 1e3:.4g} to {r.high * 1e3:.4g} | {r.p90 * 1e3:.4g} | {r.p99 * 1e3:.4g} | {_ratio(r)} "
        f"| {_percent(r.utilisation)} | {_mebibytes(r.peak_bytes)} |"
        + "".join(f" {_score(r, name)} |" for name in scores)
        for r in records
    ]
    context = records[0].context
    versions = ", ".join(f"{name} {version}" for name, version in context.versions.items())
    lines += ["", f"{context.device}, {context.threads} threads, commit {context.commit or 'unknown'}; {versions}."]
    return "\n".join(lines)


def plot(path: Path, records: Sequence[Record]) -> None:
    """Bars of units per second, a panel for each case.

    Raises:
        ValueError: some are measured and some are estimates.
    """
    from matplotlib.figure import Figure

    from jaxgen.images import save_figure

    _one_kind(records)
    cases = [(name, list(group)) for name, group in groupby(records, key=lambda r: r.case)]
    rows = sum(len(group) for _, group in cases)
    figure = Figure(figsize=(7, 0.9 * len(cases) + 0.35 * rows), layout="constrained")
    heights = [len(group) for _, group in cases]
    panels = figure.subplots(len(cases), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, group) in zip(panels, cases, strict=True):
        middle = [r.per_second for r in group]
        spread = [
            [r.per_second - r.batch / r.high for r in group],
            [r.batch / r.low - r.per_second for r in group],
        ]
        colours = ["C0" if r.ratio is None else "0.7" for r in group]
        axes.barh([r.side for r in group], middle, xerr=spread, color=colours)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel(f"{group[0].unit} a second", fontsize=8)
        axes.tick_params(labelsize=8)
    save_figure(path, figure)


def line(r: Record) -> str:
    """A record in one line, as it is measured."""
    ratio = "" if r.ratio is None else f"  {_ratio(r)} x the first's time"
    return f"{r.case:36}{r.side:18}{r.p50 * 1e3:>10.1f} ms {r.per_second:>10.4g} {r.unit}/s{ratio}"


def _one_kind(records: Sequence[Record]) -> None:
    if not records:
        raise ValueError("there are no records")
    if len({r.kind for r in records}) > 1:
        raise ValueError("some of the numbers are measured and some are estimates: they do not go into one table")


def _ratio(r: Record) -> str:
    return "" if r.ratio is None else f"{r.ratio:.2f} ({r.ratio_low:.2f} to {r.ratio_high:.2f})"


def _score(r: Record, name: str) -> str:
    return f"{r.quality[name]:.3g}" if name in r.quality else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"
