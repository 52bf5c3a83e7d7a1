"""Adversarial training's losses against closed forms of linear models and NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import train
from jaxgen.attacks.fgsm import fgsm
from jaxgen.attacks.objectives import cross_entropy
from jaxgen.attacks.pgd import pgd
from jaxgen.attacks.threat import ThreatModel, random_start
from jaxgen.attacks.training import adversarial, grad_align, kl_divergence, trades

KEY = jax.random.key(0)
THREAT = ThreatModel(math.inf, eps=0.1, low=-10.0, high=10.0)
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
LABELS = jnp.array([0, 1, 1, 0, 1, 0])
PARAMS = {"weight": jnp.asarray(rng.normal(size=4), jnp.float32), "bias": jnp.float32(0.2)}
BATCH = {"image": X, "label": LABELS}


def logistic(params, x):
    margin = x @ params["weight"] + params["bias"]
    return jnp.stack([jnp.zeros_like(margin), margin], axis=1)


def curved(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


CURVED = {
    "first": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
    "second": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
}


def loss(params, batch, key):
    losses = cross_entropy(lambda x: logistic(params, x), batch["label"])(batch["image"])
    return losses.mean(), {"key": jax.random.uniform(key)}


def by(attack, apply=logistic):
    def attacked(key, params, batch):
        objective = cross_entropy(lambda x: apply(params, x), batch["label"])
        return batch | {"image": attack(key, objective, batch["image"], THREAT)}

    return attacked


@pytest.mark.parametrize("attack", [fgsm, lambda *args: pgd(*args, steps=10)], ids=["fgsm", "pgd"])
def test_the_adversarial_logistic_loss_is_that_of_the_margin_less_its_norm(attack):
    def closed(params, eps):
        margin = (2 * LABELS - 1) * (X @ params["weight"] + params["bias"])
        return jnp.mean(jnp.log1p(jnp.exp(-(margin - eps * jnp.sum(jnp.abs(params["weight"]))))))

    hardened = jax.jit(jax.value_and_grad(adversarial(loss, by(attack)), has_aux=True))
    (value, _), gradient = hardened(PARAMS, BATCH, KEY)
    expected, expected_gradient = jax.value_and_grad(closed)(PARAMS, 0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Of the closed form it is Danskin's theorem.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected_gradient)


def test_no_gradient_flows_through_an_attack():
    def loop(key, params, batch):  # which has no reverse derivative
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: x + jnp.abs(params), batch)

    hardened = adversarial(lambda params, batch, key: (jnp.sum(params * batch), {}), loop)
    value, slope = jax.value_and_grad(lambda params: hardened(params, jnp.float32(1.0), KEY)[0])(4.0)
    assert (value, slope) == (52.0, 13.0)
    slope = jax.grad(lambda batch: hardened(4.0, batch, KEY)[0])(jnp.float32(1.0))
    assert slope == 0

    @jax.custom_jvp
    def fragile(x):
        return 2 * x

    @fragile.defjvp
    def refuse(primals, tangents):
        raise AssertionError("an attack was differentiated")

    product = adversarial(lambda params, batch, key: (params * batch, {}), lambda key, *both: fragile(sum(both)))
    assert jax.grad(lambda params, batch: product(params, batch, KEY)[0], (0, 1))(4.0, 1.0) == (10.0, 0.0)


def test_the_attack_and_the_loss_draw_apart():
    drawn = {}

    def attack(key, params, batch):
        drawn["attack"] = jax.random.key_data(key)
        return {"anything": batch}

    def record(params, batch, key):
        drawn["loss"] = jax.random.key_data(key)
        assert list(batch) == ["anything"]
        return jnp.float32(0), {}

    adversarial(record, attack)(PARAMS, X, KEY)
    drawn["given"] = jax.random.key_data(KEY)
    assert len({tuple(np.asarray(key)) for key in drawn.values()}) == 3


def test_fgsm_rs_trains():
    attack = by(lambda *args: fgsm(*args, random_start=True, step_size=1.25 * THREAT.eps))
    method = train.minimise(adversarial(loss, attack), optax.sgd(0.5), lambda key: PARAMS)
    state, step = method.init(KEY), jax.jit(method.step)
    for _ in range(30):
        state, metrics = step(state, BATCH, KEY)
    assert metrics["loss"] < 0.5 * adversarial(loss, attack)(PARAMS, BATCH, KEY)[0]


def softmax(z):
    shifted = np.exp(z - z.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_trades_against_numpy():
    z, moved = rng.normal(size=(2, 6, 3)) * 3
    labels = np.array([0, 2, 1, 1, 0, 2])
    p, q = softmax(z), softmax(moved)
    expected = -np.log(p[np.arange(6), labels]) + 2.5 * np.sum(p * np.log(p / q), axis=1)
    got = trades(jnp.asarray(z, jnp.float32), jnp.asarray(moved, jnp.float32), labels, beta=2.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    with jax.enable_x64(True):  # the gradient flows through both logits
        both = jnp.asarray(np.stack([z, moved]))
        gradient = jax.grad(lambda both: trades(*both, labels, beta=2.5).sum())(both)
        step = 1e-6 * rng.normal(size=both.shape)
        change = (trades(*(both + step), labels, beta=2.5) - trades(*(both - step), labels, beta=2.5)).sum() / 2
        np.testing.assert_allclose(change, jnp.sum(gradient * step), rtol=1e-6)
    extreme = trades(jnp.array([[0.0, 200.0]]), jnp.array([[200.0, 0.0]]), np.array([1]), beta=1.0)
    np.testing.assert_allclose(extreme, 200.0, rtol=1e-6)


def test_kl_divergence_is_trades_second_term_and_its_gradient_starts_at_zero():
    objective = kl_divergence(lambda x: curved(CURVED, x), X)
    np.testing.assert_allclose(objective(X), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: objective(x).sum())(X), 0, atol=1e-6)
    moved = X + 0.3
    z, w = (np.asarray(curved(CURVED, x)) for x in (X, moved))
    labels = np.zeros(6, int)
    np.testing.assert_allclose(
        objective(moved), trades(z, w, labels, beta=1.0) - trades(z, z, labels), rtol=1e-4, atol=1e-6
    )


def test_trades_trains():
    def attacked(key, params, batch):
        objective = kl_divergence(lambda x: logistic(params, x), batch["image"])
        return batch | {"attacked": pgd(key, objective, batch["image"], THREAT, steps=5, keep_best=False)}

    def both(params, batch, key):
        clean, moved = logistic(params, batch["image"]), logistic(params, batch["attacked"])
        return trades(clean, moved, batch["label"]).mean(), {}

    hardened = adversarial(both, attacked)
    # Of a linear model the attack's end is known: it moves the margin by eps ||w||_1, to either side.
    z, reach = logistic(PARAMS, X), 0.1 * jnp.sum(jnp.abs(PARAMS["weight"]))
    ends = jnp.stack([trades(z, z.at[:, 1].add(sign * reach), LABELS) for sign in (-1, 1)])
    # Larger divergence, one side or the other, from whichever the random start began.
    value = hardened(PARAMS, BATCH, KEY)[0]
    assert ends.min(0).mean() - 1e-5 <= value <= ends.max(0).mean() + 1e-5
    method = train.minimise(hardened, optax.sgd(0.2), lambda key: PARAMS)
    state, step = method.init(KEY), jax.jit(method.step)
    for _ in range(30):
        state, metrics = step(state, BATCH, KEY)
    assert metrics["loss"] < value


def test_grad_align_of_a_linear_function_is_nothing():
    np.testing.assert_allclose(grad_align(lambda x: x @ PARAMS["weight"], X, THREAT, KEY), 0, atol=1e-6)
    # The loss of a linear model turns no gradient either.
    objective = cross_entropy(lambda x: logistic(PARAMS, x), LABELS)
    np.testing.assert_allclose(grad_align(objective, X, THREAT, KEY), 0, atol=1e-6)


@pytest.mark.parametrize("norm", [2, math.inf])
def test_grad_align_by_hand(norm):
    threat = ThreatModel(norm, eps=2.0, low=-3.0, high=3.0)
    labels = jnp.array([0, 2, 1, 1, 0, 2])

    def by_hand(params, x):
        def slope(x, label):
            return jax.grad(lambda x: -jax.nn.log_softmax(curved(params, x))[label])(x)

        moved = random_start(KEY, threat, x)
        a, b = (jax.vmap(slope)(at, labels) for at in (x, moved))
        return 1 - jnp.sum(a * b, 1) / (jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1))

    def ours(params, x):
        return grad_align(cross_entropy(lambda x: curved(params, x), labels), x, threat, KEY)

    def both(function):
        slope = jax.grad(lambda params, x: function(params, x).mean())
        return jax.jit(lambda params, x: (function(params, x), slope(params, x)))(CURVED, X)

    (value, got), (expected_value, expected) = both(ours), both(by_hand)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4, atol=1e-6)
    assert value.max() > 0.05
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, expected)


def test_grad_align_where_gradients_are_small_zero_or_opposite():
    tiny = grad_align(lambda x: 1e-30 * x @ PARAMS["weight"], X, THREAT, KEY)
    np.testing.assert_allclose(tiny, 0, atol=1e-6)
    far = ThreatModel(2, eps=1.0, low=-50.0, high=50.0)

    def flat(weight):
        return grad_align(lambda x: weight * jnp.maximum(x[:, 0], 0), X - 20, far, KEY).sum()

    value, slope = jax.value_and_grad(flat)(2.0)
    assert (value, slope) == (0, 0)
    kink = grad_align(lambda x: jnp.abs(x[:, 0]), jnp.full((64, 1), 0.05), THREAT, KEY)
    assert set(np.round(np.asarray(kink), 5)) == {0.0, 2.0}


def test_grad_align_draws_per_example():
    objective = cross_entropy(lambda x: curved(CURVED, x), jnp.zeros(6, int))
    few = cross_entropy(lambda x: curved(CURVED, x), jnp.zeros(2, int))
    whole = grad_align(objective, X, THREAT, KEY)
    np.testing.assert_allclose(grad_align(few, X[:2], THREAT, KEY), whole[:2], rtol=1e-4, atol=1e-7)


Z = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trades(Z, Z[:1], jnp.array([0, 1])), ValueError, "`attacked_logits` must have the shape of `logits`"),
        (lambda: trades(Z, Z, jnp.array([0, 3])), ValueError, r"`labels` must lie in \[0, 2\]"),
        (lambda: trades(Z, Z, jnp.array([0.0, 1.0])), TypeError, "`labels` must be integers"),
        (lambda: trades(Z[0], Z[0], jnp.array([0])), ValueError, r"`logits` must have shape \[any, any\]"),
        (lambda: trades(Z, Z, jnp.array([0, 1]), beta=-1.0), ValueError, r"`beta` must lie in \[0, inf\]"),
        (lambda: kl_divergence(lambda x: x[:, 0], Z)(Z), ValueError, r"`logits` must have shape \[any, any\]"),
        (lambda: grad_align(lambda x: x, Z, THREAT, KEY), ValueError, r"`objective\(x\)` must have shape \[2\]"),
        (lambda: grad_align(lambda x: x[:, 0], Z, 0.1, KEY), TypeError, "`threat` must be a ThreatModel"),
        (lambda: grad_align(lambda x: x[:, 0], Z, THREAT, 0), TypeError, "`key` must be a typed PRNG key"),
        (lambda: adversarial(loss, by(fgsm))(PARAMS, BATCH, 0), TypeError, "`key` must be a typed PRNG key"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
