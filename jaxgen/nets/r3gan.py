"""R3GAN: a generator and a discriminator that are ResNets without normalisation.

Huang et al. 2024 (arXiv:2501.05441), Config E. With a = LeakyReLU 0.2, K convolutions without bias, and a width w_i for
the stage of 4 * 2^i pixels, a stage is a number of blocks

    block(h) = h + K_2 a(b_1 + K_1 a(b_0 + K_0 h))                                                  (1)

with K_0 1 x 1 to a multiple of the width, K_1 3 x 3 in groups, K_2 1 x 1 back. The pair mirror each other:

    G:  h = B (W z),    h <- stage(h),    h <- stage(up(K h)) ..,    x = K h                        (2)
    D:  h = K x,    h <- stage(h),    h <- stage(K down(h)) ..,    logit = w . sum(B h)             (3)

B is a [4, 4, w_0] basis: in G each channel of it is scaled by an entry of W z, in D each channel of the last map is
summed with its weights (a depthwise convolution by a kernel of the map's size). up and down are bilinear (`resample`;
borders repeat their pixels, where the authors' code has zeros), with a K, 1 x 1, where the width changes.

With classes G sees z beside a vector of the class, and in D, with e a vector of w_0 entries per class,

    logit = e(y) . W sum(B h)                                                                       (4)

Initialisation is fix-up's (Zhang et al. 2019, arXiv:1901.09321) with m = 3 layers a branch and L blocks in all: K_2 is
0, so that every block is the identity; the standard deviations of K_0 and K_1 are L^(-1/(2m - 2)) = L^(-1/4) of those
that keep the variance through a. Every other layer keeps the variance of what it is given.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.convolution import Conv
from jaxgen.nets.embedding import LabelEmbedding, check_labels
from jaxgen.nets.initialisation import normal, variance_scaling
from jaxgen.nets.resample import bilinear_downsample, bilinear_upsample
from jaxgen.typing import Array

_SLOPE = 0.2


class _Stage(nn.Module):
    """Blocks of Eq. 1: [batch, height, width, features] -> the same shape."""

    blocks: int
    stages: int
    expansion: int
    group_size: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> Array:
        features, hidden = h.shape[-1], self.expansion * h.shape[-1]
        fixup = variance_scaling(2 / (1 + _SLOPE**2) * (self.stages * self.blocks) ** -0.5)
        for i in range(self.blocks):
            inner = Conv(hidden, 1, dtype=self.dtype, kernel_init=fixup, name=f"block_{i}_0")(h)
            inner = Conv(
                hidden, groups=hidden // self.group_size, dtype=self.dtype, kernel_init=fixup, name=f"block_{i}_1"
            )(nn.leaky_relu(inner, _SLOPE))
            h = h + _linear(features, self.dtype, f"block_{i}_2", 0.0)(nn.leaky_relu(inner, _SLOPE))
        return h


class R3GANGenerator(nn.Module):
    """Eq. 2: images from latents.

    ``apply(params, z [batch, any], labels [batch] int = None) -> [batch, size, size, channels]`` in float32 (or wider,
    if ``dtype`` is), size = 4 * 2^(len(widths) - 1): 8 pixels from two widths, 128 from six. The output is linear. z is
    standard normal, 64 long in the authors' experiments; with classes the class's vector is as long as z.

    Each image depends on its own latent and label alone.

    Raises at trace time: TypeError for integer ``z`` or non-integer ``labels``; ValueError for empty ``widths``, a
    ``group_size`` that does not divide, a ``z`` that is not [batch, any], labels missing although ``num_classes`` is
    set or given although it is not.

    Attributes:
        channels: of the images.
        num_classes: labels lie in [0, num_classes], the last being the null class; None for no labels.
        widths: channels at 4, 8, 16 .. pixels; the authors' for CIFAR-10, to which FFHQ at 64 pixels adds 384.
        blocks: per stage.
        expansion: channels between K_0 and K_2, as a multiple of the width.
        group_size: channels in each group of K_1; divides ``expansion`` times each width. On CPU groups of 16 take some
            5 (8 pixels) to 15 times (32 pixels) as long as a convolution without groups of as many parameters.
        dtype: what the arithmetic is done in, the first and the last layer excepted; parameters stay float32.

    >>> import jax
    >>> from jaxgen import nets
    >>> model = nets.R3GANGenerator(channels=1, widths=(64, 32), num_classes=10)
    >>> z, labels = jax.random.normal(jax.random.key(0), (2, 64)), jnp.array([3, 7])
    >>> model.apply(nets.init(model, jax.random.key(1), z, labels), z, labels).shape
    (2, 8, 8, 1)
    """

    channels: int
    num_classes: int | None = None
    widths: tuple[int, ...] = (768, 768, 768, 768)
    blocks: int = 2
    expansion: int = 2
    group_size: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, labels: Array | None = None) -> Array:
        """Generates images."""
        checks.floating("z", z)
        checks.shape("z", z, (None, None))
        _check(self)
        check_labels(labels, self.num_classes, z.shape[0])
        if labels is not None and self.num_classes is not None:
            z = jnp.concatenate([z, LabelEmbedding(self.num_classes, z.shape[1], name="label")(labels)], axis=1)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        basis = self.param("basis", normal(1.0), (4, 4, self.widths[0]))
        scales = nn.Dense(self.widths[0], use_bias=False, dtype=wide, kernel_init=variance_scaling(), name="latent")(z)
        h = (basis * scales[:, None, None]).astype(self.dtype)
        for i, width in enumerate(self.widths):
            if width != h.shape[-1]:
                h = _linear(width, self.dtype, f"width_{i}")(h)
            if i > 0:
                h = bilinear_upsample(h)
            h = _stage(self, i)(h)
        return _linear(self.channels, wide, "out")(h)


class R3GANDiscriminator(nn.Module):
    """Eq. 3 and 4: logits of images.

    ``apply(params, x [batch, size, size, channels], labels [batch] int = None) -> [batch]`` in float32 (or wider, if
    ``dtype`` is), size = 4 * 2^(len(widths) - 1). Each logit depends on its own image and label alone, as penalties of
    the critic's gradient need it.

    Raises at trace time: TypeError for integer ``x`` or non-integer ``labels``; ValueError for empty ``widths``, a
    ``group_size`` that does not divide, an ``x`` that is not [batch, size, size, channels], labels missing although
    ``num_classes`` is set or given although it is not.

    Attributes:
        channels: of the images.
        num_classes: labels lie in [0, num_classes], the last being the null class; None for no labels.
        widths: channels at 4, 8, 16 .. pixels, the generator's in the authors' experiments.
        blocks: per stage.
        expansion: channels between K_0 and K_2, as a multiple of the width.
        group_size: channels in each group of K_1; divides ``expansion`` times each width.
        dtype: what the arithmetic is done in, the last layer excepted; parameters stay float32.

    >>> import jax
    >>> from jaxgen import nets
    >>> model, x = nets.R3GANDiscriminator(channels=1, widths=(64, 32)), jnp.zeros((2, 8, 8, 1))
    >>> model.apply(nets.init(model, jax.random.key(0), x), x).shape
    (2,)
    """

    channels: int
    num_classes: int | None = None
    widths: tuple[int, ...] = (768, 768, 768, 768)
    blocks: int = 2
    expansion: int = 2
    group_size: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, labels: Array | None = None) -> Array:
        """Judges images."""
        checks.floating("x", x)
        _check(self)
        size = 4 * 2 ** (len(self.widths) - 1)
        checks.shape("x", x, (None, size, size, self.channels))
        check_labels(labels, self.num_classes, x.shape[0])
        h = _linear(self.widths[-1], self.dtype, "in")(x)
        for i, width in reversed(list(enumerate(self.widths))):
            if i < len(self.widths) - 1:
                h = bilinear_downsample(h)
            if width != h.shape[-1]:
                h = _linear(width, self.dtype, f"width_{i}")(h)
            h = _stage(self, i)(h)
        wide, features = jnp.promote_types(self.dtype, jnp.float32), self.widths[0]
        basis = self.param("basis", normal(0.25), (4, 4, features))
        pooled = jnp.sum(basis * h, axis=(1, 2))  # float32, as parameters are

        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=wide, kernel_init=variance_scaling(), name="logit")

        if labels is None or self.num_classes is None:
            return dense(1)(pooled)[:, 0]
        vectors = LabelEmbedding(self.num_classes, features, std=features**-0.5, name="label")(labels)
        return jnp.sum(vectors * dense(features)(pooled), axis=1)


def _linear(features: int, dtype: Any, name: str, scale: float = 1.0) -> Conv:
    return Conv(features, 1, use_bias=False, dtype=dtype, kernel_init=variance_scaling(scale), name=name)


def _stage(model: R3GANGenerator | R3GANDiscriminator, i: int) -> _Stage:
    return _Stage(model.blocks, len(model.widths), model.expansion, model.group_size, model.dtype, name=f"stage_{i}")


def _check(model: R3GANGenerator | R3GANDiscriminator) -> None:
    for name in ("channels", "blocks", "expansion", "group_size"):
        checks.positive_integer(name, getattr(model, name))
    if not model.widths:
        raise ValueError(f"`widths` must hold at least one width, got {model.widths!r}")
    for width in model.widths:
        checks.positive_integer("widths", width)
        if model.expansion * width % model.group_size:
            raise ValueError(
                f"`group_size` must divide {model.expansion} times each width, got {model.group_size} and {width}"
            )
