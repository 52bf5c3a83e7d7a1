"""Objectives against the papers' formulae in NumPy float64, one example at a time, and who has won."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from jaxgen.attacks.objectives import (
    cross_entropy,
    dlr,
    margin,
)

LABELS = jnp.array([0, 2, 1, 4, 3])
TARGETS = jnp.array([3, 0, 2, 1, 4])
LOGITS = 3 * jax.random.normal(jax.random.key(0), (5, 6))
X = jax.random.normal(jax.random.key(1), (5, 4))


def identity(x):
    return x


def formula(name, z, y, t):
    """Eqs. 1-6 of one example."""
    z = np.asarray(z, np.float64)
    aim = y if t is None else t
    others = np.max(np.delete(z, aim))
    s = np.sort(z)[::-1]
    sign = 1 if t is None else -1
    if name == "cross_entropy":
        return sign * (logsumexp(z) - z[aim])
    if name == "dlr" and t is None and len(z) >= 3:
        return (others - z[y]) / (s[0] - s[2])
    if name == "dlr" and t is not None and len(z) >= 4:
        return (z[t] - z[y]) / (s[0] - (s[2] + s[3]) / 2)
    return sign * (others - z[aim])


@pytest.mark.parametrize("make", [cross_entropy, margin, dlr])
@pytest.mark.parametrize("classes", [6, 4, 3, 2])
@pytest.mark.parametrize("targeted", [False, True])
def test_objectives_are_the_papers(make, classes, targeted):
    logits, labels, targets = LOGITS[:, :classes], LABELS % classes, TARGETS % classes if targeted else None
    value, won = make(identity, labels, targets=targets).judge(logits)
    expected = [
        formula(make.__name__, z, int(y), int(targets[i]) if targeted else None)
        for i, (z, y) in enumerate(zip(logits, labels, strict=True))
    ]
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(won, np.argmax(logits, 1) == targets if targeted else np.argmax(logits, 1) != labels)
