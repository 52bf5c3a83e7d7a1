"""How each operation passes on which examples its operands were computed from.

The word is `Examples`, a small array beside every value; the rules are one function for each kind of operation,

    (equation, examples of its operands) -> examples of its outputs

collected in ``RULES`` under the operations' names. `coupling` says what they are for. A rule claims no more than is
certain: where it cannot follow, it answers with nothing.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np

Examples = np.ndarray
"""[2, ...]: of each entry of a value, the smallest index of an example that it was computed from and minus the largest.

So a union is a minimum. Axes along which all is alike have length 1.
"""

Rule = Callable[[Any, Sequence[Examples]], Sequence[Examples]]
"""``(equation, examples of its operands) -> examples of its outputs``."""

NOTHING = np.iinfo(np.int32).max
"""In both places of an entry that was computed from no example."""


# --- What values carry


def nothing(v: Any) -> Examples:
    """What a variable carries that no example is known to enter."""
    return np.full((2, *(1,) * len(v.aval.shape)), NOTHING, np.int32)


def carries(examples: Examples) -> bool:
    """Whether any entry was computed from an example."""
    return bool((examples != NOTHING).any())


def differ(examples: Examples, axes: Sequence[int]) -> bool:
    """Whether entries differ along any of these axes."""
    return any(examples.shape[axis + 1] > 1 for axis in axes)


def union(*parts: Examples) -> Examples:
    """The examples of a value computed entry by entry from several."""
    rank = max(part.ndim for part in parts)  # a scalar goes with everything
    return reduce(np.minimum, (part.reshape(2, *(1,) * (rank - part.ndim), *part.shape[1:]) for part in parts))


def common(*cases: Examples) -> Examples:
    """What all cases carry alike; nothing where they differ."""
    alike = reduce(np.logical_and, ((case == cases[0]).all(0) for case in cases))
    return np.where(alike, cases[0], NOTHING)


def along(examples: Examples, axes: Sequence[int]) -> Examples:
    """The union along axes, which are dropped."""
    return examples.min(tuple(axis + 1 for axis in axes)) if axes else examples


def _agreed(examples: Examples, axes: Sequence[int]) -> Examples | None:
    """What entries along axes share, which get length 1; None where they differ, but by carrying nothing (pads)."""
    shared = examples.min(tuple(axis + 1 for axis in axes), keepdims=True) if axes else examples
    return shared if ((examples == shared) | (examples == NOTHING)).all() else None


def _place(examples: Examples, axes: Sequence[int], rank: int) -> Examples:
    """Puts the axes of a value at ``axes`` of one of that rank, whose others get length 1."""
    order = np.argsort(axes)
    shape = [1] * rank
    for axis in order:
        shape[axes[axis]] = examples.shape[axis + 1]
    return examples.transpose(0, *(order + 1)).reshape(2, *shape)


def _pick(examples: Examples, axis: int, positions: np.ndarray, length: int) -> Examples:
    """The entries of an axis, of that length, at ``positions``; nothing at positions outside."""
    inside = (positions >= 0) & (positions < length)
    if not differ(examples, [axis]):
        if inside.all():
            return examples
        positions = np.zeros_like(positions)
    picked = examples.take(np.where(inside, positions, 0), axis + 1)
    picked = np.where(inside.reshape(-1, *(1,) * (examples.ndim - axis - 2)), picked, NOTHING)
    first = picked.take([0], axis + 1)
    return first if len(positions) and (picked == first).all() else picked


# --- Rules


def _elementwise(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    return [union(*operands)]


def _each(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    return operands


def _convert(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    (source,), (result,) = equation.invars, equation.outvars
    lost = jnp.issubdtype(result.aval.dtype, jnp.inexact) and not jnp.issubdtype(source.aval.dtype, jnp.inexact)
    return [nothing(result)] if lost else operands


def _select(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    """Data that choose by themselves take from all cases; a mask only what all cases share, or what is no constant.

    A mask may hide some entries for being coupled (between examples that are packed into one sequence), if not all.
    """
    which, *cases = operands
    carrying = [case for case in cases if carries(case)]
    if carries(which):
        return [union(*cases)]
    if len(carrying) > 1:
        return [common(*cases)]
    single = carrying[0][0] == -carrying[0][1]
    return [np.where(single | ~single.any(), carrying[0], NOTHING)]


def _reduction(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    return [along(operands[0], equation.params["axes"])]


def _cumulative(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    axis, backwards = equation.params["axis"] + 1, slice(None, None, -1 if equation.params["reverse"] else 1)
    ordered = np.moveaxis(operands[0], axis, 0)[backwards]
    return [np.moveaxis(np.minimum.accumulate(ordered)[backwards], 0, axis)]


def _sort(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    axis = equation.params["dimension"] + 1
    return [operand.min(axis, keepdims=True) for operand in operands]


def _window(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    sides = zip(equation.params["window_dimensions"], equation.params["window_strides"], strict=True)
    pooled = _agreed(operands[0], [axis for axis, (size, stride) in enumerate(sides) if size > 1 or stride > 1])
    return [nothing(equation.outvars[0]) if pooled is None else pooled]


def _broadcast(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    return [_place(operands[0], equation.params["broadcast_dimensions"], len(equation.params["shape"]))]


def _transpose(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    return [operands[0].transpose(0, *(axis + 1 for axis in equation.params["permutation"]))]


def _squeeze(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    return [along(operands[0], equation.params["dimensions"])]


def _reshape(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    """Cuts both shapes into the shortest runs of axes of one product; a run without differences stays of length 1."""
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if equation.params["dimensions"] is not None or 0 in old:
        return [nothing(equation.outvars[0])]
    before: list[int] = []
    after: list[int] = []
    while (i := len(before)) < len(old) or len(after) < len(new):
        j, p, q = len(after), 1, 1
        end_i, end_j = i, j
        while p != q or end_i + end_j == i + j:
            if end_j == len(new) or (end_i < len(old) and p <= q):
                p, end_i = p * old[end_i], end_i + 1
            else:
                q, end_j = q * new[end_j], end_j + 1
        apart = differ(operands[0], range(i, end_i))
        before += old[i:end_i] if apart else (1,) * (end_i - i)
        after += new[j:end_j] if apart else (1,) * (end_j - j)
    examples = np.broadcast_to(operands[0], (2, *before)).reshape(2, *after)
    for axis, length in enumerate(after):
        examples = _pick(examples, axis, np.arange(length), length)  # length 1 where nothing differs any more
    return [examples]


def _slice(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    params, examples = equation.params, operands[0]
    for axis, length in enumerate(equation.invars[0].aval.shape):
        step = params["strides"][axis] if params["strides"] else 1
        positions = np.arange(params["start_indices"][axis], params["limit_indices"][axis], step)
        examples = _pick(examples, axis, positions, length)
    return [examples]


def _split(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    positions = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return [_pick(operands[0], axis, part, sum(sizes)) for part in positions]


def _reverse(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    return [np.flip(operands[0], tuple(axis + 1 for axis in equation.params["dimensions"]))]


def _pad(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    examples, shape = operands[0], equation.outvars[0].aval.shape
    for axis, (low, _, interior) in enumerate(equation.params["padding_config"]):
        positions, between = np.divmod(np.arange(shape[axis]) - low, interior + 1)
        positions = np.where(between == 0, positions, -1)
        examples = _pick(examples, axis, positions, equation.invars[0].aval.shape[axis])
    return [examples]


def _concatenate(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    axis, whole, start, parts = equation.params["dimension"], equation.outvars[0].aval.shape, 0, []
    for v, operand in zip(equation.invars, operands, strict=True):
        length = v.aval.shape[axis]
        parts.append(_pick(operand, axis, np.arange(whole[axis]) - start, length))
        start += length
    return [_pick(union(*parts), axis, np.arange(whole[axis]), whole[axis])]


def _stack(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    axis, rank = equation.params["axis"], operands[0].ndim
    places = [place for place in range(rank) if place != axis]
    positions = np.arange(len(operands))
    parts = [_pick(_place(operand, places, rank), axis, positions - i, 1) for i, operand in enumerate(operands)]
    return [_pick(union(*parts), axis, positions, len(positions))]


def _tile(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    examples = operands[0]
    for axis, (length, times) in enumerate(zip(equation.invars[0].aval.shape, equation.params["reps"], strict=True)):
        examples = _pick(examples, axis, np.tile(np.arange(length), times), length)
    return [examples]


def _dynamic_slice(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    sizes = zip(equation.params["slice_sizes"], equation.invars[0].aval.shape, strict=True)
    kept = _agreed(operands[0], [axis for axis, (size, length) in enumerate(sizes) if size < length])
    return [nothing(equation.outvars[0]) if kept is None else kept]


def _gather(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    """What is looked up within examples; along the batch itself nothing, since which one is not known."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, out = equation.invars[0].aval.shape, equation.outvars[0]
    paired, dropped = list(numbers.operand_batching_dims), list(numbers.collapsed_slice_dims)
    whole = [axis for axis in range(len(shape)) if axis not in (*dropped, *paired)]
    cut = [axis for axis in (*whole, *dropped) if sizes[axis] < shape[axis]]
    if (kept := _agreed(operands[0], cut)) is None:
        return [nothing(out)]
    kept = kept.transpose(0, *(axis + 1 for axis in (*whole, *paired, *dropped)))
    kept = along(kept, range(len(whole) + len(paired), len(shape)))
    of_indices = [axis for axis in range(len(out.aval.shape)) if axis not in numbers.offset_dims]
    places = [*numbers.offset_dims, *(of_indices[axis] for axis in numbers.start_indices_batching_dims)]
    return [_place(kept, places, len(out.aval.shape))]


