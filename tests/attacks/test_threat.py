"""Projections against constrained least squares in float64, starts against the ball's volume, refusals by name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.attacks.threat import ThreatModel, project

KEY = jax.random.key(0)
NORMS = [1, 2, math.inf]


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
    x = project(ThreatModel(norm, eps, low, high), jnp.asarray(y), jnp.asarray(c))
    expected = np.stack([bisected(norm, *pair, eps, low, high) for pair in zip(y, c, strict=True)])
    np.testing.assert_allclose(x, expected, atol=2e-6 * max(1, spread))
