"""The oracle is JAX's own convolution in float64: every mode of differentiation and every batching."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgen.nets import (
    Conv,
    ConvTranspose,
    convolve,
    convolve_transpose,
    init,
    trilinear,
    upsample_convolve,
)

FAST = "b01f_01io->b01f"

# strides, padding, dilation, groups, (height, width), kernel size
CASES = {
    "same": (1, "SAME", 1, 1, (7, 6), (3, 3)),
    "stride 2, asymmetric": (2, ((0, 1), (0, 1)), 1, 1, (8, 8), (3, 3)),
    "all at once": ((2, 1), ((3, 0), (1, 2)), (1, 2), 2, (9, 8), (2, 3)),
    "unused border": (3, "VALID", 2, 1, (10, 11), (3, 3)),
    "depthwise": (1, "SAME", 1, 4, (5, 5), (3, 3)),
    "1 x 1": (2, "VALID", 1, 1, (5, 6), (1, 1)),
    "padding beyond the kernel": (1, ((3, 2), (0, 4)), 1, 1, (4, 4), (2, 4)),
    "image by image": ((1, 2), "SAME", 1, 2, (24, 58), (3, 2)),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def problem(request):
    """Ours, JAX's, and (x, kernel, their tangents)."""
    strides, padding, dilation, groups, size, kernel_size = request.param
    rng = np.random.default_rng(0)
    x, dx = rng.normal(size=(2, 3, *size, 4))
    kernel, dkernel = rng.normal(size=(2, *kernel_size, 4 // groups, 8))

    def pair(value):
        return (value, value) if isinstance(value, int) else value

    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    ours = partial(convolve, strides=strides, padding=padding, dilation=dilation, groups=groups)
    theirs = partial(
        lax.conv_general_dilated,
        window_strides=pair(strides),
        padding=pads,
        rhs_dilation=pair(dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return ours, theirs, jax.tree.map(jnp.asarray, (x, kernel, dx, dkernel))


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), ours, theirs)


def bent(f):
    """A scalar whose derivatives of all orders depend on both arguments."""
    return lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))


def gradients(f):
    return jax.grad(bent(f), (0, 1))


@partial(jax.jit, static_argnums=0)
def every_mode(f, x, kernel, dx, dkernel):
    def squared_tangent(x, kernel):
        return jnp.sum(jax.jvp(lambda x, k: jnp.sin(f(x, k)), (x, kernel), (dx, dkernel))[1] ** 2)

    def squared_gradients(x, kernel):
        return sum(jnp.sum(g**2) for g in gradients(f)(x, kernel))

    return {
        "forward and tangent": jax.jvp(f, (x, kernel), (dx, dkernel)),
        "reverse and forward over reverse": jax.jvp(gradients(f), (x, kernel), (dx, dkernel)),
        "reverse over forward": jax.grad(squared_tangent, (0, 1))(x, kernel),
        "reverse over reverse": jax.grad(squared_gradients, (0, 1))(x, kernel),
    }


def test_agrees_with_jax_in_every_mode(problem):
    ours, theirs, arguments = problem
    assert_close(every_mode(ours, *arguments), every_mode(theirs, *arguments))


BATCHED = ("all at once", "1 x 1")


@pytest.mark.parametrize("problem", [CASES[name] for name in BATCHED], ids=BATCHED, indirect=True)
@pytest.mark.parametrize("axes", [(0, None), (None, 2), (1, 4)], ids=["images", "kernels", "both"])
def test_agrees_with_jax_when_batched(problem, axes):
    ours, theirs, (x, kernel, dx, dkernel) = problem
    x = x if axes[0] is None else jnp.stack([x, dx, x - dx], axis=axes[0])
    kernel = kernel if axes[1] is None else jnp.stack([kernel, dkernel, kernel * dkernel], axis=axes[1])

    @partial(jax.jit, static_argnums=0)
    def everything(f, x, kernel):
        return (
            jax.vmap(f, axes)(x, kernel),
            jax.vmap(gradients(f), axes)(x, kernel),
            gradients(jax.vmap(f, axes))(x, kernel),
        )

    assert_close(everything(ours, x, kernel), everything(theirs, x, kernel))


