"""AutoAttack: a model whose stages fail and succeed in closed form; what cohorts save; what interval bounds allow."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxgen import random
from jaxgen.attacks.apgd import apgd
from jaxgen.attacks.auto_attack import Stage, anywhere, auto_attack, ensemble, next_likeliest, randomised, standard
from jaxgen.attacks.carlini_wagner import carlini_wagner
from jaxgen.attacks.deepfool import deepfool
from jaxgen.attacks.expectation import expected
from jaxgen.attacks.fab import fab
from jaxgen.attacks.fgsm import fgsm
from jaxgen.attacks.objectives import cross_entropy, dlr, margin
from jaxgen.attacks.pgd import mifgsm, pgd
from jaxgen.attacks.square import square
from jaxgen.attacks.threat import ThreatModel, beside, distance, project, random_start

KEY = jax.random.key(0)
UNIT = ThreatModel(math.inf, eps=0.2, low=0.0, high=1.0)

# Class 1 where the first feature is above a half: what is nearer to it than an attack goes is broken.
X = jnp.linspace(0.1, 0.93, 23)[:, None] * jnp.ones((1, 2))
LABELS = (X[:, 0] > 0.5).astype(int).at[7].set(1)


def two_classes(x):
    return jnp.stack([jnp.full(x.shape[0], 0.5), x[:, 0]], axis=1)


def part(share):
    """Goes a part of the way that it may go, and to the right side."""

    def attack(key, objective, x, threat):
        return project(threat, x + beside(share * threat.eps, x) * jnp.sign(0.5 - x), x)

    return attack


def guess(key, objective, x, threat):
    return random_start(key, threat, x)


def plain(attack, runs=1):
    return Stage(attack, anywhere(margin), runs)


PARTS = [plain(part(share)) for share in (0.5, 0.25, 1.0)]


def broken_in_closed_form(eps):
    far = np.abs(np.asarray(X[:, 0], np.float64) - 0.5)
    by = np.select([far < 0.5 * eps, far < eps], [1, 3], 4)
    return np.where(np.asarray(LABELS) != (X[:, 0] > 0.5), 0, by)


@pytest.mark.parametrize(
    ("eps", "cohort_size"),
    [(0.2, 1), (0.2, 4), (0.2, 64), (np.linspace(0.05, 0.9, 23), 4)],
    ids=lambda value: np.shape(value) or value,
)
def test_each_example_is_broken_by_the_first_stage_that_can(eps, cohort_size):
    threat = dataclasses.replace(UNIT, eps=eps)
    outcome = ensemble(KEY, cross_entropy(two_classes, LABELS), X, threat, stages=PARTS, cohort_size=cohort_size)
    by = broken_in_closed_form(eps)
    assert set(by) == {0, 1, 3, 4}
    np.testing.assert_array_equal(outcome.broken_by, by)
    # What is robust, or wrong as it came, comes back as it was; what is broken is the work of its stage.
    moved = np.abs(outcome.x - X)[:, 0]
    np.testing.assert_allclose(moved, eps * np.select([by == 1, by == 3], [0.5, 1.0], 0.0), atol=1e-6)
    np.testing.assert_array_equal(moved == 0, (by == 0) | (by == 4))


def test_draws_do_not_depend_on_the_cohort_or_the_batch():
    attack = jax.jit(
        lambda key, x, labels, size: ensemble(
            key, margin(two_classes, labels), x, UNIT, stages=[plain(guess, 1), plain(guess, 4)], cohort_size=size
        ),
        static_argnames="size",
    )
    whole = attack(KEY, X, LABELS, size=23)
    assert set(np.asarray(whole.broken_by)) == {0, 1, 2, 3}
    keys = random.example_keys(KEY, 23)
    for some, size in ((slice(None), 5), (slice(4, 13), 64)):
        part = attack(keys[some], X[some], LABELS[some], size=size)
        np.testing.assert_array_equal(part.broken_by, whole.broken_by[some])
        np.testing.assert_allclose(part.x, whole.x[some], atol=1e-6)


def test_each_run_draws_anew():
    """Run r of stage s with s and r folded into the example's key: the first that reaches the other side counts."""
    outcome = ensemble(KEY, margin(two_classes, LABELS), X, UNIT, stages=[plain(guess, 5)], cohort_size=4)
    keys = random.fold(random.example_keys(KEY, 23), 1)
    expected_x, wrong = X, np.asarray(LABELS) != (X[:, 0] > 0.5)
    robust = ~wrong
    for run in range(5):
        found = random_start(random.fold(keys, run), UNIT, X)
        now = robust & np.asarray((found[:, 0] > 0.5) != LABELS)
        assert run > 1 or np.any(now)
        expected_x, robust = jnp.where(now[:, None], found, expected_x), robust & ~now
    np.testing.assert_array_equal(outcome.broken_by, np.select([wrong, robust], [0, 2], 1))
    np.testing.assert_allclose(outcome.x, expected_x, atol=1e-6)


