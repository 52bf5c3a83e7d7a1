"""The U-Net of diffusion models: residual blocks and attention at falling and rising resolution.

DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239) and, with ``scale_shift``, ADM (Dhariwal & Nichol
2021, https://arxiv.org/abs/2105.05233). With h the image's features and e the embedding of time and class, a
block is

    h' = conv_0(silu(norm_0(h)))
    h' = norm_1(h' + W e)              additive (DDPM)                                             (1)
    h' = norm_1(h') (1 + W_s e) + W_b e     scale and shift (ADM)                                  (2)
    block(h) = shortcut(h) + conv_1(dropout(silu(h')))                                             (3)

The convolution that follows each doubling of the image is folded into it (``upsample_convolve``): the same
numbers in 16/36 of the work.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen import random as jaxgen_random
from jaxgen.nets.convolution import Conv, upsample_convolve
from jaxgen.nets.dense import Dense, add_bias
from jaxgen.nets.embedding import LabelEmbedding, check_labels, time_embedding
from jaxgen.nets.initialisation import Initialiser, constant, variance_scaling
from jaxgen.nets.normalisation import GroupNorm
from jaxgen.typing import Array


def _last(zero_init: bool) -> Initialiser:
    return constant(0.0) if zero_init else variance_scaling()


def _dense(features: int, dtype: Any, name: str) -> Dense:
    return Dense(features, dtype=dtype, name=name)


class _Block(nn.Module):
    """Eq. 1 to 3: (h [batch, height, width, any], e [batch, any]) -> [batch, height, width, features]."""

    features: int
    groups: int
    eps: float
    dropout: float
    scale_shift: bool
    zero_init: bool
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, embedding: Array) -> Array:
        shortcut = h
        h = GroupNorm(groups=self.groups, eps=self.eps, silu=True, dtype=self.dtype, name="norm_0")(h)
        h = Conv(self.features, dtype=self.dtype, name="conv_0")(h)
        width = self.features * (2 if self.scale_shift else 1)
        told = _dense(width, self.dtype, "embedding")(nn.silu(embedding))[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(told, 2, axis=-1)
            h = GroupNorm(groups=self.groups, eps=self.eps, dtype=self.dtype, name="norm_1")(h)
            h = nn.silu(h * (1 + scale) + shift)
        else:
            h = GroupNorm(groups=self.groups, eps=self.eps, silu=True, dtype=self.dtype, name="norm_1")(h + told)
        if self.dropout > 0 and self.has_rng("dropout"):
            keys = jaxgen_random.example_keys(self.make_rng("dropout"), h.shape[0], axis_name=self.axis_name)
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, h.shape[1:]))(keys)
            h = jnp.where(keep, h / (1 - self.dropout), 0).astype(h.dtype)
        h = Conv(self.features, dtype=self.dtype, kernel_init=_last(self.zero_init), name="conv_1")(h)
        if shortcut.shape[-1] != self.features:
            shortcut = Conv(self.features, 1, dtype=self.dtype, name="shortcut")(shortcut)
        return shortcut + h


class _Attention(nn.Module):
    """Self-attention over all pixels, with a residual: [batch, height, width, channels] -> the same."""

    heads: int
    head_dim: int | None
    groups: int
    eps: float
    zero_init: bool
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> Array:
        batch, height, width, channels = h.shape
        divisor, name = (self.heads, "heads") if self.head_dim is None else (self.head_dim, "head_dim")
        if channels % divisor:
            raise ValueError(f"`{name}` must divide the {channels} channels that attend, got {divisor}")
        heads = self.heads if self.head_dim is None else channels // self.head_dim
        normed = GroupNorm(groups=self.groups, eps=self.eps, dtype=self.dtype, name="norm")(h)
        query, key, value = (
            Conv(channels, 1, dtype=self.dtype, name=role)(normed).reshape(batch, height * width, heads, -1)
            for role in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value).reshape(h.shape)
        return h + Conv(channels, 1, dtype=self.dtype, kernel_init=_last(self.zero_init), name="out")(mixed)


class _Upsample(nn.Module):
    """Doubles the image and convolves it, 3 x 3."""

    upsample: Callable[[Array, Array], Array]
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> Array:
        features = h.shape[-1]
        kernel = self.param("kernel", variance_scaling(), (3, 3, features, features)).astype(self.dtype)
        y = self.upsample(h.astype(self.dtype), kernel)
        return add_bias(y, self.param("bias", constant(0.0), (features,)))


class UNet(nn.Module):
    """A time-conditional, optionally class-conditional U-Net.

    ``apply(params, x [batch, height, width, channels], t [batch], labels [batch] int = None)
    -> [batch, height, width, out_channels]`` in float32 (or wider, if ``dtype`` is). ``t`` may be [batch, times] where
    the network is told several, such as the two ends of a step.

    Height and width must be multiples of 2^(len(multipliers) - 1). The levels lie at sizes height, height /
    2, ...; which of them attend depends on ``attention`` and so the parameters depend on the size that
    ``init`` saw, unless ``attention_levels`` says it.

    Dropout acts exactly when ``apply`` is given ``rngs={'dropout': key}``; example i's mask is drawn from
    (key, i) alone.

    Raises at trace time: TypeError for integer ``x`` or non-integer ``labels``; ValueError for sizes that do
    not divide, a ``t`` that is not [batch] or [batch, times], labels missing although ``num_classes`` is set
    or given although it is not, an ``attention_levels`` or ``downsample_padding`` out of range.

    Attributes:
        out_channels: of the output.
        channels: of the first level.
        multipliers: of ``channels``, one per level.
        blocks: residual blocks per level going down; one more going up.
        attention: the image heights at whose levels each block is followed by attention. The middle attends
            too, unless this is empty.
        heads: attention heads.
        head_dim: channels per head; instead of ``heads``.
        num_classes: labels lie in [0, num_classes], the last being the null class; None for no labels.
        dropout: in [0, 1).
        scale_shift: Eq. 2 (ADM) instead of Eq. 1 (DDPM).
        time_scale: multiplies t; 1000 for paths whose time runs over [0, 1], as the embedding expects DDPM's
            steps.
        upsample: (x, kernel) -> the convolution of x doubled; replace it to try another one.
        groups: of all GroupNorms.
        zero_init: whether the last convolution of each residual branch, and of the network, starts at zero.
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any (for dropout).
        dtype: what the arithmetic is done in, statistics and softmax excepted; parameters stay float32.
        attention_levels: the levels that attend, counted from 0, whatever the image's size; instead of
            ``attention``.
        middle_attention: whether the middle attends; None leaves it to ``attention`` (``attention_levels``).
        eps: of all GroupNorms.
        downsample_padding: zeros (before, after) both axes where the image is halved: (0, 1) or (1, 1).
        freq_shift: of ``time_embedding``.
        flip_sin_to_cos: likewise.

    >>> from jaxgen import nets
    >>> model = nets.UNet(out_channels=1, channels=32, multipliers=(1, 2), blocks=1, num_classes=10)
    >>> x, t, labels = jnp.zeros((2, 8, 8, 1)), jnp.array([0.0, 999.0]), jnp.array([3, 10])
    >>> params = nets.init(model, jax.random.key(0), x, t, labels)
    >>> jax.jit(model.apply)(params, x, t, labels).shape
    (2, 8, 8, 1)
    """

    out_channels: int
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    heads: int = 1
    head_dim: int | None = None
    num_classes: int | None = None
    dropout: float = 0.0
    scale_shift: bool = False
    time_scale: float = 1.0
    upsample: Callable[[Array, Array], Array] = upsample_convolve
    groups: int = 32
    zero_init: bool = True
    axis_name: str | None = None
    dtype: Any = jnp.float32
    attention_levels: tuple[int, ...] | None = None
    middle_attention: bool | None = None
    eps: float = 1e-6
    downsample_padding: tuple[int, int] = (0, 1)
    freq_shift: float = 1.0
    flip_sin_to_cos: bool = False

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array | None = None) -> Array:
        """Applies the network."""
        self._check(x, t, labels)
        embedding = self._embed(t, labels)
        levels = [(level, self.channels * m) for level, m in enumerate(self.multipliers)]

        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(x)
        skips = [h]
        for level, features in levels:
            for i in range(self.blocks):
                h = self._stage("down", level, i, features, h, embedding)
                skips.append(h)
            if level < len(levels) - 1:
                padding = (self.downsample_padding, self.downsample_padding)
                h = Conv(features, strides=2, padding=padding, dtype=self.dtype, name=f"down_{level}_sample")(h)
                skips.append(h)

        h = self._block("middle_block_0", h.shape[-1])(h, embedding)
        attends = self.attention if self.attention_levels is None else self.attention_levels
        if attends if self.middle_attention is None else self.middle_attention:
            h = self._attend("middle_attention")(h)
        h = self._block("middle_block_1", h.shape[-1])(h, embedding)

        for level, features in reversed(levels):
            for i in range(self.blocks + 1):
                h = self._stage("up", level, i, features, jnp.concatenate([h, skips.pop()], axis=-1), embedding)
            if level > 0:
                h = _Upsample(self.upsample, self.dtype, name=f"up_{level}_sample")(h)

        h = GroupNorm(groups=self.groups, eps=self.eps, silu=True, dtype=self.dtype, name="norm_out")(h)
        h = Conv(self.out_channels, dtype=self.dtype, kernel_init=_last(self.zero_init), name="conv_out")(h)
        return h.astype(jnp.promote_types(h.dtype, jnp.float32))

    def _embed(self, t: Array, labels: Array | None) -> Array:
        times = jnp.reshape(jnp.asarray(t) * self.time_scale, -1)
        waves = time_embedding(times, self.channels, freq_shift=self.freq_shift, flip_sin_to_cos=self.flip_sin_to_cos)
        waves = waves.reshape(jnp.shape(t)[0], -1).astype(self.dtype)
        embedding = _dense(4 * self.channels, self.dtype, "time_0")(waves)
        embedding = _dense(4 * self.channels, self.dtype, "time_1")(nn.silu(embedding))
        if labels is not None and self.num_classes is not None:
            embedding += LabelEmbedding(self.num_classes, 4 * self.channels, name="label")(labels).astype(self.dtype)
        return embedding

    def _stage(self, side: str, level: int, i: int, features: int, h: Array, embedding: Array) -> Array:
        h = self._block(f"{side}_{level}_block_{i}", features)(h, embedding)
        levels = self.attention_levels
        attends = h.shape[1] in self.attention if levels is None else level in levels
        return self._attend(f"{side}_{level}_attention_{i}")(h) if attends else h

    def _block(self, name: str, features: int) -> _Block:
        return _Block(
            features,
            self.groups,
            self.eps,
            self.dropout,
            self.scale_shift,
            self.zero_init,
            self.axis_name,
            self.dtype,
            name=name,
        )

    def _attend(self, name: str) -> _Attention:
        return _Attention(self.heads, self.head_dim, self.groups, self.eps, self.zero_init, self.dtype, name=name)

    def _check(self, x: Array, t: Array, labels: Array | None) -> None:
        checks.floating("x", x)
        checks.shape("x", x, (None, None, None, None))
        divisor = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % divisor or x.shape[2] % divisor or 0 in x.shape:
            raise ValueError(
                f"`x` must have a height and width that {divisor} divides ({len(self.multipliers)} levels), "
                f"got shape {list(x.shape)}"
            )
        checks.shape("t", t, (x.shape[0], None)[: max(jnp.ndim(t), 1)])
        if self.downsample_padding not in ((0, 1), (1, 1)):
            raise ValueError(f"`downsample_padding` must be (0, 1) or (1, 1), got {self.downsample_padding}")
        strays = [level for level in self.attention_levels or () if not 0 <= level < len(self.multipliers)]
        if strays:
            raise ValueError(f"`attention_levels` must lie in [0, {len(self.multipliers) - 1}], got {strays[0]}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout:g}")
        check_labels(labels, self.num_classes, x.shape[0])
