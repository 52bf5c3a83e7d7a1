"""Auto-PGD against optima in closed form, its own algorithm in NumPy, torchattacks, and its own promises."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import random
from jaxgen.attacks.apgd import apgd
from jaxgen.attacks.objectives import cross_entropy, dlr, evaluate
from jaxgen.attacks.pgd import pgd
from jaxgen.attacks.threat import ThreatModel, distance
from tests.attacks import linear, peers

KEY = jax.random.key(0)
NORMS = [1, 2, math.inf]
EPS = {1: 2.0, 2: 0.8, math.inf: 0.3}
W = jax.random.normal(jax.random.key(1), (4, 5))
X = jax.random.uniform(jax.random.key(2), (6, 4, 5))


def rising(x):
    return jnp.sum(W * x, axis=(1, 2))


def bent(x):
    return jnp.sum(jnp.sin(5 * x) * W, axis=(1, 2))


@pytest.mark.parametrize(("norm", "reached"), [(1, 0.99), (2, 1 - 1e-4), (math.inf, 1 - 1e-5)])
def test_the_optimum_of_a_linear_function_is_reached_and_never_passed(norm, reached):
    threat = ThreatModel(norm, EPS[norm], 0.0, 1.0)
    x = np.asarray(jax.jit(lambda x: apgd(KEY, rising, x, threat))(X), np.float64)
    gain = np.sum(np.asarray(W) * (x - np.asarray(X)), axis=(1, 2))
    gain /= linear.greatest_gain(W, X, norm, EPS[norm], 0.0, 1.0)
    assert np.all(gain <= 1 + 1e-6)
    assert np.all(gain >= reached)


def papers(function, gradient, x0, eps, steps):
    """Algorithm 1 of one example for the norm inf within [0, 1], from ``x0``."""
    project = lambda x: np.clip(np.clip(x, x0 - eps, x0 + eps), 0, 1)  # noqa: E731
    p = [0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    checkpoints = [math.ceil(q * steps - 1e-9) for q in p]
    eta, halved, rises, window_start = 2 * eps, True, 0, 0
    before, now, value, g = x0, x0, function(x0), gradient(x0)
    best, best_value, best_g = x0, value, g
    plateau = best_value
    for k in range(1, steps + 1):
        z = project(now + eta * np.sign(g))
        new = z if k == 1 else project(now + 0.75 * (z - now) + 0.25 * (now - before))
        before, now = now, new
        rises += function(now) > value
        value, g = function(now), gradient(now)
        if value > best_value:
            best, best_value, best_g = now, value, g
        if k in checkpoints:
            halved = rises < 0.75 * (k - window_start) or (not halved and best_value == plateau)
            if halved:
                eta, now, value, g = eta / 2, best, best_value, best_g
            plateau, rises, window_start = best_value, 0, k
    return best


@pytest.mark.parametrize(("frequency", "steps", "size"), [(5, 50, 2), (9, 50, 5), (40, 30, 20)])
def test_it_is_the_papers_algorithm(frequency, steps, size):
    """On many functions, each example its own: Eq. 4 decides in one of a hundred, of this seed among others."""
    rng = np.random.default_rng(3)
    w, phase, x = rng.normal(size=(100, size)), rng.normal(size=(100, size)), rng.uniform(size=(100, size))
    threat = ThreatModel(math.inf, 0.25, 0.0, 1.0)
    with jax.enable_x64(True):
        curved = lambda x: jnp.sum(jnp.sin(frequency * x + phase) * w, axis=1)  # noqa: E731
        result = jax.jit(lambda x: apgd(KEY, curved, x, threat, steps=steps, random_start=False))(x)
        assert result.dtype == jnp.float64
    for i in range(100):
        function = lambda x, w=w[i], phase=phase[i]: np.sum(np.sin(frequency * x + phase) * w)  # noqa: E731
        gradient = lambda x, w=w[i], phase=phase[i]: frequency * np.cos(frequency * x + phase) * w  # noqa: E731
        np.testing.assert_allclose(result[i], papers(function, gradient, x[i], 0.25, steps), atol=1e-9)


def test_better_than_steps_of_one_size():
    """On a function with many maxima, at the same number of steps, as the paper claims."""
    threat = ThreatModel(2, EPS[2], 0.0, 1.0)
    x = jax.random.uniform(KEY, (40, 4, 5))
    reached = lambda attack: jnp.mean(bent(jax.jit(lambda x: attack(KEY, bent, x, threat, steps=50))(x)))  # noqa: E731
    assert reached(apgd) > reached(pgd)


@pytest.mark.parametrize("norm", NORMS)
def test_every_output_is_in_ball_and_bounds(norm):
    low, high = -0.5, 2.0
    x = low + (high - low) * jnp.clip(1.4 * X - 0.2, 0, 1)
    eps = jnp.array([0.0, 0.01, 0.2, 1.0, 5.0, 100.0])
    threat = ThreatModel(norm, eps, low, high)
    result = jax.jit(lambda x: apgd(KEY, bent, x, threat, steps=5))(x)
    assert np.all((result >= low) & (result <= high))
    assert np.all(distance(norm, result, x) <= eps * (1 + 2e-6) + 5e-6)
    np.testing.assert_array_equal(result[0], x[0])


@pytest.mark.parametrize("norm", [2, math.inf])
def test_a_single_step_is_one(norm):
    """From the clean point with eta = 2 eps, projected: on a linear function the fast method's."""
    threat = ThreatModel(norm, 0.1, -math.inf, math.inf)
    one = jax.jit(lambda x: apgd(KEY, rising, x, threat, steps=1, random_start=False))
    gain = rising(one(X)) - rising(X)
    dual = {2: jnp.linalg.norm(W), math.inf: jnp.sum(jnp.abs(W))}[norm]
    np.testing.assert_allclose(gain, np.full(6, 0.1 * dual), rtol=1e-4)


