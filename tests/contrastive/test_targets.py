"""MoCo's and BYOL's losses against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.contrastive.targets import byol_loss, moco_loss

RNG = np.random.default_rng(0)
Q, K, U = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 4)), RNG.normal(size=(9, 4))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_moco_is_its_equation():
    q, k, u = unit(Q), unit(K), unit(U)
    expected = []
    for i in range(5):
        right = np.exp(q[i] @ k[i] / 0.3)
        expected.append(-np.log(right / (right + sum(np.exp(q[i] @ u[j] / 0.3) for j in range(9)))))
    with jax.enable_x64(True):
        got = moco_loss(jnp.asarray(Q), jnp.asarray(3 * K), jnp.asarray(U), temperature=0.3)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_byol_is_its_equation():
    expected = np.sum((unit(Q) - unit(K)) ** 2, axis=1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(byol_loss(jnp.asarray(Q), jnp.asarray(2 * K)), expected, rtol=1e-12)


def test_gradients_reach_the_first_encoder_alone():
    with jax.enable_x64(True):
        of_moco = jax.grad(lambda *rows: moco_loss(*rows).sum(), argnums=(0, 1, 2))(*map(jnp.asarray, (Q, K, U)))
        of_byol = jax.grad(lambda *rows: byol_loss(*rows).sum(), argnums=(0, 1))(*map(jnp.asarray, (Q, K)))
    for first, *others in (of_moco, of_byol):
        assert np.abs(np.asarray(first)).max() > 0.01
        assert all(np.all(np.asarray(other) == 0) for other in others)
    np.testing.assert_allclose(np.sum(np.asarray(of_byol[0]) * Q, axis=1), 0, atol=1e-12)  # length is no matter


@pytest.mark.parametrize("loss", [moco_loss, lambda q, k, u: byol_loss(q, k)])
def test_rows_of_zeros_are_finite_and_dtypes_wide(loss):
    zeros = jnp.zeros((2, 3), jnp.bfloat16)
    value, gradient = jax.value_and_grad(lambda q: loss(q, zeros, zeros).sum())(zeros)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moco_loss(Q, K[:4], U), ValueError, "`keys` must have the shape of `queries`"),
        (lambda: moco_loss(Q, K, U[:, :3]), ValueError, r"`queue` must have shape \[any, 4\], got \[9, 3\]"),
        (lambda: moco_loss(Q, K, U, temperature=0.0), ValueError, "`temperature` must be"),
        (lambda: moco_loss(Q.astype(int), K, U), TypeError, "`queries` must be floating-point"),
        (lambda: byol_loss(Q, K[:, :3]), ValueError, "`targets` must have the shape of `predictions`"),
        (lambda: byol_loss(Q[0], K[0]), ValueError, r"`predictions` must have shape \[any, any\]"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