@pytest.mark.parametrize("axes", [(2, None), (None, 1), (0, 4)], ids=["first", "second", "both"])
@pytest.mark.parametrize("derivative", ["y", "x", "kernel"])
def test_each_derivative_batches_over_each_operand(derivative, axes):
    """Differentiation alone does not reach all of these: its cotangents are always mapped."""
    form = trilinear.Form((7, 6), (3, 2), (2, 1), ((1, 1), (0, 2)), (1, 2), 2)
    shapes = {"x": (2, 7, 6, 4), "kernel": (3, 2, 2, 6), "y": (2, *form.y_size, 6)}
    primitive, names = {
        "y": (trilinear.forward_p, ("x", "kernel")),
        "x": (trilinear.to_input_p, ("y", "kernel")),
        "kernel": (trilinear.to_kernel_p, ("x", "y")),
    }[derivative]
    rng = np.random.default_rng(0)
    stacks = [rng.normal(size=(3, *shapes[name])) for name in names]

    def one(a, b):
        return trilinear.bind(primitive, a, b, form)

    operands = [s[0] if axis is None else np.moveaxis(s, 0, axis) for s, axis in zip(stacks, axes, strict=True)]
    mapped = jax.vmap(one, axes)(*map(jnp.asarray, operands))
    for i in range(3):
        pair = [jnp.asarray(s[0 if axis is None else i]) for s, axis in zip(stacks, axes, strict=True)]
        assert_close(mapped[i], one(*pair))


