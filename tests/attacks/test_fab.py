"""FAB on affine classifiers, against its algorithm in NumPy, and beside torchattacks'."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import random
from jaxgen.attacks.fab import fab
from jaxgen.attacks.objectives import margin
from jaxgen.attacks.threat import ThreatModel, distance
from tests.attacks.affine import Affine
from tests.attacks.peers import network, one_thread

KEY = jax.random.key(0)
MODEL = Affine(3)


@functools.partial(jax.jit, static_argnames=["norm", "steps", "start_at_random"])
def attacked(key, x, norm, low, high, steps=40, start_at_random=False, eps=1e9, targets=None):
    objective = MODEL.objective() if targets is None else MODEL.objective(targets=targets)
    objective = dataclasses.replace(objective, any_class=True)
    threat = ThreatModel(norm, eps=eps, low=low, high=high)
    return fab(key, objective, x, threat, steps=steps, start_at_random=start_at_random)


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
def test_it_ends_at_the_smallest_perturbation_of_an_affine_classifier(norm):
    for low, high in ((0.0, 1.0), (-50.0, 50.0)):
        x = attacked(KEY, MODEL.x, norm, low, high)
        assert np.all(np.argmax(MODEL.apply(x), axis=1) != MODEL.labels)
        ratio = distance(norm, x, MODEL.x) / MODEL.smallest(norm, low=low, high=high)
        assert np.all((ratio > 1 - 1e-5) & (ratio < 1.01)), ratio


def test_aimed_at_one_class_it_ends_no_further_than_that_boundary():
    targets = np.argsort(np.asarray(MODEL.apply(MODEL.x)), axis=1)[:, -2]
    x = attacked(KEY, MODEL.x, 2, -50.0, 50.0, targets=jnp.asarray(targets))
    assert np.all(np.argmax(MODEL.apply(x), axis=1) != MODEL.labels)
    assert np.all(distance(2, x, MODEL.x) < 1.01 * MODEL.smallest(2, low=-50, high=50, targets=targets))


def test_it_is_the_papers_algorithm():
    """Algorithm 1 in NumPy: one example of two classes with a curved boundary, far from all bounds, in L2."""
    lead = lambda x, exp: 1.5 - (exp(-x) * jnp.array([1.0, 3.0])).sum(-1)  # noqa: E731
    x0 = np.array([0.3, 0.2])
    options = {"alpha_max": 0.05, "eta": 1.1, "beta": 0.8}
    x, best = x0, np.inf
    objective = margin(lambda x: jnp.stack([jnp.zeros(len(x)), lead(x, jnp.exp)], axis=1), jnp.array([0]))
    threat, start = ThreatModel(2, eps=math.inf, low=-20.0, high=20.0), jnp.asarray(x0[None], jnp.float32)
    for steps in range(1, 9):
        w, c = np.exp(-x) * np.array([1, 3]), -float(lead(x, np.exp))
        step, own = c * w / (w @ w), (c + w @ (x - x0)) * w / (w @ w)
        a = min(np.linalg.norm(step) / (np.linalg.norm(step) + np.linalg.norm(own)), 0.05)
        x = (1 - a) * (x + 1.1 * step) + a * (x0 + 1.1 * own)
        if lead(x, np.exp) > 0:
            best = min(best, np.linalg.norm(x - x0))
            x = x0 + 0.8 * (x - x0)
        if steps in (4, 8):
            found = fab(KEY, objective, start, threat, steps=steps, **options)
            np.testing.assert_allclose(distance(2, found, start)[0], best, rtol=1e-4)


def test_random_starts_are_each_examples_own():
    run = functools.partial(attacked, x=MODEL.x, norm=2, low=0.0, high=1.0, steps=3, start_at_random=True)
    keys = random.example_keys(KEY, 6)
    x, other = run(keys, eps=5.0), run(keys.at[0].set(jax.random.key(9)), eps=5.0)
    np.testing.assert_array_equal(np.any(np.asarray(x != other), axis=(1, 2, 3)), np.arange(6) == 0)


@pytest.mark.parametrize("norm", [math.inf, 2])
def test_it_finds_what_torchattacks_finds(norm):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    net = network()
    peer = torchattacks.FAB(net.torch, norm={math.inf: "Linf", 2: "L2"}[norm], eps=100.0, steps=15, n_classes=10)
    with one_thread():
        theirs = net.images(peer(net.torch_x, net.torch_labels))
    threat = ThreatModel(norm, eps=math.inf, low=0.0, high=1.0)
    ours = jax.jit(lambda x: fab(KEY, margin(net.apply, net.labels), x, threat, steps=15))(net.x)
    assert np.all(np.argmax(net.apply(ours), axis=1) != net.labels)
    ratio = distance(norm, ours, net.x) / distance(norm, theirs, net.x)
    assert np.median(ratio) < 1.01
    assert np.mean(ratio) < 1.02


def test_refusals():
    threat = ThreatModel(2, eps=1.0, low=0.0, high=1.0)
    cases = [
        ({"rivals": 0}, "`rivals` must be an integer of at least 1, got 0"),
        ({"unroll": 0}, "`unroll` must be an integer of at least 1, got 0"),
        ({"alpha_max": 1.5}, r"`alpha_max` must lie in \[0, 1\], got 1.5"),
        ({"eta": 0.9}, r"`eta` must lie in \[1, inf\], got 0.9"),
        ({"beta": -1.0}, r"`beta` must lie in \[0, 1\], got -1"),
        ({"beta": np.ones(2)}, r"`beta` must have shape \[\], got \[2\]"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            fab(KEY, MODEL.objective(), MODEL.x, threat, **options)
    with pytest.raises(ValueError, match=r"`threat.eps` must be finite, got inf"):
        fab(KEY, MODEL.objective(), MODEL.x, dataclasses.replace(threat, eps=math.inf), start_at_random=True)
    with pytest.raises(TypeError, match="`key` must be a typed PRNG key"):
        fab(0, MODEL.objective(), MODEL.x, threat, start_at_random=True)
