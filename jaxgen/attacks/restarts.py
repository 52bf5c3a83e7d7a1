"""Restarts: an attack run several times from different random starts, the best run of each example.

An attack finds a point of the ball and with it a bound of robustness; of two points the better gives the better bound.
Of n runs,

    x* = x_r    with r the first that is largest by    (won_r, value_r)                                 (1)

example by example (Madry et al. 2018, arXiv:1706.06083, section 3.1): a win counts for more than any value. The runs
take turns in one loop, in the memory and with the program of one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.attacks.objectives import Best, better, evaluate, unseen
from jaxgen.attacks.threat import ThreatModel
from jaxgen.typing import Array, Key, Objective

Attack = Callable[..., Array]
"""``(key, objective, x, threat) -> x_adv``, as all attacks here."""


def restarts(attack: Attack, count: int) -> Attack:
    """An attack that is the best of ``count`` runs of another, Eq. 1.

    Run r of an example draws from ``fold_in(its key, r)``: three runs are the two and one more. An attack that draws
    nothing gains nothing.

    Args:
        attack: ``(key, objective, x, threat) -> x_adv``, options closed over.
        count: how many runs, at least 1.

    Returns:
        An attack of the same signature.

    Raises:
        ValueError: ``count`` is not an integer of at least 1.

    >>> import math
    >>> from jaxgen.attacks.threat import random_start
    >>> guess = restarts(lambda key, objective, x, threat: random_start(key, threat, x), 100)
    >>> threat = ThreatModel(math.inf, eps=1.0, low=-1.0, high=1.0)
    >>> bool(guess(jax.random.key(0), lambda x: x[:, 0], jnp.zeros((1, 1)), threat)[0, 0] > 0.9)
    True
    """
    checks.positive_integer("count", count)

    def best_of_all(key: Key, objective: Objective, x: Array, threat: ThreatModel) -> Array:
        x = jnp.asarray(x)
        keys = random.keys_for(key, x.shape[0])

        def run(best: Best, number: Array) -> tuple[Best, None]:
            x_adv = attack(random.fold(keys, number), objective, x, threat)
            return better(best, Best(x_adv, *evaluate(objective, x_adv))), None

        best, _ = jax.lax.scan(run, unseen(x), jnp.arange(count))
        return best.x

    return best_of_all
