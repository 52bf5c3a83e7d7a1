"""The inception score against its definition in float64, at once and in pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import metrics
from jaxgen.metrics import InceptionScore, inception_score, predictions
from tests.metrics import peers, pieces

CLASSES, IMAGES = 7, 8

score = jax.jit(inception_score, static_argnames="splits")
update = jax.jit(predictions.update)
merge = jax.jit(predictions.merge)
compute = jax.jit(predictions.compute)


def naive(logits):
    """exp of the mean Kullback-Leibler divergence from the mean, as it is written."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    mean = p.mean(0)
    return np.exp(np.mean([sum(q * np.log(q / m) for q, m in zip(row, mean, strict=True) if q > 0) for row in p]))


def logits(images, *, seed=0):
    return (3 * np.random.default_rng(seed).normal(size=(images, CLASSES)) + 50).astype(np.float32)


def gathered(x, sizes):
    return pieces.gathered(predictions.init(CLASSES), update, x, sizes, rows=IMAGES)


@pytest.mark.parametrize(("images", "splits"), [(40, 1), (43, 4), (10, 10)])
def test_agrees_with_the_definition(images, splits):
    """Part after part, as long as each other or longer by one."""
    x = logits(images)
    parts = [naive(x[i * images // splits : (i + 1) * images // splits]) for i in range(splits)]
    got = score(x, splits=splits)
    assert isinstance(got, InceptionScore)
    assert got.mean.shape == got.deviation.shape == ()
    np.testing.assert_allclose(got.mean, np.mean(parts), rtol=1e-5)
    np.testing.assert_allclose(got.deviation, np.std(parts), rtol=1e-4, atol=1e-6)


def test_scores_that_are_known():
    certain = jnp.log(jnp.eye(CLASSES))
    np.testing.assert_allclose(score(certain, splits=1).mean, CLASSES, rtol=1e-6)
    np.testing.assert_allclose(score(certain[:3], splits=1).mean, 3, rtol=1e-6)
    np.testing.assert_allclose(score(certain[jnp.array([4, 4, 4])], splits=1).mean, 1, rtol=1e-6)
    np.testing.assert_allclose(score(jnp.zeros((5, CLASSES)), splits=1).mean, 1, rtol=1e-6)


def test_of_probabilities_the_logarithms():
    p = np.random.default_rng(0).dirichlet(np.ones(CLASSES), size=20).astype(np.float32)
    p[3] = np.eye(CLASSES)[2]
    with np.errstate(divide="ignore"):
        x = np.log(p)
    mean = p.mean(0, dtype=np.float64)
    divergences = np.where(p > 0, p * (np.where(p > 0, x, 0) - np.log(mean)), 0).sum(1)
    np.testing.assert_allclose(score(x, splits=1).mean, np.exp(divergences.mean()), rtol=1e-5)
    assert np.isfinite(jax.jit(jax.grad(lambda x: inception_score(x, splits=1).mean))(x)).all()


@pytest.mark.parametrize("sizes", [[8] * 5, [1] * 40, [3, 8, 0, 7, 1, 8, 8, 5]])
def test_pieces_make_the_whole(sizes):
    x = logits(40)
    state = gathered(x, sizes)
    assert state.images == 40
    np.testing.assert_allclose(compute(state), naive(x), rtol=1e-5)


def test_merging_in_any_order():
    x = logits(30)
    nothing, parts = predictions.init(CLASSES), [gathered(x[a:b], [b - a]) for a, b in ((0, 8), (8, 9), (9, 16), (16, 24), (24, 30))]  # fmt: skip
    for order in (parts, parts[::-1], [nothing, *parts, nothing]):
        np.testing.assert_allclose(compute(functools.reduce(merge, order)), naive(x), rtol=1e-5)
    assert merge(nothing, nothing).images == 0


def test_devices_that_saw_different_images():
    x, mask = logits(64).reshape(8, 8, CLASSES), np.arange(64).reshape(8, 8) % 5 > 0

    def share(x, mask):
        state = predictions.update(predictions.init(CLASSES), x, mask=mask)
        return predictions.compute(metrics.merge_across(predictions.merge, state, "data"))

    scores = jax.pmap(share, axis_name="data")(x, mask)
    np.testing.assert_allclose(scores, np.full(8, naive(x[mask])), rtol=1e-5)


def test_dtypes():
    x = jnp.asarray(logits(20) - 50, jnp.bfloat16)
    state = update(predictions.init(CLASSES), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("int32"), jnp.dtype("float32")}
    np.testing.assert_allclose(compute(state), naive(x), rtol=1e-5)
    np.testing.assert_allclose(score(x, splits=1).mean, naive(x), rtol=1e-5)


def test_no_image_has_no_score():
    with pytest.raises(ValueError, match="`state` must hold at least 1 image, got 0"):
        predictions.compute(predictions.init(CLASSES))
    assert np.isnan(compute(predictions.init(CLASSES)))


def test_nan_comes_out():
    x = logits(20)
    x[3, 2] = np.nan
    assert np.isnan(score(x, splits=2).mean)


def test_agrees_with_torch_fidelity():
    peer = peers.torch_fidelity("isc")
    import torch

    x = logits(43)
    expected = peer.isc_features_to_metric(torch.tensor(x), splits=4, shuffle=False)
    got = score(x, splits=4)
    np.testing.assert_allclose(got.mean, expected["inception_score_mean"], rtol=1e-5)
    np.testing.assert_allclose(got.deviation, expected["inception_score_std"], rtol=1e-4)


ONES = jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: inception_score(jnp.ones(4)), ValueError, r"`logits` must have shape \[any, any\], got \[4\]"),
        (lambda: inception_score(jnp.ones((4, 3), int)), TypeError, "`logits` must be floating-point.*, got dtype int32"),
        (lambda: inception_score(ONES), ValueError, "`splits` must be at most the number of rows of `logits`, 4, got 10"),
        (lambda: inception_score(ONES, splits=0), ValueError, "`splits` must be an integer of at least 1, got 0"),
        (lambda: predictions.init(0), ValueError, "`classes` must be an integer of at least 1, got 0"),
        (lambda: predictions.update(predictions.init(5), ONES), ValueError, "`a` and `b` must be of as many classes, got 5 and 3"),
        (lambda: predictions.update(predictions.init(3), ONES, mask=jnp.ones(3, bool)), ValueError, r"`mask` must have shape \[4\], got \[3\]"),
        (lambda: predictions.update(predictions.init(3), ONES, mask=jnp.ones(4)), TypeError, "`mask` must be bool, got dtype float32"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    for function in (call, jax.jit(call)):
        with pytest.raises(error, match=message):
            function()
