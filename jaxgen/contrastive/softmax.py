"""The softmax contrast: the positives of an anchor against all that it is compared with.

For anchor i let A(i) be the candidates that it is compared with, P(i) its positives, and l_ij the logits:

    L_i = log sum_{j in A(i)} exp(l_ij) - 1 / |P(i)| sum_{j in P(i)} l_ij                          (1)

    dL_i / dl_ij = exp(l_ij - log sum_{k in A(i)} exp(l_ik)) 1[j in A(i)] - 1[j in P(i)] / |P(i)|  (2)

Losses differ in who is in A and in P, a rule about pairs; P need not lie in A. The sum of exponentials is kept relative
to the largest logit M so far, s = sum_j exp(l_ij - M). A portion of candidates with the largest logit M' changes it to

    s <- s exp(M - max(M, M')) + sum_{j in portion} exp(l_ij - max(M, M'))                         (3)

(Milakov & Gimelshein 2018, arXiv:1805.02867). An anchor without positives has loss and gradient 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxgen.contrastive.pairwise import Marks, Reduction
from jaxgen.typing import Array

Rule = Callable[[Marks, Marks], tuple[Array, Array]]
"""``(anchors' marks [n, 1], candidates' marks [block]) -> (is j in A(i), is it in P(i))``, [n, block] each."""


class _Statistics(NamedTuple):
    """What Eqs. 1 and 3 need of the candidates seen, each [n]."""

    maximum: Array
    total: Array
    positive: Array
    positives: Array


def softmax_contrast(rule: Rule) -> Reduction:
    """Eq. 1 under a rule that leaves at least one candidate in each A(i)."""

    def init(zeros: Array) -> _Statistics:
        # The lowest finite number, not -inf: where a portion holds nothing of A(i), Eq. 3 counts terms exp(0) that the
        # first logit of A(i) multiplies by 0, and no difference of infinities arises.
        return _Statistics(zeros + jnp.finfo(zeros.dtype).min, zeros, zeros, zeros)

    def update(seen: _Statistics, logits: Array, anchors: Marks, candidates: Marks) -> _Statistics:
        admitted, positive = rule(anchors, candidates)
        kept = _kept(admitted, logits)
        maximum = jnp.maximum(seen.maximum, lax.stop_gradient(jnp.max(kept, 1)))
        return _Statistics(
            maximum,
            seen.total * jnp.exp(seen.maximum - maximum) + jnp.sum(jnp.exp(kept - maximum[:, None]), 1),
            seen.positive + jnp.sum(jnp.where(positive, logits, 0), 1),
            seen.positives + jnp.sum(positive, 1).astype(logits.dtype),
        )

    def result(seen: _Statistics) -> Array:
        # In this order a loss near 0 keeps its digits: the maximum is then the positive itself.
        value = seen.maximum - seen.positive / jnp.maximum(seen.positives, 1) + jnp.log(seen.total)
        return jnp.where(seen.positives > 0, value, 0)

    def slope(seen: _Statistics, logits: Array, anchors: Marks, candidates: Marks) -> Array:
        admitted, positive = rule(anchors, candidates)
        softmax = jnp.exp(_kept(admitted, logits) - seen.maximum[:, None]) / seen.total[:, None]
        value = softmax - positive / jnp.maximum(seen.positives, 1)[:, None]
        return jnp.where(seen.positives[:, None] > 0, value, 0)

    return Reduction(init, update, result, slope)


def _kept(admitted: Array, logits: Array) -> Array:
    return jnp.where(admitted, logits, jnp.finfo(logits.dtype).min)
