"""Restarts: the best of several runs by hand, example by example."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import random
from jaxgen.attacks.objectives import evaluate, margin
from jaxgen.attacks.restarts import restarts
from jaxgen.attacks.threat import ThreatModel, random_start

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (6, 3))
THREAT = ThreatModel(math.inf, eps=0.3, low=0.0, high=1.0)
# Three classes, of which the first two are told apart by x_0 and the third by x_1.
CLASSIFIED = margin(
    lambda x: jnp.stack([x[:, 0], 1 - x[:, 0], 0.9 * x[:, 1]], axis=1), jnp.argmax(X @ np.eye(3), axis=1)
)


def guess(key, objective, x, threat):
    return random_start(key, threat, x)


def scripted(*runs):
    """An attack whose run r ends at ``runs[r]``, as it can tell by its key."""
    number = jnp.stack([jax.random.uniform(random.fold(random.example_keys(KEY, 1), r)[0]) for r in range(len(runs))])

    def attack(key, objective, x, threat):
        return jnp.array(runs)[jnp.argmin(jnp.abs(number - jax.random.uniform(key[0])))]

    return attack


@pytest.mark.parametrize("objective", [CLASSIFIED, lambda x: jnp.sum(x**2, axis=1)], ids=["classified", "plain"])
@pytest.mark.parametrize("count", [1, 4])
def test_it_is_the_best_of_the_runs(objective, count):
    best = restarts(guess, count)(KEY, objective, X, THREAT)
    keys = random.example_keys(KEY, 6)
    runs = [guess(random.fold(keys, r), objective, X, THREAT) for r in range(count)]
    values, won = zip(*(evaluate(objective, x) for x in runs), strict=True)
    for i in range(6):
        r = max(range(count), key=lambda r: (bool(won[r][i]), float(values[r][i])))
        np.testing.assert_allclose(best[i], runs[r][i], atol=1e-6)


def test_a_win_counts_for_more_than_any_value():
    objective = dataclasses.replace(margin(lambda x: x, jnp.array([0])), score=lambda logits, *_: logits[:, 2])
    won, higher, won_higher = [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.9]], [[0.0, 1.0, 0.5]]
    for runs in ((won, higher), (higher, won)):
        best = restarts(scripted(*runs), 2)(KEY, objective, jnp.zeros((1, 3)), THREAT)
        np.testing.assert_array_equal(best, won)
    best = restarts(scripted(won, higher, won_higher), 3)(KEY, objective, jnp.zeros((1, 3)), THREAT)
    np.testing.assert_array_equal(best, won_higher)


def test_more_runs_are_those_of_fewer_and_some_more():
    value = lambda count: evaluate(CLASSIFIED, restarts(guess, count)(KEY, CLASSIFIED, X, THREAT))[0]  # noqa: E731
    values = np.stack([value(count) for count in (1, 2, 4, 16)])
    assert np.all(np.diff(values, axis=0) >= 0)
    assert np.all(values[-1] > values[0])


def test_runs_share_one_program_and_examples_keep_their_keys():
    traces = []

    def counted(key, objective, x, threat):
        traces.append(x.shape)
        return guess(key, objective, x, threat)

    attack = jax.jit(lambda key, x: restarts(counted, 5)(key, lambda x: x[:, 0], x, THREAT))
    whole = attack(KEY, X)
    assert len(traces) == 1
    np.testing.assert_array_equal(attack(random.example_keys(KEY, 6)[2:4], X[2:4]), whole[2:4])


def test_values_that_are_not_numbers_lose():
    """And where there is no other, the example comes back as it was."""
    x = jnp.full((1, 1), 0.25)
    value = lambda x: jnp.where(x[:, 0] > 0.75, jnp.nan, -5 - x[:, 0])  # noqa: E731
    for runs in (([[0.5]], [[1.0]]), ([[1.0]], [[0.5]])):
        np.testing.assert_array_equal(restarts(scripted(*runs), 2)(KEY, value, x, THREAT), [[0.5]])
    np.testing.assert_array_equal(restarts(scripted([[1.0]], [[0.8]]), 2)(KEY, value, x, THREAT), x)


@pytest.mark.parametrize("count", [0, 1.0, True])
def test_a_count_that_is_none_is_refused_by_name(count):
    with pytest.raises(ValueError, match=f"`count` must be an integer of at least 1, got {count}"):
        restarts(guess, count)
