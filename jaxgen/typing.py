"""The words that every room of the library uses, each with its shapes.

A network is any ``apply(params, x, ...)``; what follows are functions *of* such callables, so that Flax,
Equinox, Haiku or a plain function serve alike.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
"""An array on a device, or its tracer."""

ArrayLike = jax.Array | np.ndarray | float
"""What a function of numbers takes: a device array, a host array or a number."""

Key = jax.Array
"""A typed PRNG key, as made by ``jax.random.key``: one key unless said otherwise."""

Params = Any
"""A pytree of arrays: the only thing gradients are taken of."""

Batch = Any
"""A pytree of arrays whose leading axis is the batch, of one length for all leaves."""

Metrics = Mapping[str, jax.Array]
"""Scalars by name."""

Loss = Callable[[Params, Batch, Key], tuple[jax.Array, Metrics]]
"""``(params, batch, key) -> (scalar, metrics)``; differentiated with respect to argument 0."""

Network = Callable[[jax.Array, jax.Array], jax.Array]
"""``(x [batch, ...], t [batch]) -> output [batch, ...]``: a diffusion network, its parameters closed over."""

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""``(x [batch, ...], t [batch]) -> x0 [batch, ...]``: an estimate of the clean data."""

Objective = Callable[[jax.Array], jax.Array]
"""``(x [batch, ...]) -> [batch]``: what an attack ascends, one value per example."""


class Table(NamedTuple):
    """A sampler, as data: one row per evaluation of the denoiser.

    Row ``r`` calls the denoiser on slot 0 of a buffer of ``slots`` states, at ``times[r]``, and then replaces the whole
    buffer by ``weights[r] @ [slot 0, ..., slot S-1, denoiser's output, fresh noise]``. Slot 0 starts as the
    initial state and ends as the sample; the other slots start as zeros.

    A row whose denoiser column is zero does not call the denoiser.

    Attributes:
        times: [rows], the path's own time of each evaluation.
        weights: [rows, slots, slots + 2].
    """

    times: ArrayLike
    weights: ArrayLike
