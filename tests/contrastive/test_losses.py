"""The losses of all pairs against double loops in float64, and against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import contrastive
from tests.contrastive import oracle

N, D = 5, 3
LABELS = np.array([0, 1, 0, 2, 1])
OF_VIEWS = ["nt_xent", "dcl"]
OF_PAIRS = ["nt_xent", "dcl", "info_nce", "siglip"]
NAMES = [*OF_PAIRS, "supcon"]


def embeddings(seed=0, shape=(N, D)):
    first, second = np.random.default_rng(seed).normal(size=(2, *shape))
    return first, second


def call(module, name, first, second, temperature, bias):
    """One loss of the module, ours or the oracle's, on the same five arguments."""
    options = {"temperature": temperature, **({"bias": bias} if name == "siglip" else {})}
    loss = partial(getattr(module, name), **options)
    return loss(first, LABELS) if name == "supcon" else loss(first, second)


def ours(name, **options):
    """The loss, compiled, of two views (the first alone has classes)."""
    if name == "supcon":
        return jax.jit(lambda first, second: contrastive.supcon(first, LABELS, **options))
    return jax.jit(partial(getattr(contrastive, name), **options))


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_double_loop(name):
    arguments = (*embeddings(), np.float64(0.3), np.float64(-1.5))
    expected = call(oracle, name, *arguments)
    weights = np.random.default_rng(1).normal(size=expected.shape)  # every anchor's gradient by itself
    used = [0, 1, 2, 3] if name == "siglip" else [0, 2] if name == "supcon" else [0, 1, 2]

    def weighted(*arguments):
        values = call(contrastive, name, *arguments)
        return jnp.sum(weights * values), values

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(weighted, argnums=used, has_aux=True))
        (_, values), gradients = run(*map(jnp.asarray, arguments))
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    for at, gradient in zip(used, gradients, strict=True):

        def moved(x, at=at):
            return np.sum(weights * call(oracle, name, *arguments[:at], x, *arguments[at + 1 :]))

        np.testing.assert_allclose(gradient, oracle.slope(moved, arguments[at]), atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_examples_does_not_matter(name):
    first, second = (jnp.asarray(x, jnp.float32) for x in embeddings())
    order = np.array([3, 0, 4, 2, 1])
    loss = jax.jit(contrastive.supcon) if name == "supcon" else ours(name)
    plain = [first, jnp.asarray(LABELS)] if name == "supcon" else [first, second]
    rows = np.concatenate([order, order + N]) if name in OF_VIEWS else order
    np.testing.assert_allclose(loss(*(x[order] for x in plain)), loss(*plain)[rows], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_collapsed_embeddings(name):
    """All cosines are 1: the loss counts its candidates."""
    x = jnp.ones((N, D))
    expected = {
        "nt_xent": np.log(2 * N - 1),
        "dcl": np.log(2 * N - 2),
        "info_nce": np.log(N),
        "siglip": np.log1p(np.exp(-4)) + (N - 1) * np.log1p(np.exp(4)),
        "supcon": np.where(LABELS == 2, 0, np.log(N - 1)),
    }
    options = {"temperature": 0.2, **({"bias": -1.0} if name == "siglip" else {})}
    np.testing.assert_allclose(ours(name, **options)(x, x), expected[name], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_separated_embeddings(name, temperature):
    """Cosines 1 within and 0 between examples; a loss near 0 keeps its digits."""
    n, sharp = len(LABELS), np.exp(-1 / temperature)
    expected = {
        "nt_xent": np.log1p((2 * n - 2) * sharp),
        "dcl": np.log(2 * n - 2) - 1 / temperature,
        "info_nce": np.log1p((n - 1) * sharp),
        "siglip": np.log1p(sharp) + (n - 1) * np.log(2),
        "supcon": np.where(LABELS == 2, 0, np.log1p((n - 2) * sharp)),
    }
    x = jnp.eye(n)[LABELS if name == "supcon" else np.arange(n)]
    options = {"temperature": temperature, **({"bias": 0.0} if name == "siglip" else {})}
    np.testing.assert_allclose(ours(name, **options)(x, x), expected[name], rtol=1e-3)


def test_supcon_of_two_views_is_nt_xent():
    first, second = embeddings()
    supcon = jax.jit(partial(contrastive.supcon, temperature=0.5))
    values = supcon(np.concatenate([first, second]), np.tile(np.arange(N), 2))
    np.testing.assert_allclose(values, ours("nt_xent", temperature=0.5)(first, second), rtol=1e-6)


@pytest.mark.parametrize("block_size", [None, 2])
def test_supcon_of_one_that_is_alone_is_zero_and_moves_nothing(block_size):
    x = jnp.asarray(embeddings()[0])
    loss = jax.jit(jax.value_and_grad(lambda x: contrastive.supcon(x, np.arange(N), block_size=block_size).sum()))
    value, gradient = loss(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_do_not_matter(name):
    first, second = (jnp.asarray(x, jnp.float32) for x in embeddings())
    loss = ours(name)
    for length in (1e-30, 1e30):
        np.testing.assert_allclose(loss(length * first, second), loss(first, second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [None, 2])
def test_zero_rows_and_low_temperatures_stay_finite(name, block_size):
    first = np.float32(embeddings()[0])
    first[1] = 0

    def loss(first, second, temperature):
        return ours(name, temperature=temperature, block_size=block_size)(first, second).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    for temperature in (0.5, 0.001):
        value, gradients = run(first, -first, temperature)
        assert np.isfinite(value)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [None, 2])
def test_bfloat16_embeddings_are_reduced_in_float32(name, block_size):
    first, second = (jnp.asarray(x, jnp.bfloat16) for x in embeddings())

    loss = ours(name, block_size=block_size)
    values = loss(first, second)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, loss(first.astype(jnp.float32), second.astype(jnp.float32)), rtol=1e-6)
    gradient = jax.eval_shape(jax.grad(lambda first: loss(first, second).mean()), first)
    assert gradient.dtype == jnp.bfloat16


def test_normalise():
    x = jnp.array([[3.0, -4.0], [0.0, 0.0], [3e-30, -4e-30], [3e30, -4e30]])
    unit, back = jax.vjp(jax.jit(contrastive.normalise), x)
    direction = np.array([0.6, -0.8])
    np.testing.assert_allclose(unit, [direction, [0, 0], direction, direction], rtol=1e-6)
    (gradient,) = back(jnp.ones_like(x))
    np.testing.assert_array_equal(gradient[1], 1)
    # d(x / |x|) takes what is across x, over |x|.
    across = 1 - direction * direction.sum()
    for row, length in ((0, 5.0), (2, 5e-30), (3, 5e30)):
        np.testing.assert_allclose(gradient[row] * length, across, rtol=1e-5)
    assert contrastive.normalise(x.astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(TypeError, match="`x` must be floating-point"):
        contrastive.normalise(jnp.ones((2, 2), int))


X = jnp.ones((4, 2))


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize(
    ("first", "second", "options", "error", "message"),
    [
        (X, X[:3], {}, ValueError, r"`second` must have the shape of `first`, \[4, 2\], got \[3, 2\]"),
        (X, X[:, :1], {}, ValueError, r"`second` must have the shape of `first`, \[4, 2\], got \[4, 1\]"),
        (X[0], X[0], {}, ValueError, r"`first` must have shape \[any, any\], got \[2\]"),
        (X[:1], X[:1], {}, ValueError, r"`first` must hold at least 2 examples, got shape \[1, 2\]"),
        (X.astype(int), X, {}, TypeError, "`first` must be floating-point"),
        (X, X.astype(int), {}, TypeError, "`second` must be floating-point"),
        (X, X, {"temperature": 0.0}, ValueError, "`temperature` must be above 0 and finite, got 0"),
        (X, X, {"temperature": -1.0}, ValueError, "`temperature` must be above 0 and finite, got -1"),
        (X, X, {"temperature": jnp.ones(2)}, ValueError, r"`temperature` must have shape \[\], got \[2\]"),
        (X, X, {"block_size": 0}, ValueError, "`block_size` must be an integer of at least 1, got 0"),
        (X, X, {"block_size": 2.0}, ValueError, "`block_size` must be an integer of at least 1, got 2.0"),
    ],
)
def test_bad_pairs_are_refused(name, first, second, options, error, message):
    with pytest.raises(error, match=message):
        getattr(contrastive, name)(first, second, **options)


@pytest.mark.parametrize(
    ("x", "labels", "options", "error", "message"),
    [
        (X, np.arange(3), {}, ValueError, r"`labels` must have shape \[4\], got \[3\]"),
        (X, np.ones((4, 2), int), {}, ValueError, r"`labels` must have shape \[4\], got \[4, 2\]"),
        (X, np.ones(4), {}, TypeError, "`labels` must be integers, got dtype float32"),
        (X[:1], np.arange(1), {}, ValueError, r"`embeddings` must hold at least 2 examples, got shape \[1, 2\]"),
        (X[0], np.arange(2), {}, ValueError, r"`embeddings` must have shape \[any, any\], got \[2\]"),
        (X.astype(int), np.arange(4), {}, TypeError, "`embeddings` must be floating-point"),
        (X, np.arange(4), {"temperature": 0.0}, ValueError, "`temperature` must be above 0 and finite, got 0"),
        (X, np.arange(4), {"block_size": -1}, ValueError, "`block_size` must be an integer of at least 1, got -1"),
    ],
)
def test_bad_classes_are_refused(x, labels, options, error, message):
    with pytest.raises(error, match=message):
        contrastive.supcon(x, labels, **options)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.inf, "`bias` must be finite, got inf"),
        (jnp.ones(4), r"`bias` must have shape \[\], got \[4\]"),
    ],
)
def test_bad_biases_are_refused(bias, message):
    with pytest.raises(ValueError, match=message):
        contrastive.siglip(X, X, bias=bias)
