"""Which of the others is mine, asked both ways: the loss of CLIP.

With x_i and y_i the unit embeddings of the two sides of N pairs (an image and its caption, say) and temperature t:

    L_i = -1/2 log exp(<x_i, y_i> / t) / sum_k exp(<x_i, y_k> / t)
          -1/2 log exp(<x_i, y_i> / t) / sum_k exp(<x_k, y_i> / t)                                 (1)

Each half is InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, Eq. 4); the mean of both over i is the loss of Radford
et al. 2021 (arXiv:2103.00020, Figure 3). Unlike in `nt_xent`, an embedding is never compared with its own side.
"""

import jax.numpy as jnp

from jaxgen.contrastive.pairwise import Side, reduce_pairs
from jaxgen.contrastive.similarity import check_views, example_indices, normalise, sharpened
from jaxgen.contrastive.softmax import softmax_contrast
from jaxgen.typing import Array


def info_nce(
    first: Array,
    second: Array,
    *,
    temperature: float | Array = 0.07,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Array:
    """CLIP's symmetric InfoNCE, Eq. 1: each of n is to find its partner among the n of the other side, both ways.

    Args:
        first: [n, d], floating, any lengths.
        second: [n, d], row i the partner of row i of ``first``.
        temperature: t, above 0; a scalar, which may be traced and learned (CLIP learns log 1/t, from t = 0.07 on).
        block_size: how many of the n partners to compare with at a time, for memory n x block_size; by default all. The
            gradient is the same, by a reverse derivative only.
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any: embeddings are then
            compared with those on all devices, which pass by in a ring.

    Returns:
        [n], the mean of both directions for each pair. Float32 (float64 if an embedding is). It is log N where all
        embeddings are one.

    Raises:
        ValueError: the sides are not of one shape [n, d], the global batch is one pair, ``temperature`` is known and
            not above 0, or ``block_size`` is not a positive integer.
        TypeError: a side is not floating.

    >>> info_nce(jnp.eye(3), jnp.eye(3), temperature=1.0).mean()  # log(e + 2) - 1
    Array(0.5514..., dtype=float32)
    """
    check_views(first, second, axis_name)
    marks = example_indices(first.shape[0], axis_name)

    def found(anchors: Array, candidates: Array) -> Array:
        return reduce_pairs(
            _INFO_NCE,
            Side(sharpened(anchors, temperature), marks),
            Side(normalise(candidates), marks),
            block_size=block_size,
            axis_name=axis_name,
        )

    return (found(first, second) + found(second, first)) / 2


def _rule(i: Array, j: Array) -> tuple[Array, Array]:
    same = i == j
    return jnp.ones_like(same), same


_INFO_NCE = softmax_contrast(_rule)
