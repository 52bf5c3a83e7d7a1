"""Free adversarial training: against steps by hand, and on any placement."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import place, robust, train
from jaxgen.attacks.threat import ThreatModel, distance

KEY = jax.random.key(0)
THREAT = ThreatModel(math.inf, eps=0.3, low=-1.0, high=1.0)
SIZE, WIDTH = 16, 5


def loss(params, batch, key):
    logits = jnp.tanh(batch["image"] @ params["first"]) @ params["second"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), {"draw": jax.random.uniform(key)}


def start(key):
    first, second = jax.random.split(key)
    return {"first": jax.random.normal(first, (WIDTH, 8)), "second": jax.random.normal(second, (8, 3))}


def batch(step, size=SIZE):
    rng = np.random.default_rng(step)
    return {
        "image": rng.uniform(-1, 1, size=(size, WIDTH)).astype(np.float32),
        "label": rng.integers(0, 3, size=size),
    }


def method(shape=(SIZE, WIDTH), threat=THREAT, **options):
    return robust.free(loss, optax.sgd(0.1, momentum=0.5), start, threat, shape, **{"replays": 3, **options})


def close(got, wanted, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerance}), got, wanted
    )


def test_by_hand():
    ours = method(step_size=0.2)
    state = ours.init(KEY)
    params, delta = state.learner.params, np.zeros((SIZE, WIDTH), np.float32)
    velocity = jax.tree.map(jnp.zeros_like, params)
    step = jax.jit(ours.step)
    gradients = jax.jit(jax.value_and_grad(lambda params, x, labels: loss(params, {"image": x, "label": labels}, KEY)[0], (0, 1)))  # fmt: skip
    for i in range(3):
        rows, values = batch(i), []
        for _ in range(3):
            x = np.clip(rows["image"] + delta, -1, 1)
            value, (slope, ascent) = gradients(params, x, rows["label"])
            values.append(value)
            velocity = jax.tree.map(lambda v, g: 0.5 * v + g, velocity, slope)
            params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
            delta = np.clip(delta + 0.2 * np.sign(ascent), -0.3, 0.3)
        state, metrics = step(state, rows, KEY)
        np.testing.assert_allclose(metrics["loss"], np.mean(values), rtol=1e-4)
    close((state.learner.params, state.perturbation), (params, delta))
    assert state.step == 3
    assert state.average == ()
    assert step._cache_size() == 1


def test_one_replay_trains_on_the_perturbation_of_the_step_before():
    # With one replay and one batch over and over, it is FGSM training whose steps go on from each other.
    ours = method(replays=1)
    first, _ = ours.step(ours.init(KEY), batch(0), KEY)
    plain = train.minimise(loss, optax.sgd(0.1, momentum=0.5), start)
    expected, metrics = plain.step(plain.init(KEY), batch(0), KEY)
    close(first.learner.params, expected.learner.params)
    ascent = jax.grad(lambda x: loss(start(KEY), batch(0) | {"image": x}, KEY)[0])(batch(0)["image"])
    np.testing.assert_allclose(first.perturbation, 0.3 * np.sign(ascent), atol=1e-7)
    moved = batch(0) | {"image": np.clip(batch(0)["image"] + 0.3 * np.sign(ascent), -1, 1)}
    expected, metrics = plain.step(expected, moved, KEY)
    second, got = ours.step(first, batch(0), KEY)
    close(second.learner.params, expected.learner.params)
    np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(got["grad_norm"], metrics["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_what_is_trained_on_is_in_ball_and_bounds(norm):
    seen = []

    def spied(params, batch, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["image"])
        return loss(params, batch, key)

    threat = ThreatModel(norm, eps=jnp.linspace(0.1, 1.0, SIZE), low=-1.0, high=1.0)
    ours = robust.free(spied, optax.sgd(0.1), start, threat, (SIZE, WIDTH), replays=4, step_size=3.0)
    state, _ = jax.jit(ours.step)(ours.init(KEY), batch(0), KEY)
    jax.effects_barrier()
    assert len(seen) == 4
    for x in seen:
        assert np.all(np.abs(x) <= 1)
        assert np.all(distance(norm, x, batch(0)["image"]) <= threat.eps * 1.00001)
    # Steps beyond the ball end on its surface.
    np.testing.assert_allclose(distance(norm, state.perturbation, np.zeros_like(seen[0])), threat.eps, rtol=1e-5)


@pytest.mark.parametrize("placement", ["jit", "pmap"])
def test_eight_devices_are_one(placement):
    def run(placed):
        state = placed.init(KEY)
        for i in range(4):
            state, metrics = placed.step(state, batch(i), KEY)
        return state, metrics

    options = {"average": train.ema(0.9)}
    expected, expected_metrics = run(place.jit(method(**options), place.mesh(jax.devices()[:1])))
    if placement == "jit":
        state, metrics = run(place.jit(method(**options), place.mesh()))
        delta = state.perturbation
    else:
        state, metrics = run(place.pmap(method((SIZE // 8, WIDTH), axis_name="data", **options)))
        delta = np.asarray(state.perturbation).reshape(SIZE, WIDTH)
        state = place.first_copy(state)
    close(metrics, expected_metrics)
    close((state.learner, state.average, delta), (expected.learner, expected.average, expected.perturbation))


def test_it_learns_to_resist():
    def sloped(params, batch, key):
        margin = (2 * batch["label"] - 1) * (batch["image"] @ params)
        return jnp.mean(jax.nn.softplus(-margin)), {}

    # The label follows the first pixel; the others tell it too, but by less than eps.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=64)
    signs = (2 * labels - 1)[:, None]
    images = np.concatenate([0.8 * signs, 0.1 * np.tile(signs, 20)], axis=1).astype(np.float32)
    rows = {"image": images, "label": labels}
    ours = robust.free(sloped, optax.sgd(0.2), lambda key: jnp.zeros(21), THREAT, (64, 21), replays=4)
    plain = train.minimise(sloped, optax.sgd(0.2), lambda key: jnp.zeros(21))

    def share_of_fragile_weight(method, steps):
        state, step = method.init(KEY), jax.jit(method.step)
        for _ in range(steps):
            state, _ = step(state, rows, KEY)
        weight = np.abs(state.learner.params)
        return weight[1:].sum() / weight.sum()

    assert share_of_fragile_weight(plain, 200) > 0.5
    assert share_of_fragile_weight(ours, 50) < 0.2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: method(replays=0), ValueError, "`replays` must be an integer of at least 1"),
        (lambda: once(method(step_size=-1.0)), ValueError, r"`step_size` must lie in \[0, inf\]"),
        (lambda: once(method((8, WIDTH))), ValueError, r"`batch\['image'\]` must have shape \[8, 5\], got \[16, 5\]"),
        (lambda: once(method((SIZE,), field="label")), TypeError, "`x` must be floating-point"),
        (lambda: once(method(threat=0.1)), TypeError, "`threat` must be a ThreatModel"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def once(ours):
    ours.step(ours.init(KEY), batch(0), KEY)
