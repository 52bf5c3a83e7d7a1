"""Has it become slower? ``python -m benchmarks compare BEFORE AFTER``."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.record import Record


class Change(NamedTuple):
    """A side of a case, before and after.

    Attributes:
        before: its record.
        after: likewise.
        verdict: "slower" or "faster" if the intervals of the medians do not meet, else "same".
    """

    before: Record
    after: Record
    verdict: str


def changes(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """What both have, compared.

    Raises:
        ValueError: they have nothing in common, a number of one is measured and of the other an estimate, or the
            machine, its threads or the compilers' flags are others.
    """
    older = {record.key: record for record in before}
    found = []
    for new in after:
        old = older.get(new.key)
        if old is None:
            continue
        place = f"{new.case}, {new.side}"
        if old.kind != new.kind:
            raise ValueError(f"{place}: one number is {old.kind}, the other {new.kind}")
        if old.context.comparable() != new.context.comparable():
            raise ValueError(
                f"{place}: other circumstances: {old.context.comparable()} before, {new.context.comparable()} after"
            )
        verdict = "slower" if new.low > old.high else "faster" if new.high < old.low else "same"
        found.append(Change(old, new, verdict))
    if not found:
        raise ValueError("the two have no side of a case in common")
    return found


def table(found: Sequence[Change]) -> str:
    """The changes, a line each."""
    lines = [f"{'case':36}{'side':18}{'before':>12}{'after':>12}{'ratio':>8}  verdict"]
    lines += [
        f"{old.case:36}{old.side:18}{1e3 * old.p50:>9.1f} ms{1e3 * new.p50:>9.1f} ms{new.p50 / old.p50:>8.2f}  "
        + verdict
        for old, new, verdict in found
    ]
    return "\n".join(lines)
