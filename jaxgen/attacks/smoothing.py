"""Randomised smoothing: a classifier that provably does not change its mind within a radius (Cohen et al. 2019).

The smoothed classifier g of any base classifier f answers what f says most often of a noised example,

    g(x) = argmax_c P(f(x + sigma eps) = c),    eps ~ N(0, I)                                          (1)

and if P(f(x + sigma eps) = c) >= p > 1/2 then g is c on the whole L2 ball about x of radius (arXiv:1902.02918, Thm. 1)

    R = sigma Phi^-1(p).                                                                           (2)

P is not known, but its votes can be counted: f's classes of n draws. A few draws select c, others give a lower bound of
its probability that holds with confidence 1 - alpha (Clopper and Pearson's, `binomial`), and where this is at most 1/2
the certificate abstains. All in one program.

Draw j of example i is made from ``fold_in(keys[i], j)`` and nothing else, so votes are sums over the draws' numbers,
however these are cut into chunks, shared by devices or continued later.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from jaxgen import checks, random
from jaxgen.attacks import binomial
from jaxgen.typing import Array, ArrayLike, Denoiser, Key

Classifier = Callable[[Array], Array]
"""``x [n, ...] -> logits [n, classes]``, parameters closed over."""

ABSTAINS = -1
"""The class of an example for which nothing can be said with confidence."""


class Smoothed(NamedTuple):
    """What a smoothed classifier says of each example; each statement alone is wrong with probability alpha at most.

    Attributes:
        prediction: [batch] int32, the class of Eq. 1, or -1.
        certified: [batch] int32, the class that g has on the whole ball, or -1. It takes more to be certain of.
        radius: [batch], the ball's, Eq. 2, in the L2 norm and the units of x; 0 where nothing is certified.
    """

    prediction: Array
    certified: Array
    radius: Array


def smooth(
    key: Key,
    apply: Classifier,
    x: Array,
    *,
    sigma: ArrayLike,
    draws: int = 100_000,
    selection: int = 100,
    alpha: ArrayLike = 0.001,
    chunk: int = 16,
) -> Smoothed:
    """Predicts and certifies by randomised smoothing (arXiv:1902.02918, section 3.2), in one program.

    It is `smooth_votes`, `smooth_predict` and `smooth_certify`. A certificate of n draws does not reach beyond sigma
    Phi^-1(alpha^(1/n)): about 3.8 sigma for 100,000.

    Args:
        key: a single key, or [batch] keys.
        apply: the base classifier, ``x [n, ...] -> logits [n, classes]``; good at noised examples, by training on them
            or by a denoiser in front (`denoised`).
        x: [batch, ...], floating.
        sigma: scalar above 0, the noise's standard deviation, in the units of x: where images lie in [-1, 1], twice
            what papers say of [0, 1]; radii likewise.
        draws: n, how many bound the probability.
        selection: how many select the class; other ones.
        alpha: the probability of a wrong statement, in (0, 1).
        chunk: as in `smooth_votes`: it sets the memory.

    Returns:
        `Smoothed`. Example i depends on (key, i) and x[i] alone, if the classifier treats examples apart.

    Raises:
        ValueError: a shape is wrong, or an option is out of range.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.

    >>> sign = lambda x: jnp.stack([-x[:, 0], x[:, 0]], axis=1)  # the boundary is at distance |x_0|
    >>> smooth(jax.random.key(0), sign, jnp.array([[0.5, 3.0]]), sigma=1.0, draws=10_000, chunk=1000).radius
    Array([0.4...], dtype=float32)
    """
    # Before the draws, which may take hours.
    checks.positive_integer("selection", selection)
    checks.positive("sigma", sigma)
    binomial.check_level(alpha)
    selected = smooth_votes(key, apply, x, sigma=sigma, draws=selection, chunk=chunk)
    votes = smooth_votes(key, apply, x, sigma=sigma, draws=draws, start=selection, chunk=chunk)
    certified, radius = smooth_certify(selected, votes, sigma=sigma, alpha=alpha)
    return Smoothed(smooth_predict(votes, alpha=alpha), certified, radius)


def smooth_votes(
    key: Key,
    apply: Classifier,
    x: Array,
    *,
    sigma: ArrayLike,
    draws: int,
    start: int | Array = 0,
    chunk: int = 16,
) -> Array:
    """Counts the base classifier's classes of noised examples, in the memory of one chunk.

    Votes of draws that were made apart add up. That is how devices share the draws of a few examples, the array of
    starts being what is split:

        each = lambda start: smooth_votes(key, apply, x, sigma=0.5, draws=12_500, start=start)
        jax.vmap(each)(12_500 * jnp.arange(8)).sum(0)  # the votes of 100,000 draws

    Args:
        key: a single key, or [batch] keys.
        apply: ``x [n, ...] -> logits [n, classes]``.
        x: [batch, ...], floating.
        sigma: scalar of at least 0, the noise's standard deviation, in the units of x.
        draws: for each example, at least 1.
        start: the number of the first draw, an integer; may be traced.
        chunk: draws of each example at a time: the classifier sees batch x chunk rows. The votes do not depend on it,
            but for a classifier's ties and rounding.

    Returns:
        [batch, classes] int32.

    Raises:
        ValueError: a shape is wrong, or an option is out of range.
        TypeError: ``x`` is not floating, or ``key`` not a typed key.
    """
    checks.floating("x", x)
    checks.rank_at_least("x", x, 1)
    checks.shape("sigma", sigma, ())
    checks.interval("sigma", sigma, 0, jnp.inf)
    checks.positive_integer("draws", draws)
    checks.positive_integer("chunk", chunk)
    x = jnp.asarray(x)
    batch, rows = x.shape[0], x.shape[0] * chunk
    keys = random.keys_for(key, batch)
    logits = jax.eval_shape(apply, jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype))
    checks.shape("apply(x)", logits, (rows, None))
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def noised(key: Key, example: Array, number: Array) -> Array:
        eps = jax.random.normal(jax.random.fold_in(key, number), example.shape, wide)
        return (example + jnp.asarray(sigma, wide) * eps).astype(x.dtype)

    def add(counts: Array, first: Array) -> tuple[Array, None]:
        numbers = first + jnp.arange(chunk)
        noisy = jax.vmap(jax.vmap(noised, (None, None, 0)), (0, 0, None))(keys, x, start + numbers)
        logits = apply(noisy.reshape(rows, *x.shape[1:]))
        # The last chunk may be more than what is left to draw. A one-hot of -1 is all zeros.
        ballots = jnp.where(numbers < draws, jnp.argmax(logits, axis=1).reshape(batch, chunk), -1)
        return counts + jnp.sum(jax.nn.one_hot(ballots, logits.shape[1], dtype=jnp.int32), axis=1), None

    empty = jnp.zeros((batch, logits.shape[1]), jnp.int32)
    return jax.lax.scan(add, empty, jnp.arange(0, draws, chunk))[0]


def smooth_predict(votes: Array, *, alpha: ArrayLike = 0.001) -> Array:
    """The smoothed classifier's class, Eq. 1, or -1 (arXiv:1902.02918, PREDICT).

    It abstains unless a fair coin between the first and the second class would fall so unevenly with probability alpha
    at most, which is to say: unless Clopper and Pearson's bound of the second's share, at alpha / 2, is below 1/2.

    Args:
        votes: [batch, classes], integers.
        alpha: the probability of a wrong class, in (0, 1).

    Returns:
        [batch] int32.

    Raises:
        ValueError: ``votes`` are not [batch, classes] of 2 classes at least, or ``alpha`` is out of range.
        TypeError: votes are not integers.

    >>> smooth_predict(jnp.array([[3, 97], [48, 52]]))
    Array([ 1, -1], dtype=int32)
    """
    _check_votes("votes", votes)
    checks.interval("alpha", alpha, 0, 1)
    (first, second), (label, _) = (a.T for a in jax.lax.top_k(votes, 2))
    certain = binomial.upper_bound(second, first + second, alpha=alpha / 2) < 0.5
    return jnp.where(certain, label, ABSTAINS)


def smooth_certify(
    selection: Array, votes: Array, *, sigma: ArrayLike, alpha: ArrayLike = 0.001
) -> tuple[Array, Array]:
    """The class that the smoothed classifier has on a whole ball, or -1, and the ball's radius (CERTIFY, ibid.).

    Args:
        selection: [batch, classes], integers: the votes that select the class.
        votes: likewise, of other draws: those that bound its probability.
        sigma: scalar above 0, the noise's standard deviation.
        alpha: the probability of a wrong certificate, in (0, 1).

    Returns:
        Classes [batch] int32, and radii [batch], Eq. 2, 0 where it abstains.

    Raises:
        ValueError: a shape is wrong, or an option is out of range.
        TypeError: votes are not integers.

    >>> smooth_certify(jnp.array([[0, 9], [5, 4]]), jnp.array([[10, 990], [520, 480]]), sigma=0.5)
    (Array([ 1, -1], dtype=int32), Array([0.98..., 0.       ], dtype=float32))
    """
    _check_votes("votes", votes)
    _check_votes("selection", selection)
    checks.same_shape("selection", selection, "votes", votes)
    checks.shape("sigma", sigma, ())
    checks.positive("sigma", sigma)
    label = jnp.argmax(selection, axis=1).astype(jnp.int32)
    trials = jnp.sum(votes, axis=1)
    others = trials - jnp.take_along_axis(votes, label[:, None], axis=1)[:, 0]
    # 1 - p of Eq. 2 and not p: of a probability near 1 single precision keeps no digits.
    doubt = binomial.upper_bound(others, trials, alpha=alpha)
    certain = doubt < 0.5
    radius = -sigma * ndtri(jnp.where(certain, doubt, 0.5))
    return jnp.where(certain, label, ABSTAINS), jnp.where(certain, radius, 0)


def denoised(apply: Classifier, denoise: Denoiser, *, time: ArrayLike, alpha: ArrayLike) -> Classifier:
    """A base classifier for `smooth` that was never trained on noise: one step of a diffusion model before it.

    Carlini et al. 2023 (arXiv:2206.10550, Algorithm 1). x + sigma eps, times alpha(t), is the diffusion model's own x_t
    at the time t where sigma(t) / alpha(t) = sigma:

        time = diffusion.time_at_ratio(path, sigma)
        base = denoised(apply, denoise, time=time, alpha=path.alpha(time))
        certificate = smooth(key, base, x, sigma=sigma)

    Args:
        apply: ``x [n, ...] -> logits [n, classes]``, of clean data in the units of the denoiser's.
        denoise: ``(x_t [n, ...], t [n]) -> x0``.
        time: scalar, the t of that noise.
        alpha: scalar above 0, alpha(t): what x_t holds of the data.

    Returns:
        ``x [n, ...] -> logits [n, classes]``, of noised data.

    Raises:
        ValueError: ``time`` or ``alpha`` is not a scalar, or ``alpha`` is not above 0; (when called) the denoiser gives
            another shape.
    """
    checks.shape("time", time, ())
    checks.shape("alpha", alpha, ())
    checks.positive("alpha", alpha)

    def classify(x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        noised = (jnp.asarray(alpha, wide) * x).astype(x.dtype)
        clean = denoise(noised, jnp.full(x.shape[:1], time, wide))
        checks.same_shape("denoise(x, t)", clean, "x", x)
        return apply(clean)

    return classify


def _check_votes(name: str, votes: Array) -> None:
    checks.shape(name, votes, (None, None))
    if not jnp.issubdtype(votes.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers, numbers of votes, got dtype {votes.dtype}")
    if votes.shape[1] < 2:
        raise ValueError(f"`{name}` must be of at least 2 classes, got shape {list(votes.shape)}")
