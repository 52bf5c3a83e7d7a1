"""Multinomial logistic regression without a learning rate, for several weight decays at once.

Of standardised features x, labels y and logits z = x W + b it minimises

    f(W, b) = mean_i (log sum_c exp z_ic - z_iy) + (lambda / 2) |W|^2                              (1)

which is convex. Its Hessian is bounded whatever W and b are (Böhning 1992, "Multinomial logistic regression algorithm",
Annals of the Institute of Statistical Mathematics 44): by C / 2 + lambda for each class, with C the features'
covariance. In the basis of C's eigenvectors, of eigenvalues s, the bound is diagonal, so

    w_k <- w_k - (df / dw_k) / (s_k / 2 + lambda),    b <- b - 2 df / db                           (2)

never ascends. No step size is chosen and no line is searched, and features of any correlation are of one scale to it.
Nesterov's momentum speeds it up, started again wherever it points uphill (O'Donoghue & Candès 2012, arXiv:1204.3982,
section 3.2). All weight decays share the eigenvectors and each product with the features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.typing import Array


class Classifier(NamedTuple):
    """A linear classifier for each of several weight decays.

    Attributes:
        mean: [features], subtracted.
        scale: [features], multiplied with; 0 for a feature that does not vary.
        weights: [decays, features, classes], of standardised features.
        bias: [decays, classes].
        gradient_norm: [decays], the length of Eq. 1's gradient: 0 at the minimum.
    """

    mean: Array
    scale: Array
    weights: Array
    bias: Array
    gradient_norm: Array


def fit(features: Array, labels: Array, *, classes: int, weight_decays: Array, steps: int) -> Classifier:
    """Minimises Eq. 1 for each weight decay by so many steps of Eq. 2.

    Args:
        features: [n, features], float32 or float64.
        labels: [n] integers in [0, classes).
        classes: their number.
        weight_decays: [decays], each above 0.
        steps: a hundred for strong weight decay, a thousand for weak.
    """
    mean = jnp.mean(features, axis=0)
    deviation = jnp.sqrt(jnp.mean((features - mean) ** 2, axis=0))
    rounding = jnp.finfo(features.dtype).eps
    varies = deviation > 8 * rounding * jnp.max(jnp.abs(features), axis=0)
    scale = jnp.where(varies, 1 / jnp.where(varies, deviation, 1), 0)
    x = (features - mean) * scale
    n = x.shape[0]
    variances, basis = jnp.linalg.eigh(_product(x.T, x) / n)
    x = _product(x, basis)
    targets = jax.nn.one_hot(labels, classes, dtype=x.dtype)

    def minimise(weight_decay: Array) -> tuple[Array, Array, Array]:
        # The last term is what rounding adds to the covariance off its diagonal.
        curvature = jnp.maximum(variances, 0) / 2 + weight_decay + rounding * jnp.sum(variances)

        def gradient(weights: Array, bias: Array) -> tuple[Array, Array]:
            errors = (jax.nn.softmax(_product(x, weights) + bias) - targets) / n
            return _product(x.T, errors) + weight_decay * weights, jnp.sum(errors, axis=0)

        def step(_: int, state: tuple[tuple[Array, Array], tuple[Array, Array], Array]) -> tuple:
            before, ahead, age = state
            slopes = gradient(*ahead)
            after = (ahead[0] - slopes[0] / curvature[:, None], ahead[1] - 2 * slopes[1])
            moved = (after[0] - before[0], after[1] - before[1])
            uphill = jnp.vdot(slopes[0], moved[0]) + jnp.vdot(slopes[1], moved[1]) > 0
            age = jnp.where(uphill, 0, age + 1)
            momentum = age / (age + 3)
            return after, (after[0] + momentum * moved[0], after[1] + momentum * moved[1]), age

        start = (jnp.zeros((x.shape[1], classes), x.dtype), jnp.zeros(classes, x.dtype))
        (weights, bias), _, _ = jax.lax.fori_loop(0, steps, step, (start, start, jnp.zeros((), x.dtype)))
        slopes = gradient(weights, bias)
        return _product(basis, weights), bias, jnp.sqrt(jnp.sum(slopes[0] ** 2) + jnp.sum(slopes[1] ** 2))

    return Classifier(mean, scale, *jax.vmap(minimise)(weight_decays))


def logits(classifier: Classifier, features: Array) -> Array:
    """The logits [decays, n, classes] of features [n, features]."""
    x = (features - classifier.mean) * classifier.scale
    return jax.vmap(lambda weights, bias: _product(x, weights) + bias)(classifier.weights, classifier.bias)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
