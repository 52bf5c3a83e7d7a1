"""The inception score: is each generated image of one class, and are they together of all?

It sees no real images (Salimans et al. 2016, arXiv:1606.03498, section 4).

With p_i the classes' probabilities that a classifier gives to image i, and p their mean over the images,

    score = exp(mean of KL(p_i || p)) = exp(mean of sum_c p_ic log p_ic - sum_c p_c log p_c)    (1)

between 1 and the number of classes. Two means over images are all that it takes: so predictions may come in pieces, on
one device or on many.

    state = predictions.init(1000)
    for images in batches:
        state = predictions.update(state, classify(images))
    score = predictions.compute(state)
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from jaxgen import checks
from jaxgen.metrics.streaming import counted
from jaxgen.typing import Array


class Predictions(NamedTuple):
    """The means of some images' predictions.

    Attributes:
        images: how many, an int32 scalar.
        mean: [classes], the mean of their probabilities.
        negentropy: the mean of their negative entropies, a scalar.
    """

    images: Array
    mean: Array
    negentropy: Array


class InceptionScore(NamedTuple):
    """The inception score of parts of the images.

    Attributes:
        mean: over the parts, a scalar.
        deviation: over the parts, a scalar.
    """

    mean: Array
    deviation: Array


def inception_score(logits: Array, *, splits: int = 10) -> InceptionScore:
    """The inception score, Eq. 1, of parts of the images, as it is usually published.

    The fewer images, the lower it is: compare only values of equal numbers of images and parts.

    Args:
        logits: [images, classes], a classifier's, before any softmax; floating, and computed with in float32 at least.
            Of probabilities the logarithms, of which -inf is one. In random order: one part after the other is scored.
        splits: how many parts, at most one an image, as large as each other or larger by one; the paper's choice is 10.

    Returns:
        Two scalars.

    Raises:
        ValueError: a shape is wrong, ``splits`` is not an integer of at least 1, or there are fewer images.
        TypeError: the logits are not floating.

    >>> float(inception_score(jnp.log(jnp.eye(4)), splits=1).mean)
    4.0
    """
    checks.positive_integer("splits", splits)
    checks.floating("logits", logits)
    checks.shape("logits", logits, (None, None))
    images = logits.shape[0]
    if images < splits:
        raise ValueError(f"`splits` must be at most the number of rows of `logits`, {images}, got {splits}")
    edges = [part * images // splits for part in range(splits + 1)]
    dtype = jnp.promote_types(jnp.result_type(logits), jnp.float32)
    scores = jnp.stack([compute(_rows(logits[start:stop], None, dtype)) for start, stop in itertools.pairwise(edges)])
    return InceptionScore(jnp.mean(scores), jnp.std(scores))


def init(classes: int, *, dtype: Any = jnp.float32) -> Predictions:
    """The predictions of no images.

    Args:
        classes: how many.
        dtype: float32 or float64, of the means.

    Returns:
        What `update` and `merge` begin with.

    Raises:
        ValueError: ``classes`` is not an integer of at least 1.
    """
    checks.positive_integer("classes", classes)
    return Predictions(jnp.int32(0), jnp.zeros(classes, dtype), jnp.zeros((), dtype))


def update(state: Predictions, logits: Array, *, mask: Array | None = None) -> Predictions:
    """The predictions with those of more images.

    Args:
        state: of the images so far, from `init`.
        logits: [images, classes], as in `inception_score`; rounded to the state's dtype.
        mask: [images] bool, which ones to count (a last batch is often padded); all by default. What the others hold
            does not matter, NaN neither.

    Returns:
        A state of the same shapes and dtypes.

    Raises:
        ValueError: a shape is wrong, or there are not as many classes as in the state.
        TypeError: the logits are not floating, or the mask is not bool.
    """
    return merge(state, _rows(logits, mask, state.mean.dtype))


def merge(a: Predictions, b: Predictions) -> Predictions:
    """The predictions of the images of both.

    Args:
        a: of some images.
        b: of others.

    Returns:
        Predictions in the dtypes of ``a``.

    Raises:
        ValueError: they are not of as many classes.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"`a` and `b` must be of as many classes, got {a.mean.shape[0]} and {b.mean.shape[0]}")
    count, dtype = a.images + b.images, a.mean.dtype
    share = b.images.astype(dtype) / jnp.maximum(count, 1).astype(dtype)
    mean, negentropy = (x + share * (y.astype(dtype) - x) for x, y in zip(a[1:], b[1:], strict=True))
    return Predictions(count, mean, negentropy)


def compute(state: Predictions) -> Array:
    """The inception score of all images together, Eq. 1: of one part.

    Args:
        state: of at least 1 image.

    Returns:
        A scalar; NaN where the count turns out to be 0 when compiled code runs.

    Raises:
        ValueError: the state is known to hold no image.
    """
    if not isinstance(state.images, jax.core.Tracer) and np.any(np.asarray(state.images) < 1):
        raise ValueError("`state` must hold at least 1 image, got 0")
    score = jnp.exp(state.negentropy - jnp.sum(xlogy(state.mean, state.mean)))
    return jnp.where(state.images > 0, score, jnp.nan)


def _rows(logits: Array, mask: Array | None, dtype: Any) -> Predictions:
    checks.floating("logits", logits)
    checks.shape("logits", logits, (None, None))
    logits = jnp.asarray(logits, dtype)
    mask = counted(mask, logits.shape[0])
    logarithms = jax.nn.log_softmax(jnp.where(mask[:, None], logits, 0))
    # 0 log 0 is 0, in the derivative too.
    impossible = jnp.isneginf(logarithms)
    probabilities = jnp.exp(logarithms)
    negentropies = jnp.sum(probabilities * jnp.where(impossible, 0, logarithms), axis=1)
    count = jnp.sum(mask, dtype=jnp.int32)
    images = jnp.maximum(count, 1).astype(dtype)
    mean = jnp.sum(jnp.where(mask[:, None], probabilities, 0), axis=0) / images
    return Predictions(count, mean, jnp.sum(jnp.where(mask, negentropies, 0)) / images)
