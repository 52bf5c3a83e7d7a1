"""Projections against constrained least squares in float64, starts against the ball's volume, refusals by name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from jaxgen import random
from jaxgen.attacks.threat import ThreatModel, beside, check, distance, project, random_start

KEY = jax.random.key(0)
NORMS = [1, 2, math.inf]
nearest = jax.jit(project)


def bisected(norm, y, c, eps, low, high):
    """The projection in float64: bisection on the Lagrange multiplier of the ball, each coordinate solved for it."""
    y, c = np.asarray(y, np.float64), np.asarray(c, np.float64)

    def point(multiplier):  # minimises |x - y|^2 / 2 + multiplier * (|x - c|_1 or |x - c|_2^2 / 2) within the bounds
        d = y - c
        d = np.sign(d) * np.maximum(np.abs(d) - multiplier, 0) if norm == 1 else d / (1 + multiplier)
        return np.clip(c + d, low, high)

    if norm == math.inf:
        return np.clip(np.clip(y, c - eps, c + eps), low, high)
    least, most = 0.0, 1e12
    if np.linalg.norm((point(0) - c).ravel(), norm) <= eps:
        return point(0)
    for _ in range(200):
        middle = (least + most) / 2
        least, most = (middle, most) if np.linalg.norm((point(middle) - c).ravel(), norm) > eps else (least, middle)
    return point(most)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [1e-3, 0.3, 1.0, 5.0, math.inf])
@pytest.mark.parametrize("spread", [0.05, 1.0, 30.0])
def test_projection_is_the_nearest_point(norm, eps, spread):
    rng = np.random.default_rng(0)
    low, high = np.array([0.0, -1.0, -np.inf]), np.array([1.0, 0.5, np.inf])
    c = rng.uniform(np.maximum(low, -1), np.minimum(high, 1), (6, 5, 3))
    c[0] = np.maximum(low, -1)  # at the bound: no room on one side
    y = c + spread * rng.normal(size=c.shape)
    y[1, 0], y[2] = c[1, 0], np.round(y[2])  # ties, and coordinates that did not move
    y, c = y.astype(np.float32), c.astype(np.float32)
    x = nearest(ThreatModel(norm, eps, low, high), y, c)
    expected = np.stack([bisected(norm, *pair, eps, low, high) for pair in zip(y, c, strict=True)])
    np.testing.assert_allclose(x, expected, atol=2e-6 * max(1, spread))


@pytest.mark.parametrize("norm", [1, 2])
def test_the_reference_is_the_constrained_least_squares_solution(norm):
    """The bisection above assumes one multiplier; a general solver assumes nothing."""
    rng = np.random.default_rng(1)
    c, y = rng.uniform(0, 1, 4), rng.normal(size=4) * 2
    # |x - c| <= t for the norm 1: the sum of t is the ball's norm, and all is smooth.
    start = np.concatenate([c, np.zeros(4)])
    balls = {1: lambda v: 0.7 - v[4:].sum(), 2: lambda v: 0.49 - np.sum((v[:4] - c) ** 2)}
    solved = optimize.minimize(
        lambda v: np.sum((v[:4] - y) ** 2),
        start,
        bounds=[(0, 1)] * 4 + [(0, None)] * 4,
        constraints=[
            {"type": "ineq", "fun": balls[norm]},
            {"type": "ineq", "fun": lambda v: v[4:] - (v[:4] - c)},
            {"type": "ineq", "fun": lambda v: v[4:] + (v[:4] - c)},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(bisected(norm, y, c, 0.7, 0, 1), solved.x[:4], atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 10, width=32),
    low=st.floats(-2, 0, width=32),
    width=st.floats(0.125, 4, width=32),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_projections_stay_in_ball_and_bounds(norm, eps, low, width, spread, seed):
    low, high = np.float32(low), np.float32(low + width)
    rng = np.random.default_rng(seed)
    c = rng.uniform(low, high, (4, 3, 2)).astype(np.float32).clip(low, high)
    y = (c + spread * rng.standard_normal(c.shape)).astype(np.float32)
    threat = ThreatModel(norm, eps, low, high)
    x = nearest(threat, y, c)
    assert np.all((x >= low) & (x <= high))
    assert np.all(distance(norm, x, c) <= eps * (1 + 2e-6) + 1e-5)
    np.testing.assert_allclose(nearest(threat, x, c), x, atol=2e-6)
    members = np.all((y >= low) & (y <= high), axis=(1, 2)) & (distance(norm, y, c) <= eps)
    np.testing.assert_array_equal(np.asarray(x)[members], y[members])
    np.testing.assert_array_equal(nearest(dataclasses.replace(threat, eps=0.0), y, c), c)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_for_each_example(norm):
    c = jax.random.uniform(KEY, (3, 5))
    y = c + jax.random.normal(jax.random.key(1), c.shape)
    radii = jnp.array([0.1, 0.0, 2.0])
    threat = ThreatModel(norm, radii, 0.0, 1.0)
    alone = [nearest(ThreatModel(norm, radii[i], 0.0, 1.0), y[i : i + 1], c[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(nearest(threat, y, c), jnp.stack(alone), atol=1e-6)
    mapped = jax.jit(jax.vmap(lambda eps: project(dataclasses.replace(threat, eps=eps), y, c)))(radii)
    np.testing.assert_allclose(mapped[jnp.arange(3), jnp.arange(3)], jnp.stack(alone), atol=1e-6)


def test_projection_of_many_coordinates_keeps_its_digits():
    c = jax.random.uniform(KEY, (1, 30_000))
    y = c + jax.random.normal(jax.random.key(1), c.shape)
    for norm, eps in ((1, 100.0), (2, 12.0)):
        expected = bisected(norm, y, c, eps, 0, 1)
        np.testing.assert_allclose(nearest(ThreatModel(norm, eps, 0.0, 1.0), y, c), expected, atol=3e-6)


start_in = jax.jit(random_start)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_uniform_in_the_ball(norm):
    """The norm of a point uniform in the volume of an n-dimensional ball is distributed as r^n; signs are fair."""
    start = start_in(KEY, ThreatModel(norm, 0.5, -1.0, 1.0), jnp.zeros((2000, 3)))
    assert stats.kstest(np.asarray(distance(norm, start, jnp.zeros((2000, 3)))) / 0.5, lambda r: r**3).pvalue > 0.01
    np.testing.assert_allclose(np.mean(start, axis=0), 0, atol=0.02)
    first = np.abs(np.asarray(start)[:, 0]) / 0.5
    marginal = {1: lambda v: 1 - (1 - v) ** 3, 2: lambda v: (3 * v - v**3) / 2, math.inf: lambda v: v}[norm]
    assert stats.kstest(first, marginal).pvalue > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_starts_depend_on_their_example_alone(norm):
    x = jax.random.uniform(KEY, (6, 4))
    threat = ThreatModel(norm, 0.3, 0.0, 1.0)
    start = start_in(KEY, threat, x)
    np.testing.assert_array_equal(start_in(KEY, threat, x[:2]), start[:2])
    np.testing.assert_array_equal(start_in(random.example_keys(KEY, 6)[4:], threat, x[4:]), start[4:])
    assert np.all((start >= 0) & (start <= 1))


def test_a_threat_is_a_pytree_whose_norm_is_static():
    threat = ThreatModel(2, 0.5, 0.0, jnp.ones(3))
    assert len(jax.tree.leaves(threat)) == 3
    traces = []

    @jax.jit
    def radius(threat):
        traces.append(threat.norm)
        return 2 * threat.eps

    assert radius(threat) == 1.0
    assert radius(dataclasses.replace(threat, eps=0.25)) == 0.5
    assert radius(dataclasses.replace(threat, norm=1)) == 1.0
    assert traces == [2, 1]
    gradient = jax.grad(lambda threat: -3 * threat.eps)(ThreatModel(2, 0.5, 0.0, 1.0))
    assert gradient.eps == -3  # a cotangent, not a radius
    axes = ThreatModel(2, 0, None, None)
    assert jax.vmap(lambda threat: threat.eps, in_axes=(axes,))(ThreatModel(2, jnp.arange(3.0), 0.0, 1.0)).shape == (3,)


@pytest.mark.parametrize("norm", NORMS)
def test_double_precision_of_numpy_is_taken_without_a_word(norm):
    x = np.full((2, 3), 0.5)
    threat = ThreatModel(norm, 0.1, 0.0, 1.0)
    start = random_start(KEY, threat, x)
    np.testing.assert_array_equal(start, random_start(KEY, threat, jnp.asarray(x)))
    np.testing.assert_array_equal(project(threat, x + 0.2, x), project(threat, jnp.asarray(x + 0.2), jnp.asarray(x)))


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_stays_half_precision(norm):
    x = jax.random.uniform(KEY, (4, 8), jnp.bfloat16)
    threat = ThreatModel(norm, 0.25, 0.0, 1.0)
    start = start_in(KEY, threat, x)
    assert start.dtype == jnp.bfloat16
    assert nearest(threat, start, x).dtype == jnp.bfloat16
    np.testing.assert_array_less(distance(norm, start, x), 0.25 * 1.02)
    assert beside(threat.eps, x).dtype == jnp.float32


X = jnp.full((2, 3, 4), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ThreatModel(3, 0.1, 0.0, 1.0), ValueError, "`norm` must be 1, 2 or math.inf, got 3"),
        (lambda: ThreatModel("inf", 0.1, 0.0, 1.0), ValueError, "`norm` must be 1, 2 or math.inf, got 'inf'"),
        (lambda: ThreatModel(True, 0.1, 0.0, 1.0), ValueError, "`norm` must be 1, 2 or math.inf, got True"),
        (lambda: ThreatModel(2, -0.1, 0.0, 1.0), ValueError, r"`eps` must lie in \[0, inf\], got -0.1"),
        (lambda: ThreatModel(2, math.nan, 0.0, 1.0), ValueError, "`eps` must lie in"),
        (lambda: ThreatModel(2, [-0.1, 0.1], 0.0, 1.0), TypeError, "`eps` must be a number or an array, got list"),
        (lambda: ThreatModel(2, "8/255", 0.0, 1.0), TypeError, "`eps` must be a number or an array, got str"),
        (lambda: ThreatModel(2, 0.1, (1.0, 1.0), 0.0), TypeError, "`low` must be a number or an array, got tuple"),
        (lambda: ThreatModel(2, 0.1, 1.0, 0.0), ValueError, "`low` must lie below `high`, got low=1.0 and high=0.0"),
        (lambda: ThreatModel(2, 0.1, np.zeros(3), np.array([1, 1, 0])), ValueError, "`low` must lie below `high`"),
        (lambda: check(0.1, X), TypeError, "`threat` must be a ThreatModel, got float"),
        (lambda: check(ThreatModel(2, 0.1, 0, 255), jnp.ones((2, 3), int)), TypeError, "`x` must be floating-point"),
        (lambda: check(ThreatModel(2, 0.1, 0.0, 1.0), jnp.float32(0)), ValueError, "`x` must have at least 1 axes"),
        (lambda: check(ThreatModel(2, np.ones(3), 0.0, 1.0), X), ValueError, r"`threat.eps` must have shape \[2\]"),
        (
            lambda: check(ThreatModel(2, 0.1, np.zeros(3), 1.0), X),
            ValueError,
            r"`threat.low` must be a scalar or broad",
        ),
        (lambda: check(ThreatModel(2, 0.1, 0.0, np.ones((2, 3, 4))), X), ValueError, "`threat.high` must be a scalar"),
        (lambda: check(ThreatModel(2, 0.1, 0.0, 0.25), X), ValueError, r"`x` must lie in \[low, high\] of its threat"),
        (lambda: check(ThreatModel(2, 0.1, 0.0, 1.0), X * math.nan), ValueError, r"`x` must lie in \[low, high\]"),
        (lambda: jax.jit(lambda eps: check(ThreatModel(2, eps, 0.0, 0.25), X))(1.0), ValueError, r"`x` must lie in"),
        (lambda: project(ThreatModel(2, 0.1, 0.0, 1.0), X, X[0]), ValueError, "`center` must have the shape of `x`"),
        (lambda: random_start(KEY, ThreatModel(2, math.inf, 0.0, 1.0), X), ValueError, "`threat.eps` must be finite"),
        (lambda: random_start(0, ThreatModel(2, 1.0, 0.0, 1.0), X), TypeError, "`key` must be a typed PRNG key"),
        (lambda: distance(0, X, X), ValueError, "`norm` must be 1, 2 or math.inf, got 0"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
