"""The convolution as a trilinear form: three primitives, fast inside loops, one another's transposes.

XLA:CPU runs the gradients of ``lax.conv_general_dilated`` 50 to 100 times slower inside ``scan``,
``fori_loop`` and ``while_loop`` than outside (``benchmarks.convolution``; compare jax-ml/jax#12868). They
arrive as convolutions with permuted dimensions (``01oi``); outside loops the compiler brings these into the
order that its fast kernel takes, in a loop's body it does not. PGD, guidance by gradients, k discriminator
steps in a scan and scan-over-layers all differentiate inside a loop.

The cure rests on one observation. A convolution is a trilinear form

    F(x, k, y) = <y, convolve(x, k)>                                                              (1)

and everything that automatic differentiation can ask for, of any order, is one of its three partial
derivatives:

    forward:      dF/dy (x, k) = convolve(x, k)                                                   (2)
    to input:     dF/dx (k, y) = the transposed convolution of y with k                           (3)
    to kernel:    dF/dk (x, y) = the correlation of x with y                                      (4)

Each is bilinear, and the transpose of any of them in either argument is another of the three. So they are
three JAX primitives that are one another's transposes: forward mode, reverse mode and every nesting of them
follow, and batching (``vmap``) folds the new axis into the images, the channels or the groups of the same
primitive. A ``custom_vjp`` would lose forward mode (MeanFlow needs ``jvp`` inside ``grad``), and
``jax.custom_derivatives.linear_call`` has no batching rule.

How each is compiled is decided in one place, ``_primitive`` below. On CPU, (3) and (4) are written as plain
NHWC/HWIO convolutions of operands that are rearranged in memory; XLA:CPU folds no transpose back into a
convolution, so they stay plain in a loop's body, and (4) takes the shapes that its kernels are fastest at.
Everywhere else they have the very dimension numbers that JAX itself emits, whose patterns cuDNN and the TPU
compiler recognise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxgen.typing import Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PIXELS = 1024  # of y at a time, on CPU: what is rearranged then stays in a core's cache


class Form(NamedTuple):
    """Everything that fixes the form F of Eq. 1: hashable, so that it is a parameter of the primitives."""

    x_size: tuple[int, int]
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int

    @property
    def y_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip(self.x_size, self.kernel_size, self.strides, self.padding, self.dilation, strict=True)
        height, width = ((n + lo + hi - d * (k - 1) - 1) // s + 1 for n, k, s, (lo, hi), d in sizes)
        return height, width


def _reach(form: Form, axis: int) -> tuple[int, int]:
    """How many zeros come before x where y is its kernel, and x's size with those after it."""
    spread = (form.y_size[axis] - 1) * form.strides[axis] + 1
    low = form.padding[axis][0]
    return low, form.dilation[axis] * (form.kernel_size[axis] - 1) + spread - low


# --- The three partial derivatives, as ordinary JAX


