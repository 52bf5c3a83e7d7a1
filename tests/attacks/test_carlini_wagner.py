"""Carlini & Wagner's attack on affine classifiers, and beside foolbox's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxgen.attacks.carlini_wagner import carlini_wagner
from jaxgen.attacks.objectives import margin
from jaxgen.attacks.threat import ThreatModel, distance
from tests.attacks.affine import Affine, smallest_step
from tests.attacks.peers import network, one_thread

KEY = jax.random.key(0)
MODEL = Affine(8)


@functools.partial(jax.jit, static_argnames=["searches", "steps", "model"])
def attacked(x, weight, searches=9, steps=200, confidence=0.0, low=0.0, high=1.0, targets=None, model=MODEL):
    threat = ThreatModel(2, eps=math.inf, low=low, high=high)
    options = {"step_size": 0.05, "weight": weight, "confidence": confidence}
    objective = model.objective(targets=targets)
    return carlini_wagner(KEY, objective, x, threat, searches=searches, steps=steps, **options)


@pytest.mark.parametrize("weight", [1e-3, 100.0])
def test_it_tends_to_the_smallest_perturbation_of_an_affine_classifier(weight):
    # Of two classes: among more it goes to the one that leads on the way, which is not always the nearest.
    model = Affine(22, classes=2)
    x = attacked(model.x, weight, model=model)
    assert np.all(np.argmax(model.apply(x), axis=1) != model.labels)
    ratio = distance(2, x, model.x) / model.smallest(2)
    assert np.all((ratio > 1 - 1e-5) & (ratio < 1.02)), ratio


def test_towards_a_target_within_wide_bounds():
    targets = (MODEL.labels + 1) % 4
    x = attacked(MODEL.x, 1e-3, low=-4.0, high=jnp.full((2, 3, 2), 4.0), targets=targets)
    np.testing.assert_array_equal(jnp.argmax(MODEL.apply(x), axis=1), targets)
    w, bias = MODEL.weights.reshape(4, -1), MODEL.bias
    for i, target in enumerate(targets):
        start, others = np.float64(MODEL.x[i].ravel()), np.arange(4) != target
        rows = w[target] - w[others]
        region = optimize.LinearConstraint(rows, bias[others] - bias[target], np.inf)
        best = optimize.minimize(lambda z: np.sum((z - start) ** 2), start, method="SLSQP", constraints=region)  # noqa: B023
        assert best.success
        assert np.all(np.abs(best.x) < 4)
        ratio = np.linalg.norm(x[i].ravel() - start) / np.sqrt(best.fun)
        assert 1 - 1e-5 < ratio < 1.02


def test_the_weight_is_searched_for_each_example():
    """Too small a weight finds nothing; one search more has ten times as much, until it succeeds."""
    moved = lambda x: np.any(np.asarray(x != MODEL.x), axis=(1, 2, 3))  # noqa: E731
    assert not np.any(moved(attacked(MODEL.x, 1e-4, searches=1)))
    assert np.all(moved(attacked(MODEL.x, 1e-4, searches=7)))
    # A weight that is too large succeeds at once, further off than after the search has brought it down.
    first, last = (distance(2, attacked(MODEL.x, 1e4, searches=n), MODEL.x) for n in (1, 20))
    assert np.all(last <= first)
    assert np.mean(last) < 0.99 * np.mean(first)


def test_confidence_is_the_margin_that_is_reached():
    lead = lambda x: margin(MODEL.apply, jnp.asarray(MODEL.labels))(x)  # noqa: E731
    x = attacked(MODEL.x, 0.1, confidence=0.5)
    assert np.all(lead(x) >= 0.5)
    # At the least cost: two classes, whose boundary is shifted by as much.
    model = Affine(22, classes=2)
    x = attacked(model.x, 0.1, confidence=0.5, model=model)
    for i, label in enumerate(model.labels):
        w, bias = (v[1 - label] - v[label] for v in (model.weights.reshape(2, -1), model.bias))
        start = np.float64(model.x[i].ravel())
        step = smallest_step(2, start, w, 0.5 - bias - w @ start, 0, 1)
        assert 1 - 1e-5 < distance(2, x, model.x)[i] / np.linalg.norm(step) < 1.02
    # An example that is won by less is not won.
    np.testing.assert_array_less(0.5, lead(attacked(attacked(MODEL.x, 1.0), 1.0, confidence=0.5)))


def test_it_goes_no_further_than_foolbox():
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    net = network()
    peer = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=100, stepsize=0.05, initial_const=0.1)
    with one_thread():
        model = foolbox.PyTorchModel(net.torch, bounds=(0, 1))
        theirs, _, success = peer(model, net.torch_x, net.torch_labels, epsilons=None)
    threat = ThreatModel(2, eps=math.inf, low=0.0, high=1.0)
    options = {"searches": 5, "steps": 100, "step_size": 0.05, "weight": 0.1}
    ours = jax.jit(lambda x: carlini_wagner(KEY, margin(net.apply, net.labels), x, threat, **options))(net.x)
    assert np.all(np.argmax(net.apply(ours), axis=1) != net.labels)
    ratio = distance(2, ours, net.x) / distance(2, net.images(theirs), net.x)
    assert np.median(ratio[np.asarray(success)]) < 1.01


def test_refusals():
    threat = ThreatModel(2, eps=1.0, low=0.0, high=1.0)
    cases = [
        ({"searches": 0}, "`searches` must be an integer of at least 1, got 0"),
        ({"unroll": 0}, "`unroll` must be an integer of at least 1, got 0"),
        ({"step_size": 0.0}, "`step_size` must be above 0 and finite, got 0"),
        ({"weight": -1.0}, "`weight` must be above 0 and finite, got -1"),
        ({"confidence": -1.0}, r"`confidence` must lie in \[0, inf\], got -1"),
        ({"weight": np.ones(6)}, r"`weight` must have shape \[\], got \[6\]"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            carlini_wagner(KEY, MODEL.objective(), MODEL.x, threat, **options)
    with pytest.raises(ValueError, match=r"`threat.norm` must be 2, got inf"):
        carlini_wagner(KEY, MODEL.objective(), MODEL.x, ThreatModel(math.inf, eps=1.0, low=0.0, high=1.0))
    with pytest.raises(ValueError, match=r"`threat.high` must be finite, got inf"):
        carlini_wagner(KEY, MODEL.objective(), MODEL.x, ThreatModel(2, eps=1.0, low=0.0, high=math.inf))