def test_nested_batching_and_per_example_second_order():
    x = jax.random.normal(jax.random.key(0), (2, 3, 1, 5, 5, 2))
    kernels = jax.random.normal(jax.random.key(1), (3, 3, 3, 2, 4))
    theirs = partial(
        lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

    def curvature(f):
        hvp = lambda x, k: jax.jvp(jax.grad(bent(f), 1), (x, k), (x, k))[1]  # noqa: E731
        return jax.jit(jax.vmap(jax.vmap(hvp), (0, None)))(x, kernels)

    assert_close(curvature(partial(convolve, strides=2)), curvature(theirs))


def test_outside_jit_and_in_a_scan():
    x, k = (
        jax.random.normal(jax.random.key(0), (2, 4, 4, 3)),
        jax.random.normal(jax.random.key(1), (3, 3, 3, 3)),
    )
    with jax.disable_jit():
        assert_close(convolve(x, k), jax.jit(convolve)(x, k))
    scanned, _ = lax.scan(lambda x, k: (jnp.tanh(convolve(x, k)), None), x, jnp.stack([k, -k]))
    assert_close(scanned, jnp.tanh(convolve(jnp.tanh(convolve(x, k)), -k)))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_gradients_in_a_loop_keep_the_fast_layout(strides, batched):
    """The cause of the slowness, without a clock: no convolution of permuted dimensions in a loop's body."""

    def step(convolution, carry):
        x, k = carry
        grads = jax.grad(lambda x, k: jnp.sum(convolution(x, k) ** 2), (0, 1))
        dx, dk = (jax.vmap(grads, (0, None)) if batched else grads)(x, k)
        return x - dx, k - (dk.sum(0) if batched else dk)

    def labels(convolution):
        x, k = (
            jnp.ones((3, 4, 8, 8, 16)[0 if batched else 1 :], jnp.float32),
            jnp.ones((3, 3, 16, 16), jnp.float32),
        )
        loop = jax.jit(lambda carry: lax.fori_loop(0, 3, lambda _, carry: step(convolution, carry), carry))
        return re.findall(r"dim_labels=(\S+?)[,\s]", loop.lower((x, k)).compile().as_text())

    ours = labels(partial(convolve, strides=strides))
    assert len(ours) >= 3
    assert set(ours) == {FAST}
    theirs = partial(
        lax.conv_general_dilated,
        window_strides=(strides, strides),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # Should this fail, XLA has learnt to do it by itself and the whole detour can go.
    assert set(labels(theirs)) != {FAST}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_the_patterns_that_jax_emits(platform):
    """Compared as text: window, dimension numbers and group counts of the gradients' convolutions."""
    arguments = jnp.ones((2, 9, 8, 4), jnp.float32), jnp.ones((3, 3, 2, 8), jnp.float32)
    options = {"padding": ((1, 1), (0, 1)), "groups": 2}

    def convolutions(f):
        lowered = jax.jit(gradients(f)).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in lowered.splitlines() if "stablehlo.convolution" in line]
        return sorted(re.sub(r"%\w+", "%", line).strip() for line in lines)

    theirs = partial(
        lax.conv_general_dilated,
        window_strides=(2, 1),
        padding=options["padding"],
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    ours = convolutions(partial(convolve, strides=(2, 1), **options))
    assert len(ours) == 3
    assert ours == convolutions(theirs)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_of_shared_parameters_under_shard_map(check_vma):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x = jax.random.normal(jax.random.key(0), (8, 48, 48, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 3))

    def mapped(x, kernel):
        loss = jax.value_and_grad(lambda k: jnp.sum(convolve(x, k, strides=2) ** 2))
        value, gradient = loss(kernel)
        # With check_vma the transpose of making the kernel varying already summed over the devices.
        return lax.psum(value, "data"), gradient if check_vma else lax.psum(gradient, "data")

    run = jax.jit(
        jax.shard_map(mapped, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec(), check_vma=check_vma)
    )
    assert_close(run(x, kernel), jax.value_and_grad(lambda k: jnp.sum(convolve(x, k, strides=2) ** 2))(kernel))


def test_batch_sharded_under_jit():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (8, 24, 24, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 3))
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    run = jax.jit(gradients(convolve))
    assert_close(run(placed, kernel), run(x, kernel))
    assert set(re.findall(r"(all-\w+|collective-\w+)\(", run.lower(placed, kernel).compile().as_text())) == {
        "all-reduce"
    }


def test_bfloat16_is_accumulated_in_float32():
    """A sum of 2,304 products whose bfloat16 partial sums would stop growing at 256."""
    x, kernel = jnp.ones((1, 5, 5, 256), jnp.bfloat16), jnp.ones((3, 3, 256, 8), jnp.bfloat16)
    y = convolve(x, kernel)
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 2, 2, 0]) == 2304
    assert float(convolve(x, kernel[:1, :1])[0, 0, 0, 0]) == 256
    gradient = jax.grad(lambda k: convolve(jnp.ones((16, 16, 16, 1), jnp.bfloat16), k).astype(jnp.float32).sum())(
        jnp.ones((3, 3, 1, 1), jnp.bfloat16)
    )
    assert float(gradient[1, 1, 0, 0]) == 4096


