"""Bytes that an instruction moves between a chip's memory and its cores.

An instruction reads its operands and writes its result, and a fusion is one instruction. Of an operand that is only
sliced, as the stacked parameters of a loop over layers are, it reads the slices; of a result that is an operand updated
in place it writes the update.
"""

from collections.abc import Mapping

from jaxgen.plan.instructions import Computations, Instruction, callees, size, sizes

# Names, layouts and structure: they move nothing. Collectives, whose arrays pass through memory too, do.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "async-start", "partition-id", "replica-id", "iota", "opt-barrier"}  # fmt: skip


def traffic(each: Instruction, around: Mapping[str, Instruction], computations: Computations) -> int:
    """The bytes that an instruction reads from the large memory and writes to it, about.

    Args:
        each: of a computation that is not fused.
        around: that computation.
        computations: all of them.
    """
    if each.opcode in _FREE or each.opcode.endswith(("-done", "-update")):
        return 0
    alone = {each.name: each}
    read = 0
    for name in dict.fromkeys(each.operands):
        if name in around and (whole := size(around[name].shape, far=True)):
            read += min(whole, _read(name, alone, whole, computations))
    outputs = sizes(each.shape, far=True)
    updates = _updates(each, around, computations)
    if len(updates) != len(outputs):
        return read + sum(outputs)
    return read + sum(
        whole if update is None else min(whole, update) for whole, update in zip(outputs, updates, strict=True)
    )


def _read(name: str, inside: Mapping[str, Instruction], whole: int, computations: Computations) -> int:
    """What is read of a value of so many bytes by the instructions that take it."""
    total = 0
    for use in inside.values():
        for position, operand in enumerate(use.operands):
            if operand != name:
                continue
            if use.opcode == "dynamic-slice":
                total += size(use.shape)
            elif use.opcode == "dynamic-update-slice" and position == 0:
                pass  # what is not updated stays where it is
            elif use.opcode == "bitcast":
                total += _read(use.name, inside, whole, computations)
            elif use.opcode == "fusion" and (inner := computations.get(next(callees(use), ""))):
                parameters = {i.literal: i.name for i in inner.values() if i.opcode == "parameter"}
                total += _read(parameters[str(position)], inner, whole, computations)
            else:
                return whole
    return total


def _updates(each: Instruction, inside: Mapping[str, Instruction], computations: Computations) -> list[int | None]:
    """For each result, the bytes that are put into it, if it is an update in place."""
    if each.opcode == "fusion" and (inner := computations.get(next(callees(each), ""))):
        root = next(i for i in inner.values() if i.root)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return [update for part in parts for update in _updates(part, inner, computations)]
    if each.opcode == "bitcast" and each.operands[0] in inside:
        return _updates(inside[each.operands[0]], inside, computations)
    if each.opcode == "dynamic-update-slice" and each.operands[1] in inside:
        return [size(inside[each.operands[1]].shape)]
    return [None]
