"""Penalties of a critic's gradient by its input, one value per example.

    R1 = || grad_x D(x) ||^2 at data,    R2 = the same at samples                                       (1)
    GP = (|| grad_z D(z) || - 1)^2 at z = u x + (1 - u) y, u uniform in [0, 1]                          (2)

(1) is Mescheder et al. 2018 (arXiv:1801.04406, Eqs. 9 and 10; their gamma / 2 is the caller's factor), (2) Gulrajani et
al. 2017 (arXiv:1704.00028, Eq. 3).

All take a critic ``x [batch, ...] -> logits [batch]`` whose logit of an example depends on that example alone: then the
gradient of the logits' sum is every example's own, one vector-Jacobian product for the whole batch. Batch
normalisation and minibatch statistics break that, and are refused where the critic's program shows them (`coupling`
says what it can see). GroupNorm and batch normalisation by fixed statistics are fine.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from jaxgen import checks, random
from jaxgen.gan.coupling import coupled_examples
from jaxgen.typing import Array, ArrayLike, Key

Critic = Callable[[Array], Array]
"""``x [batch, ...] -> logits [batch]``, parameters and conditioning closed over."""


def penalised(critic: Critic, x: Array) -> tuple[Array, Array]:
    """A critic's logits and the squared norms of their gradients, from one evaluation and one product.

    The loss is computed from these logits and the penalty from these norms, so that neither evaluates the critic again.

    Args:
        critic: ``x [batch, ...] -> logits [batch]``.
        x: [batch, ...], floating.

    Returns:
        Logits [batch], and squared norms [batch], Eq. 1, in float32 at least.

    Raises:
        ValueError: the critic's value is not [batch], or its program shows that a logit depends on another example.
        TypeError: ``x`` is not floating.

    >>> penalised(lambda x: 3 * x[:, 0], jnp.ones((2, 4)))
    (Array([3., 3.], dtype=float32), Array([9., 9.], dtype=float32))
    """
    checks.floating("x", x)
    checks.rank_at_least("x", x, 1)
    # A new function each time: of a known one JAX would return the program that it had before its closure changed.
    program, logits_shape = jax.make_jaxpr(lambda x: critic(x), return_shape=True)(x)
    checks.shape("critic(x)", logits_shape, x.shape[:1])
    if (coupled := coupled_examples(program)) is not None:
        i, j = coupled
        raise ValueError(
            f"`critic` must score each example by itself: the logit of example {i} depends on example {j}, as behind "
            "batch normalisation"
        )
    (logits,), pullback = jax.vjp(jaxpr_as_fun(program), x)
    (gradient,) = pullback([jnp.ones_like(logits)])
    wide = gradient.astype(jnp.promote_types(x.dtype, jnp.float32))
    return logits, jnp.sum(jnp.square(wide).reshape(x.shape[0], -1), axis=1)


class Scored(NamedTuple):
    """Both batches' logits and penalties, each [batch].

    Attributes:
        real_logits: of the data.
        fake_logits: of the samples.
        r1: squared norms of the gradients at the data, Eq. 1.
        r2: the same at the samples.
    """

    real_logits: Array
    fake_logits: Array
    r1: Array
    r2: Array


def scored(critic: Callable[..., Array], real: Array, fake: Array, *conditions: Any) -> Scored:
    """The logits of data and samples and both penalties, from one evaluation of the critic and one product.

    The critic sees both at once, data and samples in turn: x_1, y_1, x_2, y_2 and so on. Put so, a batch that is split
    over devices stays where it is.

    Args:
        critic: ``(x [2 batch, ...], *conditions) -> logits [2 batch]``.
        real: [batch, ...] data, floating.
        fake: samples, of the shape of ``real``.
        *conditions: what belongs to example i of the data and sample i alike, labels or keys: pytrees of arrays
            [batch, ...], which the critic gets with every entry twice. What it closes over it must not have one of for
            each example.

    Returns:
        Four arrays [batch].

    Raises:
        ValueError: shapes disagree, the critic's value is not [2 batch], or its program shows that a logit depends on
            another example.
        TypeError: ``real`` is not floating.

    >>> scored(lambda x: 3 * x[:, 0], jnp.ones((1, 4)), jnp.zeros((1, 4)))
    Scored(real_logits=Array([3.], dtype=float32), fake_logits=Array([0.], dtype=float32),
           r1=Array([9.], dtype=float32), r2=Array([9.], dtype=float32))
    """
    checks.floating("real", real)
    checks.rank_at_least("real", real, 1)
    checks.same_shape("fake", fake, "real", real)
    batch = real.shape[0]
    for leaf in jax.tree.leaves(conditions):
        checks.shape("conditions", leaf, (batch, *jnp.shape(leaf)[1:]))

    def in_turn(a: Array, b: Array) -> Array:
        return jnp.stack([a, b], axis=1).reshape(2 * batch, *a.shape[1:])

    twice = jax.tree.map(lambda leaf: in_turn(leaf, leaf), conditions)
    logits, norms = penalised(lambda x: critic(x, *twice), in_turn(real, fake))
    (real_logits, fake_logits), (at_real, at_fake) = logits.reshape(batch, 2).T, norms.reshape(batch, 2).T
    return Scored(real_logits, fake_logits, at_real, at_fake)


def r1(critic: Critic, x: Array) -> Array:
    """R1, Eq. 1: the squared norm of the critic's gradient at data.

    Args:
        critic: ``x [batch, ...] -> logits [batch]``.
        x: [batch, ...] data, floating.

    Returns:
        [batch].

    Raises:
        ValueError: the critic's value is not [batch], or its program shows that a logit depends on another example.
        TypeError: ``x`` is not floating.
    """
    return penalised(critic, x)[1]


def r2(critic: Critic, x: Array) -> Array:
    """R2, Eq. 1: the squared norm of the critic's gradient at samples of the generator.

    Args:
        critic: ``x [batch, ...] -> logits [batch]``.
        x: [batch, ...] samples, floating.

    Returns:
        [batch].

    Raises:
        ValueError: the critic's value is not [batch], or its program shows that a logit depends on another example.
        TypeError: ``x`` is not floating.
    """
    return r1(critic, x)


def gradient_penalty(critic: Critic, real: Array, fake: Array, key: Key) -> Array:
    """The penalty of WGAN-GP, Eq. 2.

    Args:
        critic: ``x [batch, ...] -> logits [batch]``.
        real: [batch, ...] data, floating.
        fake: samples, of the shape of ``real``.
        key: a single key, or [batch] keys: example i draws its u from ``fold_in(key, i)``.

    Returns:
        [batch].

    Raises:
        ValueError: shapes disagree, the critic's value is not [batch], or its program shows that a logit depends on
            another example.
        TypeError: ``real`` is not floating, or ``key`` not a typed key.
    """
    checks.floating("real", real)
    checks.rank_at_least("real", real, 1)
    checks.same_shape("fake", fake, "real", real)
    batch = real.shape[0]
    u = random.draw(jax.random.uniform, random.keys_for(key, batch), (1,) * (real.ndim - 1), real.dtype)
    squares = penalised(critic, u * real + (1 - u) * fake)[1]
    # The norm has no gradient at 0: there the penalty is 1 and pulls nowhere.
    positive = squares > 0
    norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    return jnp.square(norms - 1)


def lazy(penalty: Callable[[], Array], step: ArrayLike, *, every: int) -> Array:
    """A penalty in every so many steps, times as much (Karras et al. 2019, arXiv:1912.04958, section 3.1).

    Args:
        penalty: takes nothing, gives any array; not evaluated in the other steps.
        step: number of steps taken, an integer; may be traced.
        every: at least 1; 1 is the penalty itself.

    Returns:
        ``every`` times the penalty where it divides ``step``, else zeros.

    Raises:
        ValueError: ``every`` is not an integer of at least 1.

    >>> [float(lazy(lambda: jnp.array(0.5), step, every=2)) for step in range(4)]
    [1.0, 0.0, 1.0, 0.0]
    """
    checks.positive_integer("every", every)
    shape = jax.eval_shape(penalty)
    return jax.lax.cond(
        jnp.asarray(step) % every == 0, lambda: every * penalty(), lambda: jnp.zeros(shape.shape, shape.dtype)
    )
