"""Is this robustness real? Signs that attacks fail because they cannot see, not because there is nothing to find.

After AutoAttack's checks (Croce & Hein 2020, arXiv:2003.01690, and the flags that its authors document) and Carlini et
al. 2019 (arXiv:1902.06705, sections 4 and 5). With f the classifier and x_1 ... x_n the batch,

    stochastic       f(x)_i changes with the example's place in the batch, or from one evaluation to the next    (1)
    coupled          f(x)_i changes with the other examples                                                      (2)
    probabilities    every f(x)_i lies in [0, 1] and sums to 1, as after a softmax                               (3)
    blind            the margin's gradient is zero, or not finite, at a random point of the ball                 (4)
    saturated        the objective's is, where the margin's is not                                               (5)
    one step         breaks more than many do                                                                    (6)
    black box        an attack without gradients breaks what the one with gradients could not                    (7)
    unbounded        the attack fails though it may go anywhere within the bounds                                (8)

None proves that an attack is missing, and their absence does not prove that none is. (1)-(5) say why gradients mislead,
(6)-(8) that they do.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.attacks.apgd import apgd
from jaxgen.attacks.fgsm import fgsm
from jaxgen.attacks.objectives import Classified, evaluate_and_gradient, margin
from jaxgen.attacks.restarts import Attack
from jaxgen.attacks.square import square
from jaxgen.attacks.threat import ThreatModel, check, distance, random_start
from jaxgen.typing import Array, ArrayLike, Key


class Flags(NamedTuple):
    """Which signs were seen, each a bool scalar.

    Attributes:
        stochastic: Eq. 1: use `expected`, and `randomised` stages.
        coupled: Eq. 2: fix the statistics of the network.
        probabilities: Eq. 3: pass the logits.
        blind: Eq. 4: some part passes no gradient.
        saturated: Eq. 5: ascend the margin or the DLR.
        one_step_is_better: Eq. 6.
        black_box_is_better: Eq. 7.
        unbounded_fails: Eq. 8.
    """

    stochastic: Array
    coupled: Array
    probabilities: Array
    blind: Array
    saturated: Array
    one_step_is_better: Array
    black_box_is_better: Array
    unbounded_fails: Array


class Diagnosis(NamedTuple):
    """The signs and the numbers behind them, scalars.

    Attributes:
        flags: the signs.
        random_change: the largest distance of an example's logits in Eq. 1, in parts of their length.
        neighbour_change: the same in Eq. 2.
        zero_gradients: the share of examples of Eq. 4.
        zero_objective_gradients: the share of examples whose gradient of the objective is zero or not finite.
        clean_accuracy: of the examples as they come. All accuracies are shares of the batch.
        one_step_accuracy: under the attack of one step.
        accuracy: under the attack with gradients.
        black_box_accuracy: under the attack without gradients.
        black_box_gain: the share of examples of Eq. 7.
        unbounded_accuracy: under the attack with gradients within the bounds alone, Eq. 8.
    """

    flags: Flags
    random_change: Array
    neighbour_change: Array
    zero_gradients: Array
    zero_objective_gradients: Array
    clean_accuracy: Array
    one_step_accuracy: Array
    accuracy: Array
    black_box_accuracy: Array
    black_box_gain: Array
    unbounded_accuracy: Array


def diagnose(
    key: Key,
    objective: Classified,
    x: Array,
    threat: ThreatModel,
    *,
    attack: Attack | None = None,
    one_step: Attack = fgsm,
    black_box: Attack | None = None,
    tolerance: ArrayLike = 0.01,
) -> Diagnosis:
    """Looks for the signs of masked gradients, Eqs. 1-8.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``.
        objective: a `Classified`: the one by which robustness was measured. An `Expected` one is stochastic, for its
            draws are the examples' own.
        x: [batch, ...] within the bounds, floating: clean examples, some hundred of them.
        threat: what the attacker may do, its bounds finite.
        attack: the one with gradients, ``(key, objective, x, threat) -> x_adv``, whose steps follow ``threat.eps``;
            None for 50 steps of `apgd`.
        one_step: an attack of one step.
        black_box: one without gradients; None for 1000 queries of `square`, which takes images.
        tolerance: the share of examples that Eqs. 6-8 forgive, for attacks of few steps miss some; a scalar in [0, 1].

    Returns:
        A `Diagnosis`; `report` says it in words.

    Raises:
        ValueError: ``objective`` has targets, ``x`` and ``threat`` do not fit together, bounds known are not finite, or
            ``tolerance`` is out of range.
        TypeError: ``objective`` is a plain function, ``x`` is not floating, or ``key`` not a typed key.
    """
    check(threat, x)
    if not isinstance(objective, Classified):
        raise TypeError(f"`objective` must know its classes, as `cross_entropy` does, got {type(objective).__name__}")
    if objective.targets is not None:
        raise ValueError("`objective` must have no targets: an example is robust if no wrong class can be reached")
    checks.finite("threat.low", threat.low)
    checks.finite("threat.high", threat.high)
    checks.shape("tolerance", tolerance, ())
    checks.interval("tolerance", tolerance, 0, 1)
    attack = attack or functools.partial(apgd, steps=50)
    black_box = black_box or functools.partial(square, queries=1000)
    x = jnp.asarray(x)
    keys = random.keys_for(key, x.shape[0])

    logits = objective.logits(x)
    # Of a pure function the compiler evaluates this once; host callbacks that draw, it does not merge.
    repeated = _change(objective.logits(x), logits)
    moved = _change(jnp.roll(objective.logits(jnp.roll(x, 1, axis=0)), -1, axis=0), logits)
    random_change, neighbour_change = jnp.maximum(repeated, moved), _neighbour_change(objective, x, logits)
    rounding = max(1e-4, 4 * float(jnp.finfo(logits.dtype).eps))

    start = random_start(random.fold(keys, 0), threat, x)
    ruler = dataclasses.replace(objective, score=margin(objective.logits, objective.labels).score)
    blind, stuck = _no_gradient(ruler, start), _no_gradient(objective, start)

    right = ~objective.judge(x)[1]

    def robust(attack: Attack, number: int | Array, eps: ArrayLike) -> Array:
        x_adv = attack(random.fold(keys, number), objective, x, dataclasses.replace(threat, eps=eps))
        return right & ~objective.judge(x_adv)[1]

    # From anywhere to anywhere within the bounds: as far as their corners are apart.
    low, high = (jnp.broadcast_to(jnp.asarray(bound, x.dtype), x.shape) for bound in (threat.low, threat.high))
    across = distance(threat.norm, high, low)
    radii = jnp.stack([jnp.broadcast_to(threat.eps, across.shape), across])
    many, unbounded = jax.lax.map(lambda run: robust(attack, *run), (jnp.array([1, 2]), radii))
    one, queried = robust(one_step, 3, threat.eps), robust(black_box, 4, threat.eps)
    accuracy, one_step_accuracy, black_box_accuracy = jnp.mean(many), jnp.mean(one), jnp.mean(queried)
    gain, unbounded_accuracy = jnp.mean(many & ~queried), jnp.mean(unbounded)
    flags = Flags(
        stochastic=random_change > rounding,
        # What differs from one evaluation to the next says nothing about neighbours.
        coupled=(neighbour_change > rounding) & (repeated <= rounding),
        probabilities=_are_probabilities(logits, rounding),
        blind=jnp.any(blind),
        saturated=jnp.any(stuck & ~blind),
        one_step_is_better=accuracy - one_step_accuracy > tolerance,
        black_box_is_better=gain > tolerance,
        unbounded_fails=unbounded_accuracy > tolerance,
    )
    return Diagnosis(
        flags=flags,
        random_change=random_change,
        neighbour_change=neighbour_change,
        zero_gradients=jnp.mean(blind),
        zero_objective_gradients=jnp.mean(stuck),
        clean_accuracy=jnp.mean(right),
        one_step_accuracy=one_step_accuracy,
        accuracy=accuracy,
        black_box_accuracy=black_box_accuracy,
        black_box_gain=gain,
        unbounded_accuracy=unbounded_accuracy,
    )


def report(diagnosis: Diagnosis) -> str:
    """The diagnosis in words: each sign that was seen, its number and what to do about it.

    Args:
        diagnosis: known, not traced.

    Returns:
        Lines of text.
    """
    d = diagnosis
    numbers = (
        f"accuracy: {d.clean_accuracy:.1%} clean, {d.one_step_accuracy:.1%} after one step, {d.accuracy:.1%} attacked, "
        f"{d.black_box_accuracy:.1%} without gradients, {d.unbounded_accuracy:.1%} unbounded"
    )
    advice = {
        "stochastic": f"the same example has other logits elsewhere in the batch or at another time (by "
        f"{d.random_change:.1e} of their length): attack the expectation over many draws",
        "coupled": f"an example's logits depend on its neighbours in the batch (by {d.neighbour_change:.1e} of their "
        "length): fix the statistics that the network takes of the batch",
        "probabilities": "the logits are probabilities: leave out the softmax",
        "blind": f"{d.zero_gradients:.1%} of the examples have no gradient of the margin: some part passes none; "
        "replace its gradient by that of a smooth stand-in, or trust attacks without gradients alone",
        "saturated": f"{d.zero_objective_gradients:.1%} of the examples have no gradient of the objective though most "
        "have one of the margin: ascend the margin or the DLR",
        "one_step_is_better": "one step breaks more than many do: the gradient misleads; try more restarts, another "
        "step size, another objective",
        "black_box_is_better": f"{d.black_box_gain:.1%} of the examples withstand the attack with gradients but not "
        "the one without: the gradient misleads",
        "unbounded_fails": f"{d.unbounded_accuracy:.1%} of the examples withstand an attack that may go anywhere: the "
        "attack fails, for the bounds hold images of every class",
    }
    seen = [f"{name}: {advice[name]}" for name, flag in d.flags._asdict().items() if flag]
    return "\n".join([numbers, *(seen or ["no sign of masked gradients, which does not prove that there are none"])])


def _change(logits: Array, reference: Array) -> Array:
    """The largest distance of two batches' logits, in parts of the length of the reference's."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    logits, reference = logits.astype(wide), reference.astype(wide)
    lengths = jnp.linalg.norm(reference, axis=1)
    return jnp.max(jnp.linalg.norm(logits - reference, axis=1) / jnp.where(lengths > 0, lengths, 1))


def _neighbour_change(objective: Classified, x: Array, logits: Array) -> Array:
    """How the logits of half of the examples change when each of the others becomes a copy of one of them."""
    rows = jnp.arange(x.shape[0])
    changes = []
    for kept in (rows % 2 == 0, rows % 2 == 1):
        others = objective.logits(x[jnp.where(kept, rows, rows - 1)])
        changes.append(_change(jnp.where(kept[:, None], others, logits), logits))
    return jnp.maximum(*changes)


def _no_gradient(objective: Classified, x: Array) -> Array:
    _, _, gradient = evaluate_and_gradient(objective, x)
    rows = gradient.reshape(x.shape[0], -1)
    return jnp.all(rows == 0, axis=1) | ~jnp.all(jnp.isfinite(rows), axis=1)


def _are_probabilities(logits: Array, rounding: float) -> Array:
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    in_range = (jnp.min(wide) > -rounding) & (jnp.max(wide) < 1 + rounding)
    return in_range & jnp.all(jnp.abs(jnp.sum(wide, axis=1) - 1) < rounding)
