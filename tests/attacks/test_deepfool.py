"""DeepFool on affine classifiers, where one step is all, and beside foolbox's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.attacks.deepfool import deepfool
from jaxgen.attacks.objectives import margin
from jaxgen.attacks.threat import ThreatModel, distance
from tests.attacks.affine import Affine
from tests.attacks.peers import network, one_thread

KEY = jax.random.key(0)


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-math.inf, math.inf)])
def test_one_step_is_the_smallest_perturbation_of_an_affine_classifier(norm, bounds):
    model = Affine(2)
    threat = ThreatModel(norm, eps=math.inf, low=bounds[0], high=bounds[1])
    attack = jax.jit(lambda x, overshoot: deepfool(KEY, model.objective(), x, threat, steps=1, overshoot=overshoot))
    x = attack(model.x, 1e-3)
    assert np.all(np.argmax(model.apply(x), axis=1) != model.labels)
    best = model.smallest(norm, low=max(bounds[0], -100), high=min(bounds[1], 100))
    np.testing.assert_allclose(distance(norm, x, model.x), best, rtol=2e-3)
    if math.isinf(bounds[0]):
        np.testing.assert_allclose(distance(norm, attack(model.x, 0.5), model.x), 1.5 * best, rtol=1e-4)


def test_it_ends_at_the_first_win():
    """A curved boundary: the paper's iteration in NumPy, of one example."""
    lead = lambda x, exp: 0.5 - exp(-x).sum(-1)  # noqa: E731
    x, count = np.array([0.3, 0.2]), 0
    while lead(x, np.exp) <= 0:
        slope = np.exp(-x)
        x, count = x - 1.02 * lead(x, np.exp) * slope / np.sum(slope**2), count + 1
    assert count == 4
    objective = margin(lambda x: jnp.stack([jnp.zeros(len(x)), lead(x, jnp.exp)], axis=1), jnp.array([0]))
    threat, start = ThreatModel(2, eps=math.inf, low=-10.0, high=10.0), jnp.array([[0.3, 0.2]])
    for steps, end in ((50, x), (4, x), (3, start[0])):
        found = deepfool(KEY, objective, start, threat, steps=steps)
        np.testing.assert_allclose(found[0], end, rtol=1e-5)


@pytest.mark.parametrize("norm", [2, math.inf])
def test_it_goes_no_further_than_foolbox(norm):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    net = network()
    peer = foolbox.attacks.L2DeepFoolAttack if norm == 2 else foolbox.attacks.LinfDeepFoolAttack
    attack = peer(steps=50, candidates=10, overshoot=1e-3)
    with one_thread():
        model = foolbox.PyTorchModel(net.torch, bounds=(0, 1))
        theirs, _, success = attack(model, net.torch_x, net.torch_labels, epsilons=None)
    threat = ThreatModel(norm, eps=math.inf, low=0.0, high=1.0)
    ours = jax.jit(lambda x: deepfool(KEY, margin(net.apply, net.labels), x, threat, overshoot=1e-3))(net.x)
    assert np.all(np.argmax(net.apply(ours), axis=1) != net.labels)
    ratio = distance(norm, ours, net.x) / distance(norm, net.images(theirs), net.x)
    assert np.median(ratio[np.asarray(success)]) < 1.01


def test_refusals():
    model = Affine(0)
    threat = ThreatModel(2, eps=1.0, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="`rivals` must be an integer of at least 1, got 0"):
        deepfool(KEY, model.objective(), model.x, threat, rivals=0)
    with pytest.raises(ValueError, match=r"`overshoot` must lie in \[0, inf\], got -0.1"):
        deepfool(KEY, model.objective(), model.x, threat, overshoot=-0.1)
    with pytest.raises(ValueError, match=r"`overshoot` must have shape \[\], got \[2\]"):
        deepfool(KEY, model.objective(), model.x, threat, overshoot=jnp.ones(2))
