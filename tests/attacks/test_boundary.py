"""Steps to a boundary's tangents against linear programs, and the tangents of known boundaries."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.attacks.boundary import in_reach, nearest, smallest_step, tangents, within
from jaxgen.attacks.objectives import margin
from jaxgen.attacks.threat import ThreatModel
from tests.attacks import affine

NORMS = [math.inf, 2, 1]


@functools.partial(jax.jit, static_argnums=0)
def stepped(norm, x, slope, rise, low, high):
    return smallest_step(ThreatModel(norm, eps=0.0, low=low, high=high), x, slope, rise)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_smallest_step_is_that_of_a_linear_program(norm, sign):
    rng = np.random.default_rng(0)
    x = np.clip(rng.uniform(-1.4, 1.4, size=(8, 10)), -1, 1).astype(np.float32)
    w = rng.normal(size=(8, 10)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, size=(8, 1)).astype(np.float32)
    w[0, :5] = 0
    w[1] = np.sign(w[1])  # ties
    room = np.sum(np.abs(w) * np.where(sign * w > 0, 1 - x, x + 1), axis=1)
    rise = sign * (room * np.linspace(0.02, 0.98, 8)).astype(np.float32)
    step, reached = stepped(norm, x, w, rise, -1.0, 1.0)
    assert np.all(reached)
    assert np.all(np.abs(x + step) <= 1 + 1e-6)
    np.testing.assert_allclose(np.sum(np.float64(w) * step, axis=1), rise, rtol=1e-5)
    for i in range(8):
        scale = np.abs(w[i]).max()
        best = affine.smallest_step(norm, np.float64(x[i]), np.float64(w[i]) / scale, rise[i] / scale, -1, 1)
        np.testing.assert_allclose(np.linalg.norm(step[i], norm), np.linalg.norm(best, norm), rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_beyond_reach_the_corner_is_the_step(norm):
    x, w = jnp.array([[0.25, 0.5, 0.75]]), jnp.array([[1.0, -2.0, 0.0]])
    step, reached = stepped(norm, x, w, jnp.array([9.0]), 0.0, 1.0)
    assert not reached
    np.testing.assert_allclose(step, [[0.75, -0.5, 0.0]])
    step, reached = stepped(norm, x, 0 * w, jnp.array([9.0]), 0.0, 1.0)
    assert not reached
    np.testing.assert_array_equal(step, 0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_without_bounds_the_distance_is_the_dual_norms(norm, scale):
    w = scale * jax.random.normal(jax.random.key(0), (3, 5))
    step, _ = stepped(norm, jnp.zeros((3, 5)), w, scale * jnp.array([0.5, -2.0, 0.0]), -jnp.inf, jnp.inf)
    dual = {math.inf: 1, 2: 2, 1: math.inf}[norm]
    expected = np.array([0.5, 2, 0]) / np.linalg.norm(np.float64(w) / scale, dual, axis=1)
    np.testing.assert_allclose(np.linalg.norm(step, norm, axis=1), expected, rtol=1e-5)


bounded = st.floats(0, 1, width=32)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(NORMS),
    st.lists(st.tuples(bounded, st.floats(-8, 8, width=32)), min_size=6, max_size=6),
    st.floats(-20, 20, width=32),
)
def test_steps_stay_within_the_bounds_and_rise_as_far_as_they_may(norm, pixels, rise):
    x, w = np.array(pixels, np.float32).T[:, None]
    step, reached = stepped(norm, x, w, np.array([rise], np.float32), 0.0, 1.0)
    assert np.all((x + step >= -1e-6) & (x + step <= 1 + 1e-6))
    best = np.sum(np.abs(np.float64(w)) * np.where(w * rise > 0, 1 - np.float64(x), x))
    gained = np.sum(np.float64(w) * step)
    np.testing.assert_allclose(gained * (np.sign(rise) or 1), min(abs(rise), best), rtol=1e-4, atol=1e-5)
    assert bool(reached[0]) == (best >= abs(rise)) or abs(best - abs(rise)) < 1e-4


def test_the_tangents_of_an_affine_classifier_are_its_rows():
    model = affine.Affine(0)
    logits = np.asarray(model.apply(model.x))
    slopes, rises = tangents(model.objective(), model.x, 2)(jnp.asarray(model.x) + 0.5)
    moved = np.asarray(model.apply(model.x + 0.5))
    for i, label in enumerate(model.labels):
        order = [k for k in np.argsort(-logits[i]) if k != label]
        for j in range(2):
            np.testing.assert_allclose(slopes[j, i], model.weights[order[j]] - model.weights[label], rtol=1e-5)
            np.testing.assert_allclose(rises[j, i], moved[i, label] - moved[i, order[j]], rtol=1e-4)
    assert tangents(model.objective(), model.x, 9)(model.x)[1].shape == (3, 6)


def test_a_target_leads_against_the_strongest_other_class_or_the_label():
    logits = jnp.array([[1.0, 5.0, 3.0, 4.0]])
    towards = margin(lambda x: x, jnp.array([2]), targets=jnp.array([0]))
    slopes, rises = tangents(towards, logits, 9)(logits)
    np.testing.assert_array_equal(slopes, [[[1, -1, 0, 0]]])
    np.testing.assert_array_equal(rises, [[4]])
    away = margin(lambda x: x, jnp.array([2]), targets=jnp.array([0]))
    object.__setattr__(away, "any_class", True)
    slopes, rises = tangents(away, logits, 9)(logits)
    np.testing.assert_array_equal(slopes, [[[1, 0, -1, 0]]])
    np.testing.assert_array_equal(rises, [[2]])


def test_the_nearest_tangent_is_one_that_the_bounds_let_be_reached():
    threat = ThreatModel(2, eps=0.0, low=0.0, high=1.0)
    x = jnp.array([[0.9, 0.5]])
    # The first is the nearest without bounds, the second within them.
    slopes, rises = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]), jnp.array([[0.2], [0.3]])
    step, slope, rise = nearest(threat, x, slopes, rises)
    np.testing.assert_allclose(step, [[0, 0.3]], rtol=1e-6)
    np.testing.assert_array_equal(slope, [[0, 1]])
    np.testing.assert_allclose(rise, [0.3])


def test_what_is_found_counts_where_it_is_won_and_in_the_ball():
    x = jnp.zeros((4, 2))
    found = x.at[:, 0].set(jnp.array([0.5, 0.6, 0.5, 0.6]))
    threat = ThreatModel(2, eps=jnp.array([0.5, 0.5, 0.5, 0.7]), low=0.0, high=1.0)
    kept = in_reach(threat, found, jnp.array([True, True, False, True]), x)
    np.testing.assert_array_equal(kept[:, 0], np.float32([0.5, 0, 0, 0.6]))


def test_bounds_hold_in_the_dtype_of_the_examples():
    x = within(ThreatModel(2, eps=0.0, low=-0.3, high=jnp.array([0.3, 0.7])), jnp.array([[-2.0, 2.0]]), jnp.bfloat16)
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, jnp.array([[-0.3, 0.7]], jnp.bfloat16))
