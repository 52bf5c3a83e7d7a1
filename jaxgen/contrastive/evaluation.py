"""What representations are worth: to a nearest neighbour, to a linear classifier, and by themselves.

Weighted nearest neighbours (Wu et al. 2018, arXiv:1805.01978, section 3.4): of the k training examples of the highest
cosine similarity s_i to a test example, each votes for its class,

    vote for c = sum_(i of the k nearest, y_i = c) exp(s_i / temperature)                           (1)

A linear probe (Radford et al. 2021, arXiv:2103.00020, appendix A.3): logistic regression of the frozen features, whose
weight decay is chosen on a part of the training examples and which is then fitted to all of them.

Alignment and uniformity (Wang & Isola 2020, arXiv:2005.10242, section 4.1): what a contrastive loss trades, without
labels. Of views x, y of one example and of embeddings x_i, all at unit length,

    alignment = E |x - y|^alpha                                                                     (2)
    uniformity = log E_(i != j) exp(-t |x_i - x_j|^2)                                               (3)

(2) is 0 where views fall together; (3) is 0 where all embeddings do and least, for many, where they cover the sphere.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.contrastive import logistic
from jaxgen.contrastive.similarity import normalise
from jaxgen.typing import Array, Key


def knn_accuracy(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    neighbours: int = 200,
    temperature: float = 0.07,
    block_size: int = 256,
) -> Array:
    """The share of test examples that their nearest training examples classify rightly, Eq. 1.

    Classes whose votes are equal are decided for that of the nearest neighbour among them. Labels are only compared:
    any integers will do.

    Args:
        train_features: [n, features], floating, of any norm; computed with in float32 at least.
        train_labels: [n], integers.
        test_features: [m, features], m at least 1; likewise.
        test_labels: [m], integers.
        neighbours: k, at most n; the paper's choice is 200.
        temperature: above 0: the lower, the more the nearest weigh; the paper's choice is 0.07.
        block_size: how many test examples are compared at a time: memory is block_size x n, beside the features.

    Returns:
        A scalar in [0, 1]; NaN if a feature is.

    Raises:
        ValueError: a shape is wrong, ``neighbours`` or ``block_size`` is not an integer of at least 1, there are fewer
            than ``neighbours`` training examples, or ``temperature`` is not above 0.
        TypeError: features are not floating, or labels are not integers.

    >>> train = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> knn_accuracy(train, jnp.array([3, 5]), jnp.array([[2.0, 1.0], [1.0, 9.0]]), jnp.array([3, 3]), neighbours=1)
    Array(0.5, dtype=float32)
    """
    checks.positive_integer("neighbours", neighbours)
    checks.positive_integer("block_size", block_size)
    checks.shape("temperature", temperature, ())
    checks.positive("temperature", temperature)
    _check_sets(train_features, train_labels, test_features, test_labels)
    if train_features.shape[0] < neighbours:
        raise ValueError(
            f"`neighbours` must be at most the number of rows of `train_features`, {train_features.shape[0]}, "
            f"got {neighbours}"
        )
    train, test = normalise(train_features), normalise(test_features)
    train_labels, test_labels = jnp.asarray(train_labels), jnp.asarray(test_labels)

    def right(index: Array) -> Array:
        similarities, nearest = jax.lax.top_k(jnp.matmul(train, test[index], precision="highest"), neighbours)
        # Votes are compared with each other alone: the nearest has weight 1 and nothing overflows.
        weights = jnp.exp((similarities - similarities[0]) / temperature)
        labels = train_labels[nearest]
        votes = jnp.sum(jnp.where(labels[:, None] == labels, weights, 0), axis=1)
        return _right(votes, labels, test_labels[index])

    return jnp.mean(jax.lax.map(right, jnp.arange(test.shape[0]), batch_size=block_size))


class LinearProbe(NamedTuple):
    """What a linear classifier of features reaches.

    Attributes:
        accuracy: a scalar in [0, 1], on the test examples.
        weight_decay: a scalar, the chosen one.
        validation_accuracies: [decays], what it was chosen by, in the order of ``weight_decays``.
        gradient_norm: a scalar, the length of the gradient where the final fit stopped: 0 at the minimum. Where it is
            not small, more steps are due.
    """

    accuracy: Array
    weight_decay: Array
    validation_accuracies: Array
    gradient_norm: Array


def linear_probe(
    key: Key,
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    classes: int,
    weight_decays: Sequence[float] | Array = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    validation: float = 0.1,
    steps: int = 500,
) -> LinearProbe:
    """The accuracy of logistic regression of standardised features, its weight decay chosen on a validation part.

    The objective is the mean cross-entropy plus weight_decay / 2 times the squared weights, without the bias: of
    scikit-learn's ``LogisticRegression``, weight_decay = 1 / (n C). It is convex and `logistic` minimises it without a
    learning rate, for all weight decays at once. Test examples enter the accuracy and nothing else.

    Args:
        key: draws the validation part.
        train_features: [n, features], floating, computed with in float32 at least; standardised here, by the mean and
            deviation of what is fitted.
        train_labels: [n], integers in [0, classes).
        test_features: [m, features], m at least 1; likewise.
        test_labels: [m], likewise.
        classes: their number, at least 2.
        weight_decays: [decays], each above 0, in any order; of those that validate equally well the strongest is taken.
        validation: the share of training examples that choose it, in (0, 1): one at least, and not all.
        steps: of the optimiser. On the pixels of handwritten digits 500 come within 1e-7 of the minimum for weight
            decays of 1e-3 and above, within 2e-5 for 1e-4 and 2e-4 for 1e-5.

    Returns:
        A `LinearProbe`, fitted to all training examples; its accuracies are NaN if a feature is.

    Raises:
        ValueError: a shape is wrong, labels are out of range, or an option is.
        TypeError: features are not floating, labels are not integers, or ``key`` is not a typed key.

    >>> features, labels = jnp.array([[0.0], [1.0], [4.0], [5.0]] * 5), jnp.array([0, 0, 1, 1] * 5)
    >>> linear_probe(jax.random.key(0), features, labels, features, labels, classes=2).accuracy
    Array(1., dtype=float32)
    """
    checks.key("key", key)
    checks.shape("key", key, ())
    checks.positive_integer("classes", classes)
    if classes < 2:
        raise ValueError(f"`classes` must be at least 2, got {classes}")
    checks.positive_integer("steps", steps)
    decays = jnp.asarray(weight_decays)
    checks.shape("weight_decays", decays, (None,))
    checks.positive("weight_decays", decays)
    _check_rows("weight_decays", decays, 1)
    _check_sets(train_features, train_labels, test_features, test_labels)
    checks.interval("train_labels", train_labels, 0, classes - 1)
    checks.interval("test_labels", test_labels, 0, classes - 1)
    checks.interval("validation", validation, 0, 1)
    rows = train_features.shape[0]
    held_out = round(validation * rows)
    if not 0 < held_out < rows:
        raise ValueError(
            f"`validation` must leave rows to choose by and rows to fit to, got {validation:g}, {held_out} of {rows}"
        )

    dtype = jnp.promote_types(jnp.result_type(train_features, test_features), jnp.float32)
    train_features, test_features = jnp.asarray(train_features, dtype), jnp.asarray(test_features, dtype)
    train_labels, test_labels = jnp.asarray(train_labels), jnp.asarray(test_labels)
    decays = decays.astype(dtype)
    order = jax.random.permutation(key, rows)
    held, kept = order[:held_out], order[held_out:]

    candidates = logistic.fit(
        train_features[kept], train_labels[kept], classes=classes, weight_decays=decays, steps=steps
    )
    accuracies = _accuracies(candidates, train_features[held], train_labels[held])
    chosen = jnp.max(jnp.where(accuracies == jnp.max(accuracies), decays, 0))
    final = logistic.fit(train_features, train_labels, classes=classes, weight_decays=chosen[None], steps=steps)
    (accuracy,) = _accuracies(final, test_features, test_labels)
    return LinearProbe(accuracy, chosen, accuracies, final.gradient_norm[0])


def alignment(first: Array, second: Array, *, alpha: float = 2.0) -> Array:
    """How far apart the two views of an example lie on the sphere, Eq. 2.

    Args:
        first: [n, features], floating, of any norm; n at least 1.
        second: of the shape of ``first``: the other view of each example.
        alpha: the power, above 0.

    Returns:
        A scalar in [0, 2^alpha]. Differentiable, with gradient 0 where two views fall together.

    Raises:
        ValueError: a shape is wrong, or ``alpha`` is not above 0.
        TypeError: the embeddings are not floating.

    >>> alignment(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[3.0, 0.0], [0.0, -1.0]]))
    Array(2., dtype=float32)
    """
    checks.shape("alpha", alpha, ())
    checks.positive("alpha", alpha)
    for name, views in (("first", first), ("second", second)):
        checks.floating(name, views)
        checks.shape(name, views, (None, None))
        _check_rows(name, views, 1)
    checks.same_shape("second", second, "first", first)
    squares = jnp.sum((normalise(first) - normalise(second)) ** 2, axis=1)
    together = squares == 0
    return jnp.mean(jnp.where(together, 0, jnp.where(together, 1, squares) ** (alpha / 2)))


def uniformity(embeddings: Array, *, t: float = 2.0, block_size: int = 256) -> Array:
    """How evenly embeddings cover the sphere, Eq. 3.

    Its value for the uniform distribution of many features is close to -2 t.

    Args:
        embeddings: [n, features], n at least 2; floating, of any norm.
        t: above 0: the larger, the closer the pairs that count.
        block_size: how many embeddings are compared at a time: memory is block_size x n, for gradients too.

    Returns:
        A scalar in [-4 t, 0]: 0 where all embeddings fall together. Differentiable.

    Raises:
        ValueError: a shape is wrong, ``t`` is not above 0, or ``block_size`` is not an integer of at least 1.
        TypeError: the embeddings are not floating.

    >>> uniformity(jnp.eye(3))  # all squared distances are 2
    Array(-4., dtype=float32)
    """
    checks.positive_integer("block_size", block_size)
    checks.shape("t", t, ())
    checks.positive("t", t)
    checks.floating("embeddings", embeddings)
    checks.shape("embeddings", embeddings, (None, None))
    _check_rows("embeddings", embeddings, 2)
    x = normalise(embeddings)
    n = x.shape[0]
    lengths = jnp.sum(x**2, axis=1)  # 1, but 0 for a row of zeros

    @jax.checkpoint
    def log_sum(index: Array) -> Array:
        squares = lengths + lengths[index] - 2 * jnp.matmul(x, x[index], precision="highest")
        return jax.nn.logsumexp(jnp.where(jnp.arange(n) == index, -jnp.inf, -t * squares))

    rows = jax.lax.map(log_sum, jnp.arange(n), batch_size=block_size)
    return jax.nn.logsumexp(rows) - math.log(n * (n - 1))


def _check_sets(train_features: Array, train_labels: Array, test_features: Array, test_labels: Array) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        checks.floating(f"{name}_features", features)
        checks.shape(f"{name}_features", features, (None, None))
        _check_rows(f"{name}_features", features, 1)
        checks.shape(f"{name}_labels", labels, (features.shape[0],))
        if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
            raise TypeError(f"`{name}_labels` must be integers, got dtype {jnp.result_type(labels)}")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            "`train_features` and `test_features` must hold features of one length, "
            f"got {train_features.shape[1]} and {test_features.shape[1]}"
        )


def _check_rows(name: str, x: Array, least: int) -> None:
    if x.shape[0] < least:
        raise ValueError(f"`{name}` must hold at least {least} row{'s' * (least > 1)}, got shape {list(x.shape)}")


def _right(scores: Array, labels: Array, label: Array) -> Array:
    """1 where the label of the highest score is the label, else 0; NaN if a score is."""
    return jnp.where(jnp.any(jnp.isnan(scores)), jnp.nan, labels[jnp.argmax(scores)] == label)


def _accuracies(classifier: logistic.Classifier, features: Array, labels: Array) -> Array:
    """The share [decays] of features that each classifier labels rightly."""
    scores = logistic.logits(classifier, features)
    every = jnp.arange(scores.shape[-1])
    right = jax.vmap(jax.vmap(_right, (0, None, 0)), (0, None, None))(scores, every, labels)
    return jnp.mean(right, axis=1)
