"""Two players in turn: against loops written by hand, by count, and on any placement."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxgen import gan, nets, place, random, train

KEY = jax.random.key(0)
ROWS = np.arange(1.0, 13.0, dtype=np.float32)


def quadratic_game(k=1, **options):
    """A game whose updates a person can do by hand: d follows the rows' mean and g, g follows d."""
    return train.alternate(
        train.Player(
            lambda d, g, batch, key, carried: (0.5 * (d - batch.mean() * g) ** 2, {"seen": batch.mean()}),
            optax.sgd(0.1),
            lambda key: jnp.float32(0.5),
        ),
        train.Player(
            lambda g, d, batch, key, carried: (0.5 * (g - d) ** 2, {"seen": batch.mean()}),
            optax.sgd(0.2),
            lambda key: jnp.float32(2.0),
        ),
        discriminator_steps=k,
        **options,
    )


def run(method, steps, batch=ROWS, key=KEY):
    state, step = method.init(KEY), jax.jit(method.step)
    for _ in range(steps):
        state, metrics = step(state, batch, key)
    return state, metrics


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_game_by_hand(k):
    state, metrics = run(quadratic_game(k, average=train.ema(0.5, warmup=False)), 4)
    d, g, average = 0.5, 2.0, 2.0
    for _ in range(4):
        losses = []
        for i in range(k):
            residual = d - ROWS[i::k].mean() * g
            losses.append(0.5 * residual**2)
            d -= 0.1 * residual
        generator_loss = 0.5 * (g - d) ** 2
        g -= 0.2 * (g - d)
        average = 0.5 * average + 0.5 * g
    np.testing.assert_allclose(state.discriminator.params, d, rtol=1e-5)
    np.testing.assert_allclose(state.generator.params, g, rtol=1e-5)
    np.testing.assert_allclose(state.average, average, rtol=1e-5)
    np.testing.assert_allclose(metrics["discriminator_loss"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["generator_loss"], generator_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["discriminator_seen"], ROWS.mean())
    np.testing.assert_allclose(metrics["generator_seen"], ROWS[k - 1 :: k].mean())  # the last update's rows
    assert {"discriminator_grad_norm", "generator_grad_norm"} <= metrics.keys()
    assert int(state.step) == 4


@pytest.mark.parametrize("k", [1, 2])
def test_microbatches_take_the_step_of_the_whole(k):
    method = quadratic_game(k)
    parts = quadratic_game(k, microbatches=3)

    def linear(method):  # the mean of the gradients is the gradient of the mean where the loss is linear in the rows
        return run(method, 1)[1]["discriminator_seen"]

    np.testing.assert_allclose(linear(parts), linear(method))
    loss = lambda p, q, batch, key, carried: (jnp.mean((p - q * batch) ** 2), {})  # noqa: E731
    player = train.Player(loss, optax.sgd(0.01), lambda key: jax.random.normal(key))
    whole, whole_metrics = run(train.alternate(player, player, discriminator_steps=k), 3)
    split, split_metrics = run(train.alternate(player, player, discriminator_steps=k, microbatches=2), 3)
    np.testing.assert_allclose(split.discriminator.params, whole.discriminator.params, rtol=1e-5)
    np.testing.assert_allclose(split.generator.params, whole.generator.params, rtol=1e-5)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_feedback_follows_the_metrics_and_reaches_both_losses(k):
    def loss(params, opponent, batch, key, carried):
        return 0.0 * params, {"told": carried["weight"], "mean": batch.mean()}

    def update(carried, metrics, step):
        return {"weight": carried["weight"] + metrics["discriminator_mean"] + step}

    player = train.Player(loss, optax.sgd(0.1), lambda key: jnp.zeros(()))
    feedback = train.Feedback(lambda: {"weight": jnp.float32(1.0)}, update)
    state, metrics = run(train.alternate(player, player, discriminator_steps=k, feedback=feedback), 3)
    told_last = 1 + 2 * 6.5 + 1 + 2
    assert float(metrics["discriminator_told"]) == float(metrics["generator_told"]) == told_last
    assert float(state.carried["weight"]) == told_last + 6.5 + 3


def test_what_feedback_carries_from_a_plain_number_compiles_nothing_anew():
    player = train.Player(lambda p, q, *_: (0.0 * p, {}), optax.sgd(0.1), lambda key: jnp.zeros(()))
    feedback = train.Feedback(
        lambda: {"p": 0.0, "n": 1, "key": KEY},
        lambda carried, metrics, step: {"p": 0.5, "n": 2, "key": jax.random.fold_in(carried["key"], step)},
    )
    method = train.alternate(player, player, feedback=feedback)
    step, state = jax.jit(method.step), method.init(KEY)
    for _ in range(3):
        state, _ = step(state, ROWS, KEY)
    assert step._cache_size() == 1
    assert (float(state.carried["p"]), int(state.carried["n"])) == (0.5, 2)


@pytest.mark.parametrize(
    ("init", "update"),
    [
        (lambda: 0, lambda carried, metrics, step: carried + 0.5),
        (lambda: jnp.zeros(2), lambda carried, metrics, step: jnp.zeros(3)),
        (lambda: {"a": 0.0}, lambda carried, metrics, step: {"b": 0.0}),
        (lambda: {"a": 0.0}, lambda carried, metrics, step: (0.0,)),
    ],
)
def test_feedback_that_carries_on_something_else_is_refused(init, update):
    with pytest.raises(ValueError, match=r"`feedback` must carry on what it was given, .*, got .*"):
        run(quadratic_game(feedback=train.Feedback(init, update)), 1)


@pytest.mark.parametrize("k", [1, 3])
def test_every_update_draws_anew_and_a_run_repeats(k):
    draws = []

    def loss(params, opponent, batch, key, carried):
        jax.debug.callback(lambda x: draws.append(float(x)), jax.random.normal(key))
        return 0.0 * params, {}

    player = train.Player(loss, optax.sgd(0.1), lambda key: jnp.zeros(()))
    method = train.alternate(player, player, discriminator_steps=k)
    for _ in range(2):
        run(method, 3)
        jax.effects_barrier()
    assert len(set(draws)) == 3 * (k + 1)
    assert sorted(draws[: len(draws) // 2]) == sorted(draws[len(draws) // 2 :])


@pytest.mark.parametrize("k", [1, 4])
def test_each_network_is_called_as_often_as_the_algorithm_says(k):
    """Per discriminator update: one sample of G and one scoring of data and samples by D. Per generator update: one of
    each kind. Counted as the compiled program runs; nothing is evaluated twice, and one program serves all steps."""
    calls = {"G": 0, "D": 0}

    def counted(name, value):
        def add():
            calls[name] += 1

        jax.debug.callback(add)
        return value

    def sample(g, key, n):
        return counted("G", g + random.normal(random.example_keys(key, n), (2,)))

    def critic(d, x):
        return counted("D", x @ d)

    def discriminator_loss(d, g, batch, key, carried):
        (real, r1), (fake, r2) = (gan.penalised(lambda x: critic(d, x), x) for x in (batch, sample(g, key, len(batch))))
        return jnp.mean(gan.relativistic.discriminator(real, fake) + r1 + r2), {}

    def generator_loss(g, d, batch, key, carried):
        fake = critic(d, sample(g, key, len(batch)))
        return jnp.mean(gan.relativistic.generator(critic(d, batch), fake)), {}

    method = train.alternate(
        train.Player(discriminator_loss, optax.adam(0.1), lambda key: jnp.ones(2)),
        train.Player(generator_loss, optax.adam(0.1), lambda key: jnp.ones(2)),
        discriminator_steps=k,
    )
    step, state = jax.jit(method.step), method.init(KEY)
    for i in range(3):
        state, _ = step(state, np.full((8, 2), i, np.float32), KEY)
    jax.effects_barrier()
    assert calls == {"G": 3 * (k + 1), "D": 3 * (2 * k + 2)}
    assert step._cache_size() == 1


def test_players_are_drawn_from_keys_of_their_own():
    player = train.Player(lambda p, q, *_: (p, {}), optax.sgd(0.1), jax.random.normal)
    state = train.alternate(player, player, average=train.ema(0.5)).init(KEY)
    assert state.generator.params != state.discriminator.params
    assert state.average == state.generator.params


def test_each_player_descends_by_its_own_parameters_alone():
    """The gradient of neither loss reaches the opponent, though it flows through it."""

    def loss(params, opponent, batch, key, carried):
        return params * opponent, {}

    state, metrics = run(
        train.alternate(
            train.Player(loss, optax.sgd(0.1), lambda key: jnp.float32(3.0)),
            train.Player(loss, optax.sgd(0.1), lambda key: jnp.float32(5.0)),
        ),
        1,
    )
    np.testing.assert_allclose(state.discriminator.params, 3 - 0.1 * 5)
    np.testing.assert_allclose(state.generator.params, 5 - 0.1 * 2.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["generator_grad_norm"], 2.5)


# Placement: a small convolutional pair on labelled images, the critic penalised, its scores fed back.


class Maker(nn.Module):
    @nn.compact
    def __call__(self, z, labels):
        x = nn.Dense(4 * 4 * 16)(z) + nets.LabelEmbedding(10, 4 * 4 * 16)(labels)
        x = nn.gelu(x.reshape(-1, 4, 4, 16))
        return jnp.tanh(nets.ConvTranspose(1)(x))


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x, labels):
        x = nn.gelu(nets.Conv(16, strides=2)(x)).mean((1, 2))
        return (x * (1 + nets.LabelEmbedding(10, 16)(labels))).sum(1)


def game(axis_name=None, microbatches=1, k=2):
    maker, critic = Maker(), Critic()

    def sample(g, batch, key):
        keys = random.example_keys(key, len(batch["label"]), axis_name=axis_name)
        return maker.apply(g, random.normal(keys, (6,)), batch["label"])

    def discriminator_loss(d, g, batch, key, carried):
        keys = random.example_keys(jax.random.fold_in(key, 1), len(batch["label"]), axis_name=axis_name)
        score = lambda x, labels, keys: critic.apply(d, gan.ada(keys, x, 0.5), labels)  # noqa: E731
        scores = gan.scored(score, batch["image"], sample(g, batch, key), batch["label"], keys)
        losses = gan.relativistic.discriminator(scores.real_logits, scores.fake_logits)
        return jnp.mean(losses + carried * (scores.r1 + scores.r2)), {"sign": jnp.sign(scores.real_logits).mean()}

    def generator_loss(g, d, batch, key, carried):
        real, fake = (critic.apply(d, x, batch["label"]) for x in (batch["image"], sample(g, batch, key)))
        return gan.relativistic.generator(real, fake).mean(), {}

    labels = jnp.zeros(1, jnp.int32)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.5))
    return train.alternate(
        train.Player(
            discriminator_loss, optimiser, lambda key: nets.init(critic, key, jnp.zeros((1, 8, 8, 1)), labels)
        ),
        train.Player(generator_loss, optimiser, lambda key: nets.init(maker, key, jnp.zeros((1, 6)), labels)),
        discriminator_steps=k,
        average=train.ema(0.9),
        feedback=train.Feedback(
            lambda: jnp.float32(0.1), lambda weight, metrics, step: weight + 0.01 * metrics["discriminator_sign"]
        ),
        microbatches=microbatches,
        axis_name=axis_name,
    )


