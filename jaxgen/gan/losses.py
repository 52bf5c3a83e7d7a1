"""Adversarial losses, as values: what the discriminator descends and what the generator descends.

With D(x) a logit, s the softplus log(1 + e^x), so that -log sigmoid(D) = s(-D), and means over data x and samples y:

                    discriminator                                generator
    minimax         s(-D(x)) + s(D(y))                           -s(D(y))                              (1)
    nonsaturating   s(-D(x)) + s(D(y))                           s(-D(y))                              (2)
    least_squares   (D(x) - 1)^2 / 2 + D(y)^2 / 2                (D(y) - 1)^2 / 2                      (3)
    hinge           max(0, 1 - D(x)) + max(0, 1 + D(y))          -D(y)                                 (4)
    wasserstein     D(y) - D(x)                                  -D(y)                                 (5)
    relativistic    s(D(y) - D(x))                               s(D(x) - D(y))                        (6)

(1) and (2) are Goodfellow et al. 2014 (arXiv:1406.2661, Eq. 1 and section 3), (3) Mao et al. 2016 (arXiv:1611.04076,
Eq. 9), (4) Lim & Ye 2017 (arXiv:1705.02894), (5) Arjovsky et al. 2017 (arXiv:1701.07875), (6) Jolicoeur-Martineau 2018
(arXiv:1807.00734), the loss of R3GAN (Huang et al. 2024, arXiv:2501.05441) with the penalties R1 and R2 beside it.

For data of density p and samples of density q the best D is log p / q in (1), (2) and, but for a constant, (6);
p / (p + q) in (3); the sign of p - q in (4). (5) has a best one among the 1-Lipschitz functions alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.typing import Array

LogitLoss = Callable[[Array, Array], Array]
"""``(real_logits [batch], fake_logits [batch]) -> [batch]``."""


class GanLoss(NamedTuple):
    """One of Eqs. 1-6, as two functions ``(real_logits [batch], fake_logits [batch]) -> [batch]``, to be averaged.

    They raise ValueError where the logits are not two arrays of one shape [batch], and TypeError where they are not
    floating.

    Attributes:
        discriminator: what the discriminator descends.
        generator: what the generator descends.
    """

    discriminator: LogitLoss
    generator: LogitLoss


def _checked(loss: LogitLoss) -> LogitLoss:
    def checked(real_logits: Array, fake_logits: Array) -> Array:
        for name, logits in (("real_logits", real_logits), ("fake_logits", fake_logits)):
            checks.floating(name, logits)
            checks.shape(name, logits, (None,))
        checks.same_shape("fake_logits", fake_logits, "real_logits", real_logits)
        return loss(real_logits, fake_logits)

    return checked


def _pair(discriminator: LogitLoss, generator: LogitLoss) -> GanLoss:
    return GanLoss(_checked(discriminator), _checked(generator))


def _told_apart(real: Array, fake: Array) -> Array:
    return jax.nn.softplus(-real) + jax.nn.softplus(fake)


minimax = _pair(_told_apart, lambda real, fake: -jax.nn.softplus(fake))
"""The game of Goodfellow et al., E log D(x) + E log(1 - D(y)), Eq. 1; its generator learns slowly while it is bad."""

nonsaturating = _pair(_told_apart, lambda real, fake: jax.nn.softplus(-fake))
"""Goodfellow et al.'s own remedy, Eq. 2: the generator descends -log D(y)."""

least_squares = _pair(
    lambda real, fake: 0.5 * (jnp.square(real - 1) + jnp.square(fake)), lambda real, fake: 0.5 * jnp.square(fake - 1)
)
"""Least squares with targets 1 and 0, Eq. 3."""

hinge = _pair(lambda real, fake: jax.nn.relu(1 - real) + jax.nn.relu(1 + fake), lambda real, fake: -fake)
"""The hinge loss, Eq. 4."""

wasserstein = _pair(lambda real, fake: fake - real, lambda real, fake: -fake)
"""The Wasserstein loss, Eq. 5; the critic must be kept Lipschitz, as by `gradient_penalty`."""

relativistic = _pair(lambda real, fake: jax.nn.softplus(fake - real), lambda real, fake: jax.nn.softplus(real - fake))
"""The relativistic pairing loss, Eq. 6: example i of the data against sample i."""
