"""Multi-head self-attention of tokens.

    attend(q, k, v) = softmax(q k^T / sqrt(d)) v         for each head of d features             (1)

Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762). With normalised queries and keys (Dehghani et al. 2023,
https://arxiv.org/abs/2302.05442) the logits cannot grow without bound, which is how large transformers in
half precision diverge.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.dense import Dense
from jaxgen.nets.initialisation import variance_scaling
from jaxgen.nets.normalisation import RMSNorm
from jaxgen.typing import Array

Attention = Callable[[Array, Array, Array], Array]
"""Eq. 1: (query, key, value), each [batch, tokens, heads, features of a head] -> the same shape."""


class SelfAttention(nn.Module):
    """Self-attention, Eq. 1, between linear layers.

    Parameters: ``qkv`` [features, 3 features] with the queries' columns first, then the keys' and the values', each
    head by head; ``out`` [features, features]; ``query_norm`` and ``key_norm`` [features / heads] if asked for.

    ``apply(params, x [batch, tokens, features]) -> [batch, tokens, features]`` in ``dtype``. Raises ValueError where
    ``heads`` does not divide the features.

    Attributes:
        heads: must divide the features.
        qk_norm: whether queries and keys are divided by their root mean square, head by head.
        rotate: applied to queries and keys, [batch, tokens, heads, features / heads], such as one of ``Positions``.
        dtype: what the arithmetic is done in, normalisation and softmax excepted; parameters stay float32.
        attention: Eq. 1, (query, key, value) -> mixed values: `flash_attention` keeps no logits on TPUs.
    """

    heads: int
    qk_norm: bool = False
    rotate: Callable[[Array], Array] | None = None
    dtype: Any = jnp.float32
    attention: Attention = jax.nn.dot_product_attention

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the attention."""
        checks.floating("x", x)
        checks.shape("x", x, (None, None, None))
        batch, tokens, features = x.shape
        checks.positive_integer("heads", self.heads)
        if features % self.heads:
            raise ValueError(f"`heads` must divide the {features} features of a token, got {self.heads}")
        qkv = self._dense(3 * features, "qkv")(x).reshape(batch, tokens, 3, self.heads, features // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            query = RMSNorm(dtype=self.dtype, name="query_norm")(query)
            key = RMSNorm(dtype=self.dtype, name="key_norm")(key)
        if self.rotate is not None:
            query, key = self.rotate(query), self.rotate(key)
        return self._dense(features, "out")(self.attention(query, key, value).reshape(x.shape))

    def _dense(self, features: int, name: str) -> Dense:
        glorot = variance_scaling(mode="fan_avg")
        return Dense(features, dtype=self.dtype, kernel_init=glorot, name=name)
