"""What a compiled program does besides computing, read from its text: collectives, memory traffic, transfers, dtypes.

A program in HLO is a list of computations. What one costs is what its instructions cost and what those cost that they
call, the body of a loop as often as the loop goes round, which XLA's own cost analysis leaves out, and of a choice the
dearest branch:

    cost(computation) = sum of its instructions + sum over calls of rounds x cost(callee)               (1)

What a collective of n devices moves, per device, on links that form a ring (Chan et al. 2007, Collective communication:
theory, practice, and experience, section 4), b being the bytes of the whole:

    all-gather, reduce-scatter, all-to-all    (n - 1) / n b        all-reduce    2 (n - 1) / n b         (2)
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxgen.plan.instructions import Computations, Instruction, callees, parsed, size
from jaxgen.plan.traffic import traffic

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
TRANSFERS = ("infeed", "outfeed", "send", "recv")
BETWEEN_SLICES = "send between slices"
"""The kind of collective that a slice's hosts pass on to other slices, over the data centre's network."""


class Collective(NamedTuple):
    """All collectives of one kind in a run of a program.

    Attributes:
        kind: such as "all-reduce".
        runs: how many run.
        bytes: of their arrays on one device: of what is reduced, or of what is gathered.
        moved: bytes that each device sends, Eq. 2.
    """

    kind: str
    runs: int
    bytes: int
    moved: float


class Reading(NamedTuple):
    """What `read` finds.

    Attributes:
        collectives: by kind.
        traffic: bytes that pass between the memory and the cores of one device, about: what each instruction reads
            and writes, padded to the tiles that it lies in.
        exact: whether the rounds of all loops are known; else counts and bytes are the least they can be.
        transfers: instructions that exchange data with the host, by name.
        float64: instructions that compute in float64.
        dynamic: instructions whose shapes are not known.
        aliases: outputs that take the place of an input.
    """

    collectives: tuple[Collective, ...]
    traffic: float
    exact: bool
    transfers: tuple[str, ...]
    float64: int
    dynamic: int
    aliases: int


class _Cost(NamedTuple):
    """Of a computation, Eq. 1: traffic, (runs, bytes, moved) by kind, and whether all loops' rounds are known."""

    traffic: float
    collectives: Mapping[str, tuple[float, ...]]
    exact: bool


def read(text: str) -> Reading:
    """Reads a compiled program.

    Args:
        text: its HLO, as ``compiled.as_text()`` gives it.
    """
    computations, entry = parsed(text)
    header = text.partition("\n")[0]
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header))

    @functools.cache
    def cost_of(name: str) -> _Cost:
        return _cost(computations[name], cost_of, computations, devices)

    cost = cost_of(entry)
    everything = [each for instructions in computations.values() for each in instructions.values()]
    return Reading(
        tuple(
            Collective(kind, int(runs), int(held), moved)
            for kind, (runs, held, moved) in sorted(cost.collectives.items())
        ),
        cost.traffic,
        cost.exact,
        tuple(
            each.name
            for each in everything
            if _is_callback(each) or (each.opcode in TRANSFERS and not _is_between_slices(each))
        ),
        sum("f64[" in each.shape or "c128[" in each.shape for each in everything),
        sum("<=" in each.shape for each in everything),
        len(re.findall(r"-alias\)", header)),
    )


def _cost(
    instructions: Mapping[str, Instruction], cost_of: Callable[[str], _Cost], computations: Computations, devices: int
) -> _Cost:
    """Eq. 1."""
    total, found, exact = 0.0, dict[str, tuple[float, ...]](), True

    def add(kind: str, values: tuple[float, ...]) -> None:
        found[kind] = tuple(map(sum, zip(found.get(kind, (0, 0, 0)), values, strict=True)))

    for each in instructions.values():
        if each.opcode.endswith(("-done", "-update")):
            continue  # the same as its start
        total += traffic(each, instructions, computations)
        if (kind := each.opcode.removesuffix("-start")) in COLLECTIVES:
            add(kind, (1, *_size(each, instructions, devices)))
        if each.opcode == "send" and _is_between_slices(each):
            held = size(instructions[each.operands[0]].shape)
            add(BETWEEN_SLICES, (1, held, held))
        rounds = 1
        if each.opcode == "while":
            known = _rounds(each, computations)
            rounds, exact = known if known is not None else 1, exact and known is not None
        called = [cost_of(name) for name in callees(each) if name in computations]
        if each.opcode == "conditional" and called:
            called = [max(called, key=lambda cost: cost.traffic)]
        for cost in called:
            # What is fused, and what a reduction calls for each element, passes nothing through memory.
            total += rounds * cost.traffic * (each.opcode in {"while", "conditional", "call", "async-start"})
            exact = exact and cost.exact
            for kind, values in cost.collectives.items():
                add(kind, tuple(rounds * value for value in values))
    return _Cost(total, found, exact)


def _rounds(loop: Instruction, computations: Computations) -> int | None:
    """How often a loop goes round: as XLA says, else the number that its counter is compared with."""
    if said := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(said[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
    instructions = list(computations.get(condition[1] if condition else "", {}).values())
    inner = [i for each in instructions for callee in callees(each) for i in computations.get(callee, {}).values()]
    below = any("direction=LT" in each.attributes for each in instructions + inner)
    limits = [
        int(each.literal)
        for each in instructions + inner
        if each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.shape)
    ]
    return limits[0] if below and len(limits) == 1 else None


def _is_between_slices(each: Instruction) -> bool:
    return "xla_megascale" in each.attributes


def _is_callback(each: Instruction) -> bool:
    return each.opcode == "custom-call" and bool(
        re.search(r'custom_call_target="[^"]*(?:callback|MoveToHost|MoveToDevice)', each.attributes)
    )


def _size(each: Instruction, around: Mapping[str, Instruction], devices: int) -> tuple[int, float]:
    """The bytes of a collective's arrays on one device, and what it moves, Eq. 2."""
    given = sum(size(around[name].shape) for name in each.operands if name in around)
    kind, members = each.opcode.removesuffix("-start"), _members(each.attributes, devices)
    if kind == "all-gather":
        given *= members
    if kind in {"collective-permute", "collective-broadcast"}:
        return given, float(given)
    return given, (2 if kind == "all-reduce" else 1) * (members - 1) / members * given


def _members(attributes: str, devices: int) -> int:
    """How many devices take part in each of a collective's groups."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        lengths = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(
            int(part or lengths[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        )
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", attributes):
        return int(counted[1])
    return devices
