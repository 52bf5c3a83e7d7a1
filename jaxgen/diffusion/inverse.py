"""Inverse problems: denoisers of the clean data given a measurement of it.

Let y = A x0 + std n, n ~ N(0, I), with a linear A. By Bayes' rule the score of x given y is

    grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x)                                           (1)

and p_t(y | x) is an integral over the clean data that may lie behind x. Moment matching (Rozet et al. 2024,
arXiv:2405.13712, section 4.2) takes these to be Gaussian, with the mean d = denoise(x, t) and the covariance C that the
denoiser itself implies by Tweedie's second formula,

    C = Cov[x0 | x] = sigma^2 / alpha  (d denoise / dx)                                                   (2)
    p_t(y | x) = N(A d, A C A^T + std^2 I)                                                                (3)

and since C changes slowly with x, Eq. 1 says of the posterior's denoiser that

    E[x0 | x, y] = d + C A^T v,    (A C A^T + std^2 I) v = y - A d                                        (4)

which is exact for Gaussian data. C is never formed: by its symmetry C u is sigma^2 / alpha times one
vector-Jacobian product of the denoiser, and v comes from conjugate gradients (Hestenes & Stiefel 1952), each example
with step sizes of its own.

Coarser choices of C in Eq. 3 are Diffusion Posterior Sampling (arXiv:2209.14687), C = 0 with a step size by hand, and
PiGDM (Song et al. 2023, ICLR), C a multiple of I. They save the products and lose the exactness; neither is here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen import checks
from jaxgen.diffusion.path import Path, coefficients, informative_times
from jaxgen.typing import Array, ArrayLike, Denoiser

Operator = Callable[[Array], Array]
"""``x [batch, ...] -> y [batch, ...]``: a measurement without its noise, each example's of that example alone."""


def inpaint(denoise: Denoiser, known: ArrayLike, mask: ArrayLike) -> Denoiser:
    """Puts what is known into the estimate of x0.

    Samples end with the known values, but what is unknown is drawn as if x had been noised from data that the
    denoiser never saw there: it is biased, and bluntly so where known and unknown depend on each other strongly. The
    posterior itself comes from `posterior_sampling` with ``lambda x: mask * x`` for operator.

    Args:
        denoise: the denoiser.
        known: values, broadcastable to x; those outside of the mask are ignored.
        mask: boolean, broadcastable to x; True where the value is known.

    Returns:
        A Denoiser. It raises ValueError where ``known`` or ``mask`` does not broadcast to x.

    Raises:
        TypeError: ``mask`` is not boolean.

    >>> denoise = inpaint(lambda x, t: x, 7.0, jnp.array([True, False]))
    >>> denoise(jnp.zeros((1, 2)), 0.5)
    Array([[7., 0.]], dtype=float32)
    """
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
        raise TypeError(f"`mask` must be boolean, got dtype {jnp.result_type(mask)}")

    def inpainted(x: Array, t: Array) -> Array:
        for name, value in (("known", known), ("mask", mask)):
            _broadcastable(name, value, "x", x.shape)
        return jnp.where(mask, jnp.asarray(known, x.dtype), denoise(x, t))

    return inpainted


