"""The convolutional autoencoder: four strided convolutions down, four transposed ones back up, no time input.

The simplest network that maps images to images. As a denoiser it sees the noise level only in the image
itself; the ``UNet`` beside it is told the time. The layers and their order follow DCGAN (Radford et al. 2015,
https://arxiv.org/abs/1511.06434).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.convolution import Conv, ConvTranspose
from jaxgen.nets.initialisation import normal
from jaxgen.nets.normalisation import BatchNorm
from jaxgen.typing import Array

_WIDTHS = (64, 128, 256, 512)


class ConvAutoencoder(nn.Module):
    """Encodes images to 512 channels at a sixteenth of their size and decodes them, into [-1, 1].

    Down: convolutions to 64, 128, 256 and 512 channels, kernel 4, stride 2, padding 1, BatchNorm on all but
        the first,
    LeakyReLU 0.2. Up: transposed convolutions to 256, 128, 64 and the image's own channels, the same kernel,
    BatchNorm and ReLU on all but the last, tanh. Training normalises by the batch; see ``calibrate`` for
    inference.

    ``apply(params, x [batch, height, width, channels]) -> [batch, height, width, channels]``, height and
    width multiples of 16, x floating-point (images in [-1, 1]).

    Attributes:
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any.
        dtype: what the arithmetic is done in; parameters stay float32.

    >>> import jax
    >>> from jaxgen import nets
    >>> model = nets.ConvAutoencoder()
    >>> x = jax.random.uniform(jax.random.key(1), (1, 64, 64, 3), minval=-1.0)
    >>> params = nets.init(model, jax.random.key(0), x)
    >>> denoise = lambda x, t: model.apply(params, x)    # takes no time input
    >>> denoise(x, jnp.array([10])).shape
    (1, 64, 64, 3)
    """

    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Encodes and decodes."""
        checks.floating("x", x)
        checks.shape("x", x, (None, None, None, None))
        if x.shape[1] % 16 or x.shape[2] % 16 or 0 in x.shape:
            raise ValueError(f"`x` must have a height and width that 16 divides, got shape {list(x.shape)}")
        channels = x.shape[-1]
        for i, width in enumerate(_WIDTHS):
            x = Conv(width, 4, strides=2, padding=1, dtype=self.dtype, kernel_init=normal(0.02), name=f"down_{i}")(x)
            if i > 0:
                x = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"down_norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        for i, width in enumerate((*_WIDTHS[-2::-1], channels)):
            x = ConvTranspose(width, dtype=self.dtype, kernel_init=normal(0.02), name=f"up_{i}")(x)
            if i < len(_WIDTHS) - 1:
                x = nn.relu(BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"up_norm_{i}")(x))
        return jnp.tanh(x)
