"""The diffusion transformer: attention over patches of the image, told the time and the class by adaLN-zero.

DiT (Peebles & Xie 2022, https://arxiv.org/abs/2212.09748). With c the embedding of time and class, LN a layer norm
without parameters, and six vectors per block (shift, scale, gate; twice) from one linear layer of silu(c),

    h <- h + gate_0 attention(LN(h) (1 + scale_0) + shift_0)                                     (1)
    h <- h + gate_1 mlp(LN(h) (1 + scale_1) + shift_1)                                           (2)
    output = unpatchify(W (LN(h) (1 + scale) + shift))                                           (3)

The linear layers of the modulations and W start at zero: each block is the identity and the network's output is 0.
Other weights have Glorot's variance, the embeddings' 0.02^2, as in the paper; all are drawn from normal distributions.

The blocks are one ``scan`` over stacked parameters, so that compilation does not grow with the depth.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.attention import Attention, SelfAttention
from jaxgen.nets.dense import Dense
from jaxgen.nets.embedding import LabelEmbedding, check_labels, time_embedding
from jaxgen.nets.initialisation import Initialiser, constant, normal, variance_scaling
from jaxgen.nets.normalisation import layer_norm
from jaxgen.nets.patches import patchify, unpatchify
from jaxgen.nets.positions import Positions, sincos_positions
from jaxgen.typing import Array

_WAVES = 256  # features of the time's sinusoids
_GLOROT, _ZERO = variance_scaling(mode="fan_avg"), constant(0.0)


def _dense(features: int, dtype: Any, name: str, kernel_init: Initialiser = _GLOROT) -> Dense:
    return Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def _modulation(condition: Array, parts: int, dtype: Any) -> list[Array]:
    """``parts`` vectors of c's length from silu(c), [batch, 1, features] each; zero at first."""
    vectors = _dense(parts * condition.shape[-1], dtype, "modulation", _ZERO)(nn.silu(condition))
    return jnp.split(vectors[:, None], parts, axis=-1)


def _modulated(h: Array, shift: Array, scale: Array) -> Array:
    return layer_norm(h) * (1 + scale) + shift


class _Block(nn.Module):
    """Eq. 1 and 2: (h [batch, tokens, features], c [batch, features]) -> (h, None), as ``scan`` has it."""

    heads: int
    mlp_ratio: int
    qk_norm: bool
    rotate: Callable[[Array], Array] | None
    dtype: Any
    attention: Attention

    @nn.compact
    def __call__(self, h: Array, condition: Array) -> tuple[Array, None]:
        features = h.shape[-1]
        shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = _modulation(condition, 6, self.dtype)
        attention = SelfAttention(self.heads, self.qk_norm, self.rotate, self.dtype, self.attention, name="attention")
        h = h + gate_0 * attention(_modulated(h, shift_0, scale_0))
        inner = _dense(self.mlp_ratio * features, self.dtype, "mlp_0")(_modulated(h, shift_1, scale_1))
        return h + gate_1 * _dense(features, self.dtype, "mlp_1")(nn.gelu(inner, approximate=True)), None


