"""Normalisation: float32 statistics in one pass over the images, and no running averages.

Mean and variance come from one pass. The textbook E[x^2] - E[x]^2 loses all digits when the mean is large
against the standard deviation, so moments are taken about a shift c that is some value of the very channel
(any value does, and the result does not depend on it, so no gradient flows through it):

    d = x - c,    mean = c + E[d],    var = E[d^2] - E[d]^2        per channel                     (1)

Channels then merge into groups, batches into a data set and devices into a batch by the law of total
variance, which subtracts nothing large:

    mean = E[mean_i],    var = E[var_i] + E[(mean_i - mean)^2]                                     (2)

GroupNorm: Wu & He 2018 (https://arxiv.org/abs/1803.08494). BatchNorm: Ioffe & Szegedy 2015
(https://arxiv.org/abs/1502.03167), with its statistics for inference computed afterwards as in "precise BN"
(Wu & Johnson 2021, https://arxiv.org/abs/2105.07576) and SWA: running averages are a second state beside the
parameters, lag behind them and belong to no EMA of them.

What lies between x and y costs less to compute again than to keep for the gradient: hence ``jax.checkpoint``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxgen import checks
from jaxgen.nets.initialisation import constant
from jaxgen.typing import Array, Params

_STATISTICS, _MOMENTS = "batch_stats", "batch_moments"


def _channel_moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Eq. 1 over ``axes``, which are kept with length 1; x in float32."""
    shift = lax.stop_gradient(x[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(x.ndim))])

    @jax.checkpoint
    def moments(x: Array) -> tuple[Array, Array]:
        centred = x - shift
        return jnp.mean(centred, axes, keepdims=True), jnp.mean(centred**2, axes, keepdims=True)

    first, second = moments(x)
    return shift + first, jnp.maximum(second - first**2, 0.0)


