"""Expectation over draws: a loop by hand, whoever the neighbours are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import random
from jaxgen.attacks.expectation import expected
from jaxgen.attacks.objectives import cross_entropy, dlr, margin

KEY = jax.random.key(0)
DRAWS = jax.random.split(jax.random.key(1), 5)
X = jax.random.uniform(jax.random.key(2), (6, 4))
W = jax.random.normal(jax.random.key(3), (4, 5))
LABELS, TARGETS = jnp.arange(6) % 5, (jnp.arange(6) + 2) % 5


def noisy(keys, x):
    return jnp.tanh(x + 0.5 * random.normal(keys, x.shape[1:])) @ W


@pytest.mark.parametrize("make", [cross_entropy, margin, dlr])
@pytest.mark.parametrize("targets", [None, TARGETS])
def test_value_and_gradient_are_the_means_over_the_draws(make, targets):
    objective = expected(make, noisy, LABELS, DRAWS, targets=targets)

    @jax.jit
    def together(x):
        return objective(x), jax.grad(lambda x: objective(x).sum())(x), objective.logits(x), objective.judge(x)[1]

    @jax.jit
    def alone(key, x):
        one = make(lambda x: noisy(random.example_keys(key, 6), x), LABELS, targets=targets)
        return one(x), jax.grad(lambda x: one(x).sum())(x), jax.nn.softmax(one.logits(x))

    each = [alone(key, X) for key in DRAWS]
    value, gradient, probabilities = (np.mean(part, axis=0) for part in zip(*each, strict=True))
    got_value, got_gradient, logits, got_won = together(X)
    np.testing.assert_allclose(got_value, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_gradient, gradient, atol=1e-5)
    np.testing.assert_allclose(np.exp(logits), probabilities, rtol=1e-4)
    won = probabilities.argmax(1) != LABELS if targets is None else probabilities.argmax(1) == TARGETS
    np.testing.assert_array_equal(got_won, won)
    assert 0 < np.mean(won) < 1


def test_the_mean_of_probabilities_decides_not_of_scores():
    """Two draws of three are right by a little, one is wrong by far: (0.88 + 0.88 + 0) / 3 is above a half."""
    logits = jnp.array([[[2.0, 0.0]], [[2.0, 0.0]], [[0.0, 9.0]]])
    draws = jax.random.split(KEY, 3)
    ids = (
        jax.random.uniform(random.example_keys(draws[0], 1)[0]),
        jax.random.uniform(random.example_keys(draws[1], 1)[0]),
    )

    def apply(keys, x):
        u = jax.random.uniform(keys[0])
        return logits[jnp.where(u == ids[0], 0, jnp.where(u == ids[1], 1, 2))]

    value, won = expected(margin, apply, jnp.array([0]), draws).judge(jnp.zeros((1, 1)))
    np.testing.assert_allclose(value, [5 / 3], rtol=1e-6)
    assert not won[0]


def test_rows_keep_their_draws():
    objective = expected(cross_entropy, noisy, LABELS, DRAWS, targets=TARGETS)
    index = jnp.array([4, 1, 1])
    evaluate = jax.jit(lambda o, x: (*o().judge(x), o().logits(x)), static_argnums=0)
    whole = evaluate(lambda: objective, X)
    some = evaluate(lambda: objective.rows(index), X[index])
    one = evaluate(lambda: objective.rows(index).rows(jnp.array([0])), X[4:5])
    for got, those in ((some, index), (one, jnp.array([4]))):
        jax.tree.map(lambda a, b, those=those: np.testing.assert_allclose(a, b[those], rtol=1e-5), got, whole)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: expected(margin, noisy, LABELS, KEY), ValueError, r"`keys` must have shape \[any\], got \[\]"),
        (lambda: expected(margin, noisy, LABELS, DRAWS[:0]), ValueError, r"`keys` must hold at least 1 key, got shape \[0\]"),
        (lambda: expected(margin, noisy, LABELS, 5), TypeError, "`keys` must be a typed PRNG key.*, got int"),
        (lambda: expected(margin, noisy, LABELS[:, None], DRAWS), ValueError, r"`labels` must have shape \[any\], got \[6, 1\]"),
        (lambda: expected(margin, noisy, LABELS * 1.0, DRAWS), TypeError, "`labels` must be integers"),
        (lambda: expected(margin, noisy, LABELS, DRAWS)(X[:5]), ValueError, r"`labels` must have shape \[5\], got \[6\]"),
        (lambda: expected(margin, lambda keys, x: x[:, 0], LABELS, DRAWS)(X), ValueError, r"`apply\(keys, x\)` must have shape \[6, any\], got \[6\]"),
        (lambda: expected(margin, lambda keys, x: jnp.ones((6, 5), int), LABELS, DRAWS)(X), TypeError, r"`apply\(keys, x\)` must be floating-point"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
