"""Objectives against the papers' formulae in NumPy float64, one example at a time, and who has won."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from jaxgen.attacks.objectives import (
    Best,
    Classified,
    better,
    choose,
    cross_entropy,
    dlr,
    evaluate,
    evaluate_and_gradient,
    label_free,
    margin,
    unseen,
)

LABELS = jnp.array([0, 2, 1, 4, 3])
TARGETS = jnp.array([3, 0, 2, 1, 4])
LOGITS = 3 * jax.random.normal(jax.random.key(0), (5, 6))
X = jax.random.normal(jax.random.key(1), (5, 4))


def identity(x):
    return x


def formula(name, z, y, t):
    """Eqs. 1-6 of one example."""
    z = np.asarray(z, np.float64)
    aim = y if t is None else t
    others = np.max(np.delete(z, aim))
    s = np.sort(z)[::-1]
    sign = 1 if t is None else -1
    if name == "cross_entropy":
        return sign * (logsumexp(z) - z[aim])
    if name == "dlr" and t is None and len(z) >= 3:
        return (others - z[y]) / (s[0] - s[2])
    if name == "dlr" and t is not None and len(z) >= 4:
        return (z[t] - z[y]) / (s[0] - (s[2] + s[3]) / 2)
    return sign * (others - z[aim])


@pytest.mark.parametrize("make", [cross_entropy, margin, dlr])
@pytest.mark.parametrize("classes", [6, 4, 3, 2])
@pytest.mark.parametrize("targeted", [False, True])
def test_objectives_are_the_papers(make, classes, targeted):
    logits, labels, targets = LOGITS[:, :classes], LABELS % classes, TARGETS % classes if targeted else None
    value, won = make(identity, labels, targets=targets).judge(logits)
    expected = [
        formula(make.__name__, z, int(y), int(targets[i]) if targeted else None)
        for i, (z, y) in enumerate(zip(logits, labels, strict=True))
    ]
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(won, np.argmax(logits, 1) == targets if targeted else np.argmax(logits, 1) != labels)


@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_ignores_shift_and_scale(targeted):
    objective = dlr(identity, LABELS, targets=TARGETS if targeted else None)
    np.testing.assert_allclose(objective(100 * LOGITS - 7), objective(LOGITS), rtol=1e-4)


@pytest.mark.parametrize("make", [cross_entropy, margin, dlr])
def test_gradients_are_finite_and_each_examples_own(make):
    weight = jax.random.normal(jax.random.key(2), (4, 6))
    value, won, gradient = evaluate_and_gradient(make(lambda x: x @ weight, LABELS), X)
    alone = jax.jit(jax.value_and_grad(lambda x, label: make(lambda x: x @ weight, label[None])(x[None])[0]))
    for i in range(5):
        np.testing.assert_allclose(value[i], alone(X[i], LABELS[i])[0], rtol=1e-6)
        np.testing.assert_allclose(gradient[i], alone(X[i], LABELS[i])[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(won, make(lambda x: x @ weight, LABELS).judge(X)[1])
    assert np.all(np.isfinite(evaluate_and_gradient(make(identity, LABELS), jnp.zeros((5, 6)))[2]))  # all logits equal


def test_any_class_wins_where_it_is_told_so():
    objective = margin(identity, jnp.array([0, 0, 0]), targets=jnp.array([1, 1, 1]))
    logits = jnp.eye(3)  # predicted: 0, 1, 2
    np.testing.assert_array_equal(objective.judge(logits)[1], [False, True, False])
    np.testing.assert_array_equal(dataclasses.replace(objective, any_class=True).judge(logits)[1], [False, True, True])


def test_rows_are_the_same_objective_for_some_examples():
    objective = dlr(identity, LABELS, targets=TARGETS)
    index = jnp.array([3, 0, 3])
    values = jax.jit(lambda index: objective.rows(index)(LOGITS[index]))(index)
    np.testing.assert_allclose(values, objective(LOGITS)[index], rtol=1e-6)


def test_half_precision_is_evaluated_in_single():
    value, won = evaluate(cross_entropy(identity, LABELS), LOGITS.astype(jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert won.dtype == bool
    np.testing.assert_allclose(value, cross_entropy(identity, LABELS)(LOGITS), rtol=0.05, atol=0.05)


def test_a_plain_function_never_knows_that_it_has_won():
    value, won = evaluate(lambda x: x[:, 0], X)
    np.testing.assert_array_equal(value, X[:, 0])
    assert not np.any(won)


def test_label_free_is_nt_xent_against_the_clean_batch():
    weight = np.asarray(jax.random.normal(jax.random.key(2), (4, 3)))
    attacked = np.asarray(X) + 0.3
    value = label_free(lambda x: x @ weight, X, temperature=0.2)(attacked)
    u, v = (z.astype(np.float64) @ weight for z in (attacked, np.asarray(X)))
    u, v = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (u, v))
    for i in range(5):
        others = [u[i] @ v[j] / 0.2 for j in range(5)]
        np.testing.assert_allclose(value[i], logsumexp(others) - others[i], rtol=1e-5)
    gradient = evaluate_and_gradient(label_free(lambda x: x @ weight, X), X)[2]
    assert np.all(np.max(np.abs(gradient), axis=1) > 1e-3)  # the clean batch itself is no stationary point


def test_a_victory_is_better_than_a_value():
    best = Best(jnp.zeros((5, 2)), jnp.array([5.0, 1.0, 1.0, 1.0, 1.0]), jnp.array([False, True, False, True, False]))
    other = Best(
        jnp.ones((5, 2)), jnp.array([0.0, 9.0, 2.0, 0.0, jnp.nan]), jnp.array([True, False, False, True, False])
    )
    result = better(best, other)
    np.testing.assert_array_equal(result.x[:, 0], [1, 0, 1, 0, 0])
    np.testing.assert_array_equal(result.value, [0, 1, 2, 1, 1])
    np.testing.assert_array_equal(result.won, [True, True, False, True, False])
    assert np.all(better(unseen(best.x), other._replace(value=jnp.full(5, -1e30))).x == 1)
    np.testing.assert_array_equal(choose(jnp.array(True), best, other).x, best.x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cross_entropy(identity, jnp.ones(5)), TypeError, "`labels` must be integers"),
        (lambda: cross_entropy(identity, jnp.ones((5, 6), int)), ValueError, r"`labels` must have shape \[any\]"),
        (lambda: margin(identity, LABELS, targets=jnp.ones(5)), TypeError, "`targets` must be integers"),
        (
            lambda: margin(identity, LABELS, targets=TARGETS[:2]),
            ValueError,
            "`targets` must have the shape of `labels`",
        ),
        (lambda: dlr(identity, LABELS)(LOGITS[:3]), ValueError, r"`labels` must have shape \[3\], got \[5\]"),
        (lambda: dlr(identity, LABELS)(LOGITS[:, :4]), ValueError, r"`labels` must lie in \[0, 3\]"),
        (lambda: jax.jit(dlr(identity, LABELS))(LOGITS[:, :4]), ValueError, r"`labels` must lie in \[0, 3\]"),
        (lambda: dlr(identity, LABELS - 1)(LOGITS), ValueError, "`labels` must lie in"),
        (lambda: dlr(identity, LABELS, targets=TARGETS + 2)(LOGITS), ValueError, "`targets` must lie in"),
        (
            lambda: margin(identity, 0 * LABELS)(LOGITS[:, :1]),
            ValueError,
            r"`logits\(x\)` must have at least 2 classes",
        ),
        (lambda: margin(lambda x: x[:, 0], LABELS)(LOGITS), ValueError, r"`logits\(x\)` must have shape \[5, any\]"),
        (lambda: margin(lambda x: x.argmax(1), LABELS)(LOGITS), TypeError, r"`logits\(x\)` must be floating-point"),
        (lambda: evaluate(lambda x: x.mean(), X), ValueError, r"`objective\(x\)` must have shape \[5\], got \[\]"),
        (
            lambda: evaluate_and_gradient(identity, X),
            ValueError,
            r"`objective\(x\)` must have shape \[5\], got \[5, 4\]",
        ),
        (lambda: evaluate(lambda x: x.argmax(1), X), TypeError, r"`objective\(x\)` must be floating-point"),
        (lambda: label_free(identity, X[:1]), ValueError, "`x` must hold at least 2 examples"),
        (lambda: label_free(identity, X, temperature=0.0), ValueError, "`temperature` must be above 0"),
        (lambda: label_free(lambda x: x[:, 0], X), ValueError, r"`embed\(x\)` must have shape \[5, any\]"),
        (lambda: Classified(identity, LABELS[0], None), ValueError, r"`labels` must have shape \[any\], got \[\]"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
