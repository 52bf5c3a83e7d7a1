"""One convolution for every network: fast inside loops, differentiable in every mode and to every order.

XLA:CPU runs the gradients of ``lax.conv_general_dilated`` 3 to 57 times slower inside ``scan``, ``fori_loop`` and
``while_loop`` than outside (compare jax-ml/jax#12868). The gradients arrive as convolutions with permuted
dimensions (``01oi``); outside loops the compiler brings these into the order that its fast kernel takes, in a loop's body it
does not. PGD, guidance by gradients, k discriminator steps in a scan and scan-over-layers all differentiate inside a loop.

The cure rests on one observation. A convolution is a trilinear form

    F(x, k, y) = <y, convolve(x, k)>                                                              (1)

and everything that automatic differentiation can ask for, of any order, is one of its three partial derivatives:

    forward:      dF/dy (x, k) = convolve(x, k)                                                   (2)
    to input:     dF/dx (k, y) = the transposed convolution of y with k                           (3)
    to kernel:    dF/dk (x, y) = the correlation of x with y                                      (4)

Each is bilinear, and the transpose of any of them in either argument is another of the three. So they are three JAX
primitives that are one another's transposes: forward mode, reverse mode and every nesting of them follow, and
batching (``vmap``) folds the new axis into the images, the channels or the groups of the same primitive. A ``custom_vjp`` would lose
forward mode (MeanFlow needs ``jvp`` inside ``grad``), and ``jax.custom_derivatives.linear_call`` has no batching rule.

How each is compiled is decided in one place, ``_primitive`` below. On CPU, (3) and (4) are written as plain NHWC/HWIO
convolutions of operands that an ``optimization_barrier`` keeps transposed. Everywhere else they have the very
dimension numbers that JAX itself emits, whose patterns cuDNN and the TPU compiler recognise.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxgen import checks
from jaxgen.nets.initialisation import Initialiser, constant, variance_scaling
from jaxgen.typing import Array

Padding = str | int | Sequence[tuple[int, int]]
"""'SAME', 'VALID', one number for all sides, or [(low, high), (low, high)] for height and width."""

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class _Form(NamedTuple):
    """Everything that fixes the form F of Eq. 1: hashable, so that it is a parameter of the primitives."""

    x_size: tuple[int, int]
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int

    @property
    def y_size(self) -> tuple[int, int]:
        sizes = zip(self.x_size, self.kernel_size, self.strides, self.padding, self.dilation, strict=True)
        height, width = ((n + lo + hi - d * (k - 1) - 1) // s + 1 for n, k, s, (lo, hi), d in sizes)
        return height, width


# --- The three partial derivatives, as ordinary JAX ------------------------------------------------------------------


def _forward(x: Array, kernel: Array, *, form: _Form) -> Array:
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


def _to_input(y: Array, kernel: Array, *, form: _Form, plain: bool) -> Array:
    """Eq. 3: [N, H', W', O], [h, w, C / groups, O] -> [N, H, W, C].

    A convolution of y, spread out by the strides, with the kernel turned by 180 degrees. JAX leaves the kernel's inputs and
    outputs where they are and says so in the dimension numbers; the ``plain`` form exchanges them in memory.
    """
    h, w, inputs, outputs = kernel.shape
    turned = kernel[::-1, ::-1].reshape(h, w, inputs, form.groups, outputs // form.groups)
    turned = jnp.swapaxes(turned, 2, 3).reshape(h, w, form.groups * inputs, outputs // form.groups)
    if plain:
        turned = lax.optimization_barrier(turned.swapaxes(2, 3))
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


def _to_kernel(x: Array, y: Array, *, form: _Form, plain: bool) -> Array:
    """Eq. 4: [N, H, W, C], [N, H', W', O] -> [h, w, C / groups, O].

    A convolution that has x's channels for images, the batch for channels and y, spread out by the strides, for a kernel.
    JAX says so in the dimension numbers; the ``plain`` form permutes the operands in memory.
    """
    padding = []
    for axis in (0, 1):
        spread = (form.y_size[axis] - 1) * form.strides[axis] + 1
        reach = form.dilation[axis] * (form.kernel_size[axis] - 1)
        low = form.padding[axis][0]
        padding.append((low, reach + spread - form.x_size[axis] - low))
    convolution = partial(
        lax.conv_general_dilated, window_strides=form.dilation, padding=padding, rhs_dilation=form.strides
    )
    if not plain:
        return convolution(x, y, dimension_numbers=("CHWN", "IHWO", "HWNC"), batch_group_count=form.groups)
    # [N, H, W, g C'] -> [C', H, W, g N]: each group sums over its own copy of the batch.
    images, features = x.shape[3] // form.groups, form.groups * x.shape[0]
    columns = x.reshape(*x.shape[:3], form.groups, images).transpose(4, 1, 2, 3, 0)
    kernel = convolution(
        lax.optimization_barrier(columns.reshape(images, *form.x_size, features)),
        lax.optimization_barrier(y.transpose(1, 2, 0, 3)),
        dimension_numbers=_LAYOUT,
        feature_group_count=form.groups,
    )
    return lax.optimization_barrier(kernel).transpose(1, 2, 0, 3)


# --- The same three as primitives: evaluation, compilation, differentiation, batching --------------------------------


def _primitive(name: str, native: Callable[..., Array], plain: Callable[..., Array]) -> Primitive:
    primitive = Primitive(name)
    # Outside jit each call compiles by itself, as every operation of JAX does.
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("form",)))
    # Shapes, dtypes, shardings and varying axes are those of the convolution that will run.
    primitive.def_abstract_eval(lambda a, b, *, form: jax.make_jaxpr(partial(native, form=form))(a, b).out_avals[0])
    # The one place that chooses by platform: plain convolutions on CPU, JAX's own patterns everywhere else.
    mlir.register_lowering(primitive, mlir.lower_fun(native, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False), platform="cpu")
    return primitive


_forward_p = _primitive("convolve", _forward, _forward)
_to_input_p = _primitive("convolve_to_input", partial(_to_input, plain=False), partial(_to_input, plain=True))
_to_kernel_p = _primitive("convolve_to_kernel", partial(_to_kernel, plain=False), partial(_to_kernel, plain=True))


def _bind(primitive: Primitive, a: Array, b: Array, form: _Form) -> Array:
    """Binds; inside shard_map an operand that is the same on all devices is first made varying, as in all of lax.

    That step's own transpose is the sum over devices, without which gradients of shared parameters would be partial.
    """
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in (a, b)]
    for_both = varying[0] | varying[1]
    a, b = (
        lax.pcast(operand, tuple(sorted(for_both - own)), to="varying") if for_both - own else operand
        for operand, own in zip((a, b), varying, strict=True)
    )
    return primitive.bind(a, b, form=form)


# Each rule is (cotangent, first operand, second operand) -> cotangent of the operand that is differentiated.
ad.defbilinear(
    _forward_p,
    lambda ct, x, kernel, form: _bind(_to_input_p, ct, kernel, form),
    lambda ct, x, kernel, form: _bind(_to_kernel_p, x, ct, form),
)
ad.defbilinear(
    _to_input_p,
    lambda ct, y, kernel, form: _bind(_forward_p, ct, kernel, form),
    lambda ct, y, kernel, form: _bind(_to_kernel_p, ct, y, form),
)
ad.defbilinear(
    _to_kernel_p,
    lambda ct, x, y, form: _bind(_to_input_p, y, ct, form),
    lambda ct, x, y, form: _bind(_forward_p, x, ct, form),
)

def _fold(a: Array, at: int, axis: int, groups: int) -> Array:
    """Moves axis ``at`` of ``a`` to just inside the groups of ``axis`` (an axis of what remains) and merges them."""
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
        *folds: (axis of the first operand, axis of the second, axis of the output) for the first alone being mapped, for
            the second alone, and for both. Axis 0 are images. Axis 3 (of x, y and the kernel's outputs) lies group by
            group, axis 2 (the kernel's inputs) within a group. When both are mapped, each element becomes groups of its own.
    """

    def rule(operands: Sequence[Array], at: Sequence[int | None], *, form: _Form) -> tuple[Array, int]:
        both = None not in at
        size = next(a.shape[i] for a, i in zip(operands, at, strict=True) if i is not None)
        *axes, out_axis = folds[2 if both else 0 if at[1] is None else 1]
        groups = {0: 1, 2: 1, 3: 1 if both else form.groups}
        a, b = (
            operand if i is None else _fold(operand, i, axis, groups[axis])
            for operand, i, axis in zip(operands, at, axes, strict=True)
        )
        folded = form._replace(groups=form.groups * size) if both else form
        return _unfold(_bind(primitive, a, b, folded), size, out_axis, groups[out_axis]), 0

    batching.primitive_batchers[primitive] = rule