def _dot(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    contracted, batched = equation.params["dimension_numbers"]
    rank = len(equation.outvars[0].aval.shape)
    parts, start = [], len(batched[0])
    for operand, summed, batch in zip(operands, contracted, batched, strict=True):
        free = [axis for axis in range(operand.ndim - 1) if axis not in (*summed, *batch)]
        kept = operand.transpose(0, *(axis + 1 for axis in (*batch, *free, *summed)))
        kept = along(kept, range(len(batch) + len(free), operand.ndim - 1))
        parts.append(_place(kept, [*range(len(batch)), *range(start, start + len(free))], rank))
        start += len(free)
    return [union(*parts)]


def _convolved(equation: Any, operands: Sequence[Examples], specs: Any, groups: int) -> Sequence[Examples]:
    """Each feature depends on all channels of its group; ``specs`` are JAX's: axes of (batch, features, sides...)."""
    (image_spec, kernel_spec, out_spec), out = specs, equation.outvars[0]
    images, features = _agreed(operands[0], image_spec[2:]), out.aval.shape[out_spec[1]]
    if images is None:
        return [nothing(out)]
    rows = images.transpose(0, *(axis + 1 for axis in image_spec)).reshape(2, images.shape[image_spec[0] + 1], -1)
    if rows.shape[2] > 1:
        rows = rows.reshape(2, rows.shape[1], groups, -1).min(3).repeat(features // groups, 2)
    columns = along(operands[1], kernel_spec[1:])[:, None]
    return [_place(union(rows, columns), out_spec[:2], len(out_spec))]


def _convolution(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    if equation.params["batch_group_count"] > 1:
        return [nothing(equation.outvars[0])]
    return _convolved(equation, operands, equation.params["dimension_numbers"], equation.params["feature_group_count"])


def _convolve(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    """The convolution of `jaxgen.nets`: NHWC, HWIO."""
    return _convolved(equation, operands, ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)), equation.params["form"].groups)


def _convolve_to_input(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    """Its transpose, which sums over the kernel's last axis, group by group."""
    if carries(operands[1]):
        return [nothing(equation.outvars[0])]
    return _convolved(equation, operands, ((0, 3, 1, 2), (2, 3, 0, 1), (0, 3, 1, 2)), equation.params["form"].groups)


_ENTRY_BY_ENTRY = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt clamp copy cos cosh digamma div eq erf erf_inv erfc
    exp exp2 expm1 ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg not or pow
    reduce_precision rsqrt sin sinh sqrt square sub tan tanh xor
"""
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ENTRY_BY_ENTRY.split(), _elementwise),
    **dict.fromkeys(["optimization_barrier", "pcast", "psum", "psum_invariant", "pvary"], _each),
    **dict.fromkeys(["reduce_max", "reduce_min", "reduce_prod", "reduce_sum"], _reduction),
    **dict.fromkeys(["cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"], _cumulative),
    **dict.fromkeys(["reduce_window_max", "reduce_window_min", "reduce_window_sum"], _window),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert,
    "convolve": _convolve,
    "convolve_to_input": _convolve_to_input,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "select_n": _select,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
