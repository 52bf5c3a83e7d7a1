"""The linear layer, and how it and the convolutions add their biases.

    y = x W + b                                                                                  (1)

The gradient of b is the sum of y's over everything that is not a feature: 65,536 numbers for 64 images of 32 x 32
pixels. In bfloat16 a running sum stops growing where its last digit outweighs what is added, after some hundreds of
terms. So b is added in float32, in which its gradient is then accumulated; the rest stays in the layer's dtype.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxgen.nets.initialisation import Initialiser, constant, variance_scaling
from jaxgen.typing import Array


def add_bias(y: Array, bias: Array) -> Array:
    """Y + b in float32 (or wider), rounded to y's dtype.

    Args:
        y: [..., features].
        bias: [features].
    """
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return (y.astype(wide) + bias.astype(wide)).astype(y.dtype)


class Dense(nn.Module):
    """Eq. 1 with learned ``kernel`` [inputs, features] and ``bias`` [features], as ``nn.Dense`` names them.

    ``apply(params, x [..., inputs]) -> [..., features]`` in ``dtype``.

    Attributes:
        features: outputs.
        use_bias: whether a bias is added.
        dtype: what the arithmetic is done in; parameters stay float32.
        kernel_init: draws the kernel.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initialiser = variance_scaling()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the layer."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return add_bias(y, self.param("bias", constant(0.0), (self.features,))) if self.use_bias else y
