"""Guidance: functions from denoisers to a denoiser, so that they compose and samplers need not know."""

from jaxgen.typing import Array, ArrayLike, Denoiser


def cfg(conditional: Denoiser, unconditional: Denoiser, scale: ArrayLike) -> Denoiser:
    """Classifier-free guidance, unconditional + scale (conditional - unconditional).

    Ho & Salimans 2022 (arXiv:2207.12598). Guiding estimates of x0 equals guiding noise, velocity or score, since each
    is affine in the others.

    Args:
        conditional: the denoiser that knows the condition.
        unconditional: the one that does not.
        scale: 1 is the conditional denoiser, 0 the unconditional one, above 1 is what makes samples look typical of
            their condition (the paper's 1 + w). A number, or an array that broadcasts against x; it may be traced.

    Returns:
        A Denoiser that evaluates both.

    >>> import jax.numpy as jnp
    >>> cfg(lambda x, t: x + 1, lambda x, t: x, 3.0)(jnp.zeros((1, 1)), jnp.ones((1,)))
    Array([[3.]], dtype=float32)
    """

    def denoise(x: Array, t: Array) -> Array:
        without = unconditional(x, t)
        return without + scale * (conditional(x, t) - without)

    return denoise