def counted(calls):
    def apply(x):
        jax.debug.callback(lambda: calls.append(x.shape[0]))
        return two_classes(x)

    return apply


def test_what_is_broken_costs_nothing():
    """PGD of ten steps and the judge of what it has found, on as many cohorts as the robust examples fill."""
    calls, size = [], 4
    stages = [plain(part(0.5)), plain(functools.partial(pgd, steps=10, keep_best=False)), plain(part(1.0))]
    outcome = jax.jit(
        lambda labels: ensemble(KEY, margin(counted(calls), labels), X, UNIT, stages=stages, cohort_size=size)
    )(LABELS)
    jax.effects_barrier()
    by = np.asarray(outcome.broken_by)
    robust = [np.sum(by > s) for s in range(3)]
    assert robust[0] > robust[1] > robust[2] > 0
    cohorts = -(-np.array(robust) // size)
    assert sorted(calls) == [size] * (cohorts @ [1, 10 + 1, 1]) + [23]


def test_nothing_is_compiled_again_as_fewer_are_robust():
    traces = []

    @jax.jit
    def attack(x, labels, eps):
        traces.append(x.shape)
        return ensemble(
            KEY, margin(two_classes, labels), x, dataclasses.replace(UNIT, eps=eps), stages=PARTS, cohort_size=4
        )

    outcomes = [attack(X, LABELS, eps).broken_by for eps in (0.0, 0.2, 1.0)]
    assert len(traces) == 1
    assert [int(np.sum(by == 4)) for by in outcomes] == [22, np.sum(broken_in_closed_form(0.2) == 4), 0]
    assert np.all(attack(X, 1 - LABELS, 0.2).broken_by[(X[:, 0] > 0.5) == LABELS] == 0)


def test_all_radii_at_once():
    """Under vmap the numbers of cohorts differ from lane to lane."""
    radii = jnp.array([0.05, 0.2, 0.6])
    by = jax.vmap(
        lambda eps: (
            ensemble(
                KEY,
                margin(two_classes, LABELS),
                X,
                dataclasses.replace(UNIT, eps=eps),
                stages=PARTS,
                cohort_size=4,
            ).broken_by
        )
    )(radii)
    np.testing.assert_array_equal(by, [broken_in_closed_form(eps) for eps in radii])


@pytest.mark.slow
def test_every_device_attacks_its_own():
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    x, labels = jnp.tile(X, (2, 1))[:40], jnp.tile(LABELS, 2)[:40]

    def attack(keys, x, labels):
        stages = [plain(guess), plain(functools.partial(pgd, steps=3))]
        return ensemble(keys, margin(two_classes, labels), x, UNIT, stages=stages, cohort_size=3)

    keys, each = random.example_keys(KEY, 40), PartitionSpec("batch")
    split = jax.jit(jax.shard_map(attack, mesh=mesh, in_specs=each, out_specs=each, check_vma=False))(keys, x, labels)
    whole = jax.jit(attack)(keys, x, labels)
    np.testing.assert_array_equal(split.broken_by, whole.broken_by)
    np.testing.assert_allclose(split.x, whole.x, atol=1e-6)


@pytest.mark.parametrize("make", [margin, dlr])
def test_the_likeliest_wrong_classes_are_aimed_at_in_turn(make):
    logits = jax.random.normal(KEY, (5, 6))
    labels = jnp.array([0, 1, 2, 3, 4])
    objective = cross_entropy(lambda x: x, labels)
    by_logit = [[c for c in np.argsort(-row) if c != label] for row, label in zip(logits, labels, strict=True)]

    @jax.jit
    def aimed(x, run):
        towards = next_likeliest(make)(objective, x, run)
        return towards.targets, *towards.judge(x)

    for run in range(5):
        targets, value, won = aimed(logits, run)
        np.testing.assert_array_equal(targets, [row[run] for row in by_logit])
        np.testing.assert_allclose(value, make(lambda x: x, labels, targets=targets)(logits), rtol=1e-6)
        np.testing.assert_array_equal(won, np.argmax(logits, axis=1) != labels)  # any wrong class will do


def test_the_standard_ensemble_aims_at_no_more_than_there_is():
    assert [stage.runs for stage in standard(math.inf, 10)] == [1, 9, 9, 1]
    assert [stage.runs for stage in standard(2, 1000)] == [1, 9, 9, 1]
    assert [stage.runs for stage in standard(1, 10)] == [5, 5, 9, 1]
    assert [stage.runs for stage in standard(math.inf, 3)] == [1, 2, 2, 1]
    assert [stage.runs for stage in standard(1, 2)] == [5, 1, 1, 1]


# --- The sandwich: a small network, attacked by all, between its interval bounds and its clean accuracy.

LAYERS = [
    jax.random.normal(k, s) / np.sqrt(s[0]) for k, s in zip(jax.random.split(KEY), [(16, 24), (24, 5)], strict=True)
]
IMAGES = jax.random.uniform(jax.random.key(5), (24, 4, 4, 1))


def network(x):
    return jax.nn.relu((x.reshape(x.shape[0], -1) - 0.5) @ LAYERS[0]) @ LAYERS[1]


# Two examples are wrong as they come.
CLASSES = jnp.argmax(network(IMAGES), axis=1).at[:2].add(1) % 5


def certified(eps):
    """Who no perturbation of at most eps everywhere can break: bounds of each layer (Gowal et al. 2018), in float64."""
    first, second = (np.asarray(layer, np.float64) for layer in LAYERS)
    x = np.asarray(IMAGES, np.float64).reshape(24, -1)
    low, high = np.maximum(x - eps, 0) - 0.5, np.minimum(x + eps, 1) - 0.5
    affine = lambda low, high, w: ((low + high) / 2 @ w, (high - low) / 2 @ np.abs(w))  # noqa: E731
    middle, radius = affine(low, high, first)
    low, high = np.maximum(middle - radius, 0), np.maximum(middle + radius, 0)
    # Of differences of logits, not of logits: what both share cancels.
    lead = np.stack([second[:, [c]] - second for c in np.asarray(CLASSES)])
    middle, radius = affine(low[:, None], high[:, None], lead)
    worst = (middle - radius)[:, 0]
    worst[np.arange(24), CLASSES] = np.inf
    return worst.min(axis=1) > 1e-5


ATTACKS = {
    "fgsm": fgsm,
    "pgd": pgd,
    "mifgsm": mifgsm,
    "apgd": functools.partial(apgd, steps=20),
    "deepfool": deepfool,
    "carlini_wagner": functools.partial(carlini_wagner, steps=30),
    "fab": functools.partial(fab, steps=10),
    "square": functools.partial(square, queries=100),
}


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        *((math.inf, name) for name in ATTACKS if name != "carlini_wagner"),
        (2, "carlini_wagner"),
        *(pytest.param(2, name, marks=pytest.mark.slow) for name in ATTACKS if name != "carlini_wagner"),
    ],
)
def test_accuracy_lies_between_the_certified_and_the_clean_one(norm, name):
    """Of norm 2 as well: its ball lies in that of norm inf, and what is certified there is certified here."""
    eps = 0.02
    threat = ThreatModel(norm, eps=eps, low=0.0, high=1.0)
    objective = margin(network, CLASSES)
    x_adv = jax.jit(lambda x: ATTACKS[name](KEY, objective, x, threat))(IMAGES)
    sandwich(certified(eps), ~objective.judge(x_adv)[1])
    assert np.all(distance(norm, x_adv, IMAGES) <= eps * (1 + 1e-5))
    assert np.all((x_adv >= 0) & (x_adv <= 1))


