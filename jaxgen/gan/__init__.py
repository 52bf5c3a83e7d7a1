"""Generative adversarial networks: losses as pairs of functions of logits, and penalties of a critic's gradient.

>>> import jax.numpy as jnp
>>> from jaxgen import gan
>>> critic = lambda x: jnp.sum(x, axis=1)  # any x [batch, ...] -> logits [batch]
>>> real, fake = jnp.ones((4, 2)), jnp.zeros((4, 2))
>>> real_logits, real_norms = gan.penalised(critic, real)  # the logits, and R1 at the cost of their gradient
>>> fake_logits, fake_norms = gan.penalised(critic, fake)
>>> (gan.relativistic.discriminator(real_logits, fake_logits) + 0.5 * (real_norms + fake_norms)).shape
(4,)
"""

from jaxgen.gan.losses import (
    GanLoss,
    hinge,
    least_squares,
    minimax,
    nonsaturating,
    relativistic,
    wasserstein,
)
from jaxgen.gan.penalties import gradient_penalty, lazy, penalised, r1, r2

__all__ = [
    "GanLoss",
    "gradient_penalty",
    "hinge",
    "lazy",
    "least_squares",
    "minimax",
    "nonsaturating",
    "penalised",
    "r1",
    "r2",
    "relativistic",
    "wasserstein",
]
