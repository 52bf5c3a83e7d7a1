"""Two views of each example against all other views: SimCLR's loss, and it decoupled.

With z_i the unit embeddings of the 2N views of N examples, i' the other view of the example of i, and temperature t:

    nt_xent:   L_i = -log exp(<z_i, z_i'> / t) / sum_{k != i} exp(<z_i, z_k> / t)                  (1)
    dcl:       L_i = -<z_i, z_i'> / t + log sum_{k != i, i'} exp(<z_i, z_k> / t)                   (2)

(1) is Chen et al. 2020 (arXiv:2002.05709, Eq. 1); (2) is the loss L_DC of Yeh et al. 2021 (arXiv:2110.06848, section
3), whose positive does not push itself away, so that the gradient does not fade in small batches.
"""

import jax.numpy as jnp

from jaxgen.contrastive.pairwise import Reduction, Side, reduce_pairs
from jaxgen.contrastive.similarity import check_views, example_indices, normalise, sharpened
from jaxgen.contrastive.softmax import softmax_contrast
from jaxgen.typing import Array


def nt_xent(
    first: Array,
    second: Array,
    *,
    temperature: float | Array = 0.5,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Array:
    """SimCLR's normalised, temperature-scaled cross-entropy, Eq. 1: each of 2n views is to find its other one.

    Args:
        first: [n, d], floating, any lengths.
        second: [n, d], row i the other view of the example of row i of ``first``.
        temperature: t, above 0; a scalar, which may be traced and learned.
        block_size: how many of the 2n views to compare with at a time, for memory 2n x block_size; by default all. The
            gradient is the same, by a reverse derivative only.
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any: views are then compared
            with those on all devices, which pass by in a ring.

    Returns:
        [2n], the loss of each view as the anchor: those of ``first``, then those of ``second``. Float32 (float64 if an
        embedding is). Its mean is the loss of the paper. It is log(2N - 1) where all embeddings are one.

    Raises:
        ValueError: the views are not of one shape [n, d], the global batch is one example, ``temperature`` is known and
            not above 0, or ``block_size`` is not a positive integer.
        TypeError: a view is not floating.

    >>> nt_xent(jnp.ones((4, 2)), jnp.ones((4, 2))).mean()  # log 7
    Array(1.9459..., dtype=float32)
    """
    return _of_views(_NT_XENT, first, second, temperature, block_size, axis_name)


def dcl(
    first: Array,
    second: Array,
    *,
    temperature: float | Array = 0.1,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Array:
    """The decoupled contrastive loss, Eq. 2: `nt_xent` with the positive left out of the denominator.

    Args:
        first: [n, d], floating, any lengths.
        second: [n, d], row i the other view of the example of row i of ``first``.
        temperature: t, above 0; a scalar, which may be traced and learned.
        block_size: how many of the 2n views to compare with at a time; by default all (see `nt_xent`).
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any (see `nt_xent`).

    Returns:
        [2n], the loss of each view as the anchor, as `nt_xent` orders them. It may be negative.

    Raises:
        ValueError: the views are not of one shape [n, d], the global batch is one example, ``temperature`` is known and
            not above 0, or ``block_size`` is not a positive integer.
        TypeError: a view is not floating.

    >>> dcl(jnp.ones((4, 2)), jnp.ones((4, 2))).mean()  # log 6
    Array(1.7917..., dtype=float32)
    """
    return _of_views(_DCL, first, second, temperature, block_size, axis_name)


def _of_views(
    reduction: Reduction,
    first: Array,
    second: Array,
    temperature: float | Array,
    block_size: int | None,
    axis_name: str | None,
) -> Array:
    check_views(first, second, axis_name)
    views = jnp.concatenate([first, second])
    # View v of example e is marked 2 e + v.
    even = 2 * example_indices(first.shape[0], axis_name)
    marks = jnp.concatenate([even, even + 1])
    return reduce_pairs(
        reduction,
        Side(sharpened(views, temperature), marks),
        Side(normalise(views), marks),
        block_size=block_size,
        axis_name=axis_name,
    )


def _nt_xent_rule(i: Array, j: Array) -> tuple[Array, Array]:
    return i != j, _other_view(i, j)


def _dcl_rule(i: Array, j: Array) -> tuple[Array, Array]:
    return i // 2 != j // 2, _other_view(i, j)


def _other_view(i: Array, j: Array) -> Array:
    return (i // 2 == j // 2) & (i != j)


_NT_XENT, _DCL = softmax_contrast(_nt_xent_rule), softmax_contrast(_dcl_rule)
