"""What the searches for the smallest perturbation have in common: fab, deepfool and carlini_wagner."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.attacks.carlini_wagner import carlini_wagner
from jaxgen.attacks.deepfool import deepfool
from jaxgen.attacks.fab import fab
from jaxgen.attacks.objectives import dlr, margin
from jaxgen.attacks.threat import ThreatModel, distance
from tests.attacks.affine import Affine

KEY = jax.random.key(0)
QUICK = {
    fab: {"steps": 20},
    deepfool: {"steps": 5},
    carlini_wagner: {"searches": 5, "steps": 30, "step_size": 0.1, "weight": 0.05},
}
PAIRS = [(fab, math.inf), (fab, 2), (fab, 1), (deepfool, math.inf), (deepfool, 2), (deepfool, 1), (carlini_wagner, 2)]
each = pytest.mark.parametrize("attack", list(QUICK))
MODEL = Affine(1)
X = jnp.asarray(MODEL.x)
TRACES = []


@functools.cache
def compiled(attack):
    @jax.jit
    def run(x, labels, threat):
        TRACES.append(attack)
        return attack(KEY, margin(MODEL.apply, labels), x, threat, **QUICK[attack])

    return lambda x, threat, labels=MODEL.labels: run(x, labels, threat)


def wins(x):
    return np.argmax(np.asarray(MODEL.apply(x)), axis=1) != MODEL.labels


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(PAIRS), st.floats(0, 3, width=32), st.lists(st.floats(-1, 2, width=32), min_size=2, max_size=2))
def test_either_a_win_in_ball_and_bounds_or_the_example_as_it_came(pair, eps, bounds):
    attack, norm = pair
    low, high = min(bounds), max(bounds) + 0.5
    x = np.clip(MODEL.x, low, high).astype(np.float32)
    found = np.asarray(
        compiled(attack)(x, ThreatModel(norm, eps=jnp.float32(eps), low=jnp.float32(low), high=jnp.float32(high)))
    )
    assert np.all((found >= np.float32(low)) & (found <= np.float32(high)))
    assert np.all(distance(norm, jnp.asarray(found), jnp.asarray(x)) <= np.float32(eps))
    same = np.all(found == x, axis=(1, 2, 3))
    assert np.all(same | wins(found))


@each
def test_eps_is_data_and_cuts_off_what_was_found(attack):
    run = compiled(attack)
    threat = ThreatModel(2, eps=jnp.float32(jnp.inf), low=jnp.float32(0), high=jnp.float32(1))
    found = run(X, threat)
    assert np.all(wins(found))
    before = len(TRACES)
    far = distance(2, found, X)
    assert np.all(far > 0)
    eps = jnp.array([0.0, 1.001, 0.999, 1.001, 0.5, 2]) * far
    some = run(X, dataclasses.replace(threat, eps=eps))
    np.testing.assert_array_equal(some, jnp.where((eps >= far)[:, None, None, None], found, X))
    for e in (0.0, 1e9):
        expected = X if e == 0 else found
        np.testing.assert_array_equal(run(X, dataclasses.replace(threat, eps=jnp.float32(e))), expected)
    assert len(TRACES) - before == 1, "only the shape of eps compiles anew"
    curve = jax.vmap(lambda e: run(X, dataclasses.replace(threat, eps=e)))(jnp.array([0.0, 1e9]))
    np.testing.assert_allclose(curve, jnp.stack([X, found]), atol=1e-5)


@each
def test_examples_do_not_see_one_another(attack):
    threat = ThreatModel(2, eps=jnp.float32(jnp.inf), low=jnp.float32(0), high=jnp.float32(1))
    alone = compiled(attack)(X[2:4], threat, MODEL.labels[2:4])
    np.testing.assert_allclose(alone, compiled(attack)(X, threat)[2:4], atol=1e-5)


@each
def test_an_example_that_is_won_stays_as_it_is(attack):
    threat = ThreatModel(2, eps=jnp.float32(jnp.inf), low=jnp.float32(0), high=jnp.float32(1))
    labels = MODEL.labels.copy()
    labels[3] = (labels[3] + 1) % 4
    found = compiled(attack)(X, threat, labels)
    np.testing.assert_array_equal(found[3], X[3])
    assert np.all(wins(found) == (np.arange(6) != 3))


@each
def test_a_target_is_reached(attack):
    targets = (MODEL.labels + 1) % 4
    threat = ThreatModel(2, eps=math.inf, low=-3.0, high=3.0)
    objective = MODEL.objective(targets=jnp.asarray(targets))
    found = jax.jit(lambda x: attack(KEY, objective, x, threat, **QUICK[attack] | {"steps": 60}))(X)
    np.testing.assert_array_equal(jnp.argmax(MODEL.apply(found), axis=1), targets)


@each
def test_what_comes_back_is_won_in_the_dtype_of_the_examples(attack):
    threat = ThreatModel(2, eps=math.inf, low=0.0, high=1.0)
    x = X.astype(jnp.bfloat16)
    apply = lambda x: MODEL.apply(x.astype(jnp.float32))  # noqa: E731
    labels = jnp.argmax(apply(x), axis=1)
    found = jax.jit(lambda x: attack(KEY, dlr(apply, labels), x, threat, **QUICK[attack] | {"steps": 40}))(x)
    assert found.dtype == jnp.bfloat16
    moved = np.any(np.asarray(found != x), axis=(1, 2, 3))
    assert np.sum(moved) >= 4
    np.testing.assert_array_equal((jnp.argmax(apply(found), axis=1) != labels)[moved], True)


@each
def test_double_precision_of_numpy_is_taken_without_a_word(attack):
    threat = ThreatModel(2, eps=math.inf, low=0.0, high=1.0)
    x = np.asarray(X, np.float64)
    assert attack(KEY, MODEL.objective(), x, threat, **QUICK[attack] | {"steps": 1}).dtype == jnp.float32


@each
def test_a_classifier_without_gradients_gives_nothing_and_no_nan(attack):
    threat = ThreatModel(2, eps=math.inf, low=0.0, high=1.0)
    objective = margin(lambda x: jnp.tile(jnp.array([1.0, 0.0, 0.0]), (x.shape[0], 1)), jnp.zeros(6, int))
    np.testing.assert_array_equal(attack(KEY, objective, X, threat, **QUICK[attack]), X)


@each
def test_common_refusals(attack):
    threat = ThreatModel(2, eps=1.0, low=0.0, high=1.0)
    with pytest.raises(TypeError, match="`objective` must know its classifier, as `margin` does, got function"):
        attack(KEY, lambda x: x[:, 0, 0, 0], X, threat)
    with pytest.raises(ValueError, match=r"`x` must lie in \[low, high\]"):
        attack(KEY, MODEL.objective(), X + 1, threat)
    with pytest.raises(ValueError, match=r"`labels` must have shape \[5\], got \[6\]"):
        attack(KEY, MODEL.objective(), X[:5], threat)
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 1, got 0"):
        attack(KEY, MODEL.objective(), X, threat, steps=0)
