"""Generative adversarial networks: losses as pairs of functions of logits, and what keeps a critic in bounds.

That is penalties of its gradient, spectral normalisation, and augmentation of what it sees.

>>> import jax.numpy as jnp
>>> from jaxgen import gan
>>> critic = lambda x: jnp.sum(x, axis=1)  # any x [batch, ...] -> logits [batch]
>>> real, fake = jnp.ones((4, 2)), jnp.zeros((4, 2))
>>> scored = gan.scored(critic, real, fake)  # the logits of both, and R1 and R2 at the cost of their gradient
>>> loss = gan.relativistic.discriminator(scored.real_logits, scored.fake_logits)
>>> (loss + 0.5 * (scored.r1 + scored.r2)).shape
(4,)
"""

from jaxgen.gan.adaptive import ada, adapt_probability
from jaxgen.gan.augmentation import diffaugment
from jaxgen.gan.losses import (
    GanLoss,
    hinge,
    least_squares,
    minimax,
    nonsaturating,
    relativistic,
    wasserstein,
)
from jaxgen.gan.penalties import Scored, gradient_penalty, lazy, penalised, r1, r2, scored
from jaxgen.gan.spectral import spectral_normalise

__all__ = [
    "GanLoss",
    "Scored",
    "ada",
    "adapt_probability",
    "diffaugment",
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
    "scored",
    "spectral_normalise",
    "wasserstein",
]
