"""Residual networks: images to features, or to logits of classes.

He et al. 2015 (arXiv:1512.03385), with N a normalisation, K a convolution, P the identity, or N K where the shape
changes:

    block(h) = relu(P h + N K_2 relu(N K_1 h))                           both 3 x 3, w channels         (1)
    block(h) = relu(P h + N K_3 relu(N K_2 relu(N K_1 h)))               1 x 1, 3 x 3, 1 x 1 to 4 w     (2)
    ResNet:  h = stem(x),    h <- stage(h) ..,    features = mean of h over pixels                      (3)

(1) is the basic block, (2) the bottleneck. The first block of each stage but the first halves the image and doubles w.
In (2) the 3 x 3 convolution halves ("v1.5", Goyal et al. 2017, arXiv:1706.02677, section 5.1), where He et al. have the
first 1 x 1 do so, which leaves three pixels of four unseen.

Zagoruyko & Komodakis 2016 (arXiv:1605.07146), with R = relu(N .) and P the identity, or K R where the shape changes:

    block(h) = P h + K_2 R K_1 R h                                       both 3 x 3                     (4)
    WideResNet:  h = K x,    h <- stage(h) ..,    features = mean of R h over pixels                    (5)

Here the branches add to h unhindered ("pre-activation", He et al. 2016, arXiv:1603.05027), in three stages.

Convolutions have no bias and keep the variance of what they pass back (fan-out); the classifier starts at 0.01 N(0, 1).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.convolution import Conv
from jaxgen.nets.initialisation import constant, normal, variance_scaling
from jaxgen.nets.normalisation import BatchNorm
from jaxgen.typing import Array

Norm = Callable[..., Any]
"""A normalisation, made by ``norm(dtype=, name=)`` wherever one belongs, as by ``BatchNorm`` itself."""


class Stem(NamedTuple):
    """The first layers of a ResNet: a convolution, normalisation, ReLU and perhaps pooling.

    Attributes:
        kernel_size: of the convolution, odd.
        strides: of the convolution.
        pool: whether the maximum over 3 x 3 pixels halves the image after it.
    """

    kernel_size: int
    strides: int
    pool: bool


imagenet_stem = Stem(kernel_size=7, strides=2, pool=True)
"""He et al.'s: a quarter of the image's size, for images of some 224 pixels."""

cifar_stem = Stem(kernel_size=3, strides=1, pool=False)
"""For images of some 32 pixels, as in SimCLR (Chen et al. 2020, arXiv:2002.05709, appendix B.9): keeps their size."""


class _Block(nn.Module):
    """Eq. 1 or 2: [batch, height, width, channels] -> [batch, height', width', w or 4 w]."""

    width: int
    strides: int
    bottleneck: bool
    norm: Norm
    zero_init: bool
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> Array:
        layers = [(self.width, 3, self.strides), (self.width, 3, 1)]
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.strides), (4 * self.width, 1, 1)]
        inner = h
        for i, (features, size, strides) in enumerate(layers):
            inner = nn.relu(inner) if i > 0 else inner
            inner = _conv(features, size, strides, self.dtype, f"conv_{i}")(inner)
            inner = self.norm(dtype=self.dtype, name=f"norm_{i}")(inner)
        if self.zero_init and self.is_initializing():
            self._zero_scale(f"norm_{len(layers) - 1}", inner.shape[-1])
        if h.shape[-1] != inner.shape[-1]:
            h = _conv(inner.shape[-1], 1, self.strides, self.dtype, "shortcut")(h)
            h = self.norm(dtype=self.dtype, name="shortcut_norm")(h)
        return nn.relu(h + inner)

    def _zero_scale(self, name: str, features: int) -> None:
        # Afterwards, so that ``norm`` can make any normalisation, told no more than its dtype and name.
        params: dict[str, Any] = self.get_variable("params", name) or {}
        if "scale" not in params:
            raise ValueError(f"`zero_init` needs a `norm` whose parameters hold 'scale', got {sorted(params)}")
        self.put_variable("params", name, {**params, "scale": constant(0.0)(None, (features,))})


class ResNet(nn.Module):
    """Eq. 3: features or logits of images.

    ``apply(params, x [batch, height, width, channels]) -> [batch, features]`` in float32 (or wider, if ``dtype`` is),
    or ``[batch, num_classes]``; images may be of any size. Features are the last stage's channels. From a classifier's
    parameters ``model.clone(num_classes=None).apply`` computes them.

    The paper's sizes are `ResNet18`, `ResNet34` and `ResNet50`.

    With BatchNorm features depend on the batch while training; see ``calibrate`` for inference. With `GroupNorm` they
    never do.

    Raises at trace time: TypeError for integer ``x``; ValueError for an ``x`` that is not [batch, height, width,
    channels] or is empty, ``blocks`` that are empty, sizes below 1, an even ``kernel_size`` of the ``stem``, a ``norm``
    without a parameter 'scale' where ``zero_init`` is set.

    Attributes:
        blocks: per stage.
        bottleneck: whether blocks are Eq. 2's.
        num_classes: how many logits; None for features.
        stem: the first layers: `imagenet_stem` or `cifar_stem`.
        width: of the stem and the first stage, w.
        norm: ``partial(BatchNorm, axis_name=)`` where pmap or shard_map split the batch; ``partial(GroupNorm,
            groups=)`` where ``width`` is no multiple of 32.
        zero_init: whether the scale of each block's last normalisation starts at zero, so that at first a block is P
            alone (Goyal et al.), as in the encoders of SimCLR, Barlow Twins and VICReg; He et al.'s starts at one.
        dtype: what the arithmetic is done in, statistics, mean and logits excepted; parameters stay float32.

    >>> import jax
    >>> from jaxgen import nets
    >>> model, x = nets.ResNet18(stem=nets.cifar_stem, width=8), jnp.zeros((2, 32, 32, 3))
    >>> jax.jit(model.apply)(nets.init(model, jax.random.key(0), x), x).shape
    (2, 64)
    """

    blocks: tuple[int, ...]
    bottleneck: bool = False
    num_classes: int | None = None
    stem: Stem = imagenet_stem
    width: int = 64
    norm: Norm = BatchNorm
    zero_init: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the network."""
        _check(x, width=self.width, num_classes=self.num_classes)
        self._check()
        h = _conv(self.width, self.stem.kernel_size, self.stem.strides, self.dtype, "stem")(x)
        h = nn.relu(self.norm(dtype=self.dtype, name="stem_norm")(h))
        if self.stem.pool:
            h = nn.max_pool(h, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, blocks in enumerate(self.blocks):
            for j in range(blocks):
                width, strides, name = self.width * 2**i, 2 if i > 0 and j == 0 else 1, f"stage_{i}_block_{j}"
                h = _Block(width, strides, self.bottleneck, self.norm, self.zero_init, self.dtype, name=name)(h)
        return _head(h, self.num_classes)

    def _check(self) -> None:
        if not self.blocks:
            raise ValueError(f"`blocks` must hold at least one stage, got {self.blocks!r}")
        for blocks in self.blocks:
            checks.positive_integer("blocks", blocks)
        checks.positive_integer("stem.kernel_size", self.stem.kernel_size)
        checks.positive_integer("stem.strides", self.stem.strides)
        if self.stem.kernel_size % 2 == 0:
            raise ValueError(f"`stem.kernel_size` must be odd, got {self.stem.kernel_size}")


# He et al.'s table 1. Parameters are those of 1,000 classes:
ResNet18 = functools.partial(ResNet, blocks=(2, 2, 2, 2))
"""11.7 M parameters, 512 features."""

ResNet34 = functools.partial(ResNet, blocks=(3, 4, 6, 3))
"""21.8 M parameters, 512 features."""

ResNet50 = functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True)
"""25.6 M parameters, 2,048 features."""


