"""What was found, as a table for people and as a record for programs, and what helps where a program does not fit."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxgen.plan.program import Program
from jaxgen.plan.roofline import EFFICIENCY, Estimate, Roofline, estimate, roofline
from jaxgen.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Plan:
    """Programs for one topology.

    Attributes:
        name: of what is planned.
        topology: for which.
        programs: by name, such as "training step".
        fsdp: over how many devices their state is split.
        tensor: over how many devices their layers are split.
    """

    name: str
    topology: Topology
    programs: Mapping[str, Program]
    fsdp: int = 1
    tensor: int = 1


def table(plan: Plan) -> str:
    """The plan as text, a column for each program."""
    topology, programs = plan.topology, plan.programs.values()
    columns = [dict(_lines(program, topology)) for program in programs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [["", *plan.programs], *([name, *(column.get(name, "") for column in columns)] for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    chip = topology.chip
    head = (
        f"{plan.name} on {topology.name}: {topology.chips} chip(s) of {_size(chip.hbm)} and {chip.flops / 1e12:g} "
        f"TFLOP/s in bfloat16{f', {chip.cores} devices each' if chip.cores > 1 else ''}; fsdp {plan.fsdp}"
        f"{f', tensor {plan.tensor}' if plan.tensor > 1 else ''}"
    )
    notes = [
        "Compiled, not run: memory and collectives are what the compiler says, times are bounds and estimates.",
        f"An estimate is {EFFICIENCY[0]:.0%} to {EFFICIENCY[1]:.0%} of the roofline's speed, at list prices on demand.",
    ]
    for name, program in plan.programs.items():
        if program.reading is not None and not program.reading.exact:
            notes.append(f"{name}: a loop's rounds are not known; counts and times are the least they can be.")
        notes += [f"{name} does not fit: {remedy}" for remedy in remedies(program, plan.fsdp, tensor=plan.tensor)]
    return "\n".join([head, "", *lines, "", *notes])


def record(plan: Plan) -> str:
    """The plan as JSON: numbers in bytes, seconds, operations and dollars."""
    topology = plan.topology
    chip = topology.chip._asdict()
    programs = {}
    for name, program in plan.programs.items():
        fields: dict[str, Any] = program._asdict() | {"fits": program.fits}
        if program.reading is not None:
            fields["reading"] = program.reading._asdict() | {
                "collectives": [each._asdict() for each in program.reading.collectives]
            }
        if (roof := roofline(program, topology)) is not None:
            fields["roofline"] = roof._asdict() | {"bound": roof.bound}
            fields["estimate"] = estimate(roof, topology, rows=program.rows)._asdict() | {"efficiency": EFFICIENCY}
        programs[name] = fields | {"remedies": remedies(program, plan.fsdp, tensor=plan.tensor)}
    whole = {
        "name": plan.name,
        "topology": topology.name,
        "chips": topology.chips,
        "chip": chip,
        "fsdp": plan.fsdp,
        "tensor": plan.tensor,
        "programs": programs,
    }
    return json.dumps(whole, indent=2)


def remedies(program: Program, fsdp: int, *, tensor: int = 1) -> list[str]:
    """What makes a program fit that does not, by this model of a device's memory.

        needed = (state + gradients) / (fsdp x tensor) + activations / (devices x microbatches)
                 + parameters / tensor if fsdp > 1, gathered while a step lasts (`place.jit`)

    Args:
        program: as compiled.
        fsdp: over how many devices its state is split.
        tensor: over how many devices its layers are split.

    Returns:
        A sentence for each remedy; none if it fits.
    """
    if program.fits or program.capacity is None:
        return []
    held, capacity, devices = program.whole + program.gradients, program.capacity, program.devices
    gathered = program.gradients / tensor  # as many numbers as there are parameters
    kept = program.state + program.gradients / (fsdp * tensor) + (gathered if fsdp > 1 else 0)
    each = max(program.peak - kept, 0.0)  # of activations, on a device
    activations = each * devices
    found = [
        f"it needs {_size(program.peak)} of {_size(capacity)} a device: {_size(kept)} of state and gradients and "
        f"{_size(each)} of activations"
    ]
    if kept < capacity:
        more = _slices(activations / (capacity - kept))
        if devices < more <= program.rows:
            found.append(f"{more} devices instead of {devices} hold it, {more - devices} more")
    most = devices // tensor
    parts = [
        n for n in range(fsdp + 1, most + 1) if most % n == 0 and held / (n * tensor) + gathered + each <= capacity
    ]
    if parts:
        found.append(
            f"fsdp={parts[0]} instead of {fsdp} makes room, {_size(held / (parts[0] * tensor))} of state and gradients "
            f"and {_size(gathered)} of gathered parameters"
        )
    shares = [n for n in _divisors(program.rows // most) if kept + each / n <= capacity]
    if program.gradients and shares:
        found.append(f"microbatches={shares[0]} makes room, {_size(each / shares[0])} of activations")
    if len(found) == 1 and gathered < capacity:
        more = _slices((held + activations) / (capacity - gathered))
        if more <= program.rows:
            found.append(f"{more} devices with fsdp={more} hold it")
    if each > capacity / 2:
        found.append(
            "recomputing activations (remat) makes room if it leaves at most "
            f"{_size(max(capacity - kept, 0.0))} of the {_size(each)}"
        )
    return found


def _slices(devices: float) -> int:
    """So many devices at least, as slices have them: a power of two."""
    return 2 ** math.ceil(math.log2(max(devices, 1.0)))


def _divisors(number: int) -> list[int]:
    return [n for n in range(2, number + 1) if number % n == 0]


def _lines(program: Program, topology: Topology) -> list[tuple[str, str]]:
    lines = [
        ("fits", "yes" if program.fits else "NO"),
        ("rows, over all devices", f"{program.rows}"),
        ("parameters, or numbers shared", f"{program.parameters:,}"),
        ("state, a device", f"{_size(program.state)} of {_size(program.whole)}"),
    ]
    reading = program.reading
    if reading is None or program.aliased is None:
        return [*lines, ("memory needed, a device", f"{_size(program.peak)} of {_size(program.capacity or 0)}")]
    room = topology.chip.hbm / topology.chip.cores
    lines += [
        ("memory at its peak, a device", f"{_size(program.peak)} of {_size(room)} ({program.peak / room:.1%})"),
        ("  arguments", _size(program.arguments or 0)),
        ("  results in the place of arguments", _size(program.aliased)),
        ("  temporaries", _size(program.temporaries or 0)),
        ("operations, a device", f"{_operations(program.flops / program.devices)}"),
        ("  by XLA's count, loops once", "" if program.xla_flops is None else _operations(program.xla_flops)),
        ("memory traffic, a device, about", _size(reading.traffic)),
        ("  by XLA's count, its loops once", "" if program.xla_bytes is None else _size(program.xla_bytes)),
        ("collectives", "; ".join(f"{each.runs} {each.kind}" for each in reading.collectives) or "none"),
        ("  of", "; ".join(_size(each.bytes) for each in reading.collectives)),
        ("exchanges with the host", str(len(reading.transfers) or "none")),
        ("float64, dynamic shapes", f"{reading.float64 or 'none'}, {reading.dynamic or 'none'}"),
    ]
    if (roof := roofline(program, topology)) is not None:
        lines += _times(roof, estimate(roof, topology, rows=program.rows))
    return [*lines, ("compiled in", f"{program.seconds:.1f} s")]


def _times(roof: Roofline, estimated: Estimate) -> list[tuple[str, str]]:
    between = "not estimated between slices" if roof.interconnect is None else _seconds(roof.interconnect)
    lines = [
        ("roofline: compute", _seconds(roof.compute)),
        ("roofline: memory, about", _seconds(roof.memory)),
        ("roofline: collectives", between),
        ("bound by", roof.bound),
        ("estimate: rows a second", " to ".join(f"{value:,.0f}" for value in estimated.per_second)),
    ]
    if estimated.dollars is not None:
        lines.append(
            (
                "estimate: $ a million rows",
                " to ".join(f"{v:,.2f}" if v >= 0.1 else f"{v:.1g}" for v in estimated.dollars),
            )
        )
    return lines


def _size(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log2(count)) // 10, 4)
    return f"{count / 1024**power:.1f} {' KMGT'[power]}iB"


def _seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.3g} ms" if time >= 1e-3 else f"{time * 1e6:.3g} us"


def _operations(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {name}FLOP"
    return f"{number:.0f} FLOP"
