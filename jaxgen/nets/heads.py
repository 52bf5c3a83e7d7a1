"""Heads of contrastive learning: multilayer perceptrons between an encoder's features and the embeddings of a loss.

With N a normalisation, W linear,

    mlp(h) = W_n relu(N W_(n-1) .. relu(N W_1 h))                                                       (1)

The projections and predictions of the literature are values of one type, f the encoder's number of features:

    SimCLR (Chen et al. 2020, arXiv:2002.05709): projection                      MLP((f, 128))
    BYOL (Grill et al. 2020, arXiv:2006.07733): projection and prediction alike  MLP((4096, 256))
    Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230): projection             MLP((8192, 8192, 8192))
    VICReg (Bardes et al. 2022, arXiv:2105.04906): expander                      MLP((8192, 8192, 8192))
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.dense import Dense
from jaxgen.nets.initialisation import variance_scaling
from jaxgen.nets.normalisation import BatchNorm
from jaxgen.typing import Array


class MLP(nn.Module):
    """Eq. 1: embeddings of features.

    ``apply(params, x [batch, any]) -> [batch, widths[-1]]`` in float32 (or wider, if ``dtype`` is). Linear layers have
    a bias where no normalisation follows.

    With BatchNorm embeddings depend on the batch while training; see ``calibrate`` for inference.

    Raises at trace time: TypeError for integer ``x``; ValueError for an ``x`` that is not [batch, any] or is empty,
    ``widths`` that are empty or below 1.

    Attributes:
        widths: features behind each linear layer, the last being the embeddings'.
        norm: what stands before each ReLU, made by ``norm(dtype=, name=)``; None for none. ``partial(BatchNorm,
            axis_name=)`` where pmap or shard_map split the batch; `RMSNorm` where examples must not be coupled.
        dtype: what the arithmetic is done in, statistics excepted; parameters stay float32.

    >>> import jax
    >>> from jaxgen import nets
    >>> model, x = nets.MLP((32, 8)), jnp.zeros((4, 16))
    >>> model.apply(nets.init(model, jax.random.key(0), x), x).shape
    (4, 8)
    """

    widths: tuple[int, ...]
    norm: Callable[..., Any] | None = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the head."""
        checks.floating("x", x)
        checks.shape("x", x, (None, None))
        if 0 in x.shape:
            raise ValueError(f"`x` must not be empty, got shape {list(x.shape)}")
        if not self.widths:
            raise ValueError(f"`widths` must hold at least one width, got {self.widths!r}")
        for width in self.widths:
            checks.positive_integer("widths", width)
        h = x
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            h = Dense(
                width,
                use_bias=last or self.norm is None,
                dtype=self.dtype,
                kernel_init=variance_scaling(1.0 if last else 2.0),
                name=f"linear_{i}",
            )(h)
            if not last:
                h = nn.relu(h if self.norm is None else self.norm(dtype=self.dtype, name=f"norm_{i}")(h))
        return h.astype(jnp.promote_types(h.dtype, jnp.float32))