_batch_rule(_forward_p, (0, None, 0), (None, 3, 3), (3, 3, 3))
_batch_rule(_to_input_p, (0, None, 0), (None, 2, 3), (3, 3, 3))
_batch_rule(_to_kernel_p, (3, None, 2), (None, 3, 3), (3, 3, 3))


# --- What networks call ----------------------------------------------------------------------------------------------


def convolve(
    x: Array,
    kernel: Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Array:
    """Convolves images with a kernel; fast in loops, differentiable in every mode and to every order.

    A 1 x 1 kernel without padding and groups is a matrix product. Products of bfloat16 are accumulated in float32.

    Args:
        x: [batch, height, width, channels].
        kernel: [kernel height, kernel width, channels / groups, features].
        strides: the step between outputs, one number or (vertical, horizontal).
        padding: 'SAME' (output size = ceil(size / stride)), 'VALID', one number for all four sides, or
            ((top, bottom), (left, right)).
        dilation: the step between the kernel's taps.
        groups: output feature i sees the channels of its group only; divides channels and features.

    Returns:
        [batch, output height, output width, features], in the promoted dtype of ``x`` and ``kernel``.

    Raises:
        ValueError: shapes do not fit together, or the output would be empty.
        TypeError: ``x`` is not floating-point.

    >>> convolve(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4)), strides=2, padding=1).shape
    (1, 3, 3, 4)
    """
    x, kernel = _promote(x, kernel)
    checks.positive_integer("groups", groups)
    if kernel.shape[2] * groups != x.shape[3] or kernel.shape[3] % groups:
        raise ValueError(
            f"`kernel` must have shape [any, any, {x.shape[3]} / {groups}, a multiple of {groups}] for `x` of shape "
            f"{list(x.shape)} and `groups` = {groups}, got {list(kernel.shape)}"
        )
    x_size, kernel_size = (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1])
    strides, dilation = _pair("strides", strides), _pair("dilation", dilation)
    pads = _pads(padding, x_size, kernel_size, strides, dilation)
    form = _Form(x_size, kernel_size, strides, pads, dilation, groups)
    if min(form.y_size) < 1:
        raise ValueError(f"`x` of shape {list(x.shape)} is smaller than `kernel` of shape {list(kernel.shape)}")
    if kernel_size == (1, 1) and pads == ((0, 0), (0, 0)) and groups == 1:
        x = x[:, :: strides[0], :: strides[1]]
        return jnp.matmul(x, kernel[0, 0], preferred_element_type=_accumulator(x.dtype)).astype(x.dtype)
    return _bind(_forward_p, x, kernel, form)


