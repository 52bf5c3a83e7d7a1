"""MoCo and BYOL as methods: against steps by hand, and on any placement."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import contrastive, momentum, place, random, train

KEY = jax.random.key(0)
WIDTH, FEATURES = 6, 4


def embed(params, x):
    return jnp.tanh(x) @ params["encoder"]


def predict(params, z):
    return z @ params["predictor"]


def start(key):
    first, second = jax.random.split(key)
    return {
        "encoder": jax.random.normal(first, (WIDTH, FEATURES)),
        "predictor": jax.random.normal(second, (FEATURES, FEATURES)),
    }


def views(axis_name=None):
    def draw(key, batch):
        keys = random.example_keys(key, len(batch), axis_name=axis_name)
        return tuple(batch + 0.1 * random.normal(random.fold(keys, view), (WIDTH,)) for view in (0, 1))

    return draw


def method(name, axis_name=None, **options):
    optimiser, average = optax.sgd(0.1, momentum=0.5), train.ema(0.9, warmup=False)
    if name == "moco":
        return momentum.moco(
            embed, views(axis_name), optimiser, start, FEATURES,
            **{"queue_size": 24, "average": average, "axis_name": axis_name, **options},
        )  # fmt: skip
    return momentum.byol(embed, predict, views(axis_name), optimiser, start, average=average, axis_name=axis_name)


def batch(step, size=16):
    return np.random.default_rng(step).normal(size=(size, WIDTH)).astype(np.float32)


def test_moco_by_hand():
    ours, params = method("moco"), None
    state = ours.init(KEY)
    params, target, queue = state.learner.params, state.target, state.queue
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, rtol=1e-5)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for i in range(3):
        view_key, _ = jax.random.split(jax.random.fold_in(KEY, i))
        first, second = views()(view_key, batch(i))
        keys = contrastive.normalise(embed(target, second))

        def loss(params, first=first, keys=keys, queue=queue):
            return contrastive.moco_loss(embed(params, first), keys, queue, temperature=0.2).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        velocity = jax.tree.map(lambda v, g: 0.5 * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
        target = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, target, params)
        queue = np.concatenate([keys, queue])[:24]
        state, metrics = ours.step(state, batch(i), KEY)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for got, wanted in ((state.learner.params, params), (state.target, target), (state.queue, queue)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)
    assert 0 <= float(metrics["accuracy"]) <= 1


def test_byol_by_hand():
    ours = method("byol")
    state = ours.init(KEY)
    params, target = state.learner.params, state.target
    view_key, _ = jax.random.split(jax.random.fold_in(KEY, 0))
    first, second = views()(view_key, batch(0))

    def loss(params):
        ways = ((first, second), (second, first))
        parts = [contrastive.byol_loss(predict(params, embed(params, a)), embed(target, b)) for a, b in ways]
        return jnp.mean(parts[0]) + jnp.mean(parts[1])

    value, gradient = jax.value_and_grad(loss)(params)
    state, metrics = ours.step(state, batch(0), KEY)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    followed = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, target, moved)
    for got, wanted in ((state.learner.params, moved), (state.target, followed)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)
    assert state.queue == ()


@pytest.mark.parametrize("name", ["moco", "byol"])
@pytest.mark.parametrize("placement", ["jit", "pmap"])
def test_eight_devices_are_one(name, placement):
    def run(placed):
        state = placed.init(KEY)
        for i in range(5):
            state, metrics = placed.step(state, batch(i), KEY)
        return state, metrics

    expected, expected_metrics = run(place.jit(method(name), place.mesh(jax.devices()[:1])))
    if placement == "jit":
        state, metrics = run(place.jit(method(name), place.mesh()))
    else:
        state, metrics = run(place.pmap(method(name, "data")))
        state = place.first_copy(state)
    for label in expected_metrics:
        np.testing.assert_allclose(metrics[label], expected_metrics[label], rtol=1e-4)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_moco_learns_to_tell_examples_apart():
    data = batch(0, 64)
    ours = momentum.moco(embed, views(), optax.adam(0.01), start, FEATURES, queue_size=64, average=train.ema(0.9))
    state, step = ours.init(KEY), jax.jit(ours.step)
    losses = []
    for i in range(60):
        state, metrics = step(state, np.roll(data, 16 * i, axis=0)[:16], KEY)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < np.mean(losses[8:18]) - 0.1
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: method("moco", queue_size=0), "`queue_size` must be an integer of at least 1"),
        (lambda: method("moco", temperature=0.0), "`temperature` must be"),
        (lambda: taken("moco", queue_size=8), "`queue_size` must be at least the global batch, 16, got 8"),
        (lambda: momentum.moco(embed, views(), optax.sgd(1), start, 0), "`features` must be an integer of at least 1"),
        (
            lambda: once(momentum.moco(embed, views(), optax.sgd(1), start, 5, queue_size=32)),
            r"`embed\(params, x\)` must have shape \[any, 5\], got \[16, 4\]",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def taken(name, **options):
    once(method(name, **options))


def once(ours):
    ours.step(ours.init(KEY), batch(0), KEY)
