"""Spectral normalisation against NumPy's singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import gan, nets

SHAPES = [(7, 5), (5, 9), (1, 6), (6, 1), (3, 3, 4, 8), (2, 3, 4)]
EXACT = 16  # iterations that find the leading singular vectors of every kernel above
normalise = jax.jit(gan.spectral_normalise, static_argnames=("iterations", "where"))


def kernel(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def sigma(kernel):
    return np.linalg.norm(np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_singular_value_becomes_one(shape):
    w = kernel(shape)
    np.testing.assert_allclose(normalise(w, iterations=EXACT), w / sigma(w), rtol=1e-5)


def test_sigma_of_a_large_random_kernel_is_found_from_below():
    """A plain power iteration of as many products is 2 % off."""
    w = kernel((4, 4, 128, 256))
    assert 1 < sigma(normalise(w)) < 1.004


@pytest.mark.parametrize("rank", [1, 2])
def test_a_kernel_of_low_rank(rank):
    w = kernel((40, rank)) @ kernel((rank, 30), 1)
    np.testing.assert_allclose(sigma(normalise(w)), 1, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 3.0, 1e25])
def test_scale_is_forgotten(scale):
    w = kernel((12, 10))
    np.testing.assert_allclose(normalise(scale * w), normalise(w), rtol=1e-5)


def test_only_kernels_are_touched_and_the_structure_stays():
    params = {"params": {"Dense_0": {"kernel": kernel((6, 4)), "bias": kernel((4,))}, "scale": kernel(())}}
    dense = normalise(params)["params"]
    assert jax.tree.structure(dense) == jax.tree.structure(params["params"])
    np.testing.assert_array_equal(dense["Dense_0"]["bias"], params["params"]["Dense_0"]["bias"])
    np.testing.assert_array_equal(dense["scale"], params["params"]["scale"])
    np.testing.assert_allclose(sigma(dense["Dense_0"]["kernel"]), 1, rtol=1e-5)


def test_where_chooses_by_path():
    params = {"first": {"kernel": kernel((6, 4))}, "last": {"kernel": kernel((6, 4))}}
    seen = []
    chosen = normalise(params, where=lambda path, leaf: seen.append(path) or path.startswith("first"))
    assert seen == ["first/kernel", "last/kernel"]
    np.testing.assert_array_equal(chosen["last"]["kernel"], params["last"]["kernel"])
    np.testing.assert_allclose(sigma(chosen["first"]["kernel"]), 1, rtol=1e-5)


def test_a_network_of_dense_layers_is_1_lipschitz():
    def network(params, x):
        for w in params:
            x = jnp.maximum(x @ w, 0.2 * (x @ w))
        return x[:, 0]

    params = normalise([3 * kernel((8, 32)), 3 * kernel((32, 32), 1), 3 * kernel((32, 1), 2)])
    slopes = jax.jit(lambda x: gan.r1(lambda x: network(params, x), x))(kernel((200, 8), 3))
    assert 0 < np.max(slopes) <= 1 + 1e-5


def test_a_convolution_is_bounded_by_the_root_of_its_taps():
    w = normalise(kernel((3, 3, 2, 4)), iterations=EXACT)
    operator = jax.jacobian(lambda x: nets.convolve(x, w))(jnp.zeros((1, 8, 8, 2))).reshape(8 * 8 * 4, 8 * 8 * 2)
    assert 1 < np.linalg.norm(operator, 2) <= 3 * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (2, 2, 3, 8)])
def test_the_gradient_is_the_papers_and_the_true_one(shape):
    """Miyato et al., Eq. 12, and what differentiation through the singular value decomposition says."""
    w, cotangent = kernel(shape), kernel(shape, 1)
    gradient = jax.grad(lambda w: jnp.sum(cotangent * normalise(w, iterations=EXACT)))(w)
    matrix, c = (np.asarray(a, np.float64).reshape(-1, shape[-1]) for a in (w, cotangent))
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    papers = (c - np.sum(c * matrix / s[0]) * np.outer(u[:, 0], vh[0])) / s[0]
    np.testing.assert_allclose(gradient.reshape(matrix.shape), papers, atol=2e-5)
    with jax.enable_x64(True):
        true = jax.grad(lambda m: jnp.sum(c * m / jnp.linalg.svd(m, compute_uv=False)[0]))(jnp.asarray(matrix))
    np.testing.assert_allclose(gradient.reshape(matrix.shape), true, atol=2e-5)


def test_a_kernel_of_zeros_stays_and_has_a_gradient():
    value, gradient = jax.value_and_grad(lambda w: normalise(w).sum())(jnp.zeros((3, 3, 4, 8)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 1)


def test_under_jit_and_vmap():
    stack = jnp.stack([kernel((3, 3, 4, 8), seed) for seed in range(3)])
    alone = jnp.stack([normalise(w) for w in stack])
    np.testing.assert_allclose(jax.jit(jax.vmap(normalise))(stack), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_single(dtype):
    w = kernel((3, 3, 4, 8)).astype(dtype)
    normalised = normalise(w, iterations=EXACT)
    assert normalised.dtype == dtype
    np.testing.assert_allclose(normalised.astype(jnp.float32), w.astype(jnp.float32) / sigma(w), rtol=2**-8)


def test_double_precision_stays():
    with jax.enable_x64(True):
        w = kernel((6, 4)).astype(jnp.float64)
        np.testing.assert_allclose(normalise(w), w / sigma(w), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gan.spectral_normalise({"a": jnp.ones((2, 3), int)}), TypeError, "`a` must be floating-point"),
        (
            lambda: gan.spectral_normalise({"a": {"b": jnp.ones(3)}}, where=lambda path, leaf: True),
            ValueError,
            r"`a/b` must have at least 2 axes, got shape \[3\]",
        ),
        (
            lambda: gan.spectral_normalise(jnp.ones((2, 2)), iterations=0),
            ValueError,
            "`iterations` must be an integer of at least 1",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
