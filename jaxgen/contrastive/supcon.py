"""All of one class together: the supervised contrastive loss.

With z_i unit embeddings, P(i) the others of the label of i, and temperature t:

    L_i = -1 / |P(i)| sum_{p in P(i)} log exp(<z_i, z_p> / t) / sum_{k != i} exp(<z_i, z_k> / t)   (1)

Khosla et al. 2020 (arXiv:2004.11362, Eq. 2, L_out, which they find to be the better one). With two views of each
example and no two examples of one label it is `nt_xent`.
"""

import jax.numpy as jnp

from jaxgen import checks
from jaxgen.contrastive.pairwise import Side, reduce_pairs
from jaxgen.contrastive.similarity import check_embeddings, example_indices, normalise, sharpened
from jaxgen.contrastive.softmax import softmax_contrast
from jaxgen.typing import Array


def supcon(
    embeddings: Array,
    labels: Array,
    *,
    temperature: float | Array = 0.1,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Array:
    """The supervised contrastive loss, Eq. 1: each is to find all others of its label.

    Args:
        embeddings: [n, d], floating, any lengths; of several views of each example, one after the other, all.
        labels: [n], integers; any values.
        temperature: t, above 0; a scalar, which may be traced and learned.
        block_size: how many of the n embeddings to compare with at a time, for memory n x block_size; by default all.
            The gradient is the same, by a reverse derivative only.
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any: embeddings are then
            compared with those on all devices, which pass by in a ring.

    Returns:
        [n], the loss of each embedding as the anchor, 0 for one that is alone with its label. Float32 (float64 if the
        embeddings are).

    Raises:
        ValueError: a shape is wrong, the global batch is one embedding, ``temperature`` is known and not above 0, or
            ``block_size`` is not a positive integer.
        TypeError: the embeddings are not floating, or the labels are not integers.

    >>> supcon(jnp.ones((4, 2)), jnp.array([0, 0, 1, 1])).mean()  # log 3
    Array(1.0986..., dtype=float32)
    """
    check_embeddings("embeddings", embeddings, axis_name)
    checks.shape("labels", labels, (embeddings.shape[0],))
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers, got dtype {labels.dtype}")
    marks = (example_indices(embeddings.shape[0], axis_name), labels)
    return reduce_pairs(
        _SUPCON,
        Side(sharpened(embeddings, temperature), marks),
        Side(normalise(embeddings), marks),
        block_size=block_size,
        axis_name=axis_name,
    )


def _rule(i: tuple[Array, Array], j: tuple[Array, Array]) -> tuple[Array, Array]:
    other = i[0] != j[0]
    return other, other & (i[1] == j[1])


_SUPCON = softmax_contrast(_rule)
