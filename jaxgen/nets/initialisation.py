"""Initialisation in seconds: one flat random draw, sliced and scaled, for all parameters of a network.

Flax's ``module.init`` runs the network and draws each parameter by itself: for a U-Net of 36 million
parameters that is 27 seconds. ``init`` traces the network abstractly instead. While it does so the
initialisers below answer with a box that says how the leaf is distributed, then

    leaf_i = std_i * z[offset_i : offset_i + size_i],      z ~ N(0, I) of all sizes together,
       (1)

in one compiled program that depends on the shapes alone. Leaves of other initialisers (plain Flax modules
inside a user's network, collections other than 'params') are computed by the module's own ``init``,
compiled, from which the compiler removes everything that they do not need.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.core import meta

from jaxgen import checks
from jaxgen.typing import Array, Key, Params

Initialiser = Callable[..., Any]
"""``(key, shape, dtype=float32) -> array of that shape``."""

_abstract: ContextVar[bool] = ContextVar("jaxgen_abstract_initialisation", default=False)


class _Box(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A leaf known by its distribution, N(mean, std^2); lifted transforms (scan) change its shape only."""

    value: Any
    mean: float = struct.field(pytree_node=False)
    std: float = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Box":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Box":
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Box":
        return self


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        leaf = jnp.full(shape, self.value, dtype)
        return _Box(leaf, self.value, 0.0) if _abstract.get() else leaf


@dataclass(frozen=True)
class _Normal:
    std: float

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        if _abstract.get():
            return _Box(jnp.zeros(shape, dtype), 0.0, self.std)
        return self.std * jax.random.normal(key, shape, dtype)


@dataclass(frozen=True)
class _VarianceScaling:
    scale: float
    mode: str
    in_axis: int
    out_axis: int

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        receptive = math.prod(shape) / (shape[self.in_axis] * shape[self.out_axis])
        fan_in, fan_out = shape[self.in_axis] * receptive, shape[self.out_axis] * receptive
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        return _Normal(math.sqrt(self.scale / max(fan, 1.0)))(key, shape, dtype)


def constant(value: float) -> Initialiser:
    """An initialiser: every entry is ``value``."""
    return _Constant(float(value))


def normal(std: float) -> Initialiser:
    """An initialiser: independent normal entries of mean 0 and standard deviation ``std`` >= 0."""
    checks.interval("std", std, 0.0, math.inf)
    return _Normal(float(std))


def variance_scaling(scale: float = 1.0, *, mode: str = "fan_in", in_axis: int = -2, out_axis: int = -1) -> Initialiser:
    """An initialiser: normal entries of variance ``scale`` / fan.

    He et al. 2015 (https://arxiv.org/abs/1502.01852).

    Args:
        scale: at least 0; 1 keeps the variance through a linear layer, 2 through a layer followed by ReLU, 0
            gives zeros.
        mode: 'fan_in', 'fan_out' or 'fan_avg', where a fan counts the channels times the kernel's taps.
        in_axis: the axis of input channels.
        out_axis: the axis of output channels. All other axes are taps.

    Raises:
        ValueError: ``scale`` is negative or ``mode`` unknown.
    """
    checks.interval("scale", scale, 0.0, math.inf)
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f"`mode` must be 'fan_in', 'fan_out' or 'fan_avg', got {mode!r}")
    return constant(0.0) if scale == 0 else _VarianceScaling(float(scale), mode, in_axis, out_axis)


class _Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    mean: float
    std: float


def init(module: nn.Module, key: Key, *args: Any, **kwargs: Any) -> Params:
    """Draws a network's parameters: the distributions of ``module.init``, in a fraction of its time.

    A pure function of (module, key, shapes of the arguments); may itself be compiled, with output shardings
    if the parameters are to be born on several devices. Compiles inside (Eq. 1 is one program, the leaves of
    foreign initialisers another), whether or not the caller does. The numbers are not those of
    ``module.init``.

    Args:
        module: a Flax linen module. Convolutions, normalisations and embeddings of ``jaxgen.nets`` take the
            fast way; so do Flax's modules that are given the initialisers of this file.
        key: a single key.
        *args: arguments of the module's call: arrays, or ``jax.ShapeDtypeStruct`` in their place.
        **kwargs: likewise.

    Returns:
        The dictionary of variables, ``{'params': ...}``, as ``module.init`` would return it:
        ``module.apply`` takes it.

    Raises:
        TypeError: ``key`` is not a typed key.
        ValueError: ``key`` is not a single one; or whatever the module raises for these arguments.

    >>> params = init(nn.Dense(3, kernel_init=variance_scaling()), jax.random.key(0), jnp.zeros((1, 4)))
    >>> jax.tree.map(jnp.shape, params)
    {'params': {'bias': (3,), 'kernel': (4, 3)}}
    """
    checks.key("key", key)
    checks.shape("key", key, ())

    def own(key: Key) -> Params:
        actual = jax.tree.map(_materialise, (args, kwargs), is_leaf=_is_abstract)
        return module.init(key, *actual[0], **actual[1])

    token = _abstract.set(True)
    try:
        boxed = jax.eval_shape(own, key)
    finally:
        _abstract.reset(token)
    leaves, structure = jax.tree.flatten(boxed, is_leaf=_is_box)
    ours = [i for i, leaf in enumerate(leaves) if _is_box(leaf)]
    drawn_key, foreign_key = jax.random.split(key)
    values: dict[int, Array] = {}
    if ours:
        specs = [_Leaf(leaves[i].value.shape, leaves[i].value.dtype, leaves[i].mean, leaves[i].std) for i in ours]
        values.update(zip(ours, _draw(drawn_key, leaves=tuple(specs)), strict=True))
    if len(ours) < len(leaves):
        others = [i for i in range(len(leaves)) if i not in values]
        computed = jax.jit(lambda key: [leaf for i, leaf in enumerate(jax.tree.leaves(own(key))) if i in others])(
            foreign_key
        )
        values.update(zip(others, computed, strict=True))
    return jax.tree.unflatten(structure, [values[i] for i in range(len(leaves))])


@partial(jax.jit, static_argnames=("leaves",))
def _draw(key: Key, *, leaves: tuple[_Leaf, ...]) -> list[Array]:
    """Eq. 1."""
    flat = jax.random.normal(key, (sum(math.prod(leaf.shape) for leaf in leaves if leaf.std),))
    values, offset = [], 0
    for shape, dtype, mean, std in leaves:
        if std:
            size = math.prod(shape)
            values.append((mean + std * flat[offset : offset + size].reshape(shape)).astype(dtype))
            offset += size
        else:
            values.append(jnp.full(shape, mean, dtype))
    return values


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, _Box)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _materialise(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_abstract(leaf) else leaf
