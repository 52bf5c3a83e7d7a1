"""What a compiled program does besides computing, read from its text: collectives, memory traffic, transfers, dtypes.

A program in HLO is a list of computations, callees before callers. An instruction runs as often as its computation is
called, and the body of a loop as often as the loop goes round, which is what XLA's own cost analysis leaves out:

    times(computation) = sum over calls of times(caller) x (the loop's rounds, or 1)                    (1)

What a collective of n devices moves, per device, on links that form a ring (Chan et al. 2007, Collective communication:
theory, practice, and experience, section 4), b being the bytes of the whole:

    all-gather, reduce-scatter, all-to-all    (n - 1) / n b        all-reduce    2 (n - 1) / n b         (2)
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
TRANSFERS = ("infeed", "outfeed", "send", "recv")

_SIZES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
# Names, layouts and tuple structure: they move nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "iota", "opt-barrier"}  # fmt: skip


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
        traffic: bytes that pass between the memory and the cores of one device, at most: what each instruction reads
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


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool


Computations = dict[str, dict[str, _Instruction]]


def read(text: str) -> Reading:
    """Reads a compiled program.

    Args:
        text: its HLO, as ``compiled.as_text()`` gives it.
    """
    computations, entry = _parsed(text)
    header = text.partition("\n")[0]
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header))
    times, top, exact = _times(computations, entry)
    found: dict[str, list[float]] = {}
    transfers, float64, dynamic, traffic = [], 0, 0, 0.0
    for name, instructions in computations.items():
        if not times.get(name):
            continue
        for each in instructions.values():
            float64 += "f64[" in each.shape or "c128[" in each.shape
            dynamic += "<=" in each.shape
            if each.opcode in TRANSFERS or _is_callback(each):
                transfers.append(each.name)
            if (kind := each.opcode.removesuffix("-start")) in COLLECTIVES:
                total = found.setdefault(kind, [0, 0, 0])
                for i, value in enumerate((1, *_size(each, instructions, devices))):
                    total[i] += times[name] * value
        if name in top:
            traffic += times[name] * sum(_traffic(each, instructions, computations) for each in instructions.values())
    return Reading(
        tuple(Collective(kind, int(n), int(b), m) for kind, (n, b, m) in sorted(found.items())),
        traffic,
        exact,
        tuple(transfers),
        float64,
        dynamic,
        len(re.findall(r"-alias\)", header)),
    )


def _parsed(text: str) -> tuple[Computations, str]:
    computations: Computations = {}
    entry, here = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            here = computations.setdefault(opened[2], {}) if opened and not line.startswith("HloModule") else None
            if opened and opened[1]:
                entry = opened[2]
        elif here is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            rest = line[found.end() :]
            shape, rest = _leading(rest) if rest.startswith("(") else rest.split(" ", 1)
            opcode, rest = re.split(r"(?=\()", rest.lstrip(), maxsplit=1)
            operands, attributes = _leading(rest)
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            here[found[2]] = _Instruction(
                found[2], shape, opcode, names, operands[1:-1], attributes, found[1] is not None
            )
    return computations, entry


def _leading(text: str) -> tuple[str, str]:
    """What the parenthesis at the beginning holds, with it, and the rest."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    return text, ""


def _times(computations: Computations, entry: str) -> tuple[dict[str, int], set[str], bool]:
    """Eq. 1, the computations whose instructions are run one by one (not fused), and whether all loops are known."""
    times, top, exact = {entry: 1}, {entry}, True
    for name in reversed(computations):
        if not times.get(name):
            continue
        for each in computations[name].values():
            if each.opcode.endswith(("-done", "-update")):
                continue  # the same as its start
            rounds = 1
            if each.opcode == "while":
                known = _rounds(each, computations)
                rounds, exact = known if known is not None else 1, exact and known is not None
            for callee in _callees(each):
                times[callee] = times.get(callee, 0) + times[name] * rounds
                if each.opcode in {"while", "conditional", "call", "async-start"} and name in top:
                    top.add(callee)
    return times, top, exact


def _callees(each: _Instruction) -> Iterator[str]:
    if each.opcode == "while":  # the condition is a comparison
        yield from re.findall(r"\bbody=%?([\w.\-]+)", each.attributes)
        return
    yield from re.findall(r"\b(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)", each.attributes)
    for branches in re.findall(r"\bbranch_computations=\{([^}]*)\}", each.attributes):
        yield from re.findall(r"%?([\w.\-]+)", branches)


