"""One convolution for every network: fast inside loops, differentiable in every mode and to every order.

Images are NHWC, kernels HWIO. ``trilinear`` says why this is not simply ``lax.conv_general_dilated``.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxgen import checks
from jaxgen.nets.dense import add_bias
from jaxgen.nets.initialisation import Initialiser, constant, variance_scaling
from jaxgen.nets.trilinear import Form, bind, forward_p, to_input_p
from jaxgen.typing import Array

Padding = str | int | Sequence[tuple[int, int]]
"""'SAME', 'VALID', one number for all sides, or ((top, bottom), (left, right))."""


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

    A 1 x 1 kernel without padding and groups is a matrix product. Products of bfloat16 are accumulated in
    float32.

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
            f"`kernel` must have shape [any, any, {x.shape[3]} / {groups}, a multiple of {groups}] for `x` "
            f"of shape {list(x.shape)} and `groups` = {groups}, got {list(kernel.shape)}"
        )
    x_size, kernel_size = (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1])
    strides, dilation = _pair("strides", strides), _pair("dilation", dilation)
    pads = _pads(padding, x_size, kernel_size, strides, dilation)
    form = Form(x_size, kernel_size, strides, pads, dilation, groups)
    if min(form.y_size) < 1:
        raise ValueError(f"`x` of shape {list(x.shape)} is smaller than `kernel` of shape {list(kernel.shape)}")
    if kernel_size == (1, 1) and pads == ((0, 0), (0, 0)) and groups == 1:
        x = x[:, :: strides[0], :: strides[1]]
        pixels = x.reshape(-1, x.shape[3])  # one axis to sum over for the kernel's gradient; of three, XLA makes copies
        y = jnp.matmul(pixels, kernel[0, 0], preferred_element_type=_accumulator(x.dtype)).astype(x.dtype)
        return y.reshape(*x.shape[:3], kernel.shape[3])
    return bind(forward_p, x, kernel, form)


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
        padding: what the transposed convolution would have padded its images by, that is, what is cut off
            here.
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
    height, width = ((x.shape[i + 1] - 1) * strides[i] - sum(pads[i]) + kernel_size[i] + extra[i] for i in (0, 1))
    if min(height, width) < 1:
        raise ValueError(f"`x` of shape {list(x.shape)} gives an empty image with `padding` = {pads}")
    return bind(to_input_p, x, kernel, Form((height, width), kernel_size, strides, pads, (1, 1), 1))


def upsample_convolve(x: Array, kernel: Array) -> Array:
    """Doubles images by nearest neighbour and convolves them with a 3 x 3 kernel, in 16/36 of the work.

    Each pixel of the doubled image sees two by two of the small one, with sums of the kernel's taps: for
    even rows the taps (0, 1 + 2) of rows (i - 1, i), for odd rows (0 + 1, 2) of rows (i, i + 1), and columns
    alike. Four small convolutions, interleaved, are the large one, to rounding, with 'SAME' padding.

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
            y = add_bias(y, self.param("bias", constant(0.0), (self.features,)))
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
            y = add_bias(y, self.param("bias", constant(0.0), (self.features,)))
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
        (top, bottom), (left, right) = lax.padtype_to_pads(size, reach, strides, padding)
        return (top, bottom), (left, right)
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    if len(padding) != 2 or any(not isinstance(pair, Sequence) or len(pair) != 2 for pair in padding):
        raise ValueError(f"`padding` must be 'SAME', 'VALID', a number or two pairs, got {padding!r}")
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)