class DiT(nn.Module):
    """A time-conditional, optionally class-conditional diffusion transformer.

    ``apply(params, x [batch, height, width, channels], t [batch], labels [batch] int = None)
    -> [batch, height, width, out_channels]`` in float32 (or wider, if ``dtype`` is). ``t`` may be [batch, times] where
    the network is told several, such as the two ends of a step.

    Height and width must be multiples of ``patch``; parameters do not depend on them. The paper's sizes are `DiT_S`,
    `DiT_B`, `DiT_L` and `DiT_XL`, each with patches of 2, 4 or 8.

    Raises at trace time: TypeError for integer ``x`` or non-integer ``labels``; ValueError for sizes that do not
    divide, a ``t`` that is not [batch] or [batch, times], labels missing although ``num_classes`` is set or given
    although it is not.

    Attributes:
        out_channels: of the output; twice those of ``x`` where a variance is learned, as in the paper.
        features: of a token; a multiple of ``heads``.
        depth: blocks.
        heads: attention heads.
        patch: the side of a patch.
        num_classes: labels lie in [0, num_classes], the last being the null class; None for no labels.
        time_scale: multiplies t; 1000 for paths whose time runs over [0, 1], as the embedding expects DDPM's steps.
        positions: how tokens know where they lie: `sincos_positions`, as in the paper, or `rotary_positions`.
        qk_norm: whether queries and keys are normalised.
        mlp_ratio: hidden features of the MLP, as a multiple of ``features``.
        remat: what of each block is kept for the gradient, a policy of ``jax.checkpoint_policies``, the rest being
            computed again: ``nothing_saveable`` keeps a block's input alone. None keeps everything.
        unroll: how many blocks one round of the scan runs: ``depth`` for no loop. Parameters are the same.
        dtype: what the arithmetic is done in, but for the embedding of time and class, normalisation and softmax, which
            are float32; parameters stay float32.
        attention: of the blocks, as for `SelfAttention`: `flash_attention` keeps no logits on TPUs.

    >>> import jax
    >>> from jaxgen import nets
    >>> model = nets.DiT(out_channels=1, features=64, depth=2, heads=4, patch=2, num_classes=10)
    >>> x, t, labels = jnp.zeros((2, 8, 8, 1)), jnp.array([0.0, 999.0]), jnp.array([3, 10])
    >>> params = nets.init(model, jax.random.key(0), x, t, labels)
    >>> jax.jit(model.apply)(params, x, t, labels).shape
    (2, 8, 8, 1)
    """

    out_channels: int
    features: int
    depth: int
    heads: int
    patch: int = 2
    num_classes: int | None = None
    time_scale: float = 1.0
    positions: Positions = sincos_positions
    qk_norm: bool = False
    mlp_ratio: int = 4
    remat: Callable[..., Any] | None = None
    unroll: int = 1
    dtype: Any = jnp.float32
    attention: Attention = jax.nn.dot_product_attention

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array | None = None) -> Array:
        """Applies the network."""
        self._check(x, t, labels)
        patches = patchify(x, self.patch)
        height, width = x.shape[1:3]
        grid = (height // self.patch, width // self.patch)
        condition = self._embed(t, labels)

        h = _dense(self.features, self.dtype, "patches")(patches)
        if self.positions.add is not None:
            h = h + self.positions.add(*grid, self.features).astype(self.dtype)
        h = self._blocks(grid)(h, condition)[0]
        shift, scale = _modulation(condition, 2, self.dtype)
        h = _dense(self.patch**2 * self.out_channels, self.dtype, "out", _ZERO)(_modulated(h, shift, scale))
        return unpatchify(h.astype(jnp.promote_types(h.dtype, jnp.float32)), height, width)

    def _embed(self, t: Array, labels: Array | None) -> Array:
        # In float32: bfloat16 tells fewer than 400 of 1,000 steps apart, and this is one vector per image.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        times = jnp.reshape(jnp.asarray(t) * self.time_scale, -1)
        waves = time_embedding(times, _WAVES, freq_shift=0.0, flip_sin_to_cos=True).reshape(jnp.shape(t)[0], -1)
        inner = nn.silu(_dense(self.features, wide, "time_0", normal(0.02))(waves))
        embedding = _dense(self.features, wide, "time_1", normal(0.02))(inner)
        if labels is not None and self.num_classes is not None:
            embedding += LabelEmbedding(self.num_classes, self.features, std=0.02, name="label")(labels)
        return embedding

    def _blocks(self, grid: tuple[int, int]) -> Any:
        turn = self.positions.rotate
        rotate = None if turn is None else (lambda x: turn(x, *grid))
        block: Any = _Block
        if self.remat is not None:
            # Inside a loop the compiler cannot merge the second computation with the first; without one it would.
            block = nn.remat(block, policy=self.remat, prevent_cse=self.unroll > 1)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=self.unroll,
        )
        return scanned(self.heads, self.mlp_ratio, self.qk_norm, rotate, self.dtype, self.attention, name="blocks")

    def _check(self, x: Array, t: Array, labels: Array | None) -> None:
        checks.floating("x", x)
        checks.shape("x", x, (None, None, None, None))
        checks.shape("t", t, (x.shape[0], None)[: max(jnp.ndim(t), 1)])
        for name in ("out_channels", "features", "depth", "heads", "mlp_ratio", "unroll"):
            checks.positive_integer(name, getattr(self, name))
        check_labels(labels, self.num_classes, x.shape[0])


# The paper's table 1. In millions of parameters with patches of 2, four channels to eight, and 1,000 classes:
DiT_S = functools.partial(DiT, features=384, depth=12, heads=6)
"""33 M parameters: ``DiT_S(patch=2, out_channels=8, num_classes=1000)``."""

DiT_B = functools.partial(DiT, features=768, depth=12, heads=12)
"""130 M parameters."""

DiT_L = functools.partial(DiT, features=1024, depth=24, heads=16)
"""458 M parameters."""

DiT_XL = functools.partial(DiT, features=1152, depth=28, heads=16)
"""675 M parameters."""
