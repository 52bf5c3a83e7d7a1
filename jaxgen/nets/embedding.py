"""What a network is told besides the image: the time, as sinusoids, and the class.

    omega_i = max_period^(-i / (d/2 - freq_shift)),    i = 0 .. d/2 - 1                            (1)
    embedding(t) = (sin(omega t), cos(omega t))                                                    (2)

Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); for diffusion Ho et al. 2020
(https://arxiv.org/abs/2006.11239).
"""

import math

import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.initialisation import normal
from jaxgen.typing import Array, ArrayLike


def time_embedding(
    t: ArrayLike,
    features: int,
    *,
    max_period: float = 10_000.0,
    freq_shift: float = 1.0,
    flip_sin_to_cos: bool = False,
) -> Array:
    """Sinusoidal embedding of time (Eq. 1 and 2).

    Args:
        t: [batch], any numbers; the frequencies suit a range of about 0 to ``max_period`` / 10.
        features: the length of the embedding; even, and more than 2 * ``freq_shift``.
        max_period: 2 pi times it is the longest wavelength.
        freq_shift: 1 makes the longest wavelength exact (DDPM), 0 leaves it one step short (ADM).
        flip_sin_to_cos: cosines first.

    Returns:
        [batch, features] float32.

    Raises:
        ValueError: ``t`` is not a vector, or ``features`` does not suit.

    >>> time_embedding(jnp.array([0.0]), 4)
    Array([[0., 0., 1., 1.]], dtype=float32)
    """
    checks.shape("t", t, (None,))
    half = features // 2
    if features % 2 or half <= freq_shift:
        raise ValueError(f"`features` must be even and more than 2 * `freq_shift` = {2 * freq_shift:g}, got {features}")
    rates = jnp.exp(-math.log(max_period) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.asarray(t, jnp.float32)[:, None] * rates
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


class LabelEmbedding(nn.Module):
    """A learned vector per class, and one more for no class: index ``num_classes`` is the null class.

    Train with a share of labels replaced by ``num_classes`` and the network is conditional and unconditional
    at once, as classifier-free guidance needs it (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    ``apply(params, labels [batch] int) -> [batch, features]``. Labels outside [0, num_classes] are not
    looked at while tracing and give NaN.

    Attributes:
        num_classes: at least 1.
        features: the length of the vectors.
        std: of the vectors' first draw.
    """

    num_classes: int
    features: int
    std: float = 1.0

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        """Looks the labels up."""
        checks.positive_integer("num_classes", self.num_classes)
        checks.shape("labels", labels, (None,))
        if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
            raise TypeError(
                f"`labels` must be integers in [0, {self.num_classes}], got dtype {jnp.result_type(labels)}"
            )
        table = self.param("embedding", normal(self.std), (self.num_classes + 1, self.features))
        return table.at[labels].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def check_labels(labels: Array | None, num_classes: int | None, batch: int) -> None:
    """Raises ValueError unless there are [batch] ``labels`` exactly where there are ``num_classes``."""
    if (labels is None) != (num_classes is None):
        came, expected = ("None", "[batch] integers") if labels is None else (f"{jnp.shape(labels)}", "None")
        raise ValueError(f"`labels` must be {expected} when `num_classes` is {num_classes}, got {came}")
    if labels is not None:
        checks.shape("labels", labels, (batch,))
