"""What each network computes in which precision, read from its trace: so a matrix unit of bfloat16 is used, and safely.

The same, in what a compiler makes of it for TPUs: test_tpu.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import nets, train
from jaxgen.nets.dense import Dense

HALF, SINGLE = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
IMAGES, LATENTS, TIMES = ((2, 32, 32, 3),), ((2, 16),), ((2, 32, 32, 3), (2,))
NETWORKS = {
    "UNet": (functools.partial(nets.UNet, 3, 32, (1, 2), 1, scale_shift=True), TIMES),
    "DiT": (functools.partial(nets.DiT, 3, 32, 2, 2, qk_norm=True, positions=nets.rotary_positions), TIMES),
    "DiT with flash attention": (functools.partial(nets.DiT, 3, 32, 2, 2, attention=nets.flash_attention), TIMES),
    "R3GANGenerator": (functools.partial(nets.R3GANGenerator, 3, widths=(32, 32)), LATENTS),
    "R3GANDiscriminator": (functools.partial(nets.R3GANDiscriminator, 3, widths=(32, 32)), ((2, 8, 8, 3),)),
    "DCGANGenerator": (functools.partial(nets.DCGANGenerator, 32, 3), LATENTS),
    "DCGANDiscriminator": (functools.partial(nets.DCGANDiscriminator, 32, 3, norm=nets.BatchNorm), IMAGES),
    "ResNet": (functools.partial(nets.ResNet, (1, 1), num_classes=10, stem=nets.cifar_stem, width=16), IMAGES),
    "bottlenecks": (functools.partial(nets.ResNet, (1, 1), bottleneck=True, num_classes=10, width=16), IMAGES),
    "WideResNet": (functools.partial(nets.WideResNet, 10, 1, 10), IMAGES),
    "ConvAutoencoder": (nets.ConvAutoencoder, IMAGES),
    "MLP": (functools.partial(nets.MLP, (32, 8)), LATENTS),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def built(name, dtype=HALF):
    make, shapes = NETWORKS[name]
    return make(dtype=dtype), [jax.ShapeDtypeStruct(shape, SINGLE) for shape in shapes]


@functools.cache
def traced(name, *, backward):
    """The equations of a network, those of its loops and other inner functions included."""
    model, inputs = built(name)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    apply = lambda params, *x: model.apply(params, *x).astype(SINGLE)  # noqa: E731
    function = jax.grad(lambda *arguments: jnp.sum(apply(*arguments) ** 2)) if backward else apply
    return list(equations(jax.make_jaxpr(function)(params, *inputs).jaxpr))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


def dtypes(variables):
    return {v.aval.dtype for v in variables if jnp.issubdtype(v.aval.dtype, jnp.floating)}


@every_network
def test_matrix_units_get_bfloat16(name):
    """All convolutions and attention, forward and backward; all products but those that give one vector an image."""
    for backward in (False, True):
        for equation in traced(name, backward=backward):
            kind = equation.primitive.name
            assert kind != "conv_general_dilated"
            if kind.startswith(("convolve", "attend")):
                assert dtypes(equation.invars) == {HALF}
            if kind == "dot_general" and not backward and dtypes(equation.invars) != {HALF}:
                assert equation.outvars[0].aval.ndim == 2  # of time, class or logits: float32 on purpose


@every_network
def test_sums_and_softmax_are_float32(name):
    """What a network sums or exponentiates: the statistics of norms, means, softmax."""
    seen = [
        equation
        for equation in traced(name, backward=False)
        if equation.primitive.name in ("reduce_sum", "reduce_max", "cumsum", "reduce_prod", "exp", "rsqrt", "div")
        and equation.invars[0].aval.ndim
    ]
    for equation in seen:
        assert dtypes(equation.invars) <= {SINGLE}, equation
    if name not in ("R3GANGenerator", "DiT with flash attention"):
        assert any(equation.primitive.name == "reduce_sum" for equation in seen)


@every_network
def test_what_is_kept_is_float32(name):
    """Parameters, the optimiser's state and the average, whatever the arithmetic; a step hands them on as they came."""
    model, inputs = built(name)

    def loss(params, batch, key):
        return jnp.mean(model.apply(params, *batch).astype(SINGLE) ** 2), {}

    def init(key):
        return nets.init(model, key, *(jnp.zeros(x.shape) for x in inputs))

    method = train.minimise(loss, optax.adam(1e-3), init, average=train.ema())
    state = jax.eval_shape(method.init, jax.random.key(0))
    after, _ = jax.eval_shape(method.step, state, tuple(inputs), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (SINGLE, jnp.int32)


@every_network
def test_no_float64_even_where_jax_allows_it(name):
    """With 64-bit types on, NumPy's constants would carry whatever they touch into float64."""
    model, inputs = built(name, SINGLE)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(model.apply)(params, *inputs).jaxpr
    wide = [
        equation.primitive.name
        for equation in equations(jaxpr)
        if np.dtype(np.float64) in dtypes(v for v in equation.outvars if v.aval.ndim)
    ]
    assert not wide


@pytest.mark.parametrize("strides", [1, 2])
def test_tpus_get_the_convolutions_that_jax_itself_writes(strides):
    """Forward and both gradients: their dimension numbers are patterns that the compiler knows; CPUs get others."""
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 4), HALF), jax.ShapeDtypeStruct((3, 3, 4, 8), HALF)
    jaxs = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(strides, strides), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

    def written(convolve, platform):
        gradient = jax.jit(jax.grad(lambda x, kernel: jnp.sum(convolve(x, kernel) ** 2), argnums=(0, 1)))
        text = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return sorted(re.findall(r"dim_numbers = (.*?), window = {(.*?)}", text))

    ours = functools.partial(nets.convolve, strides=strides)
    assert written(ours, "tpu") == written(jaxs, "tpu") != written(ours, "cpu")
    assert len(written(ours, "tpu")) == 3


@pytest.mark.parametrize("layer", [nets.Conv, nets.ConvTranspose, Dense])
def test_gradients_of_biases_are_summed_in_float32(layer):
    """Over 16,384 pixels whose mean is a tenth of their deviation: a sum in bfloat16 has lost most of it."""
    model, rng = layer(4, dtype=HALF), np.random.default_rng(0)
    x = jnp.zeros((16, 32, 32, 2))
    params = nets.init(model, jax.random.key(0), x)
    y, pull = jax.vjp(jax.jit(model.apply), params, x)
    cotangent = jnp.asarray(rng.normal(0.1, size=y.shape), HALF)
    gradient = jax.jit(lambda pull, ct: pull(ct)[0]["params"]["bias"])(pull, cotangent)
    np.testing.assert_allclose(gradient, np.asarray(cotangent, np.float64).sum((0, 1, 2)), rtol=1e-4)
