"""Does a critic score each example by itself? Read off its program, while it is traced.

The gradient of the logits' sum is every example's own where each logit depends on its own example alone,

    grad_(x_i) sum_j D_j(x) = grad_(x_i) D_i(x)    if    dD_j / dx_i = 0 for all j != i                  (1)

Batch normalisation, minibatch standard deviation and attention over the batch break (1), and nothing looks wrong: the
penalty is a number like any other.

The program, a jaxpr, shows it without being run. Every value carries the examples that its entries are computed from,
as the smallest and the largest of their indices:

    of a value computed entry by entry: the union of its operands';    of a sum over an axis: the union along it   (2)

Indices are kept along the axes on which they differ, with length 1 along all others, so the work is small. The images
enter with i in row i; (1) is denied where logit i comes out with another index.

Only what is certain is carried. Parameters, integers, what went through ``jax.lax.stop_gradient``, and results of
operations without a rule in `dependence` carry nothing: a coupling may go unseen (behind a gather or a scatter along
the batch, or a sum over devices), but what is found does reach the logits, if only times a zero (of a mask, say) that
the program does not show.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxgen.gan.dependence import NOTHING, RULES, Examples, along, carries, common, differ, nothing

_SETTLED = 10  # steps after which a loop that still moves examples about is given up


def coupled_examples(program: ClosedJaxpr) -> tuple[int, int] | None:
    """Finds a logit that certainly depends on another example than its own.

    Args:
        program: of a critic ``x [batch, ...] -> logits [batch]``, as ``jax.make_jaxpr(critic)(x)`` gives it.

    Returns:
        (i, j): logit i depends on example j. None if there is none to be seen.

    >>> import jax, jax.numpy as jnp
    >>> coupled_examples(jax.make_jaxpr(lambda x: x[:, 0] - jnp.mean(x))(jnp.ones((3, 2))))
    (1, 0)
    >>> coupled_examples(jax.make_jaxpr(lambda x: x[:, 0] - jnp.mean(x, axis=1))(jnp.ones((3, 2))))
    """
    (x,) = program.in_avals
    rows = np.arange(x.shape[0], dtype=np.int32)
    own = np.stack([rows, -rows])
    (logits,) = _run(program, [own.reshape(*own.shape, *(1,) * (len(x.shape) - 1))])
    strange = np.argwhere((logits != own) & (logits != NOTHING))
    if not len(strange):
        return None
    side, i = strange[0]
    return int(i), abs(int(np.broadcast_to(logits, own.shape)[side, i]))


def _run(program: Any, inputs: Sequence[Examples]) -> list[Examples]:
    """What the outputs of a program carry, open or closed."""
    program = getattr(program, "jaxpr", program)
    known = dict(zip(program.invars, inputs, strict=True))

    def read(v: Any) -> Examples:
        return known[v] if not isinstance(v, Literal) and v in known else nothing(v)

    for equation in program.eqns:
        rule, operands = _RULES.get(equation.primitive.name), [read(v) for v in equation.invars]
        if rule is None or not any(carries(operand) for operand in operands):
            continue
        try:
            known.update(zip(equation.outvars, rule(equation, operands), strict=True))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue  # a JAX that words this operation differently: not knowing it must not stop a training
    return [read(v) for v in program.outvars]


def _call(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    params = equation.params
    return _run(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], operands)


def _cond(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    outputs = [_run(branch, operands[1:]) for branch in equation.params["branches"]]
    return [common(*cases) for cases in zip(*outputs, strict=True)]


def _unsliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many of a loop's operands or results its body sees whole, not a slice at a time; they come first."""
    return sum(len(v.aval.shape) == len(aval.shape) for v, aval in zip(outside, inside, strict=True))


def _scan(equation: Any, operands: Sequence[Examples]) -> Sequence[Examples]:
    """The body is run until what is carried settles; a loop over the batch itself gives nothing."""
    body, length = equation.params["jaxpr"], equation.params["length"]
    whole, carried = _unsliced(equation.invars, body.in_avals), _unsliced(equation.outvars, body.out_avals)
    fixed, carry, sliced = operands[: whole - carried], list(operands[whole - carried : whole]), operands[whole:]
    if any(differ(operand, [0]) for operand in sliced):
        return [nothing(v) for v in equation.outvars]
    history: list[list[Examples]] = []
    for step in range(length):
        if step == _SETTLED:
            return [nothing(v) for v in equation.outvars]
        outputs = _run(body, [*fixed, *carry, *(along(operand, [0]) for operand in sliced)])
        history.append(outputs[len(carry) :])
        before, carry = carry, outputs[: len(carry)]
        if all((a == b).all() for a, b in zip(before, carry, strict=True)):
            break
    return [*carry, *(common(*stacked)[:, None] for stacked in zip(*history, strict=True))]


_RULES = {
    **RULES,
    **dict.fromkeys(["closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "remat2"], _call),
    "cond": _cond,
    "scan": _scan,
}
