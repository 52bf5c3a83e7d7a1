"""Losses of all pairs of rows, without the matrix of all pairs.

Let anchors a_i (i = 1..n) and candidates c_j (j = 1..m) be rows of d numbers, and let a loss depend on their products

    l_ij = <a_i, c_j>,    L_i = result(S_i),    S_i = update(... update(init, l_i1), ..., l_im)    (1)

through statistics S_i that take the candidates in any order and in any portions: a sum, or a maximum with the sum of
exponentials relative to it. A temperature is a scale of the rows, a bias one more feature. With cotangents g_i of L_i
and the slopes p_ij = dL_i / dl_ij, which follow from l_ij and the finished S_i,

    da_i = g_i sum_j p_ij c_j,    dc_j = sum_i g_i p_ij a_i                                        (2)

so neither pass has to see more than one block of columns at a time. Three ways to do it:

- dense: the matrix [n, m], differentiated by JAX (also forwards).
- blockwise (``block_size``): [n, block_size] at a time. Kept for the backward pass are the rows and S_i; it computes
  each block of products again, a fourth product of matrices where dense has three.
- ring (``axis_name``): each device holds a shard of anchors and a shard of candidates. The candidates, with what says
  which they are, pass from neighbour to neighbour until every device has seen all; in the backward pass the gradients
  that they gather go round with them. No device holds more than its anchors against one shard, or one block of it.
  Ring attention walks so (Liu et al. 2023, arXiv:2310.01889), and so does the chunked loss of SigLIP (Zhai et al. 2023,
  arXiv:2303.15343, section 3.3).

The last two have a reverse derivative only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen import checks
from jaxgen.typing import Array

Marks = Any
"""A tree of arrays [rows] that says which example, view or class each row is of: what rules about pairs look at."""


class Reduction(NamedTuple):
    """A loss per row of a matrix of products, as Eq. 1 takes it.

    The marks of anchors come as [n, 1] and those of candidates as [block], so that a comparison of them is [n, block].

    Attributes:
        init: zeros [n] -> statistics, a tree of arrays [n].
        update: (statistics, products [n, block], anchors' marks, candidates' marks) -> statistics.
        result: statistics -> [n].
        slope: (statistics, products [n, block], anchors' marks, candidates' marks) -> [n, block], the derivative of
            the result by the products.
    """

    init: Callable[[Array], Any]
    update: Callable[[Any, Array, Marks, Marks], Any]
    result: Callable[[Any], Array]
    slope: Callable[[Any, Array, Marks, Marks], Array]


class Side(NamedTuple):
    """The anchors, or the candidates.

    Attributes:
        rows: [n, d], float32 or float64.
        marks: a tree of arrays [n].
    """

    rows: Array
    marks: Marks


def reduce_pairs(
    reduction: Reduction, anchors: Side, candidates: Side, *, block_size: int | None, axis_name: str | None
) -> Array:
    """The loss of each anchor against all candidates.

    Args:
        reduction: the loss.
        anchors: [n, d] with their marks.
        candidates: [m, d] with their marks; under ``axis_name`` this device's shard of them.
        block_size: how many candidates to compare at a time; None for all that are here. It need not divide m.
        axis_name: the mapped axis of pmap or shard_map over which candidates are split, if any.

    Returns:
        [n].

    Raises:
        ValueError: ``block_size`` is not a positive integer.
    """
    if block_size is not None:
        checks.positive_integer("block_size", block_size)
    anchors = Side(anchors.rows, jax.tree.map(lambda mark: mark[:, None], anchors.marks))
    if block_size is None and axis_name is None:
        return reduction.result(_seen(reduction, anchors, _unseen(reduction, anchors), candidates))
    return _in_blocks(reduction, block_size, axis_name, *_alike(anchors, candidates))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _unseen(reduction: Reduction, anchors: Side) -> Any:
    return reduction.init(jnp.zeros_like(anchors.rows[:, 0]))


def _seen(reduction: Reduction, anchors: Side, statistics: Any, block: Side) -> Any:
    return reduction.update(statistics, _product(anchors.rows, block.rows.T), anchors.marks, block.marks)


def _alike(*sides: Side) -> tuple[Side, ...]:
    """Inside shard_map, makes all that is the same on all devices vary as the rest does.

    That step's own transpose is the sum over devices, without which gradients of shared rows would be partial.
    """
    vary = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(sides)]
    together = frozenset[str]().union(*vary)

    def cast(leaf: Array) -> Array:
        missing = together - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(cast, sides)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_blocks(
    reduction: Reduction, block_size: int | None, axis_name: str | None, anchors: Side, candidates: Side
) -> Array:
    return _forward(reduction, block_size, axis_name, anchors, candidates)[0]


def _forward(
    reduction: Reduction, block_size: int | None, axis_name: str | None, anchors: Side, candidates: Side
) -> tuple[Array, Any]:
    def visit(statistics: Any, block: Side) -> tuple[Any, tuple[()]]:
        return _seen(reduction, anchors, statistics, block), ()

    statistics, _ = _around(visit, _unseen(reduction, anchors), candidates, (), block_size, axis_name)
    return reduction.result(statistics), (anchors, candidates, statistics)


def _backward(
    reduction: Reduction, block_size: int | None, axis_name: str | None, saved: Any, cotangent: Array
) -> tuple[Side, Side]:
    anchors, candidates, statistics = saved

    def visit(gradient: Array, block: Side) -> tuple[Array, Array]:  # Eq. 2
        products = _product(anchors.rows, block.rows.T)
        slopes = cotangent[:, None] * reduction.slope(statistics, products, anchors.marks, block.marks)
        return gradient + _product(slopes, block.rows), _product(slopes.T, anchors.rows)

    of_anchors, of_candidates = _around(
        visit, jnp.zeros_like(anchors.rows), candidates, jnp.zeros_like(candidates.rows), block_size, axis_name
    )
    return Side(of_anchors, None), Side(of_candidates, None)


_in_blocks.defvjp(_forward, _backward)

Visit = Callable[[Any, Side], tuple[Any, Any]]
"""``(carry, block of candidates) -> (carry, what the block's rows gather, a tree of arrays [block, ...])``."""


def _around(
    visit: Visit, carry: Any, candidates: Side, gathered: Any, block_size: int | None, axis_name: str | None
) -> tuple[Any, Any]:
    """Visits all candidates, on all devices; what they gather is summed over the visits and comes home with them."""
    if axis_name is None:
        return _along(visit, carry, candidates, block_size)
    devices = lax.axis_size(axis_name)
    neighbours = [(device, (device + 1) % devices) for device in range(devices)]

    def turn(state: Any, _: None) -> tuple[Any, None]:
        carry, shard, gathered = state
        carry, more = _along(visit, carry, shard, block_size)
        gathered = jax.tree.map(jnp.add, gathered, more)
        # A shard can be on its way while it is visited; after the last turn each is at home again, with its gradients.
        return (carry, *lax.ppermute((shard, gathered), axis_name, neighbours)), None

    (carry, _, gathered), _ = lax.scan(turn, (carry, candidates, gathered), length=devices)
    return carry, gathered


def _along(visit: Visit, carry: Any, candidates: Side, block_size: int | None) -> tuple[Any, Any]:
    """Visits the candidates that are here, block by block, and then the rest."""
    length = candidates.rows.shape[0]
    block = length if block_size is None else min(block_size, length)
    whole = length - length % block
    blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, block, *leaf.shape[1:]), candidates)
    carry, gathered = lax.scan(visit, carry, blocks)
    gathered = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), gathered)
    if whole < length:
        carry, rest = visit(carry, jax.tree.map(lambda leaf: leaf[whole:], candidates))
        gathered = jax.tree.map(lambda *parts: jnp.concatenate(parts), gathered, rest)
    return carry, gathered
