"""Floating-point operations of a model: its matrix products and convolutions, counted from what JAX traces.

A product of a number and a sum are two operations; all else, such as activations and normalisations, counts nothing, as
is the custom for models. Nothing is compiled, so that the count says what the model is and not what a compiler made of
it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxgen.nets.flash import PLAIN
from jaxgen.nets.trilinear import forward_p, to_input_p, to_kernel_p


def counted(function: Callable[..., Any], *arguments: Any) -> float:
    """The operations of a function.

    Args:
        function: of arrays.
        *arguments: arrays, or their shapes and dtypes.

    Returns:
        How many; of a loop of unknown length one round, of a choice its dearest branch.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    shapes = [variable.aval.shape for variable in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = shapes[1]
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
    if equation.primitive in (forward_p, to_input_p, to_kernel_p):
        return _trilinear(equation)
    if equation.primitive in PLAIN:
        operands = (jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in equation.invars)
        return counted(PLAIN[equation.primitive], *operands)
    inner = [_count(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _trilinear(equation: Any) -> float:
    """All three derivatives of the form multiply each output pixel's features with each tap's channels."""
    form = equation.params["form"]
    x, kernel = (variable.aval.shape for variable in equation.invars)
    result = equation.outvars[0].aval.shape
    if equation.primitive is forward_p or equation.primitive is to_input_p:
        images, channels, features = x[0], kernel[2], kernel[3]
    else:
        images, channels, features = x[0], result[2], result[3]
    return 2.0 * images * math.prod(form.y_size) * math.prod(form.kernel_size) * channels * features


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "eqns"):
                yield part
            elif hasattr(part, "jaxpr") and hasattr(part.jaxpr, "eqns"):
                yield part.jaxpr
