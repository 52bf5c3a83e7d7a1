"""Is this pair one? Asked of every pair by itself: the sigmoid loss of SigLIP.

With x_i and y_i the unit embeddings of the two sides of N pairs, s the softplus log(1 + e^x), z_ij = 1 where i = j
and -1 elsewhere, temperature t and bias b:

    L_i = sum_j s(-z_ij l_ij),    l_ij = <x_i, y_j> / t + b                                        (1)

    dL_i / dl_ij = -z_ij sigmoid(-z_ij l_ij)                                                       (2)

Zhai et al. 2023 (arXiv:2303.15343, section 3.2), whose factor of the similarities is 1 / t and whose loss is the mean
over i.
"""

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.contrastive.pairwise import Marks, Reduction, Side, reduce_pairs
from jaxgen.contrastive.similarity import check_views, example_indices, normalise, sharpened
from jaxgen.typing import Array


def siglip(
    first: Array,
    second: Array,
    *,
    temperature: float | Array = 0.1,
    bias: float | Array = -10.0,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Array:
    """SigLIP's sigmoid loss, Eq. 1: every pair of the two sides is told to be one or not.

    Args:
        first: [n, d], floating, any lengths.
        second: [n, d], row i the partner of row i of ``first``.
        temperature: t, above 0; a scalar, which may be traced and learned (the paper learns log 1/t, from t = 0.1 on).
        bias: b, a scalar, which may be traced and learned; the paper starts at -10, as nearly all pairs are not one.
        block_size: how many of the n partners to compare with at a time, for memory n x block_size; by default all. The
            gradient is the same, by a reverse derivative only.
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any: embeddings are then
            compared with those on all devices, which pass by in a ring.

    Returns:
        [n], the sum over all partners for each row of ``first``. Float32 (float64 if an embedding is). Its mean is the
        loss of the paper.

    Raises:
        ValueError: the sides are not of one shape [n, d], the global batch is one pair, ``temperature`` is known and
            not above 0, ``bias`` is no finite scalar, or ``block_size`` is not a positive integer.
        TypeError: a side is not floating.

    >>> siglip(jnp.eye(2), jnp.eye(2), temperature=1.0, bias=0.0).mean()  # log(1 + 1/e) + log 2
    Array(1.0064..., dtype=float32)
    """
    check_views(first, second, axis_name)
    checks.shape("bias", bias, ())
    checks.finite("bias", bias)
    anchors, candidates = sharpened(first, temperature), normalise(second)
    marks = example_indices(first.shape[0], axis_name)
    # The bias is the product of one more feature with 1.
    last = jnp.ones_like(anchors[:, :1])
    return reduce_pairs(
        _SIGLIP,
        Side(jnp.concatenate([anchors, last * jnp.asarray(bias).astype(last.dtype)], 1), marks),
        Side(jnp.concatenate([candidates, last], 1), marks),
        block_size=block_size,
        axis_name=axis_name,
    )


def _update(seen: Array, logits: Array, i: Marks, j: Marks) -> Array:
    return seen + jnp.sum(jax.nn.softplus(jnp.where(i == j, -logits, logits)), 1)


def _slope(seen: Array, logits: Array, i: Marks, j: Marks) -> Array:
    return jnp.where(i == j, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))


_SIGLIP = Reduction(init=lambda zeros: zeros, update=_update, result=lambda seen: seen, slope=_slope)
