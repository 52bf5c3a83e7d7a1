"""Objectives: what an attack ascends, one value per example.

With z the logits of an example, y its class, z_(1) >= z_(2) >= ... the sorted logits and t the class aimed at:

    cross entropy    log sum_i e^z_i - z_y                                                                (1)
    margin           max_{i != y} z_i - z_y                                                               (2)
    dlr              (max_{i != y} z_i - z_y) / (z_(1) - z_(3))                                           (3)

and towards t, targeted:

    cross entropy    z_t - log sum_i e^z_i                                                                (4)
    margin           z_t - max_{i != t} z_i                                                               (5)
    dlr              (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)                                          (6)

Eq. 2 is Carlini & Wagner 2017's (arXiv:1608.04644, f_6), above 0 where the class is wrong. Eqs. 3 and 6, the difference
of logits ratio (Croce & Hein 2020, arXiv:2003.01690, Eqs. 6 and 7), change neither with a shift nor with a scale of the
logits, by which a network can make the gradients of Eq. 1 vanish. Eq. 3 needs three classes and Eq. 6 four; below, they
are the margins, Eqs. 2 and 5.

Any function ``x -> [batch]`` is an objective. `Classified` also knows its classes, and so which examples are won.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array, ArrayLike, Objective

Tree = TypeVar("Tree")

Logits = Callable[[Array], Array]
"""``x [batch, ...] -> logits [batch, classes]``, parameters closed over."""

Score = Callable[[Array, Array, Array | None], Array]
"""``(logits [batch, classes], labels [batch], targets [batch] or None) -> [batch]``, ascended."""


# Compared by identity, or jax.jit, which keeps programs by function, could not take one.
@dataclasses.dataclass(frozen=True, eq=False)
class Classified:
    """An objective of a classifier's logits that also says which examples are won.

    Attributes:
        logits: ``x [batch, ...] -> [batch, classes]``, before any softmax.
        labels: [batch] integers, the true classes.
        score: what is ascended: ``(logits, labels, targets) -> [batch]``.
        targets: [batch] integers, the classes aimed at; None where any wrong one will do.
        any_class: whether a targeted example is won by any wrong class, not by its target alone.

    Raises:
        ValueError: ``labels`` or ``targets`` are not [batch], of one length.
        TypeError: they are not integers.
    """

    logits: Logits
    labels: Array
    score: Score
    targets: Array | None = None
    any_class: bool = False

    def __post_init__(self) -> None:
        """Refuses labels that are none."""
        _check_classes("labels", self.labels)
        if self.targets is not None:
            _check_classes("targets", self.targets)
            checks.same_shape("targets", self.targets, "labels", self.labels)

    def __call__(self, x: Array) -> Array:
        """The value at ``x`` [batch, ...], [batch]."""
        return self.judge(x)[0]

    def judge(self, x: Array) -> tuple[Array, Array]:
        """Value and victory from one evaluation of the network.

        Args:
            x: [batch, ...].

        Returns:
            Values [batch], in float32 at least, and whether each example is won, [batch] bool: given a wrong class, or
            (targeted) its target.

        Raises:
            ValueError: there is not one label for each example, the logits are not [batch, classes] with at least two
                classes, or a known label or target is out of range.
            TypeError: the logits are not floating.
        """
        checks.shape("labels", self.labels, jnp.shape(x)[:1])
        logits = self.logits(x)
        checks.floating("logits(x)", logits)
        checks.shape("logits(x)", logits, (jnp.shape(x)[0], None))
        classes = logits.shape[1]
        if classes < 2:
            raise ValueError(f"`logits(x)` must have at least 2 classes, got shape {list(logits.shape)}")
        checks.interval("labels", self.labels, 0, classes - 1)
        if self.targets is not None:
            checks.interval("targets", self.targets, 0, classes - 1)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        predicted = jnp.argmax(logits, axis=1)
        if self.targets is None or self.any_class:
            won = predicted != jnp.asarray(self.labels)
        else:
            won = predicted == jnp.asarray(self.targets)
        return self.score(logits, jnp.asarray(self.labels), self.targets), won

    def rows(self, index: Array) -> "Classified":
        """The same objective for some of the examples.

        Args:
            index: [n] integers, which examples; may be traced.

        Returns:
            The objective for ``x[index]``.
        """
        targets = None if self.targets is None else jnp.asarray(self.targets)[index]
        return dataclasses.replace(self, labels=jnp.asarray(self.labels)[index], targets=targets)


def cross_entropy(apply: Logits, labels: Array, *, targets: Array | None = None) -> Classified:
    """The cross entropy of the labels, Eq. 1; targeted, minus that of the targets, Eq. 4.

    Args:
        apply: ``x [batch, ...] -> logits [batch, classes]``, before any softmax.
        labels: [batch] integers, the true classes.
        targets: [batch] integers, the classes aimed at; None where any wrong one will do.

    Returns:
        The objective, ``x -> [batch]``.

    Raises:
        ValueError: ``labels`` or ``targets`` are not [batch], of one length.
        TypeError: they are not integers.

    >>> cross_entropy(lambda x: x, jnp.array([0, 1]))(jnp.zeros((2, 10)))
    Array([2.3025851, 2.3025851], dtype=float32)
    """

    def score(logits: Array, labels: Array, targets: Array | None) -> Array:
        if targets is None:
            return jax.nn.logsumexp(logits, axis=1) - _of(logits, labels)
        return _of(logits, targets) - jax.nn.logsumexp(logits, axis=1)

    return Classified(apply, labels, score, targets)


def margin(apply: Logits, labels: Array, *, targets: Array | None = None) -> Classified:
    """By how much another class leads the label, Eq. 2; targeted, the target all others, Eq. 5.

    Args:
        apply: as in `cross_entropy`.
        labels: as in `cross_entropy`.
        targets: as in `cross_entropy`.

    Returns:
        The objective, ``x -> [batch]``, above 0 where an example is won.

    Raises:
        ValueError: as in `cross_entropy`.
        TypeError: as in `cross_entropy`.

    >>> margin(lambda x: x, jnp.array([0, 0]))(jnp.array([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]]))
    Array([-1.,  2.], dtype=float32)
    """
    return Classified(apply, labels, _margin, targets)


def dlr(apply: Logits, labels: Array, *, targets: Array | None = None) -> Classified:
    """The difference of logits ratio, Eq. 3, targeted Eq. 6; of too few classes the margin, Eqs. 2 and 5.

    Args:
        apply: as in `cross_entropy`.
        labels: as in `cross_entropy`.
        targets: as in `cross_entropy`.

    Returns:
        The objective, ``x -> [batch]``; untargeted above 0 where an example is won.

    Raises:
        ValueError: as in `cross_entropy`.
        TypeError: as in `cross_entropy`.

    >>> dlr(lambda x: x, jnp.array([0, 0]))(jnp.array([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]]))
    Array([-0.5,  1. ], dtype=float32)
    """

    def score(logits: Array, labels: Array, targets: Array | None) -> Array:
        needed = 3 if targets is None else 4
        if logits.shape[1] < needed:
            return _margin(logits, labels, targets)
        z = jax.lax.top_k(logits, needed)[0]
        # As small as the reference's: it matters only where the leading logits are equal.
        if targets is None:
            return _margin(logits, labels, None) / (z[:, 0] - z[:, 2] + 1e-12)
        return (_of(logits, targets) - _of(logits, labels)) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + 1e-12)

    return Classified(apply, labels, score, targets)


def label_free(embed: Logits, x: Array, *, temperature: ArrayLike = 0.5) -> Objective:
    """How badly an embedding is recognised among the others: NT-Xent of an attacked example, without labels.

    With u_i the attacked example's embedding and v_j the clean ones, of unit length (Chen et al. 2020,
    arXiv:2002.05709, Eq. 1, ascended as in Kim et al. 2020, arXiv:2006.07589),

        log sum_j exp(u_i . v_j / temperature) - u_i . v_i / temperature                                  (7)

    Each value depends on its own attacked example and, as in any contrastive loss, on the clean batch.

    Args:
        embed: ``x [batch, ...] -> [batch, features]``.
        x: [batch, ...], the clean examples, at least two.
        temperature: above 0.

    Returns:
        The objective, ``x -> [batch]``.

    Raises:
        ValueError: there is a single example, the embeddings are not [batch, features], or ``temperature`` is known
            not to be above 0.
        TypeError: the embeddings are not floating.
    """
    checks.positive("temperature", temperature)
    if jnp.shape(x)[0] < 2:
        raise ValueError(f"`x` must hold at least 2 examples, got shape {list(jnp.shape(x))}")

    def embedding(x: Array) -> Array:
        u = embed(x)
        checks.floating("embed(x)", u)
        checks.shape("embed(x)", u, (jnp.shape(x)[0], None))
        u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        return u * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(u), axis=1, keepdims=True), 1e-24))

    clean = jax.lax.stop_gradient(embedding(x))

    def objective(x: Array) -> Array:
        u = embedding(x)
        checks.same_shape("embed(x)", u, "embeddings of the clean examples", clean)
        similarity = jnp.dot(u, clean.T, precision=jax.lax.Precision.HIGHEST) / temperature
        return jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity)

    return objective


def evaluate(objective: Objective, x: Array) -> tuple[Array, Array]:
    """An objective's value and which examples are won, from one evaluation.

    Args:
        objective: any ``x -> [batch]``; `Classified` ones know when they have won.
        x: [batch, ...].

    Returns:
        Values [batch], in the dtype of ``x``, float32 at least, and [batch] bool: all False for an objective that does
        not know.

    Raises:
        ValueError: the value is not [batch].
        TypeError: it is not floating.
    """
    value, won = objective.judge(x) if isinstance(objective, Classified) else (objective(x), None)
    checks.floating("objective(x)", value)
    checks.shape("objective(x)", value, jnp.shape(x)[:1])
    value = value.astype(jnp.promote_types(jnp.result_type(x), jnp.float32))
    return value, jnp.zeros(value.shape, bool) if won is None else won


def evaluate_and_gradient(objective: Objective, x: Array) -> tuple[Array, Array, Array]:
    """What `evaluate` gives and each example's gradient, from one evaluation and one product.

    Args:
        objective: as in `evaluate`.
        x: [batch, ...], floating.

    Returns:
        Values [batch], whether won [batch], and gradients in the shape and dtype of ``x``.

    Raises:
        ValueError: as in `evaluate`.
        TypeError: as in `evaluate`.

    >>> evaluate_and_gradient(lambda x: 3 * x[:, 0], jnp.ones((1, 2)))[2]
    Array([[3., 0.]], dtype=float32)
    """

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        value, won = evaluate(objective, x)
        return jnp.sum(value), (value, won)

    gradient, (value, won) = jax.grad(total, has_aux=True)(x)
    return value, won, gradient


class Best(NamedTuple):
    """The best adversarial examples so far.

    Attributes:
        x: [batch, ...].
        value: [batch], of the objective.
        won: [batch] bool.
    """

    x: Array
    value: Array
    won: Array


def unseen(x: Array) -> Best:
    """Where a search begins: at ``x`` [batch, ...] of the value -inf, which any point that has a value beats."""
    # Like x, so that under shard_map they vary over the axes that it does.
    value = jnp.full_like(x, -jnp.inf, dtype=jnp.promote_types(x.dtype, jnp.float32), shape=x.shape[:1])
    return Best(x, value, jnp.zeros_like(value, bool))


def better(best: Best, other: Best) -> Best:
    """The better of two for each example: the one that is won, then the one of the higher value.

    Args:
        best: kept where neither is better.
        other: the challenger.

    Returns:
        The better ones.
    """
    return choose((other.won & ~best.won) | ((other.won == best.won) & (other.value > best.value)), other, best)


def choose(mask: Array, these: Tree, those: Tree) -> Tree:
    """These examples where ``mask``, those elsewhere.

    Args:
        mask: bool, [batch], or a scalar for all examples.
        these: a pytree of arrays [batch, ...].
        those: another of its structure and shapes.

    Returns:
        A pytree of the same structure and shapes.
    """
    return jax.tree.map(
        lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b), these, those
    )


def _margin(logits: Array, labels: Array, targets: Array | None) -> Array:
    which = labels if targets is None else targets
    classes = jnp.arange(logits.shape[1])
    others = jnp.max(jnp.where(classes == which[:, None], -jnp.inf, logits), axis=1)
    lead = others - _of(logits, which)
    return lead if targets is None else -lead


def _of(logits: Array, classes: Array) -> Array:
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


def _check_classes(name: str, classes: Array) -> None:
    if not jnp.issubdtype(jnp.result_type(classes), jnp.integer):
        raise TypeError(f"`{name}` must be integers, the classes' numbers, got dtype {jnp.result_type(classes)}")
    checks.shape(name, classes, (None,))