class _WideBlock(nn.Module):
    """Eq. 4: [batch, height, width, channels] -> [batch, height', width', features]."""

    features: int
    strides: int
    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> Array:
        active = nn.relu(self.norm(dtype=self.dtype, name="norm_0")(h))
        inner = _conv(self.features, 3, self.strides, self.dtype, "conv_0")(active)
        inner = nn.relu(self.norm(dtype=self.dtype, name="norm_1")(inner))
        inner = _conv(self.features, 3, 1, self.dtype, "conv_1")(inner)
        if h.shape[-1] != self.features:
            h = _conv(self.features, 1, self.strides, self.dtype, "shortcut")(active)
        return h + inner


class WideResNet(nn.Module):
    """Eq. 5: features or logits of images of some 32 pixels; by default WRN-28-10, 36.5 M parameters.

    ``apply(params, x [batch, height, width, channels]) -> [batch, features]`` in float32 (or wider, if ``dtype`` is),
    or ``[batch, num_classes]``; images may be of any size. Features are the last stage's channels, 640 by default.

    Normalisation, and features from a classifier's parameters, are as in `ResNet`.

    Raises at trace time: TypeError for integer ``x``; ValueError for an ``x`` that is not [batch, height, width,
    channels] or is empty, a ``depth`` that is not 6 n + 4, sizes below 1.

    Attributes:
        depth: 6 n + 4 for n blocks per stage.
        widening: the stages have 1, 2 and 4 times ``width`` times this many channels.
        num_classes: how many logits; None for features.
        width: channels of the first convolution.
        norm: ``partial(BatchNorm, axis_name=)`` where pmap or shard_map split the batch; ``partial(GroupNorm,
            groups=)`` where ``width`` is no multiple of 32, such as the default.
        dtype: what the arithmetic is done in, statistics, mean and logits excepted; parameters stay float32.

    >>> import jax
    >>> from jaxgen import nets
    >>> model, x = nets.WideResNet(depth=10, widening=2, num_classes=10), jnp.zeros((2, 32, 32, 3))
    >>> jax.jit(model.apply)(nets.init(model, jax.random.key(0), x), x).shape
    (2, 10)
    """

    depth: int = 28
    widening: int = 10
    num_classes: int | None = None
    width: int = 16
    norm: Norm = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the network."""
        _check(x, depth=self.depth, widening=self.widening, width=self.width, num_classes=self.num_classes)
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"`depth` must be 6 n + 4 for n blocks per stage, got {self.depth}")
        h = _conv(self.width, 3, 1, self.dtype, "stem")(x)
        for i in range(3):
            for j in range((self.depth - 4) // 6):
                features, strides = self.width * self.widening * 2**i, 2 if i > 0 and j == 0 else 1
                h = _WideBlock(features, strides, self.norm, self.dtype, name=f"stage_{i}_block_{j}")(h)
        h = nn.relu(self.norm(dtype=self.dtype, name="norm_out")(h))
        return _head(h, self.num_classes)


def _conv(features: int, kernel_size: int, strides: int, dtype: Any, name: str) -> Conv:
    """Padded alike on both sides, which 'SAME' with a stride is not."""
    return Conv(
        features,
        kernel_size,
        strides=strides,
        padding=kernel_size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=variance_scaling(2.0, mode="fan_out"),
        name=name,
    )


def _head(h: Array, num_classes: int | None) -> Array:
    """The mean over pixels and, of classifiers, the logits: in float32, for it costs nothing."""
    wide = jnp.promote_types(h.dtype, jnp.float32)
    features = jnp.mean(h.astype(wide), axis=(1, 2))
    if num_classes is None:
        return features
    dense = nn.Dense(num_classes, dtype=wide, kernel_init=normal(0.01), bias_init=constant(0.0), name="logits")
    return dense(features)


def _check(x: Array, *, num_classes: int | None, **sizes: int) -> None:
    checks.floating("x", x)
    checks.shape("x", x, (None, None, None, None))
    if 0 in x.shape:
        raise ValueError(f"`x` must not be empty, got shape {list(x.shape)}")
    for name, value in sizes.items():
        checks.positive_integer(name, value)
    if num_classes is not None:
        checks.positive_integer("num_classes", num_classes)