def test_undefined_values_never_leave_the_ball():
    """For norm 1, whose first stages are in balls of two and three times the radius."""
    threat = ThreatModel(1, 0.3, 0.0, 1.0)
    result = jax.jit(lambda x: apgd(KEY, lambda x: bent(x) * jnp.nan, x, threat, steps=5))(X)
    assert np.all(distance(1, result, X) <= 0.3 * (1 + 1e-5))


@pytest.mark.parametrize("norm", NORMS)
def test_examples_do_not_know_their_batch(norm):
    eps = jnp.linspace(0.1, 0.6, 6)
    attack = jax.jit(lambda key, x, eps: apgd(key, bent, x, ThreatModel(norm, eps, 0.0, 1.0), steps=10))
    order = jnp.array([2, 3, 2, 3, 5, 0])
    keys = random.example_keys(KEY, 6)
    np.testing.assert_allclose(attack(keys[order], X[order], eps[order]), attack(keys, X, eps)[order], atol=1e-5)


def test_a_victory_is_kept_though_later_points_have_higher_values():
    """Towards a target that is never reached, past another wrong class: won on the way, if any class counts."""

    def logits(x):
        lead = 0.1 - jnp.abs(x[:, 0] - 0.3)
        return jnp.stack([0 * lead, lead, -2 + x[:, 0]], axis=1)

    objective = cross_entropy(logits, jnp.zeros(1, int), targets=jnp.full(1, 2))
    objective = dataclasses.replace(objective, score=lambda logits, labels, targets: logits[:, 2])
    threat, x = ThreatModel(math.inf, 1.0, 0.0, 1.0), jnp.array([[0.3]])
    attack = jax.jit(lambda x, f: apgd(KEY, f, x, threat, steps=5, random_start=False), static_argnums=1)
    assert attack(x, objective) == 1.0
    assert attack(x, dataclasses.replace(objective, any_class=True)) == x


def test_one_program_for_all_radii_and_targets():
    traces = []

    @jax.jit
    def run(eps, targets):
        traces.append(1)
        apply = lambda x: x.reshape(6, 20) @ W.reshape(20, 1) * jnp.arange(1.0, 5)  # noqa: E731
        objective = dlr(apply, jnp.zeros(6, int), targets=targets)
        return apgd(KEY, objective, X, ThreatModel(2, eps, 0.0, 1.0), steps=3)

    for i in range(1, 4):
        run(0.1 * i, jnp.full(6, i))
    assert len(traces) == 1


def test_the_network_is_compiled_once():
    """One evaluation in the program: the start's and every step's, whatever the norm."""
    for norm in NORMS:
        calls = []

        def objective(x, calls=calls):
            calls.append(1)
            return bent(x)

        jax.make_jaxpr(lambda x, norm=norm, f=objective: apgd(KEY, f, x, ThreatModel(norm, 0.3, 0.0, 1.0)))(X)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("norm", "peer_norm", "eps", "loss"), [(math.inf, "Linf", 0.04, "ce"), (2, "L2", 0.4, "ce"), (2, "L2", 0.4, "dlr")]
)
def test_matches_or_beats_torchattacks(norm, peer_norm, eps, loss):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    net = peers.network(batch=48)
    pytest.importorskip("torch").manual_seed(0)
    with peers.one_thread():
        attack = torchattacks.APGD(net.torch, norm=peer_norm, eps=eps, steps=40, loss=loss)
        # Its `forward` returns wrong examples alone; this is the point of the highest loss of a run.
        theirs = net.images(attack.attack_single_run(net.torch_x, net.torch_labels.long())[0])
    objective = {"ce": cross_entropy, "dlr": dlr}[loss](net.apply, net.labels)
    # As theirs, ours reports the point of the highest value: a function that does not say where it has won.
    ours = jax.jit(lambda x: apgd(KEY, lambda x: objective(x), x, ThreatModel(norm, eps, 0.0, 1.0), steps=40))(net.x)
    mine, peer = evaluate(objective, ours)[0], evaluate(objective, theirs)[0]
    # From other random starts some examples end in other maxima: theirs between two seeds differ as much.
    assert jnp.mean(mine >= peer - 1e-3) > 0.85
    assert jnp.sum(objective.judge(ours)[1]) >= jnp.sum(objective.judge(theirs)[1]) - 2


THREAT = ThreatModel(math.inf, 0.1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: apgd(0, rising, X, THREAT), TypeError, "`key` must be a typed PRNG key"),
        (lambda: apgd(KEY, rising, 2 * X, THREAT), ValueError, r"`x` must lie in \[low, high\]"),
        (lambda: apgd(KEY, rising, X, 0.1), TypeError, "`threat` must be a ThreatModel, got float"),
        (
            lambda: apgd(KEY, lambda x: rising(x).mean(), X, THREAT),
            ValueError,
            r"`objective\(x\)` must have shape \[6\]",
        ),
        (lambda: apgd(KEY, rising, X, THREAT, steps=0), ValueError, "`steps` must be an integer of at least 1"),
        (lambda: apgd(KEY, rising, X, THREAT, unroll=0), ValueError, "`unroll` must be an integer of at least 1"),
        (lambda: apgd(KEY, rising, X, ThreatModel(2, math.inf, 0.0, 1.0)), ValueError, "`threat.eps` must be finite"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
