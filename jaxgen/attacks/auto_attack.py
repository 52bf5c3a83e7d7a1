"""AutoAttack: an ensemble of attacks without a knob, each on what has withstood those before.

Croce & Hein 2020 (arXiv:2003.01690, section 5): what one attack misses another finds, and an example counts as robust
if none has broken it. The standard ensemble is

    APGD on the cross entropy;    APGD on the targeted DLR, towards each of the likeliest wrong classes in turn;
    FAB, towards the same;        the Square Attack, which sees no gradient                             (1)

and the one for randomised defences APGD on the expected cross entropy and on the expected DLR (`expectation`).

All of it is one program. Before each run the examples are sorted, those that are still robust first, and the run goes
over them in cohorts of one size, as many as there are by then:

    cohorts = ceil(robust examples / cohort size)                                                       (2)

That number is data. Nothing is compiled again as the robust examples become fewer, and what is broken costs nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.attacks.apgd import apgd
from jaxgen.attacks.fab import fab
from jaxgen.attacks.objectives import Classified, cross_entropy, dlr, margin
from jaxgen.attacks.restarts import Attack
from jaxgen.attacks.square import square
from jaxgen.attacks.threat import ThreatModel, check
from jaxgen.typing import Array, Key

Aim = Callable[[Classified, Array, Array], Classified]
"""``(objective, x, run) -> objective``: what run number ``run``, which may be traced, ascends."""


class Stage(NamedTuple):
    """One attack of an ensemble, in one run or more.

    Attributes:
        attack: ``(key, objective, x, threat) -> x_adv``, options closed over.
        aim: what each of the runs ascends.
        runs: how many there are, each on what is still robust.
    """

    attack: Attack
    aim: Aim
    runs: int = 1


def anywhere(make: Callable[..., Classified]) -> Aim:
    """Aims at any wrong class.

    Args:
        make: `cross_entropy`, `margin` or `dlr`.

    Returns:
        An Aim, the same for each run.
    """

    def aim(objective: Classified, x: Array, run: Array) -> Classified:
        return dataclasses.replace(objective, score=make(objective.logits, objective.labels).score)

    return aim


def next_likeliest(make: Callable[..., Classified]) -> Aim:
    """Aims at one wrong class after the other, the likeliest first; any wrong class on the way will do.

    Args:
        make: `cross_entropy`, `margin` or `dlr`.

    Returns:
        An Aim: run r aims at the wrong class whose logit at ``x`` is the r-th largest, counted from 0.
    """

    def aim(objective: Classified, x: Array, run: Array) -> Classified:
        logits, labels = objective.logits(x), jnp.asarray(objective.labels)
        others = jnp.where(jnp.arange(logits.shape[1]) == labels[:, None], -jnp.inf, logits)
        targets = jnp.argsort(others, axis=1, descending=True)[:, run]
        score = make(objective.logits, labels, targets=targets).score
        return dataclasses.replace(objective, score=score, targets=targets, any_class=True)

    return aim


def standard(norm: float, classes: int, *, steps: int = 100, queries: int = 5000, unroll: int = 1) -> tuple[Stage, ...]:
    """The standard ensemble, Eq. 1, with the papers' budgets: of arXiv:2003.01690, and for norm 1 of arXiv:2103.01208.

    Args:
        norm: of the threat model. For 1, APGD runs five times on the cross entropy and aims at five classes; for the
            others it runs once and aims at nine.
        classes: how many there are; no more are aimed at than are wrong.
        steps: of APGD and of FAB, in each run; fewer for a quick look.
        queries: of the Square Attack, which takes images.
        unroll: steps per iteration of the compiled loops.

    Returns:
        Four stages.

    Raises:
        ValueError: ``classes`` is not an integer of at least 2.

    >>> [stage.runs for stage in standard(2, classes=10)]
    [1, 9, 9, 1]
    """
    checks.positive_integer("classes", classes)
    if classes < 2:
        raise ValueError(f"`classes` must be at least 2, got {classes}")
    starts, rivals = (5, 5) if norm == 1 else (1, 9)
    ascent = functools.partial(apgd, steps=steps, unroll=unroll)
    return (
        Stage(ascent, anywhere(cross_entropy), starts),
        Stage(ascent, next_likeliest(dlr), min(rivals, classes - 1)),
        Stage(functools.partial(fab, steps=steps, unroll=unroll), next_likeliest(margin), min(9, classes - 1)),
        Stage(functools.partial(square, queries=queries), anywhere(margin)),
    )


def randomised(*, steps: int = 100, unroll: int = 1) -> tuple[Stage, ...]:
    """The ensemble for randomised defences, for an objective that is `expected` over, say, twenty draws.

    Args:
        steps: of APGD, in each stage.
        unroll: steps per iteration of the compiled loops.

    Returns:
        Two stages: APGD on the cross entropy and on the DLR.
    """
    ascent = functools.partial(apgd, steps=steps, unroll=unroll)
    return Stage(ascent, anywhere(cross_entropy)), Stage(ascent, anywhere(dlr))


class Outcome(NamedTuple):
    """What an ensemble has found.

    Attributes:
        x: the adversarial examples; where an example is robust, or wrong as it came, that example itself.
        broken_by: [batch] integers: 0 where an example is wrong as it came, s where it was broken by the s-th stage,
            one more than there are stages where it is robust. Accuracy after s stages is ``(broken_by > s).mean()``.
    """

    x: Array
    broken_by: Array


def auto_attack(
    key: Key,
    objective: Classified,
    x: Array,
    threat: ThreatModel,
    *,
    stages: Sequence[Stage] | None = None,
    cohort_size: int = 64,
) -> Array:
    """The adversarial examples of `ensemble`, called as any attack is.

    Args:
        key: as in `ensemble`.
        objective: as in `ensemble`.
        x: as in `ensemble`.
        threat: as in `ensemble`.
        stages: as in `ensemble`.
        cohort_size: as in `ensemble`.

    Returns:
        The shape and dtype of ``x``: adversarial examples; where an example is robust, or wrong as it came, itself.

    Raises:
        ValueError: as in `ensemble`.
        TypeError: as in `ensemble`.
    """
    return ensemble(key, objective, x, threat, stages=stages, cohort_size=cohort_size).x


def ensemble(
    key: Key,
    objective: Classified,
    x: Array,
    threat: ThreatModel,
    *,
    stages: Sequence[Stage] | None = None,
    cohort_size: int = 64,
) -> Outcome:
    """Attacks one after the other, each on the examples that are still robust, Eq. 2.

    Run r of stage s draws from an example's key with s and r folded in. What comes of an example depends neither on the
    others nor on the size of a cohort, but for the rounding of a network that computes other shapes otherwise. To use
    several devices, call this under ``shard_map(check_vma=False)`` with every device's own examples, labels and keys:
    each is then done when its own examples are.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``.
        objective: a `Classified` without targets: its classifier and labels; stages replace its score.
        x: [batch, ...] within the bounds, floating: the clean examples.
        threat: what the attacker may do.
        stages: the attacks in their order; None for the `standard` ones.
        cohort_size: how many examples are attacked at a time: as many as keep the device busy. A cohort that is not
            full costs as much as one that is.

    Returns:
        An `Outcome`.

    Raises:
        ValueError: ``objective`` has targets, ``x`` and ``threat`` do not fit together, ``stages`` is empty, or
            ``cohort_size`` or a stage's ``runs`` is not an integer of at least 1.
        TypeError: ``objective`` is a plain function, ``x`` is not floating, or ``key`` not a typed key.
    """
    check(threat, x)
    checks.positive_integer("cohort_size", cohort_size)
    if not isinstance(objective, Classified):
        raise TypeError(f"`objective` must know its classes, as `cross_entropy` does, got {type(objective).__name__}")
    if objective.targets is not None:
        raise ValueError("`objective` must have no targets: the ensemble chooses its own")
    x = jnp.asarray(x)
    batch = x.shape[0]
    if stages is None:
        stages = standard(threat.norm, jax.eval_shape(objective.logits, x).shape[1])
    if not stages:
        raise ValueError("`stages` must hold at least 1 stage, got none")
    keys = random.keys_for(key, batch)
    outcome = Outcome(x, jnp.where(objective.judge(x)[1], 0, len(stages) + 1))
    for number, stage in enumerate(stages, 1):
        checks.positive_integer("runs", stage.runs)
        withstand = functools.partial(
            _run, random.fold(keys, number), objective, x, threat, stage, number, min(cohort_size, batch)
        )
        outcome = jax.lax.fori_loop(0, stage.runs, withstand, outcome)
    return outcome


def _run(
    keys: Key,
    objective: Classified,
    x: Array,
    threat: ThreatModel,
    stage: Stage,
    number: int,
    cohort_size: int,
    run: Array,
    outcome: Outcome,
) -> Outcome:
    """One run of a stage over the cohorts of what is robust until then."""
    batch = x.shape[0]
    robust = outcome.broken_by > number
    keys = random.fold(keys, run)
    eps = jnp.broadcast_to(threat.eps, (batch,))
    # The last cohort is filled up with what is broken already, or with rows that there are not.
    order = jnp.pad(jnp.argsort(~robust, stable=True), (0, cohort_size), constant_values=batch)

    def attack_cohort(cohort: Array, outcome: Outcome) -> Outcome:
        rows = jax.lax.dynamic_slice_in_dim(order, cohort * cohort_size, cohort_size)
        index = jnp.minimum(rows, batch - 1)
        clean, those = x[index], objective.rows(index)
        found = stage.attack(
            keys[index], stage.aim(those, clean, run), clean, dataclasses.replace(threat, eps=eps[index])
        )
        won = those.judge(found)[1] & robust[index]
        broken = jnp.where(won, rows, batch)
        return Outcome(
            outcome.x.at[broken].set(found, mode="drop"), outcome.broken_by.at[broken].set(number, mode="drop")
        )

    cohorts = -(-jnp.sum(robust) // cohort_size)
    return jax.lax.fori_loop(0, cohorts, attack_cohort, outcome)
