"""FGSM, PGD and MI-FGSM against a linear function's optimum in closed form, foolbox, and their own promises."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from jaxgen import random
from jaxgen.attacks.apgd import apgd
from jaxgen.attacks.fgsm import fgsm
from jaxgen.attacks.objectives import Classified, cross_entropy, margin
from jaxgen.attacks.pgd import mifgsm, pgd
from jaxgen.attacks.restarts import restarts
from jaxgen.attacks.steepest import advance, steepest
from jaxgen.attacks.threat import ThreatModel, distance, random_start
from tests.attacks import linear, peers

KEY = jax.random.key(0)
KEYS = random.example_keys(KEY, 6)
NORMS = [1, 2, math.inf]
W = jax.random.normal(jax.random.key(1), (4, 5))
X = jax.random.uniform(jax.random.key(2), (6, 4, 5))


def rising(x):
    return jnp.sum(W * x, axis=(1, 2))


@pytest.mark.parametrize("norm", NORMS)
def test_without_bounds_one_step_is_the_optimum(norm):
    """The maximum of w . d over the ball is eps times the dual norm of w."""
    threat = ThreatModel(norm, 0.7, -math.inf, math.inf)
    dual = {1: jnp.max(jnp.abs(W)), 2: jnp.linalg.norm(W), math.inf: jnp.sum(jnp.abs(W))}[norm]
    gain = rising(fgsm(KEY, rising, X, threat, share=0.0)) - rising(X)
    np.testing.assert_allclose(gain, np.full(6, 0.7 * dual), rtol=1e-5)


@pytest.mark.parametrize(
    ("attack", "norm", "reached"),
    [
        (lambda *args: fgsm(*args, share=0.0), 1, 1 - 1e-5),
        (fgsm, math.inf, 1 - 1e-5),
        (lambda *args: pgd(*args, steps=200, random_start=False), 1, 1 - 1e-5),
        (lambda *args: pgd(*args, steps=200), 1, 0.99),
        (lambda *args: pgd(*args, steps=200, step_size=0.2), 2, 0.99),
        (pgd, math.inf, 1 - 1e-5),
        (lambda *args: mifgsm(*args, steps=40), 1, 0.99),
        (lambda *args: mifgsm(*args, steps=40, step_size=0.5), 2, 0.99),
        (mifgsm, math.inf, 1 - 1e-5),
    ],
)
def test_within_bounds_the_optimum_is_reached_and_never_passed(attack, norm, reached):
    eps = {1: 2.0, 2: 0.8, math.inf: 0.3}[norm]
    threat = ThreatModel(norm, eps, 0.0, 1.0)
    x = np.asarray(jax.jit(lambda x: attack(KEY, rising, x, threat))(X), np.float64)
    optimum = linear.greatest_gain(W, X, norm, eps, 0.0, 1.0)
    gain = np.sum(np.asarray(W) * (x - np.asarray(X)), axis=(1, 2)) / optimum
    assert np.all(gain <= 1 + 1e-6)
    assert np.all(gain >= reached)


def test_steps_of_norm_1_fill_the_largest_coordinates_first():
    threat = ThreatModel(1, 1.0, 0.0, 1.0)
    x, g = jnp.array([[0.0, 0.5, 1.0, 0.5]]), jnp.array([[1.0, 4.0, 3.0, -2.0]])
    step = jnp.asarray(0.75)
    np.testing.assert_allclose(
        advance(threat, x, g, step, share=0.25), [[0, 1, 1, 0.25]]
    )  # 2nd to the bound, 3rd is there
    np.testing.assert_allclose(advance(threat, x, g, step, share=1.0), [[0.1875, 0.6875, 1, 0.3125]])  # shared by four
    np.testing.assert_allclose(advance(threat, x, 0 * g, step), x)
    tied = advance(threat, jnp.full((1, 4), 0.5), jnp.ones((1, 4)), jnp.asarray(0.4), share=0.25)
    np.testing.assert_allclose(tied, np.full((1, 4), 0.6), rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_directions_have_unit_norm_or_none(norm):
    g = jnp.stack([W, 0 * W, 1e-30 * W])  # the squares of the last are no longer numbers of single precision
    direction = steepest(norm, g)
    np.testing.assert_allclose(distance(norm, direction, 0 * g), [1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(direction[2], direction[0], rtol=1e-5)


def test_fgsm_is_the_formula():
    threat = ThreatModel(math.inf, 8 / 255, 0.0, 1.0)
    objective = cross_entropy(
        lambda x: jnp.tanh(x.reshape(6, 20)) @ jnp.ones((20, 3)).at[0, 0].set(3), jnp.arange(6) % 3
    )
    gradient = jax.grad(lambda x: objective(x).sum())(X)
    np.testing.assert_allclose(
        fgsm(KEY, objective, X, threat), jnp.clip(X + 8 / 255 * jnp.sign(gradient), 0, 1), atol=1e-7
    )


def test_fgsm_rs_steps_from_a_random_start():
    threat = ThreatModel(math.inf, 0.1, 0.0, 1.0)
    start = random_start(KEY, threat, X)
    expected = jnp.clip(jnp.clip(start + 0.05 * jnp.sign(W), X - 0.1, X + 0.1), 0, 1)
    np.testing.assert_allclose(fgsm(KEY, rising, X, threat, random_start=True, step_size=0.05), expected, atol=1e-6)


def test_momentum_is_the_papers():
    """Algorithm 1 of MI-FGSM in NumPy, on a function whose gradient turns."""
    curved = lambda x: jnp.sum(jnp.sin(7 * x) * W, axis=(1, 2))  # noqa: E731
    threat = ThreatModel(math.inf, 0.2, 0.0, 1.0)
    x, m = np.asarray(X, np.float64), np.zeros(X.shape)
    for _ in range(6):
        g = 7 * np.cos(7 * x) * np.asarray(W)
        m = 0.9 * m + g / np.abs(g).sum(axis=(1, 2), keepdims=True)
        x = np.clip(np.clip(x + 0.05 * np.sign(m), X - 0.2, X + 0.2), 0, 1)
    result = mifgsm(KEY, curved, X, threat, steps=6, step_size=0.05, decay=0.9, keep_best=False)
    np.testing.assert_allclose(result, x, atol=1e-6)


def bent(x):
    return jnp.sum(jnp.sin(5 * x) * W, axis=(1, 2))


def compiled(attack, **kwargs):
    return jax.jit(lambda key, x, threat: attack(key, bent, x, threat, **kwargs))


ATTACKS = [
    compiled(fgsm, random_start=True, step_size=0.3),
    compiled(pgd, steps=3),
    compiled(mifgsm, steps=3, random_start=True, keep_best=False),
]


@settings(max_examples=12, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.one_of(st.just(0.0), st.floats(0, 5, width=32)),
    low=st.floats(-2, 0, width=32),
    width=st.floats(0.125, 3, width=32),
    attack=st.sampled_from(ATTACKS),
)
def test_every_output_is_in_ball_and_bounds(norm, eps, low, width, attack):
    low, high = np.float32(low), np.float32(low + width)
    x = jnp.clip(low + width * (1.4 * X - 0.2), low, high)
    # One program a norm: a radius for each example, bounds for each column.
    threat = ThreatModel(norm, jnp.full(6, eps), jnp.full(5, low), jnp.full(5, high))
    result = attack(KEYS, x, threat)
    assert np.all((result >= low) & (result <= high))
    assert np.all(distance(norm, result, x) <= eps * (1 + 2e-6) + 5e-6)
    if eps == 0:
        np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize("norm", NORMS)
def test_examples_do_not_know_their_batch(norm):
    """Among other neighbours, in another place, each with its own key and radius."""
    eps, order = jnp.linspace(0.1, 0.6, 6), jnp.array([2, 3, 2, 3, 5, 0])
    for attack in ATTACKS:
        result = attack(KEYS, X, ThreatModel(norm, eps, jnp.zeros(5), jnp.ones(5)))
        others = attack(KEYS[order], X[order], ThreatModel(norm, eps[order], jnp.zeros(5), jnp.ones(5)))
        np.testing.assert_allclose(others, result[order], atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_best_point_is_kept(norm):
    """Steps that overshoot: the last point is worse than the best, which no point along the way exceeds."""
    eps = 0.5 if norm == math.inf else 2.0
    threat, kwargs = ThreatModel(norm, eps, 0.0, 1.0), {"step_size": 0.8 * eps, "random_start": False}
    along = [bent(compiled(pgd, steps=n, keep_best=False, **kwargs)(KEY, X, threat)) for n in range(1, 4)]
    kept = bent(compiled(pgd, steps=3, **kwargs)(KEY, X, threat))
    np.testing.assert_allclose(kept, jnp.max(jnp.stack([bent(X), *along]), axis=0), rtol=1e-5)
    assert np.any(kept > along[-1] + 1e-3)


def test_a_victory_is_kept_though_later_points_have_higher_values():
    """Class 1 leads around 0.3 alone, where the attack begins; what it ascends leads away."""

    def logits(x):
        lead = 0.1 - jnp.abs(x[:, 0] - 0.3)
        return jnp.stack([0 * lead, lead, -1 + x[:, 0]], axis=1)

    objective = Classified(logits, jnp.zeros(1, int), lambda logits, labels, targets: logits[:, 2])
    threat, x = ThreatModel(math.inf, 1.0, 0.0, 1.0), jnp.array([[0.3]])
    np.testing.assert_array_equal(pgd(KEY, objective, x, threat, steps=3, random_start=False), x)
    plain = pgd(KEY, lambda x: objective(x), x, threat, steps=3, random_start=False)  # does not say that it has won
    np.testing.assert_allclose(plain, [[1.0]])


def test_one_program_for_all_radii_steps_and_targets():
    traces = []

    @jax.jit
    def run(eps, step_size, decay, targets):
        traces.append(1)
        objective = margin(
            lambda x: x.reshape(6, 20) @ W.reshape(20, 1) * jnp.arange(1.0, 4), jnp.zeros(6, int), targets=targets
        )
        threat = ThreatModel(math.inf, eps, 0.0, 1.0)
        x = pgd(KEY, objective, X, threat, steps=2, step_size=step_size)
        x = mifgsm(KEY, objective, x, threat, steps=2, step_size=step_size, decay=decay)
        return fgsm(KEY, objective, x, threat, step_size=step_size)

    for i in range(1, 4):
        run(0.1 * i, 0.01 * i, 0.1 * i, jnp.full(6, i - 1))
    assert len(traces) == 1


def test_mapped_over_radii():
    radii = jnp.array([0.0, 0.1, 0.4])
    attack = jax.jit(lambda eps: pgd(KEY, bent, X, ThreatModel(2, eps, 0.0, 1.0), steps=3))
    together = jax.jit(jax.vmap(attack))(radii)
    np.testing.assert_allclose(together, jnp.stack([attack(eps) for eps in radii]), atol=1e-6)


def test_every_device_attacks_its_own():
    """Under shard_map as it comes, which checks what varies over the devices."""
    threat, rows = ThreatModel(math.inf, 0.1, 0.0, 1.0), PartitionSpec("batch")
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))

    def attacked(keys, x):
        best = restarts(lambda *args: pgd(*args, steps=2), 2)
        others = lambda *args: mifgsm(*args, steps=2), lambda *args: apgd(*args, steps=5)
        return [attack(keys, rising, x, threat) for attack in (best, *others)]

    split = jax.jit(jax.shard_map(attacked, mesh=mesh, in_specs=rows, out_specs=rows))(KEYS, X)
    for ours, alone in zip(split, jax.jit(attacked)(KEYS, X), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-6)


def test_the_dtype_is_the_examples():
    threat = ThreatModel(2, 0.5, 0.0, 1.0)
    for attack in ATTACKS:
        assert jax.eval_shape(attack, KEY, X.astype(jnp.bfloat16), threat).dtype == jnp.bfloat16


def test_equals_foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # foolbox imports names that SciPy has moved
        foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    net = peers.network(batch=12)
    # Away from the bounds: at them foolbox projects onto ball and box one after the other, for the norm 2.
    x = 0.3 + 0.4 * net.x
    images = 0.3 + 0.4 * net.torch_x
    model = foolbox.PyTorchModel(net.torch, bounds=(0, 1), device="cpu")
    objective = cross_entropy(net.apply, net.labels)
    for norm, eps, peer, step in (
        (math.inf, 0.08, foolbox.attacks.LinfPGD, 0.02),
        (2, 0.6, foolbox.attacks.L2PGD, 0.15),
        (math.inf, 0.08, foolbox.attacks.LinfFastGradientAttack, None),
        (2, 0.6, foolbox.attacks.L2FastGradientAttack, None),
    ):
        threat = ThreatModel(norm, eps, 0.0, 1.0)
        with peers.one_thread():
            if step is None:
                theirs = peer(random_start=False).run(model, images, net.torch_labels.long(), epsilon=eps)
                ours = jax.jit(fgsm, static_argnums=1)(KEY, objective, x, threat)
            else:
                theirs = peer(abs_stepsize=step, steps=10, random_start=False).run(
                    model, images, net.torch_labels.long(), epsilon=eps
                )
                ours = pgd(KEY, objective, x, threat, steps=10, step_size=step, random_start=False, keep_best=False)
        np.testing.assert_allclose(ours, net.images(theirs), atol=1e-5)


THREAT = ThreatModel(math.inf, 0.1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pgd(0, rising, X, THREAT), TypeError, "`key` must be a typed PRNG key"),
        (lambda: fgsm(None, rising, X, THREAT), TypeError, "`key` must be a typed PRNG key"),
        (lambda: pgd(KEY, rising, 2 * X, THREAT), ValueError, r"`x` must lie in \[low, high\]"),
        (lambda: fgsm(KEY, rising, jnp.ones((2, 3), int), THREAT), TypeError, "`x` must be floating-point"),
        (lambda: mifgsm(KEY, rising, X, 0.1), TypeError, "`threat` must be a ThreatModel, got float"),
        (
            lambda: pgd(KEY, lambda x: rising(x).mean(), X, THREAT),
            ValueError,
            r"`objective\(x\)` must have shape \[6\]",
        ),
        (lambda: fgsm(KEY, lambda x: x, X, THREAT), ValueError, r"`objective\(x\)` must have shape \[6\]"),
        (lambda: pgd(KEY, rising, X, THREAT, steps=0), ValueError, "`steps` must be an integer of at least 1"),
        (lambda: mifgsm(KEY, rising, X, THREAT, steps=1.5), ValueError, "`steps` must be an integer of at least 1"),
        (lambda: pgd(KEY, rising, X, THREAT, unroll=0), ValueError, "`unroll` must be an integer of at least 1"),
        (lambda: pgd(KEY, rising, X, THREAT, step_size=-0.1), ValueError, r"`step_size` must lie in \[0, inf\]"),
        (lambda: fgsm(KEY, rising, X, THREAT, step_size=jnp.ones(3)), ValueError, r"`step_size` must have shape \[6\]"),
        (lambda: mifgsm(KEY, rising, X, THREAT, decay=-1.0), ValueError, r"`decay` must lie in \[0, inf\]"),
        (lambda: steepest(1, X, share=1.5), ValueError, r"`share` must lie in \[0, 1\]"),
        (lambda: steepest(3, X), ValueError, "`norm` must be 1, 2 or math.inf"),
        (lambda: fgsm(KEY, rising, X, ThreatModel(2, math.inf, 0.0, 1.0)), ValueError, "`threat.eps` must be finite"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