def convolve_transpose(
    x: Array,
    kernel: Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
    output_padding: int | tuple[int, int] = 0,
) -> Array:
    """The transpose of ``convolve`` with respect to its images, as PyTorch's ``ConvTranspose2d`` defines it.

    Args:
        x: [batch, height, width, channels].
        kernel: [kernel height, kernel width, features, channels]: that of the convolution it transposes.
        strides: the factor by which the image grows.
        padding: what the transposed convolution would have padded its images by, that is, what is cut off here.
        output_padding: rows and columns added at the bottom and right; less than ``strides``.

    Returns:
        [batch, output height, output width, features] with output height =
        (height - 1) * stride - top - bottom + kernel height + output padding.

    Raises:
        ValueError: shapes do not fit together, or the output would be empty.
        TypeError: ``x`` is not floating-point.

    >>> convolve_transpose(jnp.ones((1, 4, 4, 8)), jnp.ones((4, 4, 3, 8)), strides=2, padding=1).shape
    (1, 8, 8, 3)
    """
    x, kernel = _promote(x, kernel)
    if kernel.shape[3] != x.shape[3]:
        raise ValueError(f"`kernel` must have shape [any, any, any, {x.shape[3]}], got {list(kernel.shape)}")
    kernel_size, strides = (kernel.shape[0], kernel.shape[1]), _pair("strides", strides)
    extra = _pair("output_padding", output_padding, least=0)
    if extra[0] >= strides[0] or extra[1] >= strides[1]:
        raise ValueError(f"`output_padding` must be less than `strides` = {strides}, got {extra}")
    pads = _pads(padding, (0, 0), kernel_size, strides, (1, 1))
    height, width = (
        (x.shape[i + 1] - 1) * strides[i] - sum(pads[i]) + kernel_size[i] + extra[i] for i in (0, 1)
    )
    if min(height, width) < 1:
        raise ValueError(f"`x` of shape {list(x.shape)} gives an empty image with `padding` = {pads}")
    return _bind(_to_input_p, x, kernel, _Form((height, width), kernel_size, strides, pads, (1, 1), 1))


