"""Gradients of a loss of all embeddings in the memory of a few: an encoder that runs a chunk at a time.

A contrastive loss L(z_1, ..., z_n) wants many examples, and an encoder's activations are what fills the memory. But L
sees the encoder f through the embeddings alone,

    dL / dparams = sum_i (dL / dz_i) (df(params, x_i) / dparams),    z_i = f(params, x_i)               (1)

so Gao et al. 2021 (arXiv:2101.06983, section 3) take three passes: embed all examples chunk by chunk and keep nothing
else; differentiate the loss by the embeddings, dL / dz_i, which they cache; run each chunk once more, pull its part of
the cache back through it, and add up the sum of Eq. 1.

That is what reverse differentiation does by itself to a loop over chunks that are checkpointed each, so no pass is
written by hand, the loss needs not know, and the gradients are exact. The price is the second run of the encoder. XLA
reports the same memory for it as for a custom derivative of three passes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array, Batch, Params

Encoder = Callable[[Params, Batch], Any]
"""``(params, x) -> embeddings``: trees of arrays [batch, ...], embedding i of example i."""


def grad_cached(apply: Encoder, *, chunks: int) -> Encoder:
    """The same encoder, with the activations of one chunk of the batch instead of all.

    Values and gradients, by the parameters and by ``x``, are those of ``apply`` to rounding. It must treat each example
    by itself: batch normalisation would normalise each chunk by its own statistics. Randomness goes in with the
    examples, ``x = (images, random.example_keys(key, batch))``, and does not depend on the chunks then.

    Args:
        apply: ``(params, x) -> embeddings``, trees of arrays [batch, ...].
        chunks: k, how many parts the batch is run in. Chunk c takes rows c, c + k, ..., so that of a batch that is
            split over devices each device has its share of each chunk.

    Returns:
        ``(params, x) -> embeddings`` as ``apply``. While tracing it raises ValueError where ``chunks`` does not divide
        the batch, or ``apply`` does not give one embedding for each example.

    Raises:
        ValueError: ``chunks`` is not an integer of at least 1.

    >>> encode = grad_cached(lambda params, x: params * x, chunks=2)
    >>> jax.grad(lambda params: jnp.prod(encode(params, jnp.arange(1.0, 5.0))))(1.0)  # of 24 params^4
    Array(96., dtype=float32, weak_type=True)
    """
    checks.positive_integer("chunks", chunks)

    def cached(params: Params, x: Batch) -> Any:
        for path, leaf in jax.tree_util.tree_leaves_with_path(x):
            if not jnp.ndim(leaf) or jnp.shape(leaf)[0] % chunks:
                raise ValueError(
                    f"`chunks` must divide the batch, got {chunks} chunks and `x{jax.tree_util.keystr(path)}` of shape "
                    f"{list(jnp.shape(leaf))}"
                )
        rows = {jnp.shape(leaf)[0] // chunks for leaf in jax.tree.leaves(x)}
        if len(rows) != 1:
            raise ValueError(f"`x` must be a tree of arrays of one batch, got {jax.tree.map(jnp.shape, x)}")
        (size,) = rows
        columns = jax.tree.map(lambda leaf: jnp.reshape(leaf, (size, chunks, *jnp.shape(leaf)[1:])), x)

        # Cut inside what is checkpointed, and from the batch as it lies: chunks are neither kept nor copied together.
        def encode(chunk: Array) -> Any:
            part = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, chunk, 1, keepdims=False), columns)
            embeddings = apply(params, part)
            for leaf in jax.tree.leaves(embeddings):
                checks.shape("apply(params, x)", leaf, (size, *jnp.shape(leaf)[1:]))
            return embeddings

        # Within a loop nothing can be shared with the first run, so XLA need not be kept from trying.
        embeddings = jax.lax.map(jax.checkpoint(encode, prevent_cse=False), jnp.arange(chunks))
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), embeddings)

    return cached
