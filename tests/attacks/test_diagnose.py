"""Diagnosis: each known way of masking gradients raises its flags and no others, an honest model none."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.attacks.diagnose import Flags, diagnose, report
from jaxgen.attacks.objectives import Classified, cross_entropy, margin
from jaxgen.attacks.pgd import pgd
from jaxgen.attacks.square import square
from jaxgen.attacks.threat import ThreatModel

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (32, 4, 4, 1), minval=0.3, maxval=0.7)
W = jax.random.normal(jax.random.key(2), (16, 2))
EPS = 0.02
THREAT = ThreatModel(math.inf, eps=EPS, low=0.0, high=1.0)
NORMAL = {"noise": 0.0, "coupling": 0.0, "quantised": 0.0, "scale": 1.0, "softmax": 0.0, "ascend_margin": 0.0}


def linear(x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ W


LABELS = jnp.argmax(linear(X), axis=1).at[:2].add(1) % 2


@jax.jit
def diagnosed(knobs, labels):
    """One program for all models, honest or not: which it is is data."""

    def apply(x):
        x = x + knobs["noise"] * jax.random.normal(KEY, x.shape)
        x = x - knobs["coupling"] * jnp.mean(x - 0.5, axis=0)
        x = jnp.where(knobs["quantised"] > 0, jnp.round(x * 16) / 16, x)
        logits = knobs["scale"] * linear(x)
        return jnp.where(knobs["softmax"] > 0, jax.nn.softmax(logits), logits)

    def score(*args):
        of = lambda make: make(apply, labels).score(*args)  # noqa: E731
        return jnp.where(knobs["ascend_margin"] > 0, of(margin), of(cross_entropy))

    return diagnose(
        KEY,
        Classified(apply, labels, score),
        X,
        THREAT,
        attack=functools.partial(pgd, steps=10),
        black_box=functools.partial(square, queries=200),
    )


def raised(diagnosis):
    return {name for name, flag in diagnosis.flags._asdict().items() if flag}


BLIND = {"black_box_is_better", "unbounded_fails"}  # what follows if gradients lead nowhere


@pytest.mark.parametrize(
    ("knobs", "flags"),
    [
        ({}, set()),
        ({"ascend_margin": 1.0}, set()),
        ({"noise": 0.01}, {"stochastic"}),
        ({"coupling": 0.3}, {"coupled"}),
        ({"softmax": 1.0}, {"probabilities"}),
        ({"quantised": 1.0}, {"blind"} | BLIND),
        ({"scale": 1e5}, {"saturated"} | BLIND),
        ({"scale": 1e5, "ascend_margin": 1.0}, set()),
        ({"scale": 0.0}, {"blind", "unbounded_fails"}),
        ({"scale": math.inf}, {"blind", "unbounded_fails"}),
    ],
    ids=lambda value: " ".join(sorted(value)) or "none",
)
def test_a_masked_model_raises_its_flags_and_an_honest_one_none(knobs, flags):
    diagnosis = diagnosed(NORMAL | knobs, LABELS)
    assert raised(diagnosis) == flags, report(diagnosis)


def test_the_numbers_of_a_linear_classifier_are_those_of_its_closed_form():
    diagnosis = diagnosed(NORMAL, LABELS)
    lead = np.asarray(margin(linear, LABELS)(X), np.float64)  # above 0 where wrong
    robust = np.mean(lead + EPS * np.sum(np.abs(W[:, 0] - W[:, 1])) < 0)
    assert 0.1 < robust < 0.8
    for accuracy in (diagnosis.accuracy, diagnosis.one_step_accuracy):
        np.testing.assert_allclose(accuracy, robust, atol=1e-6)
    np.testing.assert_allclose(diagnosis.clean_accuracy, 30 / 32)
    assert robust <= diagnosis.black_box_accuracy < 30 / 32
    assert [float(n) for n in (diagnosis.unbounded_accuracy, diagnosis.black_box_gain, diagnosis.zero_gradients)] == [
        0,
        0,
        0,
    ]
    assert max(diagnosis.random_change, diagnosis.neighbour_change) < 1e-6


def test_the_numbers_of_masked_models():
    quantised, saturated = (diagnosed(NORMAL | knobs, LABELS) for knobs in ({"quantised": 1.0}, {"scale": 1e5}))
    assert quantised.zero_gradients == quantised.zero_objective_gradients == 1
    # Where the class is wrong as it comes the cross entropy does not saturate.
    assert saturated.zero_gradients == 0
    assert 0.5 < saturated.zero_objective_gradients < 1
    for masked in (quantised, saturated):
        np.testing.assert_allclose(masked.black_box_gain, masked.accuracy - masked.black_box_accuracy, atol=1e-6)
        assert masked.unbounded_accuracy > 0.05
    # Logits of x + noise are apart by noise @ W, and those of x - 0.3 mean by what the mean changes.
    noisy, coupled = (diagnosed(NORMAL | knobs, LABELS) for knobs in ({"noise": 0.01}, {"coupling": 0.3}))
    assert noisy.random_change > 0.01
    assert noisy.neighbour_change == 0
    assert coupled.neighbour_change > 0.01
    assert coupled.random_change < 1e-5


POINTS = jnp.full((8, 1, 1, 1), 0.5)
WIDE = ThreatModel(math.inf, eps=0.4, low=0.0, high=1.0)


@pytest.mark.slow
def test_one_step_that_jumps_over_a_hill():
    """Right of 0.5 the margin rises until 0.6, falls below where it began, and is won beyond 0.85 only."""
    hills = lambda x: jnp.interp(x[:, 0, 0, 0], jnp.array([0.0, 0.5, 0.6, 0.8, 0.9]), jnp.array([-3.0, -2, -1, -3, 1]))  # noqa: E731
    objective = margin(lambda x: jnp.stack([jnp.zeros(8), hills(x)], axis=1), jnp.zeros(8, int))
    small = lambda *args: pgd(*args, steps=20, step_size=0.01, random_start=False)  # noqa: E731
    diagnosis = diagnose(KEY, objective, POINTS, WIDE, attack=small, black_box=small)
    assert raised(diagnosis) == {"one_step_is_better", "unbounded_fails"}
    assert diagnosis.one_step_accuracy == 0
    assert diagnosis.accuracy == 1


def test_random_numbers_from_outside_of_jax_are_seen():
    """They are other ones at each evaluation, which must not be taken for neighbours that matter."""
    generator = np.random.default_rng(0)
    noise = lambda x: jax.pure_callback(lambda x: generator.normal(size=x.shape).astype("float32"), x, x)  # noqa: E731
    apply = lambda x: linear(x + 0.01 * jax.lax.stop_gradient(noise(jax.lax.stop_gradient(x))))  # noqa: E731
    still = lambda key, objective, x, threat: x  # noqa: E731
    diagnosis = jax.jit(
        lambda x: diagnose(KEY, margin(apply, LABELS), x, THREAT, attack=still, one_step=still, black_box=still)
    )(X)
    assert diagnosis.flags.stochastic
    assert not diagnosis.flags.coupled


def test_rounding_is_no_sign():
    apply = lambda x: linear(x).astype("bfloat16")  # noqa: E731
    still = lambda key, objective, x, threat: x  # noqa: E731
    diagnosis = jax.jit(
        lambda x: diagnose(KEY, margin(apply, LABELS), x, THREAT, attack=still, one_step=still, black_box=still)
    )(X)
    assert raised(diagnosis) == {"unbounded_fails"}


def test_the_report_says_what_was_seen_and_what_to_do():
    honest = report(diagnosed(NORMAL, LABELS))
    assert honest.startswith("accuracy: 93.8% clean, ")
    assert honest.endswith("no sign of masked gradients, which does not prove that there are none")
    masked = report(diagnosed(NORMAL | {"quantised": 1.0}, LABELS)).splitlines()
    assert [line.split(":")[0] for line in masked] == ["accuracy", "blind", "black_box_is_better", "unbounded_fails"]
    assert "100.0% of the examples have no gradient of the margin" in masked[1]
    every = diagnosed(NORMAL, LABELS)._replace(flags=Flags(*[True] * len(Flags._fields)))
    assert [line.split(":")[0] for line in report(every).splitlines()[1:]] == list(Flags._fields)


OBJECTIVE = margin(linear, LABELS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnose(KEY, lambda x: linear(x)[:, 0], X, THREAT), TypeError, "`objective` must know its classes, as `cross_entropy` does, got function"),
        (lambda: diagnose(KEY, margin(linear, LABELS, targets=1 - LABELS), X, THREAT), ValueError, "`objective` must have no targets"),
        (lambda: diagnose(KEY, OBJECTIVE, X + 1, THREAT), ValueError, r"`x` must lie in \[low, high\]"),
        (lambda: diagnose(KEY, OBJECTIVE, X, ThreatModel(2, eps=1.0, low=0.0, high=math.inf)), ValueError, "`threat.high` must be finite, got inf"),
        (lambda: diagnose(KEY, OBJECTIVE, X, THREAT, tolerance=1.5), ValueError, r"`tolerance` must lie in \[0, 1\], got 1.5"),
        (lambda: diagnose(0, OBJECTIVE, X, THREAT), TypeError, "`key` must be a typed PRNG key.*, got int"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
