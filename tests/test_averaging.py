"""Power-function averages against their definition, and reconstructed ones against the tracked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import averaging, train

KEY = jax.random.key(0)
TRACKED = (0.05, 0.10)


def gamma_of(sigma_rel):
    """Eq. 3, inverted by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = 0.5 * (low + high)
        shorter = np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) < sigma_rel
        low, high = (low, gamma) if shorter else (gamma, high)
    return low


def profile(steps, sigma_rel):
    """What the average after ``steps`` steps weighs each of them by: Eq. 2, unrolled."""
    gamma, weights = gamma_of(sigma_rel), np.zeros(steps)
    for t in range(1, steps + 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        weights *= beta
        weights[t - 1] += 1 - beta
    return weights


@pytest.fixture(scope="module")
def walk():
    """2,000 steps of a parameter that drifts and jitters, as training does."""
    rng = np.random.default_rng(0)
    time = np.linspace(0, 1, 2001)[1:, None]
    return np.exp(-3 * time) * [1.0, -2.0, 0.5, 1.0] + 0.3 * rng.normal(size=(2000, 4)) / np.sqrt(1 + 20 * time)


def snapshots(walk, count, lengths=TRACKED):
    steps = np.linspace(0, len(walk), count + 1).astype(int)[1:]
    return [(int(t), tuple({"w": profile(t, length) @ walk[:t]} for length in lengths)) for t in steps]


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_the_profile_has_the_length_asked_for(sigma_rel):
    weights = profile(4000, sigma_rel)
    time = (np.arange(4000) + 0.5) / 4000
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(weights @ time**2 - (weights @ time) ** 2), sigma_rel, rtol=1e-4)


def test_minimise_keeps_the_averages_of_the_definition():
    losses = lambda params, batch, key: (jnp.sum((params["w"] - batch) ** 2), {})  # noqa: E731
    method = train.minimise(
        losses, optax.sgd(0.05), lambda key: {"w": jnp.array([1.0, -1.0])}, average=averaging.power_ema(TRACKED)
    )
    state, step, iterates = method.init(KEY), jax.jit(method.step), []
    for k in range(40):
        state, _ = step(state, jnp.array([np.sin(k), 2.0]), KEY)
        iterates.append(np.asarray(state.learner.params["w"], np.float64))
    for average, length in zip(state.average, TRACKED, strict=True):
        np.testing.assert_allclose(average["w"], profile(40, length) @ np.array(iterates), rtol=1e-5)


def test_the_longest_average_is_the_plain_mean():
    average = averaging.power_ema((averaging.LONGEST,))
    (value,) = average.init(jnp.array(9.0))
    for step, x in enumerate([1.0, 2.0, 6.0], start=1):
        (value,) = average.update((value,), jnp.array(x), jnp.array(step))
    np.testing.assert_allclose(value, 3.0, rtol=1e-6)


def test_inner_products_are_those_of_the_profiles():
    """The weights solve the least squares of the profiles themselves, unrolled: no snapshot can come nearer."""
    steps, target = [400, 900, 1000], 0.07
    basis = np.zeros((6, 1000))
    for i, t in enumerate(steps):
        for j, length in enumerate(TRACKED):
            basis[2 * i + j, :t] = profile(t, length)
    wanted = np.linalg.lstsq(basis.T, profile(1000, target), rcond=None)[0].reshape(3, 2)
    np.testing.assert_allclose(averaging.power_weights(steps, TRACKED, target=target), wanted, atol=2e-3)


@pytest.mark.parametrize("length", TRACKED)
def test_a_tracked_length_is_exact(walk, length):
    stored = snapshots(walk, 8)
    got = averaging.reconstruct(stored, TRACKED, target=length)
    np.testing.assert_allclose(got["w"], stored[-1][1][TRACKED.index(length)]["w"], rtol=1e-6)
    earlier = averaging.reconstruct(stored, TRACKED, target=length, step=stored[4][0])
    np.testing.assert_allclose(earlier["w"], stored[4][1][TRACKED.index(length)]["w"], rtol=1e-6)


@pytest.mark.parametrize("target", [0.03, 0.07, 0.15])
def test_other_lengths_come_nearer_with_more_snapshots(walk, target):
    wanted = profile(len(walk), target) @ walk
    errors = [
        np.linalg.norm(averaging.reconstruct(snapshots(walk, n), TRACKED, target=target)["w"] - wanted)
        for n in (2, 8, 32)
    ]
    nearest = min(np.linalg.norm(average["w"] - wanted) for average in snapshots(walk, 1)[0][1])
    assert errors[2] < errors[0], errors
    assert errors[2] < 0.02 * nearest, (errors, nearest)


def test_snapshots_come_in_any_order_and_keep_their_dtype(walk):
    stored = snapshots(walk, 5)
    halves = [(t, jax.tree.map(lambda w: w.astype(np.float32), pair)) for t, pair in reversed(stored)]
    got = averaging.reconstruct(halves, TRACKED, target=0.07)
    assert got["w"].dtype == np.float32
    np.testing.assert_allclose(got["w"], averaging.reconstruct(stored, TRACKED, target=0.07)["w"], rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: averaging.power_ema((0.05, 0.3)), r"`sigma_rel` must lie in \(0, 0.2887\], got \[0.05, 0.3\]"),
        (lambda: averaging.power_ema(()), "`sigma_rel` must lie in"),
        (lambda: averaging.power_weights([1], TRACKED, target=0.0), r"`target` must lie in \(0, 0.2887\], got \[0.0\]"),
        (lambda: averaging.power_weights([], TRACKED, target=0.1), "`steps` must be different numbers"),
        (lambda: averaging.power_weights([5, 5], TRACKED, target=0.1), r"`steps` must be different.*got \[5, 5\]"),
        (lambda: averaging.power_weights([0], TRACKED, target=0.1), "`steps` must be an integer of at least 1"),
        (
            lambda: averaging.reconstruct([(3, ({},))], TRACKED, target=0.1),
            "must hold 2 averages each.*got 1 at step 3",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
