"""Expectation over a defence's own random numbers: what an attack on a randomised classifier ascends.

A classifier that draws r, z = f(r, x), is attacked by the mean of its objective (Athalye et al. 2018, arXiv:1802.00420,
section 4.2, expectation over transformations, EOT), here over a fixed sample r_1 ... r_D for each example:

    value(x) = 1/D sum_d score(f(r_d, x))                                                               (1)
    won(x)   where the mean of softmax(f(r_d, x)) favours a wrong class                                 (2)

Neither is a matter of luck: the same x has the same value, so that an attack can keep its best. Nor is either the last
word: judge what an attack has found by draws that it has not seen.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.attacks.objectives import Classified
from jaxgen.typing import Array, Key


@dataclasses.dataclass(frozen=True)
class Expected(Classified):
    """The mean over draws, Eqs. 1 and 2. Its ``logits`` are the logarithm of the mean probabilities.

    Attributes:
        apply: ``(keys [batch], x [batch, ...]) -> logits [batch, classes]``.
        keys: [batch, draws], each example's own.
    """

    apply: Callable[[Key, Array], Array] = dataclasses.field(kw_only=True)
    keys: Key = dataclasses.field(kw_only=True)

    def judge(self, x: Array) -> tuple[Array, Array]:
        """Value and victory, as of any `Classified`."""
        checks.shape("labels", self.labels, jnp.shape(x)[:1])
        draws = _draws(self.apply, self.keys, x)
        vote = Classified(lambda x: _vote(draws), self.labels, self.score, self.targets, self.any_class)
        values = jax.vmap(lambda logits: self.score(logits, jnp.asarray(self.labels), self.targets))(draws)
        return jnp.mean(values, axis=0), vote.judge(x)[1]

    def rows(self, index: Array) -> "Expected":
        """The same objective for some of the examples, with the draws that they had."""
        keys, labels = self.keys[index], jnp.asarray(self.labels)[index]
        targets = None if self.targets is None else jnp.asarray(self.targets)[index]

        def vote(x: Array) -> Array:
            return _vote(_draws(self.apply, keys, x))

        return dataclasses.replace(self, logits=vote, labels=labels, targets=targets, keys=keys)


def expected(
    make: Callable[..., Classified],
    apply: Callable[[Key, Array], Array],
    labels: Array,
    keys: Key,
    *,
    targets: Array | None = None,
) -> Expected:
    """The expectation of an objective over a randomised classifier's draws, Eqs. 1 and 2.

    Each evaluation evaluates the classifier for all draws at once, and an attack's gradient is the mean of theirs.

    Args:
        make: `cross_entropy`, `margin` or `dlr`.
        apply: ``(keys [batch], x [batch, ...]) -> logits [batch, classes]``: one key for each example, from which alone
            its random numbers are drawn (``jaxgen.random.normal(keys, x.shape[1:])``).
        labels: [batch] integers, the true classes.
        keys: [draws]; example i has ``fold_in(keys[d], i)`` for draw d.
        targets: [batch] integers, the classes aimed at; None where any wrong one will do.

    Returns:
        The objective.

    Raises:
        ValueError: ``keys`` is not [draws], or ``labels`` or ``targets`` are not [batch].
        TypeError: ``keys`` are not typed keys, or the labels or targets no integers.

    >>> from jaxgen.attacks.objectives import margin
    >>> apply = lambda keys, x: x + 0.1 * random.normal(keys, x.shape[1:])
    >>> objective = expected(margin, apply, jnp.array([0, 1]), jax.random.split(jax.random.key(0), 20))
    >>> objective.judge(jnp.array([[1.0, 0.0], [1.0, 0.0]]))[1]
    Array([False,  True], dtype=bool)
    """
    checks.key("keys", keys)
    checks.shape("keys", keys, (None,))
    if not keys.size:
        raise ValueError("`keys` must hold at least 1 key, got shape [0]")
    checks.shape("labels", labels, (None,))
    own = jax.vmap(lambda key: random.example_keys(key, jnp.shape(labels)[0]), out_axes=1)(keys)
    plain = make(lambda x: _vote(_draws(apply, own, x)), labels, targets=targets)
    return Expected(plain.logits, labels, plain.score, targets, apply=apply, keys=own)


def _draws(apply: Callable[[Key, Array], Array], keys: Key, x: Array) -> Array:
    """The logits of every draw, [draws, batch, classes], in float32 at least."""
    logits = jax.vmap(lambda keys: apply(keys, x), in_axes=1)(keys)
    checks.floating("apply(keys, x)", logits)
    checks.shape("apply(keys, x)", logits[0], (x.shape[0], None))
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _vote(draws: Array) -> Array:
    """The logarithm of the mean probabilities, [batch, classes]."""
    return jax.nn.logsumexp(jax.nn.log_softmax(draws), axis=0) - math.log(draws.shape[0])