def posterior_sampling(
    denoise: Denoiser,
    path: Path,
    operator: Operator,
    observation: Array,
    noise_std: ArrayLike,
    *,
    iterations: int,
) -> Denoiser:
    """The denoiser E[x0 | x, y] of the posterior given y = operator(x0) + noise_std n, Eq. 4.

    Any sampler run with it samples from p(x0 | y): exactly so, to the sampler's own error, where the data are Gaussian.
    Where alpha is 0 (`rectified_flow` at t = 1) Eq. 2 is infinity times 0, and the denoiser is evaluated just below.

    Args:
        denoise: the denoiser of the data, differentiable by x; its estimate of an example must depend on that example
            alone.
        path: the Gaussian path.
        operator: A of Eq. 3, ``x [batch, ...] -> y [batch, ...]``, linear or affine: a mask, a blur, a sub-sampling, a
            matrix. Its transpose is derived from it.
        observation: y, of the shape of ``operator(x)``; may be traced.
        noise_std: the measurement's standard deviation, finite and at least 0; a number or an array that broadcasts
            against the observation; may be traced. At 0 ``A C A^T`` should not be singular.
        iterations: of conjugate gradients, at least 1; each costs one vector-Jacobian product. As many as a single
            observation has elements (or A C A^T distinct eigenvalues) solve Eq. 4 exactly; a handful does for images.
            An example stops before where its residual has vanished or, since an imperfect network's C need not be
            positive, where a direction has no positive curvature.

    Returns:
        A Denoiser. It raises ValueError where ``operator(x)`` and the observation differ in shape, or where the
        operator is seen not to be linear.

    Raises:
        ValueError: ``noise_std`` is known to be negative or not finite, or does not broadcast to the observation;
            ``iterations`` is below 1.

    >>> from jaxgen import diffusion, testing
    >>> path = diffusion.edm()
    >>> denoise = testing.gaussian_denoiser(path, 0.0, 1.0)
    >>> first = posterior_sampling(denoise, path, lambda x: x[:, :1], jnp.array([[2.0]]), 0.0, iterations=1)
    >>> first(jnp.zeros((1, 3)), 1.0)
    Array([[2., 0., 0.]], dtype=float32)
    """
    checks.finite("noise_std", noise_std)
    checks.interval("noise_std", noise_std, 0.0, float("inf"))
    _broadcastable("noise_std", noise_std, "observation", jnp.shape(observation))
    checks.positive_integer("iterations", iterations)

    def posterior(x: Array, t: Array) -> Array:
        t = informative_times(path, t, x)
        alpha, sigma = coefficients(path, t, x)
        x0, pullback = jax.vjp(lambda x: denoise(x, t), x)
        linear, transpose = _linear_part(operator, x0, observation)

        def covariance(u: Array) -> Array:
            return (sigma**2 / alpha * pullback(u.astype(x0.dtype))[0]).astype(x0.dtype)

        def system(v: Array) -> Array:
            return linear(covariance(transpose(v))) + (jnp.square(noise_std) * v).astype(v.dtype)

        predicted = operator(x0)
        v = _conjugate_gradients(system, (observation - predicted).astype(predicted.dtype), iterations)
        return (x0 + covariance(transpose(v))).astype(x.dtype)

    return posterior


def _linear_part(operator: Operator, x: Array, observation: Array) -> tuple[Operator, Operator]:
    """A and A^T of an operator that may add a constant: transposing drops it, and transposing again gives A."""
    y = jax.eval_shape(operator, x)
    checks.same_shape("operator(x)", y, "observation", observation)
    transposed = jax.linear_transpose(operator, x)
    try:
        jax.eval_shape(transposed, y)
    except Exception as error:  # JAX has no one type for what it cannot transpose.
        raise ValueError(f"`operator` must be a linear function of x, but it has no transpose: {error}") from error
    again = jax.linear_transpose(lambda v: transposed(v)[0], y)
    return (lambda u: again(u)[0]), (lambda v: transposed(v)[0])


def _conjugate_gradients(system: Operator, right: Array, iterations: int) -> Array:
    """Solves ``system(v) = right`` from v = 0, for each example apart."""
    axes = tuple(range(1, right.ndim))

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=axes, keepdims=True, dtype=jnp.promote_types(right.dtype, jnp.float32))

    floor = jnp.finfo(right.dtype).eps ** 2 * dot(right, right)

    def iterate(state: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        v, residual, direction, size = state
        mapped = system(direction)
        curvature = dot(direction, mapped)
        active = (size > floor) & (curvature > 0)
        step = jnp.where(active, size / jnp.where(active, curvature, 1), 0)
        v = (v + step * direction).astype(v.dtype)
        residual = (residual - step * mapped).astype(v.dtype)
        new = dot(residual, residual)
        turned = residual + jnp.where(active, new / jnp.where(active, size, 1), 0) * direction
        direction = jnp.where(active, turned, direction).astype(v.dtype)
        return (v, residual, direction, new), None

    start: tuple[Array, ...] = (jnp.zeros_like(right), right, right, dot(right, right))
    return jax.lax.scan(iterate, start, length=iterations)[0][0]


def _broadcastable(name: str, value: ArrayLike, other_name: str, shape: tuple[int, ...]) -> None:
    came = jnp.shape(value)
    if len(came) > len(shape) or any(c not in (1, n) for c, n in zip(came[::-1], shape[::-1], strict=False)):
        raise ValueError(f"`{name}` must broadcast to the shape of `{other_name}`, {list(shape)}, got {list(came)}")
