"""Purification: noise that drowns an attack, and a diffusion model that takes both away (Nie et al. 2022).

    x_t = alpha(t) x + sigma(t) eps,    eps ~ N(0, I)                                                 (1)
    x0 = what a sampler makes of x_t from time t on                                                     (2)

(arXiv:2205.07460, Eqs. 3 and 4.) The sampler is an argument, so any diffusion model of any library will do; with this
one's:

    times = t * np.linspace(1, 0, 21)                                     # any grid that starts at t
    table = diffusion.ddpm(path, times)                                   # any solver
    sample = lambda keys, x: diffusion.sample(keys, denoise, table, x)
    clean = purify(key, sample, x, alpha=path.alpha(t), sigma=path.sigma(t))

All of it is differentiable, and exactly so, for `diffusion.sample` checkpoints its rows: the gradient through the whole
sampler keeps one state per row.

A defence that draws is easily believed too soon (Athalye et al. 2018, arXiv:1802.00420): an attack that fails because
each evaluation is another function has not been resisted. Here randomness is an argument,

    defended = lambda keys, x: apply(params, purify(keys, sample, x, alpha=..., sigma=...))

so that both honest attacks are objectives as any other, of one function each, with its exact gradient:

    cross_entropy(functools.partial(defended, key), labels)                            # knows the defender's very draws
    expected(cross_entropy, defended, labels, jax.random.split(other_key, 16))         # knows how they are drawn

The first is judged by that key, the second by one that the attack has not seen.
"""

from collections.abc import Callable

import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.attacks.threat import beside
from jaxgen.typing import Array, ArrayLike, Key

Sampler = Callable[[Key, Array], Array]
"""``(keys [batch], x_t [batch, ...]) -> x0 [batch, ...]``: a diffusion model's, from the time of x_t to the data."""


def purify(key: Key, sample: Sampler, x: Array, *, alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """Noises examples to a time of a diffusion model, Eq. 1, and samples back, Eq. 2.

    A pure function of its arguments: with the same key it makes the same draws. The result may leave the data's bounds
    as the sampler's does.

    Args:
        key: a single key, or [batch] keys, for the noise and, others made of them, for the sampler.
        sample: ``(keys [batch], x_t [batch, ...]) -> x0``, such as ``lambda keys, x: diffusion.sample(keys,
            denoise, table, x)`` with a table that starts at t.
        x: [batch, ...], floating, in the units of the diffusion model's data.
        alpha: a scalar or [batch], alpha(t): how much of x is kept; at least 0.
        sigma: likewise, sigma(t): how much noise is added; at least 0. The more, the less is left of an attack, and of
            what it was made on.

    Returns:
        The shape and dtype of ``x``. Example i depends on (key, i) and x[i] alone, if the sampler treats examples so.

    Raises:
        ValueError: shapes disagree, or ``alpha`` or ``sigma`` is known and out of range.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> halve = lambda keys, x: x / 2  # a sampler
    >>> import jax
    >>> purify(jax.random.key(0), halve, jnp.ones((2, 3)), alpha=1.0, sigma=0.0)
    Array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]], dtype=float32)
    """
    checks.floating("x", x)
    checks.rank_at_least("x", x, 1)
    x = jnp.asarray(x)
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if jnp.ndim(value):
            checks.shape(name, value, x.shape[:1])
        checks.interval(name, value, 0, jnp.inf)
    keys = random.keys_for(key, x.shape[0])
    eps = random.normal(random.fold(keys, 0), x.shape[1:], dtype=jnp.promote_types(x.dtype, jnp.float32))
    noised = beside(alpha, x) * x + beside(sigma, x) * eps
    clean = sample(random.fold(keys, 1), noised.astype(x.dtype))
    checks.same_shape("sample(keys, x)", clean, "x", x)
    return clean.astype(x.dtype)
