"""Adversarial training: a loss of examples that are attacked while it is minimised.

    min over params   E [ L(params, x*) ],    x* = argmax over the threat model's x' of J(params, x')           (1)

(Madry et al. 2018, arXiv:1706.06083, Eq. 2, where J = L.) `adversarial` makes this of any loss and any attack. The
gradient of (1) by the parameters is L's at x*, the attack held constant (Danskin's theorem), so that nothing is
differentiated through an attack. An attack sees the whole batch and returns what the loss takes, so that recipes are
values of its argument:

    def attacked(key, params, batch):
        objective = attacks.cross_entropy(lambda x: apply(params, x), batch["label"])
        x = attacks.fgsm(key, objective, batch["image"], threat, random_start=True, step_size=1.25 * threat.eps)
        return batch | {"image": x}

    method = train.minimise(attacks.adversarial(loss, attacked), optimiser, init)

is FGSM-RS (Wong et al. 2020, arXiv:2001.03994, Algorithm 3), and with ``attacks.pgd(..., steps=7, keep_best=False)`` in
its place Madry et al.'s recipe. FGSM-RS may overfit to its own single step and lose all robustness to others within an
epoch ("catastrophic overfitting"). The gradients at x and near it then point apart, which can be penalised
(Andriushchenko & Flammarion 2020, arXiv:2007.02617):

    GradAlign = 1 - cos(grad_x l(x), grad_x l(x + eta)),    eta uniform in the ball.                       (2)

TRADES (Zhang et al. 2019, arXiv:1901.08573, Algorithm 1) attacks what the classifier says instead of whether it is
right, and pays for both:

    L = cross entropy(f(x), y) + beta KL(f(x) || f(x*)),    x* = argmax KL(f(x) || f(x'))                  (3)

    def attacked(key, params, batch):
        objective = attacks.kl_divergence(lambda x: apply(params, x), batch["image"])
        return batch | {"attacked": attacks.pgd(key, objective, batch["image"], threat, keep_best=False)}

    def loss(params, batch, key):
        clean, moved = apply(params, batch["image"]), apply(params, batch["attacked"])
        return attacks.trades(clean, moved, batch["label"], beta=6.0).mean(), {}
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.attacks.objectives import Logits, cross_entropy, evaluate_and_gradient
from jaxgen.attacks.threat import ThreatModel, random_start
from jaxgen.typing import Array, Batch, Key, Loss, Metrics, Objective, Params

BatchAttack = Callable[[Key, Params, Batch], Batch]
"""``(key, params, batch) -> batch``: what is done to a batch before its loss is taken."""


def adversarial(loss: Loss, attack: BatchAttack) -> Loss:
    """The loss of attacked batches, Eq. 1. Its gradient is that of ``loss``; none flows through the attack.

    Args:
        loss: ``(params, batch, key) -> (scalar, metrics)``, of what the attack returns.
        attack: ``(key, params, batch) -> batch``, with the parameters as they are; what it returns may hold more than
            what it was given, such as both clean and attacked examples. Its key is a single one. Where the batch is
            split by a mapped axis, give an attack ``random.example_keys(key, batch, axis_name=...)``.

    Returns:
        A Loss.

    >>> loss = lambda params, batch, key: (jnp.mean(params * batch), {})
    >>> uphill = lambda key, params, batch: batch + 0.5 * jnp.sign(params)
    >>> jax.grad(adversarial(loss, uphill), has_aux=True)(2.0, jnp.ones(3), jax.random.key(0))[0]
    Array(1.5, dtype=float32, weak_type=True)
    """

    def of_attacked(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        checks.key("key", key)
        attack_key, key = jax.random.split(key)
        # Held constant on the way in: derivatives that are only thrown away afterwards are traced first.
        attacked = attack(attack_key, *jax.lax.stop_gradient((params, batch)))
        return loss(params, jax.lax.stop_gradient(attacked), key)

    return of_attacked


def kl_divergence(apply: Logits, x: Array) -> Objective:
    """How far what a classifier says has moved from what it says of clean examples: what TRADES attacks, Eq. 3.

    Its gradient is zero at ``x`` itself: start an attack elsewhere, at random.

    Args:
        apply: ``x [batch, ...] -> logits [batch, classes]``.
        x: [batch, ...], the clean examples, whose logits are computed here, once.

    Returns:
        The objective ``x' -> [batch]``, KL(f(x) || f(x')) in nats.

    Raises:
        ValueError: the logits are not [batch, classes].
        TypeError: the logits are not floating.

    >>> kl_divergence(lambda x: x, jnp.array([[0.0, 0.0]]))(jnp.array([[0.0, jnp.log(3.0)]]))
    Array([0.1438...], dtype=float32)
    """
    clean = jax.lax.stop_gradient(apply(x))
    return lambda x: _divergence(clean, apply(x))


def trades(logits: Array, attacked_logits: Array, labels: Array, *, beta: float | Array = 6.0) -> Array:
    """TRADES, Eq. 3, one value per example. Gradients flow through both logits, as they do in the paper's.

    Args:
        logits: [batch, classes], of the clean examples.
        attacked_logits: likewise, of those that an attack on `kl_divergence` has moved.
        labels: [batch] integers.
        beta: at least 0, what robustness is worth: 1 / lambda of the paper, which takes 1 to 6.

    Returns:
        [batch], in float32 at least.

    Raises:
        ValueError: shapes disagree, a known label is out of range, or ``beta`` is negative.
        TypeError: logits are not floating, or labels not integers.

    >>> trades(jnp.zeros((1, 2)), jnp.array([[0.0, jnp.log(3.0)]]), jnp.array([0]), beta=1.0)  # log 2 + 0.1438
    Array([0.8369...], dtype=float32)
    """
    checks.interval("beta", beta, 0, math.inf)
    divergence = _divergence(logits, attacked_logits)
    return cross_entropy(lambda logits: logits, labels)(logits) + beta * divergence


def grad_align(objective: Objective, x: Array, threat: ThreatModel, key: Key) -> Array:
    """How much an objective's gradient turns within the ball, Eq. 2, one value per example.

    A regulariser of FGSM training, times a weight: 0.2 for 8/255 and 2 for 16/255 on CIFAR-10 in the paper. It is
    differentiated by the parameters through both gradients.

    Args:
        objective: ``x -> [batch]``, each value of its own example alone, such as `cross_entropy`.
        x: [batch, ...], floating.
        threat: its ball, cut by the bounds, is where the other gradient is taken.
        key: a single key, or [batch] keys.

    Returns:
        [batch], in [0, 2]; 0 where a gradient is zero, which has no direction.

    Raises:
        ValueError: ``x`` does not fit the threat model, or the objective's value is not [batch].
        TypeError: ``x`` is not floating, or ``key`` not a typed key.
    """
    moved = jax.lax.stop_gradient(random_start(key, threat, x))
    here, there = (_unit(evaluate_and_gradient(objective, at)[2]) for at in (x, moved))
    cosine = jnp.sum(here * there, axis=1)
    defined = jnp.any(here != 0, axis=1) & jnp.any(there != 0, axis=1)
    return jnp.where(defined, 1 - cosine, 0)


def _divergence(logits: Array, moved: Array) -> Array:
    for name, value in (("logits", logits), ("attacked_logits", moved)):
        checks.floating(name, value)
        checks.shape(name, value, (None, None))
    checks.same_shape("attacked_logits", moved, "logits", logits)
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    log_p, log_q = (jax.nn.log_softmax(value.astype(wide), axis=1) for value in (logits, moved))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)


def _unit(gradient: Array) -> Array:
    """Rows [batch, n] of length 1, in float32 at least; rows of zeros, and their derivative, stay zero."""
    rows = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)).reshape(gradient.shape[0], -1)
    # By the largest first: the squares of the small gradients of a confident network would vanish.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=1, keepdims=True, initial=0))
    rows = rows / jnp.where(largest > 0, largest, 1)
    return rows * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(rows), axis=1, keepdims=True), 0.5))
