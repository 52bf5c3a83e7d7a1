"""Attention that keeps no matrix of logits: a Pallas kernel on TPUs, ordinary JAX everywhere else.

    attend(q, k, v) = softmax(q k^T / sqrt(d)) v         for each head of d features             (1)

needs tokens^2 logits a head. Flash attention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) visits them block by
block, in the fast memory beside the arithmetic, and keeps none for the gradient: it computes them again. JAX ships
such a kernel for TPUs. Its gradient of the queries is first in parts, one for each block of keys, in their dtype: for
blocks of 512 keys, heads of 128 features and bfloat16 an eighth of what float32 logits take. Its ``custom_vjp`` knows
reverse mode alone; MeanFlow asks for ``jvp`` inside ``grad``. So here, as in ``trilinear``, a function and its
derivatives are primitives that know one another:

    attend:  (q, k, v) -> o                               Eq. 1                                   (2)
    push:    (dq, dk, dv; q, k, v) -> do                  its tangent, linear in the first three  (3)
    pull:    (ct; q, k, v) -> (ct_q, ct_k, ct_v)          the transpose of push                   (4)

On TPUs, (2) and (4) are the kernel's two directions; (3), derivatives of (3) and (4), and every other platform are
Eq. 1 in ordinary JAX. Whatever the platform, the gradient keeps q, k and v alone.

Why it is an option and no default: XLA does Eq. 1 well where tokens are few. Compiled for a TPU v5p, the value and
gradient of DiT-XL/2 with 256 tokens, batch 32, in bfloat16 needs 27.8 GiB of temporaries as JAX writes attention, 22.7
with ``jax.checkpoint`` around it and 23.8 here; with ``remat`` of whole blocks 1.6, and 1.5 here. Of a block's memory
traffic, some 8 GiB, the kernel saves one. One attention over 1,024 tokens moves 14.4 GiB (v6e, value and gradient) as
JAX writes it and 3.3 here, with a third of the temporaries. Nothing of this was timed: no TPU took part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxgen import checks
from jaxgen.typing import Array

_LANES = 128  # the width of a TPU's vector registers: of a block of tokens, and of a head that takes more than one
_BLOCK = 512  # tokens at a time: a block of float32 logits is then 1 MiB of the 16 that are there


def flash_attention(query: Array, key: Array, value: Array) -> Array:
    """Eq. 1 without keeping logits: the ``attention`` of `SelfAttention` and `DiT` for many tokens on TPUs.

    Products of bfloat16 are accumulated in float32, in which the softmax is too; the kernel's gradient of the queries
    is rounded once for every block of at most 512 keys. Differentiable in every mode
    and to every order; ``vmap`` adds to the batch.

    The kernel takes bfloat16 or float32, numbers of tokens that 128 divides, and heads of at most 128 features or of
    multiples of 128. Other arguments are left to ``jax.nn.dot_product_attention``, as is every platform but TPUs.

    XLA cannot split a kernel between devices and refuses to try. On several, each computes its own rows (and heads)
    within ``shard_map``, which cannot see through the kernel what varies between devices::

        rows = jax.P(("data", "fsdp"))
        split = jax.shard_map(nets.flash_attention, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        model = nets.DiT_XL(out_channels=8, attention=split)

    Args:
        query: [batch, tokens, heads, features].
        key: [batch, keys, heads, features].
        value: [batch, keys, heads, features].

    Returns:
        [batch, tokens, heads, features], in the arguments' dtype.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the arguments are not floating-point or not of one dtype.

    >>> x = jnp.ones((2, 256, 4, 64))
    >>> flash_attention(x, x, x).shape
    (2, 256, 4, 64)
    """
    _check(query, key, value)
    features = query.shape[3]
    fits = features <= _LANES or features % _LANES == 0
    whole = all(x.shape[1] % _LANES == 0 for x in (query, key))
    if not (fits and whole and query.dtype in (jnp.bfloat16, jnp.float32)):
        return jax.nn.dot_product_attention(query, key, value)
    return attend_p.bind(query, key, value)[0]


def _check(query: Array, key: Array, value: Array) -> None:
    checks.floating("query", query)
    checks.shape("query", query, (None, None, None, None))
    batch, _, heads, features = query.shape
    checks.shape("key", key, (batch, None, heads, features))
    checks.shape("value", value, key.shape)
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"`{name}` must have `query`'s dtype, {query.dtype}, got {x.dtype}")


# --- Eq. 2 to 4 as ordinary JAX


def _attend(query: Array, key: Array, value: Array) -> tuple[Array]:
    return (jax.nn.dot_product_attention(query, key, value),)


def _push(dquery: Array, dkey: Array, dvalue: Array, *primals: Array) -> tuple[Array]:
    return jax.jvp(_attend, primals, (dquery, dkey, dvalue))[1]


def _pull(cotangent: Array, *primals: Array) -> tuple[Array, ...]:
    return jax.vjp(_attend, *primals)[1]((cotangent,))


# --- Eq. 2 and 4 by the kernel


def _attend_by_kernel(query: Array, key: Array, value: Array) -> tuple[Array]:
    # Imported where it is used: Pallas takes half a second, and most programs are not for TPUs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, tokens, heads, features = query.shape
    rows, columns = _block(tokens), _block(key.shape[1])
    whole = splash_attention_mask.FullMask((tokens, key.shape[1]))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([whole] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            use_fused_bwd_kernel=True,
        ),
    )
    scaled = (query.astype(jnp.float32) * features**-0.5).astype(query.dtype)
    out = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (scaled, key, value)))
    return (out.swapaxes(1, 2),)


def _block(tokens: int) -> int:
    return max(n for n in range(_LANES, _BLOCK + 1, _LANES) if tokens % n == 0)


def _pull_by_kernel(cotangent: Array, *primals: Array) -> tuple[Array, ...]:
    return jax.vjp(_attend_by_kernel, *primals)[1]((cotangent,))


# --- The same three as primitives: evaluation, compilation, differentiation, batching


def _primitive(name: str, plain: Callable[..., Any], kernel: Callable[..., Any] | None = None) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    compiled = jax.jit(primitive.bind)

    def evaluate(*operands: Array) -> Sequence[Array]:
        # Outside jit each call compiles by itself, as every operation of JAX does, jax.disable_jit or not.
        with jax.disable_jit(False):
            return compiled(*operands)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(lambda *operands: jax.make_jaxpr(plain)(*operands).out_avals)
    # The one place that chooses by platform: the kernel on TPUs, ordinary JAX everywhere else.
    mlir.register_lowering(primitive, mlir.lower_fun(plain))
    if kernel is not None:
        mlir.register_lowering(primitive, mlir.lower_fun(kernel), platform="tpu")
    batching.primitive_batchers[primitive] = lambda operands, at: _batched(primitive, operands, at)
    return primitive


def _batched(
    primitive: Primitive, operands: Sequence[Array], at: Sequence[int | None]
) -> tuple[list[Array], list[int]]:
    """The mapped axis becomes part of the batch."""
    size = next(x.shape[axis] for x, axis in zip(operands, at, strict=True) if axis is not None)
    fronted = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, at, strict=True)
    )
    outputs = primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in fronted))
    return [x.reshape(size, -1, *x.shape[1:]) for x in outputs], [0] * len(outputs)


attend_p = _primitive("attend", _attend, _attend_by_kernel)
push_p = _primitive("attend_push", _push)
pull_p = _primitive("attend_pull", _pull, _pull_by_kernel)


PLAIN: dict[Primitive, Callable[..., Any]] = {attend_p: _attend, push_p: _push, pull_p: _pull}
"""What each computes, as ordinary JAX."""


def _attend_jvp(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Sequence[Array], Sequence[Array]]:
    return attend_p.bind(*primals), push_p.bind(*map(ad.instantiate_zeros, tangents), *primals)


def _jvp_by(primitive: Primitive, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Of second order, and so of every higher one: in ordinary JAX."""

    def rule(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Sequence[Array], Sequence[Array]]:
        dense = tuple(map(ad.instantiate_zeros, tangents))
        return primitive.bind(*primals), jax.jvp(plain, tuple(primals), dense)[1]

    return rule


def _push_transpose(cotangents: Sequence[Any], *operands: Any) -> list[Array | None]:
    pulled = pull_p.bind(ad.instantiate_zeros(cotangents[0]), *operands[3:])
    linear = (ad.is_undefined_primal(operand) for operand in operands[:3])
    return [x if asked else None for x, asked in zip(pulled, linear, strict=True)] + [None] * 3


def _pull_transpose(cotangents: Sequence[Any], _: Any, *primals: Array) -> list[Array | None]:
    return [*push_p.bind(*map(ad.instantiate_zeros, cotangents), *primals), None, None, None]


ad.primitive_jvps[attend_p] = _attend_jvp
ad.primitive_jvps[push_p] = _jvp_by(push_p, _push)
ad.primitive_jvps[pull_p] = _jvp_by(pull_p, _pull)
ad.primitive_transposes[push_p] = _push_transpose
ad.primitive_transposes[pull_p] = _pull_transpose
