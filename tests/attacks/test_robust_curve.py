"""Robust curves: closed forms of a linear model, the nesting of balls by hand, and one program for all radii."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen import random
from jaxgen.attacks.fgsm import fgsm
from jaxgen.attacks.objectives import evaluate, margin
from jaxgen.attacks.pgd import pgd
from jaxgen.attacks.robust_curve import robust_curve
from jaxgen.attacks.threat import ThreatModel, beside, project, random_start

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (8, 4), minval=0.3, maxval=0.7)
W = jnp.array([1.0, -2.0, 0.5, 3.0])
UNIT = ThreatModel(math.inf, eps=0.0, low=0.0, high=1.0)
EPS = jnp.array([0.0, 0.05, 0.1, 0.2])


def linear(x):
    return x @ W


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
def test_a_linear_objective_grows_by_the_dual_norm(norm):
    threat = dataclasses.replace(UNIT, norm=norm)
    attack = lambda *args: fgsm(*args, share=0.25)  # noqa: E731
    curve = robust_curve(KEY, linear, X, threat, EPS, attack=attack)
    dual = {math.inf: 1, 2: 2, 1: math.inf}[norm]
    expected = linear(X) + EPS[:, None] * np.linalg.norm(W, dual)
    np.testing.assert_allclose(curve.value, expected, rtol=1e-5)
    assert not np.any(curve.won), "a plain objective does not know when it has won"


def clumsy(key, objective, x, threat):
    """The larger its ball, the worse it does, and at random."""
    gain = jax.vmap(jax.random.uniform)(key) - 3 * threat.eps
    return project(threat, x + beside(gain * threat.eps, x), x)


EPS_IN_ANY_ORDER = np.array([0.2, 0.0, 0.45, 0.1, 0.1, 0.3])


@pytest.mark.parametrize("at_once", [None, 1, 4])
def test_what_is_found_in_a_ball_holds_in_all_larger_ones(at_once):
    objective = margin(lambda x: jnp.stack([0.02 + 0 * x[:, 0], x[:, 0] - 0.5], axis=1), jnp.zeros(8, int))
    curve = robust_curve(KEY, objective, X, UNIT, EPS_IN_ANY_ORDER, attack=clumsy, at_once=at_once)
    keys = random.example_keys(KEY, 8)
    runs = [
        evaluate(objective, clumsy(keys, objective, X, dataclasses.replace(UNIT, eps=jnp.float32(eps))))
        for eps in EPS_IN_ANY_ORDER
    ]
    values, won = (np.stack(each) for each in zip(*runs, strict=True))
    assert np.any(np.diff(values[np.argsort(EPS_IN_ANY_ORDER)], axis=0) < 0), "the attack alone is not monotone"
    clean_value, clean_won = evaluate(objective, X)
    for i, eps in enumerate(EPS_IN_ANY_ORDER):
        within = eps >= EPS_IN_ANY_ORDER
        # Other shapes are rounded otherwise.
        np.testing.assert_allclose(curve.value[i], np.maximum(values[within].max(0), clean_value), atol=1e-7)
        np.testing.assert_array_equal(curve.won[i], won[within].any(0) | clean_won)


def test_an_attack_that_does_harm_to_itself_leaves_the_example_as_it_is():
    """The example itself lies in every ball, whether or not the attack has looked there."""
    objective = margin(lambda x: jnp.stack([1.2 + 0 * x[:, 0], linear(x)], axis=1), jnp.zeros(8, int))
    downhill = lambda key, objective, x, threat: fgsm(key, lambda x: -objective(x), x, threat)  # noqa: E731
    curve = robust_curve(KEY, objective, X, UNIT, [0.1, 0.2], attack=downhill)
    value, won = evaluate(objective, X)
    assert 0 < np.mean(won) < 1
    np.testing.assert_allclose(curve.value, np.stack([value, value]), rtol=1e-6)
    np.testing.assert_array_equal(curve.won, np.stack([won, won]))


def test_accuracy_falls_from_the_clean_one_to_none():
    objective = margin(lambda x: jnp.stack([linear(x), 1.2 + 0 * x[:, 0]], axis=1), (linear(X) < 1.2).astype(int))
    curve = robust_curve(KEY, objective, X, UNIT, [0.0, 0.02, 0.04, 0.06, 0.5], attack=fgsm)
    distances = np.abs(np.asarray(linear(X)) - 1.2) / np.sum(np.abs(W))
    np.testing.assert_array_equal(curve.won, distances < np.array([0.0, 0.02, 0.04, 0.06, 0.5])[:, None])
    assert 0 < np.mean(curve.won[2]) < 1


def test_radii_are_data():
    traces = []

    @jax.jit
    def curve(key, x, eps):
        traces.append(eps.shape)
        return robust_curve(key, linear, x, UNIT, eps, attack=pgd)

    first, second = curve(KEY, X, EPS), curve(KEY, X, EPS[::-1] * 2)
    assert len(traces) == 1
    assert np.all(second.value[0] > first.value[3])
    # An example of another batch draws what it drew.
    some = robust_curve(random.example_keys(KEY, 8)[3:5], linear, X[3:5], UNIT, EPS, attack=pgd)
    np.testing.assert_allclose(some.value, first.value[:, 3:5], rtol=1e-6)


def test_examples_stay_on_their_devices():
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))
    attack = jax.jit(lambda key, x: robust_curve(key, linear, x, UNIT, EPS, attack=pgd))
    x = jax.device_put(X, sharding)
    program = attack.lower(KEY, x).compile()
    assert not {word for word in ("all-gather", "all-to-all", "collective-permute") if word in program.as_text()}
    curve = program(KEY, x)
    assert curve.value.sharding.shard_shape(curve.value.shape) == (4, 1)
    np.testing.assert_allclose(curve.value, attack(KEY, X).value, rtol=1e-6)


def chance(key, objective, x, threat):
    return random_start(key, threat, x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: robust_curve(KEY, linear, X, UNIT, 0.1, attack=chance), ValueError, r"`eps_values` must have shape \[any\], got \[\]"),
        (lambda: robust_curve(KEY, linear, X, UNIT, [], attack=chance), ValueError, r"`eps_values` must hold at least 1 radius, got shape \[0\]"),
        (lambda: robust_curve(KEY, linear, X, UNIT, [0.1, -0.1], attack=chance), ValueError, r"`eps_values` must lie in \[0, inf\], got values from -0.1 to 0.1"),
        (lambda: robust_curve(KEY, linear, X, UNIT, [0.1, math.nan], attack=chance), ValueError, r"`eps_values` must lie in \[0, inf\], got values that are not finite"),
        (lambda: robust_curve(KEY, linear, X, UNIT, EPS, attack=chance, at_once=0), ValueError, "`at_once` must be an integer of at least 1, got 0"),
        (lambda: robust_curve(KEY, linear, X + 1, UNIT, EPS, attack=chance), ValueError, r"`x` must lie in \[low, high\]"),
        (lambda: robust_curve(KEY, linear, jnp.ones((2, 4), int), UNIT, EPS, attack=chance), TypeError, "`x` must be floating-point"),
        (lambda: robust_curve(KEY, lambda x: x.sum(), X, UNIT, EPS, attack=chance), ValueError, r"`objective\(x\)` must have shape \[8\], got \[\]"),
        (lambda: robust_curve(0, linear, X, UNIT, EPS, attack=chance), TypeError, "`key` must be a typed PRNG key.*, got int"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