def _forward(x: Array, kernel: Array, *, form: Form) -> Array:
    """Eq. 2: [N, H, W, C], [h, w, C / groups, O] -> [N, H', W', O]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        form.strides,
        form.padding,
        rhs_dilation=form.dilation,
        dimension_numbers=_LAYOUT,
        feature_group_count=form.groups,
    )


def _to_input(y: Array, kernel: Array, *, form: Form, plain: bool) -> Array:
    """Eq. 3: [N, H', W', O], [h, w, C / groups, O] -> [N, H, W, C].

    A convolution of y, spread out by the strides, with the kernel turned by 180 degrees. JAX leaves the
    kernel's inputs and outputs where they are and says so in the dimension numbers; the ``plain`` form
    exchanges them in memory.
    """
    h, w, inputs, outputs = kernel.shape
    turned = kernel[::-1, ::-1].reshape(h, w, inputs, form.groups, outputs // form.groups)
    turned = jnp.swapaxes(turned, 2, 3).reshape(h, w, form.groups * inputs, outputs // form.groups)
    if plain:
        turned = turned.swapaxes(2, 3)
    padding = []
    for axis in (0, 1):
        reach = form.dilation[axis] * (form.kernel_size[axis] - 1)
        spread = (form.y_size[axis] - 1) * form.strides[axis] + 1
        low = reach - form.padding[axis][0]
        padding.append((low, form.x_size[axis] + reach - spread - low))
    return lax.conv_general_dilated(
        y,
        turned,
        (1, 1),
        padding,
        lhs_dilation=form.strides,
        rhs_dilation=form.dilation,
        dimension_numbers=_LAYOUT if plain else ("NHWC", "HWOI", "NHWC"),
        feature_group_count=form.groups,
    )


def _to_kernel(x: Array, y: Array, *, form: Form) -> Array:
    """Eq. 4: [N, H, W, C], [N, H', W', O] -> [h, w, C / groups, O].

    A convolution that has x's channels for images, the batch for channels and y, spread out by the strides,
    for a kernel: so JAX says it in the dimension numbers.
    """
    padding = []
    for axis in (0, 1):
        low, high = _reach(form, axis)
        padding.append((low, high - form.x_size[axis]))
    return lax.conv_general_dilated(
        x,
        y,
        form.dilation,
        padding,
        rhs_dilation=form.strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        batch_group_count=form.groups,
    )


def _to_kernel_plain(x: Array, y: Array, *, form: Form) -> Array:
    """Eq. 4 as plain convolutions, one for each column of the kernel's taps.

    Each has x's rows for rows, its channels for columns and, for channels, all that is summed over within a row:
    the images and y's columns.
    """
    batch, (height, width), channels = y.shape[0], form.y_size, x.shape[3] // form.groups
    low, high = _reach(form, 0)
    kernel = y.transpose(1, 0, 2, 3).reshape(height, 1, batch * width, y.shape[3])
    taps = []
    for tap in range(form.kernel_size[1]):
        start = tap * form.dilation[1] - form.padding[1][0]
        stop = start + (width - 1) * form.strides[1] + 1
        seen = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), (-start, stop - x.shape[2], 0), (0, 0, 0)))
        rows = seen[:, :, :: form.strides[1]].reshape(batch, x.shape[1], width, form.groups, channels)
        convolved = lax.conv_general_dilated(
            rows.transpose(1, 4, 3, 0, 2).reshape(1, x.shape[1], channels, form.groups * batch * width),
            kernel,
            (form.dilation[0], 1),
            ((low, high - x.shape[1]), (0, 0)),
            rhs_dilation=(form.strides[0], 1),
            dimension_numbers=_LAYOUT,
            feature_group_count=form.groups,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )
        taps.append(convolved[0])
    return jnp.stack(taps, axis=1).astype(x.dtype)


def _to_kernel_in_parts(x: Array, y: Array, *, form: Form) -> Array:
    """Eq. 4 as above, a few images at a time, which takes half the time of all at once where images are large.

    Not for images that the compiler splits between devices: each device would walk through all of them.
    """
    batch, pixels = y.shape[0], y.shape[1] * y.shape[2]
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * pixels <= _PIXELS))
    if images == batch:
        return _to_kernel_plain(x, y, form=form)

    def add(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _to_kernel_plain(part[0], part[1], form=form), None

    parts = tuple(a.reshape(batch // images, images, *a.shape[1:]) for a in (x, y))
    shape = (*form.kernel_size, x.shape[3] // form.groups, y.shape[3])
    zeros = jnp.zeros(shape, jnp.promote_types(x.dtype, jnp.float32))
    return lax.scan(add, _vary(zeros, jax.typeof(y).manual_axis_type.varying), parts)[0].astype(x.dtype)


# --- The same three as primitives: evaluation, compilation, differentiation, batching


def _primitive(
    name: str, native: Callable[..., Array], plain: Callable[..., Array], alone: Callable[..., Array] | None = None
) -> Primitive:
    primitive = Primitive(name)
    compiled = jax.jit(primitive.bind, static_argnames=("form",))

    def evaluate(a: Array, b: Array, *, form: Form) -> Array:
        # Outside jit each call compiles by itself, as every operation of JAX does, jax.disable_jit or not.
        with jax.disable_jit(False):
            return compiled(a, b, form=form)

    def lower_on_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, form: Form) -> Any:
        chosen = plain if alone is None or _is_split(ctx) else alone
        return mlir.lower_fun(chosen, multiple_results=False)(ctx, *operands, form=form)

    primitive.def_impl(evaluate)
    # Shapes, dtypes, shardings and varying axes are those of the convolution that will run.
    primitive.def_abstract_eval(lambda a, b, *, form: jax.make_jaxpr(partial(native, form=form))(a, b).out_avals[0])
    # The one place that chooses by platform: plain convolutions on CPU, JAX's own patterns everywhere else.
    mlir.register_lowering(primitive, mlir.lower_fun(native, multiple_results=False))
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    return primitive


def _is_split(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the compiler may split the arrays between devices: not on one, nor where shard_map has done so."""
    context: Any = ctx.module_context.axis_context
    if hasattr(context, "mesh"):
        return not context.manual_axes.issuperset(context.mesh.axis_names)
    return context.num_devices > 1


