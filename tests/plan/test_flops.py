"""Operations counted from the trace, against those counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxgen import nets
from jaxgen.nets.convolution import convolve
from jaxgen.plan.flops import counted

X, KERNEL = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 6))
ONE = 2 * 2 * 8 * 8 * 9 * 4 * 6


def test_products():
    assert counted(jnp.matmul, jnp.ones((5, 3, 7)), jnp.ones((5, 7, 2))) == 2 * 5 * 3 * 7 * 2


@pytest.mark.parametrize(
    "form", [lambda x, k: lax.conv(x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1), (1, 1), "SAME"), convolve]
)
def test_convolutions(form):
    assert counted(form, X, KERNEL) == ONE


def test_strides_and_groups():
    assert counted(lambda x, k: convolve(x, k, strides=2), X, KERNEL) == ONE / 4
    assert counted(lambda x, k: convolve(x, k, groups=2), X, KERNEL[:, :, :2]) == ONE / 2


def test_gradients_cost_twice_what_values_do():
    loss = lambda x, k: jnp.sum(convolve(x, k) ** 2)  # noqa: E731
    assert counted(jax.grad(loss, argnums=(0, 1)), X, KERNEL) == 3 * ONE
    assert counted(jax.grad(loss), X, KERNEL) == 2 * ONE


def test_loops_choices_and_calls():
    step = lambda x, _: (jax.nn.relu(x @ jnp.ones((4, 4))), None)  # noqa: E731
    assert counted(lambda x: lax.scan(jax.checkpoint(step), x, length=7)[0], jnp.ones((3, 4))) == 7 * 2 * 3 * 4 * 4
    assert counted(lambda x: lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x), jnp.ones((4, 4))) == 4 * 4**3
    assert counted(jax.jit(lambda x: jax.vmap(lambda row: row @ x)(x)), jnp.ones((4, 4))) == 2 * 4**3


def test_a_known_network():
    """ResNet-18's 1.82 GMACs for 224 x 224 pixels, as its authors count (He et al. 2016, Table 1: 1.8e9)."""
    network = nets.ResNet(blocks=(2, 2, 2, 2), num_classes=1000)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(lambda key: nets.init(network, key, x), jax.random.key(0))
    assert counted(network.apply, params, x) / 2 == pytest.approx(1.814e9, rel=0.01)


def test_attention_by_a_kernel_counts_as_any_other():
    x = jnp.zeros((2, 128, 3, 16))

    def of(attention):
        return counted(jax.value_and_grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)), x, x, x)

    product = 2 * 2 * 3 * 128 * 128 * 16
    assert of(jax.nn.dot_product_attention) == 6 * product
    assert of(nets.flash_attention) == 8 * product  # for the gradient the logits are computed again
