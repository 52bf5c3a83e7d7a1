"""Self-conditioning: a network that sees its own estimate of the clean data.

Chen et al. 2022 (arXiv:2208.04202, section 3.2). The network takes a third argument, an estimate of x0. In training a
first pass makes it from zeros, and half of the examples see it, without gradient; the others go on seeing zeros:

    x0_hat = stop_gradient(to_data(net(x, t, 0))),    output = net(x, t, coin x0_hat),    coin ~ Bernoulli(1/2)      (1)

That is a function from networks to networks, so every loss, prediction and sampler takes it as it is. In sampling the
paper hands over the estimate of the step before, which saves the first pass. A table's denoiser knows x and t alone,
and is their function: here it makes the estimate afresh each time, by the very two passes of Eq. 1. What comes out is
the network as it was trained; an evaluation costs two passes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.diffusion.path import Path, beside
from jaxgen.diffusion.prediction import Prediction, path_coefficients
from jaxgen.typing import Array, Key, Network

SelfConditioned = Callable[[Array, Array, Array], Array]
"""``(x [batch, ...], t [batch], estimate of x0 [batch, ...]) -> output [batch, ...]``."""


def self_conditioned(
    path: Path,
    prediction: Prediction,
    net: SelfConditioned,
    *,
    key: Key | None = None,
    probability: float = 0.5,
    axis_name: str | None = None,
) -> Network:
    """The network of Eq. 1, for `denoising_loss` where a key is given, else for `denoiser`.

    Args:
        path: the Gaussian path.
        prediction: what the network predicts.
        net: ``(x, t, estimate) -> output``, parameters and conditioning closed over; it sees zeros where there is no
            estimate yet.
        key: a single key, which may be the loss's: example i tosses its coin from ``fold_in(key, i)``. None for
            sampling: every example sees its estimate.
        probability: of seeing the estimate in training, in [0, 1].
        axis_name: the mapped axis over which the batch is split, under pmap or shard_map.

    Returns:
        A Network ``(x, t) -> output``, which evaluates ``net`` twice.

    Raises:
        ValueError: ``probability`` is out of range.
        TypeError: ``key`` is not a typed key.

    >>> from jaxgen import diffusion
    >>> path, net = diffusion.edm(), lambda x, t, estimate: x - estimate
    >>> twice = self_conditioned(path, diffusion.data, net)  # x - (x - 0)
    >>> diffusion.denoiser(path, diffusion.data, twice)(jnp.ones((1, 2)), 1.0)
    Array([[0., 0.]], dtype=float32)
    """
    checks.interval("probability", probability, 0.0, 1.0)
    if key is not None:
        checks.key("key", key)

    def twice(x: Array, t: Array) -> Array:
        first = net(x, t, jnp.zeros_like(x))
        estimate = prediction.to_data(path_coefficients(path, t, x), x, first).astype(x.dtype)
        if key is not None:
            # 2: `denoising_loss` folds 0 and 1 into the same keys.
            keys = random.fold(random.example_keys(key, x.shape[0], axis_name=axis_name), 2)
            shown = random.draw(jax.random.uniform, keys, (), jnp.dtype(jnp.float32)) < probability
            estimate = jnp.where(beside(shown, x), estimate, 0)
        return net(x, t, jax.lax.stop_gradient(estimate))

    return twice
