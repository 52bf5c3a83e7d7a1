"""How long a program takes at least, and an estimate of how long it will.

A device computes, reads its memory and talks to its neighbours at the same time, so that a program takes no less than
the longest of the three (Williams et al. 2009, Roofline: an insightful visual performance model):

    seconds >= max(operations / peak, bytes of memory / bandwidth, bytes moved / interconnect)               (1)

The bytes of memory are read from the program, about: where memory binds, this is an estimate and no bound. Real
programs reach a part of that speed. That it is a fifth to three fifths is an assumption here, no measurement.
"""

from typing import NamedTuple

from jaxgen.plan.program import Program
from jaxgen.plan.topology import Topology

EFFICIENCY = (0.2, 0.6)
"""Parts of the roofline that are assumed to be reached, at least and at most."""


class Roofline(NamedTuple):
    """The three terms of Eq. 1 in seconds; the third is None for several slices, whose network is not modelled.

    Attributes:
        compute: for the operations.
        memory: for the memory traffic, which `hlo.read` gives an upper bound of.
        interconnect: for the collectives.
    """

    compute: float
    memory: float
    interconnect: float | None

    @property
    def seconds(self) -> float:
        """Eq. 1."""
        return max(self.compute, self.memory, self.interconnect or 0.0)

    @property
    def bound(self) -> str:
        """The largest term's name."""
        return max(self._fields, key=lambda name: getattr(self, name) or 0.0)


class Estimate(NamedTuple):
    """What a program may reach, as (least, most); estimates, not measurements.

    Attributes:
        seconds: of a run of the program.
        per_second: rows, such as images.
        dollars: of a million rows at the chips' list prices; None where none is known.
    """

    seconds: tuple[float, float]
    per_second: tuple[float, float]
    dollars: tuple[float, float] | None


def roofline(program: Program, topology: Topology) -> Roofline | None:
    """The time that a run of a program needs for its operations, its memory traffic and its collectives.

    Args:
        program: compiled for the devices of ``topology``.
        topology: whose chips' published numbers count.

    Returns:
        The terms of Eq. 1; None for a program that does not fit.
    """
    if program.reading is None:
        return None
    chip = topology.chip
    moved = sum(each.moved for each in program.reading.collectives)
    compute = program.flops / (topology.chips * chip.flops)
    memory = program.reading.traffic * chip.cores / chip.bandwidth
    if topology.slices > 1 and moved:
        return Roofline(compute, memory, None)
    # Cores of one chip share its links.
    return Roofline(compute, memory, moved * chip.cores / topology.interconnect if topology.interconnect else 0.0)


def estimate(roof: Roofline, topology: Topology, *, rows: int) -> Estimate:
    """What a program may reach if `EFFICIENCY` is true of it.

    Args:
        roof: from `roofline`.
        topology: whose list prices count.
        rows: of a run of the program, such as images.
    """
    least, most = EFFICIENCY
    seconds = (roof.seconds / most, roof.seconds / least)
    per_second = (rows / seconds[1], rows / seconds[0])
    dollars = None
    if topology.chip.dollars is not None:
        cheap, dear = (hourly * topology.chips / 3600 * 1e6 for hourly in topology.chip.dollars)
        dollars = (cheap / per_second[1], dear / per_second[0])
    return Estimate(seconds, per_second, dollars)
