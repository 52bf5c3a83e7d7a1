"""A compiled program's text, HLO, taken apart into computations and instructions."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_SIZES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
        name: of its result.
        shape: of its result, with dtype and layout.
        opcode: such as "add".
        operands: names of results.
        literal: what stands between the parentheses, such as the number of a parameter.
        attributes: what stands behind them.
        root: whether its result is the computation's.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool


Computations = dict[str, dict[str, Instruction]]
"""Computations by name, each of instructions by name."""


def parsed(text: str) -> tuple[Computations, str]:
    """Takes a program apart.

    Args:
        text: its HLO.

    Returns:
        The computations, and the name of the one that is entered.
    """
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
            here[found[2]] = Instruction(
                found[2], shape, opcode, names, operands[1:-1], attributes, found[1] is not None
            )
    return computations, entry


def callees(each: Instruction) -> Iterator[str]:
    """The computations that an instruction calls; of a loop its body, for the condition is a comparison."""
    if each.opcode == "while":
        yield from re.findall(r"\bbody=%?([\w.\-]+)", each.attributes)
        return
    yield from re.findall(r"\b(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)", each.attributes)
    for branches in re.findall(r"\b(?:branch|called)_computations=\{([^}]*)\}", each.attributes):
        yield from re.findall(r"%?([\w.\-]+)", branches)


def sizes(shape: str, *, far: bool = False) -> list[int]:
    """The bytes of each array of a shape.

    Args:
        shape: as an `Instruction` has it, of one array or of a tuple.
        far: counts arrays in the chip's large memory alone, padded to the tiles that they lie in.
    """
    found = []
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        lengths = [int(n.removeprefix("<=")) for n in dimensions.split(",") if n]
        if far:
            lengths = _padded(lengths, layout) if "S(" not in layout else [0]  # S(1): a memory on the cores
        bits = re.search(r"\d+", dtype)
        width = _SIZES[dtype] if dtype in _SIZES else int(bits[0]) / 8 if bits else 0
        found.append(math.ceil(width * math.prod(lengths)))
    return found


def size(shape: str, *, far: bool = False) -> int:
    """The bytes of all arrays of a shape, as `sizes` counts them.

    Args:
        shape: as for `sizes`.
        far: as for `sizes`.

    >>> size("(f32[2,3]{1,0}, bf16[4])"), size("f32[5,130]{1,0:T(8,128)}", far=True)
    (32, 8192)
    """
    return sum(sizes(shape, far=far))


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


def _leading(text: str) -> tuple[str, str]:
    """What the parenthesis at the beginning holds, with it, and the rest."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    return text, ""