def upsample_convolve(x: Array, kernel: Array) -> Array:
    """Doubles images by nearest neighbour and convolves them with a 3 x 3 kernel ('SAME'), in 16/36 of the work.

    Each pixel of the doubled image sees two by two of the small one, with sums of the kernel's taps: for even rows the taps
    (0, 1 + 2) of rows (i - 1, i), for odd rows (0 + 1, 2) of rows (i, i + 1), and columns alike. Four small convolutions,
    interleaved, are the large one, to rounding.

    Args:
        x: [batch, height, width, channels].
        kernel: [3, 3, channels, features].

    Returns:
        [batch, 2 height, 2 width, features].

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: ``x`` is not floating-point.
    """
    x, kernel = _promote(x, kernel)
    checks.shape("kernel", kernel, (3, 3, x.shape[3], None))

    def halves(taps: Array) -> tuple[Array, Array]:
        return jnp.stack([taps[0], taps[1] + taps[2]]), jnp.stack([taps[0] + taps[1], taps[2]])

    rows = [
        jnp.stack(
            [
                convolve(x, columns.swapaxes(0, 1), padding=((1 - i, i), (1 - j, j)))
                for j, columns in enumerate(halves(half.swapaxes(0, 1)))
            ],
            axis=3,
        )
        for i, half in enumerate(halves(kernel))
    ]
    batch, height, width, _ = x.shape
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernel.shape[3])


class Conv(nn.Module):
    """A convolution with learned ``kernel`` [h, w, channels / groups, features] and ``bias`` [features].

    ``apply(params, x [batch, height, width, channels]) -> [batch, height', width', features]``.

    Attributes:
        features: output channels.
        kernel_size: one number or (height, width).
        strides: as for ``convolve``.
        padding: as for ``convolve``.
        groups: as for ``convolve``.
        use_bias: whether a bias is added.
        dtype: what the arithmetic is done in; parameters stay float32.
        kernel_init: draws the kernel.
    """

    features: int
    kernel_size: int | tuple[int, int] = 3
    _: KW_ONLY
    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"
    groups: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initialiser = variance_scaling()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the convolution."""
        checks.floating("x", x)
        checks.shape("x", x, (None, None, None, None))
        size = _pair("kernel_size", self.kernel_size)
        kernel = self.param("kernel", self.kernel_init, (*size, x.shape[3] // self.groups, self.features))
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides=self.strides,
            padding=self.padding,
            groups=self.groups,
        )
        if self.use_bias:
            y = y + self.param("bias", constant(0.0), (self.features,)).astype(self.dtype)
        return y


class ConvTranspose(nn.Module):
    """A transposed convolution with learned ``kernel`` [h, w, features, channels] and ``bias`` [features].

    PyTorch's ``ConvTranspose2d`` with the weight [channels, features, h, w] transposed by (2, 3, 1, 0). The
    defaults double the image.

    ``apply(params, x [batch, height, width, channels]) -> [batch, height', width', features]``.

    Attributes:
        features: output channels.
        kernel_size: one number or (height, width).
        strides: as for ``convolve_transpose``.
        padding: as for ``convolve_transpose``.
        output_padding: as for ``convolve_transpose``.
        use_bias: whether a bias is added.
        dtype: what the arithmetic is done in; parameters stay float32.
        kernel_init: draws the kernel.
    """

    features: int
    kernel_size: int | tuple[int, int] = 4
    _: KW_ONLY
    strides: int | tuple[int, int] = 2
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1
    output_padding: int | tuple[int, int] = 0
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initialiser = variance_scaling(in_axis=3)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the transposed convolution."""
        checks.floating("x", x)
        checks.shape("x", x, (None, None, None, None))
        size = _pair("kernel_size", self.kernel_size)
        kernel = self.param("kernel", self.kernel_init, (*size, self.features, x.shape[3]))
        y = convolve_transpose(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides=self.strides,
            padding=self.padding,
            output_padding=self.output_padding,
        )
        if self.use_bias:
            y = y + self.param("bias", constant(0.0), (self.features,)).astype(self.dtype)
        return y


def _promote(x: Array, kernel: Array) -> tuple[Array, Array]:
    checks.floating("x", x)
    checks.shape("x", x, (None, None, None, None))
    checks.shape("kernel", kernel, (None, None, None, None))
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return x.astype(dtype), kernel.astype(dtype)


def _accumulator(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _pair(name: str, value: int | tuple[int, int], *, least: int = 1) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(n, int) or n < least for n in pair):
        raise ValueError(f"`{name}` must be one or two integers of at least {least}, got {value!r}")
    return pair


def _pads(
    padding: Padding,
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"`padding` must be 'SAME', 'VALID', a number or two pairs, got {padding!r}")
        reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True))
        top_bottom, left_right = lax.padtype_to_pads(size, reach, strides, padding)
        return tuple(top_bottom), tuple(left_right)
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    pads = tuple(tuple(pair) for pair in padding)
    if len(pads) != 2 or any(len(pair) != 2 for pair in pads):
        raise ValueError(f"`padding` must be 'SAME', 'VALID', a number or two pairs, got {padding!r}")
    (top, bottom), (left, right) = pads
    return (top, bottom), (left, right)