class GroupNorm(nn.Module):
    """Normalises each image by its groups of channels, then scales, shifts and, if asked, applies SiLU.

    Statistics are float32 whatever ``dtype``. Parameters: ``scale`` [channels] (ones), ``bias`` [channels]
    (zeros).

    ``apply(params, x [batch, ..., channels]) -> [batch, ..., channels]`` in ``dtype``.

    Attributes:
        groups: must divide the channels.
        eps: added to the variance.
        silu: whether x * sigmoid(x) follows.
        dtype: of the result.
    """

    groups: int = 32
    eps: float = 1e-6
    silu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the normalisation."""
        checks.floating("x", x)
        checks.rank_at_least("x", x, 3)
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"`groups` must divide the {channels} channels of `x`, got {self.groups}")
        scale = self.param("scale", constant(1.0), (channels,)).astype(jnp.float32)
        bias = self.param("bias", constant(0.0), (channels,)).astype(jnp.float32)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))

        means, variances = _channel_moments(x, tuple(range(1, x.ndim - 1)))
        grouped = (*means.shape[:-1], self.groups, channels // self.groups)
        mean = jnp.mean(means.reshape(grouped), -1, keepdims=True)  # Eq. 2
        variance = jnp.mean(variances.reshape(grouped) + (means.reshape(grouped) - mean) ** 2, -1, keepdims=True)

        def spread(a: Array) -> Array:
            return jnp.broadcast_to(a, grouped).reshape(means.shape)

        def finish(x: Array, mean: Array, factor: Array) -> Array:
            y = (x - mean) * factor + bias
            return (nn.silu(y) if self.silu else y).astype(self.dtype)

        return jax.checkpoint(finish)(x, spread(mean), spread(lax.rsqrt(variance + self.eps)) * scale)


def layer_norm(x: Array, *, eps: float = 1e-6) -> Array:
    """Standardises the last axis, without parameters (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Args:
        x: [..., features], floating.
        eps: added to the variance.

    Returns:
        The shape and dtype of ``x``, of mean 0 and variance 1 along the last axis; computed in float32 at least.

    Raises:
        TypeError: ``x`` is not floating.
    """
    checks.floating("x", x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    return (centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Divides the last axis by its root mean square and scales it.

    Zhang & Sennrich 2019 (https://arxiv.org/abs/1910.07467). Statistics are float32 whatever ``dtype``. Parameter:
    ``scale`` [features] (ones).

    ``apply(params, x [..., features]) -> [..., features]`` in ``dtype``.

    Attributes:
        eps: added to the mean square.
        dtype: of the result.
    """

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the normalisation."""
        checks.floating("x", x)
        scale = self.param("scale", constant(1.0), (x.shape[-1],)).astype(jnp.float32)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + self.eps) * scale).astype(self.dtype)


class BatchNorm(nn.Module):
    """Normalises each channel by the batch; by fixed statistics where the variables carry them.

    ``{'params': ...}`` is the only state while training: then the batch's own mean and (biased) variance are
    used and nothing is kept. Variables from ``calibrate`` carry a collection 'batch_stats' besides, and with
    it each image's result depends on that image alone.

    Statistics are float32 whatever ``dtype``. Parameters: ``scale`` [channels] (ones), ``bias`` [channels]
    (zeros).

    ``apply(params, x [batch, ..., channels]) -> [batch, ..., channels]`` in ``dtype``.

    Attributes:
        eps: added to the variance.
        axis_name: the mapped axis of pmap or shard_map over which the batch is split, if any.
        dtype: of the result.
    """

    eps: float = 1e-5
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the normalisation."""
        checks.floating("x", x)
        checks.rank_at_least("x", x, 2)
        channels = x.shape[-1]
        scale = self.param("scale", constant(1.0), (channels,)).astype(jnp.float32)
        bias = self.param("bias", constant(0.0), (channels,)).astype(jnp.float32)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.has_variable(_STATISTICS, "mean"):
            mean: Array = self.get_variable(_STATISTICS, "mean")
            variance: Array = self.get_variable(_STATISTICS, "var")
        else:
            mean, variance = self._moments(x)
        return ((x - mean) * (lax.rsqrt(variance + self.eps) * scale) + bias).astype(self.dtype)

    def _moments(self, x: Array) -> tuple[Array, Array]:
        means, variances = _channel_moments(x, tuple(range(x.ndim - 1)))
        mean, variance = means.reshape(-1), variances.reshape(-1)
        count = jnp.float32(x.size // x.shape[-1])
        if self.axis_name is not None and not self.is_initializing():
            own, mean = mean, lax.pmean(mean, self.axis_name)
            variance = lax.pmean(variance + (own - mean) ** 2, self.axis_name)  # Eq. 2
            count = lax.psum(count, self.axis_name)
        if not self.is_initializing():
            self.sow(_MOMENTS, "moments", {"count": count, "mean": mean, "var": variance})
        return mean, variance


def calibrate(apply: Callable[..., Any], params: Params, batches: Iterable[Any]) -> Params:
    """Computes the statistics that BatchNorm normalises by at inference, in one pass over data.

    Every batch is normalised by itself, as in training. Each BatchNorm's statistics are then the exact mean
    and (biased) variance of all that entered it during the pass: Eq. 2 over the batches, each weighted by
    its number of values. For a single batch, inference gives what training gave on that batch. Call it for
    the very parameters that will be used, their EMA included.

    Args:
        apply: the network, called as ``apply(params, x, mutable='batch_moments')``: Flax's own
            ``module.apply``, compiled or not (``jax.jit(module.apply, static_argnames='mutable')``), or a
            function around it that passes ``mutable`` on and returns what comes back.
        params: the dictionary of variables, ``{'params': ...}``. Statistics already there are ignored.
        batches: what the network takes, one batch at a time: x, or a tuple of the arguments after
            ``params``. The batches need not have one size.

    Returns:
        ``params`` with the collection 'batch_stats' added (or replaced).

    Raises:
        ValueError: ``batches`` is empty, or the network has no BatchNorm.

    >>> params = BatchNorm().init(jax.random.key(0), jnp.zeros((1, 1)))
    >>> calibrated = calibrate(BatchNorm().apply, params, [jnp.array([[0.0], [4.0]])])
    >>> jax.tree.map(float, jax.tree.map(jnp.squeeze, calibrated['batch_stats']))
    {'mean': 2.0, 'var': 4.0}
    """
    params = {name: tree for name, tree in params.items() if name != _STATISTICS}
    total: Any = None
    for batch in batches:
        arguments = batch if isinstance(batch, tuple) else (batch,)
        _, collected = apply(params, *arguments, mutable=_MOMENTS)
        if not collected:
            raise ValueError("`apply` must be a network with BatchNorm, got one that reports no moments")
        moments = jax.tree.map(_merge_all, collected[_MOMENTS], is_leaf=lambda node: isinstance(node, tuple))
        total = moments if total is None else jax.tree.map(_merge, total, moments, is_leaf=_is_moments)
    if total is None:
        raise ValueError("`batches` must hold at least one batch, got none")
    return {**params, _STATISTICS: _statistics(total)}


def _is_moments(node: Any) -> bool:
    return isinstance(node, dict) and set(node) == {"count", "mean", "var"}


def _merge(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    """Eq. 2 for two parts with weights."""
    count = a["count"] + b["count"]
    share = b["count"] / count
    step = b["mean"] - a["mean"]
    variance = a["var"] + share * (b["var"] - a["var"]) + share * (1 - share) * step**2
    return {"count": count, "mean": a["mean"] + share * step, "var": variance}


def _merge_all(calls: tuple[dict[str, Array], ...]) -> dict[str, Array]:
    """The moments of a module that was called more than once."""
    merged, *rest = calls
    for call in rest:
        merged = _merge(merged, call)
    return merged


def _statistics(tree: dict[str, Any]) -> dict[str, Any]:
    if _is_moments(tree):
        return {"mean": tree["mean"], "var": tree["var"]}
    if set(tree) == {"moments"}:
        return _statistics(tree["moments"])
    return {name: _statistics(node) for name, node in tree.items()}
