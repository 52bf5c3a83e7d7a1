"""Gradients of convolutions inside a loop against outside: ``python -m benchmarks.convolution``.

Both sides do the same step, a convolution's gradients with respect to image and kernel followed by a small
update; one side as a program of its own, the other as the body of a ``fori_loop``. The runs are interleaved
and each number is the median over repeats of the time per step. The requirement on CPU: the library's
convolution in a loop takes at most 1.3 times what ``lax.conv_general_dilated`` takes outside one. For
comparison the last column puts the latter itself in the loop.

Two Zen 4 cores, otherwise idle, 7 repeats (the last column: 2). In loop : plain, and native in loop : plain:

    images, features / stride          jax 0.10.2        jax 0.12.0.1
    16 x 32 x 32 x 128 -> 128 / 1      1.03    59        1.03    87
    16 x 16 x 16 x 256 -> 256 / 1      1.03    77        1.00    90
    16 x 32 x 32 x 128 -> 128 / 2      0.98    49        0.97    55
    64 x 8 x 8 x 64 -> 64 / 1          1.03    54        1.00    97
    128 x 8 x 8 x 64 -> 128 / 2        0.85    60        0.87   103
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.nets.convolution import convolve
from jaxgen.typing import Array

STEPS = 4  # of the loop, per call


class Shape(NamedTuple):
    """One convolution: images [batch, size, size, channels] -> features, 3 x 3."""

    batch: int
    size: int
    channels: int
    features: int
    stride: int


SHAPES = (
    Shape(16, 32, 128, 128, 1),
    Shape(16, 16, 256, 256, 1),
    Shape(16, 32, 128, 128, 2),
    Shape(64, 8, 64, 64, 1),
    Shape(128, 8, 64, 128, 2),
)

Convolution = Callable[..., Array]
Step = Callable[[tuple[Array, Array]], tuple[Array, Array]]


def native(x: Array, kernel: Array, *, strides: int) -> Array:
    """JAX's own convolution."""
    return lax.conv_general_dilated(x, kernel, (strides, strides), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def step(convolution: Convolution, strides: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    """Descends along the gradients of the mean square of the output."""
    gradients = jax.grad(lambda x, k: jnp.mean(convolution(x, k, strides=strides) ** 2), (0, 1))(*carry)
    return carry[0] - 1e-3 * gradients[0], carry[1] - 1e-3 * gradients[1]


def loop(body: Step, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    """STEPS steps in a fori_loop."""
    return lax.fori_loop(0, STEPS, lambda _, carry: body(carry), carry)


def measure(shape: Shape, repeats: int, with_native_loop: bool) -> dict[str, float]:
    """Seconds per step of each side."""
    keys = jax.random.split(jax.random.key(0))
    carry = (
        jax.random.normal(keys[0], (shape.batch, shape.size, shape.size, shape.channels)),
        0.05 * jax.random.normal(keys[1], (3, 3, shape.channels, shape.features)),
    )
    theirs, ours = partial(step, native, shape.stride), partial(step, convolve, shape.stride)
    sides: dict[str, tuple[Callable, int]] = {
        "plain": (jax.jit(theirs), 1),
        "ours plain": (jax.jit(ours), 1),
        "ours in loop": (jax.jit(partial(loop, ours)), STEPS),
    }
    if with_native_loop:
        sides["native in loop"] = (jax.jit(partial(loop, theirs)), STEPS)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, (run, steps) in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(run(carry))
            if repeat:  # the first call compiles
                times[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints one line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-native-loop", action="store_true", help="leave the slow column out")
    arguments = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}, {arguments.repeats} repeats, milliseconds per step")
    print(f"{'':40}{'plain':>8}{'ours':>8}{'in loop':>9}{'in loop : plain':>17}{'native in loop : plain':>24}")
    for shape in SHAPES:
        times = measure(shape, arguments.repeats, not arguments.no_native_loop)
        plain = times["plain"]
        image = f"{shape.batch} x {shape.size} x {shape.size} x {shape.channels}"
        label = f"{image} -> {shape.features} / {shape.stride}"
        last = f"{times['native in loop'] / plain:24.2f}" if "native in loop" in times else ""
        print(
            f"{label:40}{1e3 * plain:8.1f}{1e3 * times['ours plain']:8.1f}{1e3 * times['ours in loop']:9.1f}"
            f"{times['ours in loop'] / plain:17.2f}{last}"
        )


if __name__ == "__main__":
    main()