def _rounds(loop: _Instruction, computations: Computations) -> int | None:
    """How often a loop goes round: as XLA says, else the number that its counter is compared with."""
    if said := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(said[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
    instructions = list(computations.get(condition[1] if condition else "", {}).values())
    inner = [i for each in instructions for callee in _callees(each) for i in computations.get(callee, {}).values()]
    below = any("direction=LT" in each.attributes for each in instructions + inner)
    limits = [
        int(each.literal)
        for each in instructions + inner
        if each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.shape)
    ]
    return limits[0] if below and len(limits) == 1 else None


def _is_callback(each: _Instruction) -> bool:
    return each.opcode == "custom-call" and bool(
        re.search(r'custom_call_target="[^"]*(?:callback|MoveToHost|MoveToDevice)', each.attributes)
    )


def _size(each: _Instruction, around: Mapping[str, _Instruction], devices: int) -> tuple[int, float]:
    """The bytes of a collective's arrays on one device, and what it moves, Eq. 2."""
    given = sum(_bytes(around[name].shape) for name in each.operands if name in around)
    kind, members = each.opcode.removesuffix("-start"), _members(each.attributes, devices)
    if kind == "all-gather":
        given *= members
    if kind in {"collective-permute", "collective-broadcast"}:
        return given, float(given)
    return given, (2 if kind == "all-reduce" else 1) * (members - 1) / members * given


def _members(attributes: str, devices: int) -> int:
    """How many devices take part in each of a collective's groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", attributes):
        return int(counted[1])
    return devices


def _bytes(shape: str, *, far: bool = False) -> int:
    """Of the arrays of a shape; of those in the chip's large memory alone, padded to its tiles, if ``far``."""
    total = 0.0
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        lengths = [int(n.removeprefix("<=")) for n in dimensions.split(",") if n]
        if far:
            if "S(" in layout:  # S(1) and others are memories on the cores, or the host's
                continue
            lengths = _padded(lengths, layout)
        bits = re.search(r"\d+", dtype)
        size = _SIZES[dtype] if dtype in _SIZES else int(bits[0]) / 8 if bits else 0
        total += size * math.prod(lengths)
    return math.ceil(total)


def _padded(lengths: list[int], layout: str) -> list[int]:
    """The lengths in memory: of the layout {1,0:T(8,128)}, axis 1 is a multiple of 128 and axis 0 of 8."""
    found = re.match(r"\{([\d,]*):T\(([\d,]+)\)", layout)
    if found is None:
        return lengths
    lengths = list(lengths)
    minor_first, tile = ([int(n) for n in part.split(",") if n] for part in found.groups())
    for axis, unit in zip(minor_first, reversed(tile), strict=False):
        lengths[axis] = -(-lengths[axis] // unit) * unit
    return lengths


def _traffic(each: _Instruction, around: Mapping[str, _Instruction], computations: Computations) -> int:
    """What an instruction reads from memory and writes to it; of slices and of updates in place, that part alone."""
    if each.opcode in _FREE or each.opcode.endswith(("-done", "-update")):
        return 0
    inside: Sequence[_Instruction] = ()
    if each.opcode == "fusion":
        inside = list(computations.get(next(_callees(each), ""), {}).values())
    if not inside:
        inside = [each._replace(root=True)]
    given = {i.literal: i.name for i in inside if i.opcode == "parameter"} if each.opcode == "fusion" else {}
    total = 0
    for position, name in enumerate(each.operands):
        if name not in around:
            continue
        whole = _bytes(around[name].shape, far=True)
        inner = given.get(str(position), name)
        uses = [i for i in inside if inner in i.operands]
        if whole and uses and all(i.opcode in {"dynamic-slice", "dynamic-update-slice"} for i in uses):
            whole = min(whole, sum(_part(i, inner, inside, around) for i in uses))
        total += whole
    root = next((i for i in inside if i.root), each)
    written = _bytes(each.shape, far=True)
    if written and root.opcode == "dynamic-update-slice":
        written = min(written, _part(root, "", inside, around))
    return total + written


def _part(each: _Instruction, operand: str, inside: Sequence[_Instruction], around: Mapping[str, _Instruction]) -> int:
    """The bytes of what a slice takes, or of what an update in place puts in; what it updates it does not read."""
    if each.opcode == "dynamic-slice":
        return _bytes(each.shape)
    if each.operands[0] == operand:
        return 0
    update = {i.name: i for i in inside}.get(each.operands[1]) or around.get(each.operands[1])
    return _bytes(update.shape) if update else 0
