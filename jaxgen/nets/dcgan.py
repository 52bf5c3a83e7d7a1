"""DCGAN: a generator of transposed convolutions and a discriminator of strided ones.

Radford et al. 2015 (arXiv:1511.06434). With z a latent, n widths w_1 .. w_n and images of s x s pixels,

    G:  z -> [s/2^n, s/2^n, w_n] -> .. -> [s/2, s/2, w_1] -> [s, s, channels]                           (1)
    D:  [s, s, channels] -> [s/2, s/2, w_1] -> .. -> [s/2^n, s/2^n, w_n] = phi(x) -> logit              (2)

The first arrow of (1) and the last of (2) are linear, the others the layers of `ConvAutoencoder`, decoder and encoder:
kernel 4, stride 2, padding 1. Between them lie ReLU in (1) and LeakyReLU 0.2 in (2), each behind a normalisation but
for the one after D's first layer; a tanh ends (1). Kernels start at 0.02 N(0, 1).

With classes G sees z beside a vector of the class, and D is told by the projection of Miyato & Koyama 2018
(arXiv:1802.05637, Eq. 3), a vector e of w_n entries per class,

    logit = w . phi(x) + b + e(y) . (sum of phi(x) over pixels)                                         (3)
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.convolution import Conv, ConvTranspose
from jaxgen.nets.embedding import LabelEmbedding, check_labels
from jaxgen.nets.initialisation import constant, normal
from jaxgen.nets.normalisation import BatchNorm
from jaxgen.typing import Array

Norm = Callable[..., Any] | None
"""A normalisation, made by ``norm(dtype=, name=)`` wherever one belongs, as by ``BatchNorm`` itself; None for none."""

_WIDTHS = (64, 128, 256, 512)


class DCGANGenerator(nn.Module):
    """Eq. 1: images in [-1, 1] from latents.

    ``apply(params, z [batch, any], labels [batch] int = None) -> [batch, size, size, channels]`` in float32 (or wider,
    if ``dtype`` is). z is standard normal, 100 long in the paper; with classes the class's vector is as long as z.

    With BatchNorm an image depends on its batch while training; see ``calibrate`` for inference.

    Raises at trace time: TypeError for integer ``z`` or non-integer ``labels``; ValueError for a ``size`` that does not
    suit the ``widths``, a ``z`` that is not [batch, any], labels missing although ``num_classes`` is set or given
    although it is not.

    Attributes:
        size: height and width of the images, a multiple of 2^len(widths).
        channels: of the images.
        num_classes: labels lie in [0, num_classes], the last being the null class; None for no labels.
        widths: channels at a half, a quarter .. of the images' size.
        norm: what stands before each ReLU; ``partial(BatchNorm, axis_name=)`` where pmap or shard_map split the batch.
        dtype: what the arithmetic is done in, statistics excepted; parameters stay float32.

    >>> import jax
    >>> from jaxgen import nets
    >>> model, z = nets.DCGANGenerator(size=32, channels=3), jax.random.normal(jax.random.key(0), (2, 100))
    >>> model.apply(nets.init(model, jax.random.key(1), z), z).shape
    (2, 32, 32, 3)
    """

    size: int
    channels: int
    num_classes: int | None = None
    widths: tuple[int, ...] = _WIDTHS
    norm: Norm = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, labels: Array | None = None) -> Array:
        """Generates images."""
        checks.floating("z", z)
        checks.shape("z", z, (None, None))
        check_labels(labels, self.num_classes, z.shape[0])
        smallest = _smallest(self.size, self.channels, self.widths)
        if labels is not None and self.num_classes is not None:
            z = jnp.concatenate([z, LabelEmbedding(self.num_classes, z.shape[1], name="label")(labels)], axis=1)
        h = _dense((smallest, smallest, self.widths[-1]), (-1,), self.dtype, "latent")(z)
        h = nn.relu(_normalised(self.norm, h, self.dtype, "latent_norm"))
        for i, width in enumerate((*self.widths[-2::-1], self.channels)):
            h = ConvTranspose(width, dtype=self.dtype, kernel_init=normal(0.02), name=f"up_{i}")(h)
            if i < len(self.widths) - 1:
                h = nn.relu(_normalised(self.norm, h, self.dtype, f"up_norm_{i}"))
        return jnp.tanh(h.astype(_wide(self.dtype)))


class DCGANDiscriminator(nn.Module):
    """Eq. 2 and 3: logits of images.

    ``apply(params, x [batch, size, size, channels], labels [batch] int = None) -> [batch]`` in float32 (or wider, if
    ``dtype`` is).

    The paper's discriminator has ``norm=BatchNorm``. Here there is none unless asked for: penalties of the critic's
    gradient (R1, R2) need logits each of which depends on its own image alone.

    Raises at trace time: TypeError for integer ``x`` or non-integer ``labels``; ValueError for a ``size`` that does not
    suit the ``widths``, an ``x`` that is not [batch, size, size, channels], labels missing although ``num_classes`` is
    set or given although it is not.

    Attributes:
        size: height and width of the images, a multiple of 2^len(widths).
        channels: of the images.
        num_classes: labels lie in [0, num_classes], the last being the null class; None for no labels.
        widths: channels at a half, a quarter .. of the images' size.
        norm: what stands before each LeakyReLU but the first; `BatchNorm` couples the batch, `GroupNorm` does not.
        dtype: what the arithmetic is done in, statistics and logits excepted; parameters stay float32.

    >>> import jax
    >>> from jaxgen import nets
    >>> model, x = nets.DCGANDiscriminator(size=32, channels=3), jnp.zeros((2, 32, 32, 3))
    >>> model.apply(nets.init(model, jax.random.key(0), x), x).shape
    (2,)
    """

    size: int
    channels: int
    num_classes: int | None = None
    widths: tuple[int, ...] = _WIDTHS
    norm: Norm = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, labels: Array | None = None) -> Array:
        """Judges images."""
        checks.floating("x", x)
        _smallest(self.size, self.channels, self.widths)
        checks.shape("x", x, (None, self.size, self.size, self.channels))
        check_labels(labels, self.num_classes, x.shape[0])
        h = x
        for i, width in enumerate(self.widths):
            h = Conv(width, 4, strides=2, padding=1, dtype=self.dtype, kernel_init=normal(0.02), name=f"down_{i}")(h)
            if i > 0:
                h = _normalised(self.norm, h, self.dtype, f"down_norm_{i}")
            h = nn.leaky_relu(h, 0.2)
        wide = _wide(self.dtype)
        h = h.astype(wide)  # one number per image is left to compute: float32 costs nothing
        logits = _dense((1,), (1, 2, 3), wide, "logit")(h)[:, 0]
        if labels is not None and self.num_classes is not None:
            vectors = LabelEmbedding(self.num_classes, self.widths[-1], std=0.02, name="label")(labels)
            logits += jnp.sum(vectors * jnp.sum(h, axis=(1, 2)), axis=1)
        return logits


def _dense(features: tuple[int, ...], axis: tuple[int, ...], dtype: Any, name: str) -> nn.DenseGeneral:
    return nn.DenseGeneral(features, axis, dtype=dtype, kernel_init=normal(0.02), bias_init=constant(0.0), name=name)


def _normalised(norm: Norm, h: Array, dtype: Any, name: str) -> Array:
    return h if norm is None else norm(dtype=dtype, name=name)(h)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _smallest(size: int, channels: int, widths: tuple[int, ...]) -> int:
    """Height and width of the smallest map."""
    checks.positive_integer("size", size)
    checks.positive_integer("channels", channels)
    if not widths:
        raise ValueError(f"`widths` must hold at least one width, got {widths!r}")
    for width in widths:
        checks.positive_integer("widths", width)
    divisor = 2 ** len(widths)
    if size % divisor:
        raise ValueError(f"`size` must be a multiple of {divisor} ({len(widths)} widths), got {size}")
    return size // divisor