def images(step, size=32):
    rng = np.random.default_rng(step)
    return {
        "image": rng.uniform(-1, 1, (size, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }


def train_for(placed, steps=10):
    state = placed.init(KEY)
    for step in range(steps):
        state, metrics = placed.step(state, images(step), KEY)
    return state, metrics


@pytest.fixture(scope="module", params=[1, 2], ids=["whole", "microbatched"])
def alone(request):
    return *train_for(place.jit(game(microbatches=request.param), place.mesh(jax.devices()[:1]))), request.param


def agree(state, metrics, alone):
    expected, expected_metrics, _ = alone
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=2e-3, atol=1e-5)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("fsdp", [1, 4], ids=["data", "fsdp"])
def test_eight_devices_under_jit(alone, fsdp, monkeypatch):
    monkeypatch.setattr("jaxgen.place.rules.SMALLEST_SHARDED_LEAF", 64)
    placed = place.jit(game(microbatches=alone[2]), place.mesh(fsdp=fsdp))
    state, metrics = train_for(placed)
    kernel = state.generator.params["params"]["Dense_0"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (fsdp == 1)
    agree(state, metrics, alone)


def test_eight_devices_under_pmap(alone):
    state, metrics = train_for(place.pmap(game(axis_name="data", microbatches=alone[2])))
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))  # copies have not drifted
    agree(place.first_copy(state), metrics, alone)


def test_the_state_is_donated():
    placed = place.jit(game(), place.mesh())
    old = placed.init(KEY)
    placed.step(old, images(0), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quadratic_game(0), "`discriminator_steps` must be an integer of at least 1, got 0"),
        (lambda: quadratic_game(microbatches=0), "`microbatches` must be an integer"),
        (
            lambda: run(quadratic_game(5), 1),
            "`discriminator_steps` must divide the batch, got a batch of 12 and discriminator_steps of 5",
        ),
        (
            lambda: run(quadratic_game(3, microbatches=3), 1),
            "`microbatches` must divide the batch, got a batch of 4 and microbatches of 3",
        ),
        (
            lambda: place.pmap(game()).step(place.pmap(game()).init(KEY), images(0), KEY),
            "`method` does not average over the axis 'data'",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