def test_transposed_convolution_is_the_transpose():
    """<convolve(x, k), y> = <x, convolve_transpose(y, k)>, whatever the geometry."""
    rng = np.random.default_rng(1)
    for size, kernel_size, strides, padding, extra in (
        ((8, 8), (4, 4), 2, 1, 0),
        ((9, 8), (3, 3), (2, 1), 1, 0),
        ((10, 7), (3, 2), 3, ((1, 0), (0, 2)), (2, 1)),
    ):
        kernel = rng.normal(size=(*kernel_size, 3, 5))
        x = rng.normal(size=(2, *size, 3))
        convolved = convolve(x, kernel, strides=strides, padding=padding)
        y = rng.normal(size=convolved.shape)
        back = convolve_transpose(jnp.asarray(y), kernel, strides=strides, padding=padding, output_padding=extra)
        assert back.shape == x.shape
        np.testing.assert_allclose(np.sum(convolved * y), np.sum(x * back), rtol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra"), [(4, 2, 1, 0), (3, 2, 1, 1), (5, 3, 0, 2), (3, 1, 2, 0)]
)
def test_transposed_convolution_agrees_with_torch(kernel, stride, padding, extra):
    torch = pytest.importorskip("torch", reason="peer: torch is not installed")
    reference = torch.nn.ConvTranspose2d(6, 4, kernel, stride, padding, extra).double()
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 6))
    expected = reference(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    module = ConvTranspose(4, kernel, strides=stride, padding=padding, output_padding=extra, dtype=jnp.float64)
    weights = {
        "kernel": jnp.asarray(reference.weight.detach().numpy().transpose(2, 3, 1, 0)),
        "bias": jnp.asarray(reference.bias.detach().numpy()),
    }
    np.testing.assert_allclose(module.apply({"params": weights}, x), expected, rtol=1e-10, atol=1e-12)


def test_folded_upsampling_is_upsampling_then_convolving():
    x, k = (
        jax.random.normal(jax.random.key(0), (2, 3, 5, 4)),
        jax.random.normal(jax.random.key(1), (3, 3, 4, 6)),
    )

    def plain(x, k):
        return convolve(x.repeat(2, axis=1).repeat(2, axis=2), k)

    assert_close(upsample_convolve(x, k), plain(x, k))
    assert_close(jax.jit(gradients(upsample_convolve))(x, k), jax.jit(gradients(plain))(x, k))


def test_modules_keep_float32_parameters_and_compute_in_dtype():
    x = jnp.ones((2, 8, 8, 4), jnp.float32)
    for module, shape, kernel in (
        (Conv(6, strides=2, groups=2, dtype=jnp.bfloat16), (2, 4, 4, 6), (3, 3, 2, 6)),
        (ConvTranspose(6, dtype=jnp.bfloat16), (2, 16, 16, 6), (4, 4, 6, 4)),
    ):
        params = init(module, jax.random.key(0), x)
        assert params["params"]["kernel"].shape == kernel
        assert params["params"]["kernel"].dtype == params["params"]["bias"].dtype == jnp.float32
        y = module.apply(params, x)
        assert (y.shape, y.dtype) == (shape, jnp.bfloat16)
    assert set(init(Conv(3, use_bias=False), jax.random.key(0), x)["params"]) == {"kernel"}


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"`x` must be floating-point", lambda x, k: convolve(x.astype(jnp.int32), k)),
        (
            ValueError,
            r"`x` must have shape \[any, any, any, any\], got \[8, 8, 4\]",
            lambda x, k: convolve(x[0], k),
        ),
        (ValueError, r"`kernel` must have shape \[any, any, 3 / 1", lambda x, k: convolve(x[..., :3], k)),
        (
            ValueError,
            r"`kernel` must have shape .* got \[3, 3, 2, 5\]",
            lambda x, k: convolve(x, k[:, :, :2, :5], groups=2),
        ),
        (
            ValueError,
            r"`groups` must be an integer of at least 1, got 0",
            lambda x, k: convolve(x, k, groups=0),
        ),
        (ValueError, r"`strides` must be one or two integers", lambda x, k: convolve(x, k, strides=0)),
        (
            ValueError,
            r"`padding` must be 'SAME', 'VALID'.*got 'same'",
            lambda x, k: convolve(x, k, padding="same"),
        ),
        (ValueError, r"`padding` must be .*got \(1, 1\)", lambda x, k: convolve(x, k, padding=(1, 1))),
        (
            ValueError,
            r"`x` of shape .* is smaller than `kernel`",
            lambda x, k: convolve(x[:, :2], k, padding="VALID"),
        ),
        (ValueError, r"`kernel` must have shape \[any, any, any, 4\]", lambda x, k: convolve_transpose(x, k)),
        (
            ValueError,
            r"`output_padding` must be less than `strides`",
            lambda x, k: convolve_transpose(x, k.swapaxes(2, 3), output_padding=1),
        ),
        (ValueError, r"`kernel` must have shape \[3, 3, 4, any\]", lambda x, k: upsample_convolve(x, k[:2])),
    ],
)
def test_bad_input_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 8)))