forward_p = _primitive("convolve", _forward, _forward)
to_input_p = _primitive("convolve_to_input", partial(_to_input, plain=False), partial(_to_input, plain=True))
to_kernel_p = _primitive("convolve_to_kernel", _to_kernel, _to_kernel_plain, _to_kernel_in_parts)


def _vary(a: Array, axes: frozenset[str]) -> Array:
    return lax.pcast(a, tuple(sorted(axes)), to="varying") if axes else a


def bind(primitive: Primitive, a: Array, b: Array, form: Form) -> Array:
    """Binds; inside shard_map an operand that is the same on all devices is first made varying.

    So does all of lax. That step's own transpose is the sum over devices, without which gradients of shared
    parameters would be partial.
    """
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in (a, b)]
    for_both = varying[0] | varying[1]
    a, b = (_vary(operand, for_both - own) for operand, own in zip((a, b), varying, strict=True))
    return primitive.bind(a, b, form=form)


# Each rule is (cotangent, first operand, second operand) -> cotangent of the operand that is differentiated.
ad.defbilinear(
    forward_p,
    lambda ct, x, kernel, form: bind(to_input_p, ct, kernel, form),
    lambda ct, x, kernel, form: bind(to_kernel_p, x, ct, form),
)
ad.defbilinear(
    to_input_p,
    lambda ct, y, kernel, form: bind(forward_p, ct, kernel, form),
    lambda ct, y, kernel, form: bind(to_kernel_p, ct, y, form),
)
ad.defbilinear(
    to_kernel_p,
    lambda ct, x, y, form: bind(to_input_p, y, ct, form),
    lambda ct, x, y, form: bind(forward_p, x, ct, form),
)


def _fold(a: Array, at: int, axis: int, groups: int) -> Array:
    """Moves axis ``at`` to just inside the groups of ``axis`` (counted without ``at``) and merges the two."""
    a = jnp.moveaxis(a, at, 0)
    size, length = a.shape[0], a.shape[axis + 1]
    a = a.reshape(*a.shape[: axis + 1], groups, length // groups, *a.shape[axis + 2 :])
    a = jnp.moveaxis(a, 0, axis + 1)
    return a.reshape(*a.shape[:axis], groups * size * (length // groups), *a.shape[axis + 3 :])


def _unfold(a: Array, size: int, axis: int, groups: int) -> Array:
    """The inverse of ``_fold``, with the mapped axis in front."""
    length = a.shape[axis] // (groups * size)
    a = a.reshape(*a.shape[:axis], groups, size, length, *a.shape[axis + 1 :])
    a = jnp.moveaxis(a, axis + 1, 0)
    return a.reshape(*a.shape[: axis + 1], groups * length, *a.shape[axis + 3 :])


def _batch_rule(primitive: Primitive, *folds: tuple[int | None, int | None, int]) -> None:
    """Registers batching: the mapped axis is folded into an axis of each operand that is mapped.

    Args:
        primitive: the primitive.
        *folds: (axis of the first operand, axis of the second, axis of the output) for the first alone being
            mapped, for the second alone, and for both. Axis 0 are images. Axis 3 (of x, y and the kernel's
            outputs) lies group by group, axis 2 (the kernel's inputs) within a group. When both are mapped,
            each element becomes groups of its own.
    """

    def rule(operands: Sequence[Array], at: Sequence[int | None], *, form: Form) -> tuple[Array, int]:
        both = None not in at
        size = next(a.shape[i] for a, i in zip(operands, at, strict=True) if i is not None)
        *axes, out_axis = folds[2 if both else 0 if at[1] is None else 1]
        groups = {0: 1, 2: 1, 3: 1 if both else form.groups}
        a, b = (
            operand if i is None or axis is None else _fold(operand, i, axis, groups[axis])
            for operand, i, axis in zip(operands, at, axes, strict=True)
        )
        folded = form._replace(groups=form.groups * size) if both else form
        return _unfold(bind(primitive, a, b, folded), size, out_axis, groups[out_axis]), 0

    batching.primitive_batchers[primitive] = rule


_batch_rule(forward_p, (0, None, 0), (None, 3, 3), (3, 3, 3))
_batch_rule(to_input_p, (0, None, 0), (None, 2, 3), (3, 3, 3))
_batch_rule(to_kernel_p, (3, None, 2), (None, 3, 3), (3, 3, 3))