def sandwich(certified, robust):
    clean = ~margin(network, CLASSES).judge(IMAGES)[1]
    assert np.sum(certified) > 3, "the bounds say something"
    assert not np.any(certified & ~robust), "an attack has broken what cannot be broken"
    assert not np.any(robust & ~clean), "an attack has mended what was wrong"
    assert np.sum(robust) < np.sum(clean)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [math.inf, 2, 1])
def test_the_standard_ensemble_is_in_the_sandwich_and_beats_its_parts(norm):
    eps = {math.inf: 0.02, 2: 0.02, 1: 0.2}[norm]
    threat = ThreatModel(norm, eps=eps, low=0.0, high=1.0)
    objective = cross_entropy(network, CLASSES)
    outcome = jax.jit(
        lambda x: ensemble(KEY, objective, x, threat, stages=standard(norm, 5, steps=20, queries=200), cohort_size=8)
    )(IMAGES)
    robust = outcome.broken_by == 5
    np.testing.assert_array_equal(robust, ~objective.judge(outcome.x)[1])
    if norm != 1:
        sandwich(certified(eps), robust)
    assert np.all(distance(norm, outcome.x, IMAGES) <= eps * (1 + 1e-5))
    parts = [
        ~objective.judge(jax.jit(lambda x, a=a: ATTACKS[a](KEY, objective, x, threat))(IMAGES))[1]
        for a in ("pgd", "fab")
    ]
    assert np.sum(robust) <= min(np.sum(part) for part in parts)


