"""Affine classifiers, of which the smallest adversarial perturbation is known."""

import math

import jax.numpy as jnp
import numpy as np
from scipy import optimize

from jaxgen.attacks.objectives import margin


class Affine:
    """Random examples in [0, 1], an affine classifier, and the labels that it gives them."""

    def __init__(self, seed, batch=6, shape=(2, 3, 2), classes=4):
        rng = np.random.default_rng(seed)
        self.weights, self.bias = rng.normal(size=(classes, *shape)), rng.normal(size=classes)
        self.x = rng.uniform(size=(batch, *shape)).astype(np.float32)
        # Some pixels at the bounds, as in images.
        self.x = np.clip(1.4 * self.x - 0.2, 0, 1).astype(np.float32)
        self.labels = np.argmax(np.asarray(self.apply(self.x)), axis=1)

    def apply(self, x):
        w = jnp.asarray(self.weights, x.dtype)
        return jnp.sum(w * x[:, None], axis=tuple(range(2, w.ndim + 1))) + jnp.asarray(self.bias, x.dtype)

    def objective(self, **targets):
        return margin(self.apply, jnp.asarray(self.labels), **targets)

    def smallest(self, norm, *, low=0.0, high=1.0, targets=None):
        """The least perturbation of each example within the bounds, in float64: inf where there is none."""
        w, x = self.weights.reshape(len(self.bias), -1), self.x.reshape(len(self.x), -1).astype(float)
        found = []
        for i, label in enumerate(self.labels):
            rivals = [k for k in range(len(w)) if k != label] if targets is None else [targets[i]]
            steps = [
                smallest_step(
                    norm, x[i], w[k] - w[label], -(w[k] - w[label]) @ x[i] - self.bias[k] + self.bias[label], low, high
                )
                for k in rivals
            ]
            found.append(min(np.inf if s is None else np.linalg.norm(s, norm) for s in steps))
        return np.array(found)


def smallest_step(norm, x, w, c, low, high):
    """argmin || s || with <w, s> = c and low <= x + s <= high, in float64: a linear program, or bisection for 2."""
    n = len(x)
    below, above = low - x, high - x
    if norm == 2:
        s = lambda z: np.clip(z * np.sign(c) * w, below, above)  # noqa: E731
        if abs(w @ s(1e9)) < abs(c):
            return None
        return s(optimize.brentq(lambda z: np.sign(c) * (w @ s(z)) - abs(c), 0, 1e9, xtol=1e-14))
    if norm == math.inf:
        eye, one = np.eye(n), np.ones((n, 1))
        limits = np.block([[eye, -one], [-eye, -one]])
        result = optimize.linprog(
            np.eye(n + 1)[-1],
            limits,
            np.zeros(2 * n),
            np.append(w, 0)[None],
            [c],
            [*zip(below, above, strict=True), (0, None)],
        )
        return result.x[:n] if result.success else None
    bounds = [(0, a) for a in above] + [(0, -b) for b in below]
    result = optimize.linprog(np.ones(2 * n), A_eq=np.append(w, -w)[None], b_eq=[c], bounds=bounds)
    return result.x[:n] - result.x[n:] if result.success else None