@pytest.mark.slow
def test_a_randomised_defence_falls_to_the_expectation():
    """Judged by draws that the attack has not seen."""
    noisy = lambda keys, x: 4 * network(x + 0.1 * random.normal(keys, x.shape[1:]))  # noqa: E731
    threat = ThreatModel(math.inf, eps=0.15, low=0.0, high=1.0)
    seen, unseen = (jax.random.split(jax.random.key(seed), 8) for seed in (7, 8))

    @jax.jit
    def attack(x):
        objective = expected(cross_entropy, noisy, CLASSES, seen)
        return auto_attack(KEY, objective, x, threat, stages=randomised(steps=5), cohort_size=5)

    x_adv = attack(IMAGES)
    judge = jax.jit(expected(cross_entropy, noisy, CLASSES, unseen).judge)
    assert np.mean(judge(IMAGES)[1]) < 0.4
    assert np.mean(judge(x_adv)[1]) > 0.8


OBJECTIVE = margin(two_classes, LABELS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: auto_attack(KEY, lambda x: x[:, 0], X, UNIT), TypeError, "`objective` must know its classes, as `cross_entropy` does, got function"),
        (lambda: auto_attack(KEY, margin(two_classes, LABELS, targets=1 - LABELS), X, UNIT), ValueError, "`objective` must have no targets"),
        (lambda: auto_attack(KEY, OBJECTIVE, X + 1, UNIT), ValueError, r"`x` must lie in \[low, high\]"),
        (lambda: auto_attack(KEY, OBJECTIVE, X[:9], UNIT, stages=PARTS), ValueError, r"`labels` must have shape \[9\], got \[23\]"),
        (lambda: auto_attack(KEY, OBJECTIVE, X, UNIT, stages=[]), ValueError, "`stages` must hold at least 1 stage, got none"),
        (lambda: auto_attack(KEY, OBJECTIVE, X, UNIT, stages=[plain(guess, 0)]), ValueError, "`runs` must be an integer of at least 1, got 0"),
        (lambda: auto_attack(KEY, OBJECTIVE, X, UNIT, stages=PARTS, cohort_size=0), ValueError, "`cohort_size` must be an integer of at least 1, got 0"),
        (lambda: auto_attack(0, OBJECTIVE, X, UNIT, stages=PARTS), TypeError, "`key` must be a typed PRNG key.*, got int"),
        (lambda: standard(math.inf, 1), ValueError, "`classes` must be at least 2, got 1"),
        (lambda: standard(math.inf, 10.0), ValueError, "`classes` must be an integer of at least 1, got 10.0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
