"""Training methods against loops written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxgen import train

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 3)), RNG.normal(size=12)
BATCH = {"x": X.astype(np.float32), "y": Y.astype(np.float32)}


def least_squares(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), {"w0": params["w"][0]}


def start(key):
    return {"w": jnp.array([1.0, -1.0, 0.5])}


def run(method, steps, batch=BATCH, key=KEY):
    state, step = method.init(KEY), jax.jit(method.step)
    for _ in range(steps):
        state, metrics = step(state, batch, key)
    return state, metrics


def descent(steps, rate):
    """Gradient descent and its iterates, in float64."""
    iterates = [np.array([1.0, -1.0, 0.5])]
    for _ in range(steps):
        w = iterates[-1]
        iterates.append(w - rate * 2 * X.T @ (X @ w - Y) / len(X))
    return iterates


def test_minimise_is_gradient_descent():
    state, metrics = run(train.minimise(least_squares, optax.sgd(0.05), start), 7)
    iterates = descent(7, 0.05)
    np.testing.assert_allclose(state.learner.params["w"], iterates[-1], rtol=1e-5)
    assert int(state.step) == 7
    residual = X @ iterates[-2] - Y
    np.testing.assert_allclose(metrics["loss"], np.mean(residual**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(2 * X.T @ residual / 12), rtol=1e-5)
    np.testing.assert_allclose(metrics["w0"], iterates[-2][0], rtol=1e-5)
    assert state.average == ()


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_weighted_sum_of_the_iterates(warmup):
    state, _ = run(train.minimise(least_squares, optax.sgd(0.05), start, average=train.ema(0.8, warmup=warmup)), 9)
    average = None
    for k, w in enumerate(descent(9, 0.05)):
        decay = min(0.8, (1 + k) / (10 + k)) if warmup else 0.8
        average = w if average is None else decay * average + (1 - decay) * w
    np.testing.assert_allclose(state.average["w"], average, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [2, 3, 12])
def test_microbatches_take_the_step_of_the_whole(microbatches):
    whole, whole_metrics = run(train.minimise(least_squares, optax.adam(0.1), start), 5)
    parts, parts_metrics = run(train.minimise(least_squares, optax.adam(0.1), start, microbatches=microbatches), 5)
    np.testing.assert_allclose(parts.learner.params["w"], whole.learner.params["w"], rtol=1e-4)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(parts_metrics[name], value, rtol=1e-4)


def test_each_microbatch_has_a_key_of_its_own_and_interleaved_rows():
    def loss(params, batch, key):
        return params * 0.0, {"draw": jax.random.normal(key), "rows": jnp.sum(batch * 10.0 ** jnp.arange(2))}

    method = train.minimise(loss, optax.sgd(0.1), lambda key: jnp.zeros(()), microbatches=2)
    _, metrics = method.step(method.init(KEY), jnp.array([1.0, 2.0, 3.0, 4.0]), KEY)
    # parts are rows (0, 2) and (1, 3): (1 + 30 + 2 + 40) / 2
    np.testing.assert_allclose(metrics["rows"], 36.5)
    step_key = jax.random.fold_in(KEY, 0)
    draws = [jax.random.normal(jax.random.fold_in(step_key, m)) for m in (0, 1)]
    assert draws[0] != draws[1]
    np.testing.assert_allclose(metrics["draw"], sum(draws) / 2, rtol=1e-6)


def test_every_step_draws_anew_and_a_run_repeats():
    def loss(params, batch, key):
        return params * 0.0, {"draw": jax.random.normal(key)}

    method = train.minimise(loss, optax.sgd(0.1), lambda key: jnp.zeros(()))
    state, draws = method.init(KEY), []
    for _ in range(3):
        state, metrics = method.step(state, BATCH, KEY)
        draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 3
    expected = [float(jax.random.normal(jax.random.fold_in(KEY, k))) for k in range(3)]
    assert draws == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train.ema(1.0), r"`decay` must lie in \[0, 1\), got 1.0"),
        (lambda: train.ema(-0.1), "`decay` must lie in"),
        (
            lambda: train.minimise(least_squares, optax.sgd(1), start, microbatches=0),
            "`microbatches` must be an integer",
        ),
        (
            lambda: run(train.minimise(least_squares, optax.sgd(1), start, microbatches=5), 1),
            "`microbatches` must divide the batch, got a batch of 12 and microbatches of 5",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_takes_the_step_of_the_whole(check_vma, microbatches):
    """Whether or not JAX sums the gradients of shared parameters over devices by itself."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    spec = PartitionSpec("data")
    method = train.minimise(
        least_squares, optax.sgd(0.05), start, microbatches=microbatches, axis_name="data", average=train.ema(0.5)
    )
    step = jax.shard_map(
        method.step,
        mesh=mesh,
        in_specs=(PartitionSpec(), spec, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    state, metrics = run(train.Method(method.init, step), 3)
    whole, whole_metrics = run(train.minimise(least_squares, optax.sgd(0.05), start, average=train.ema(0.5)), 3)
    for got, wanted in zip(jax.tree.leaves((state, metrics)), jax.tree.leaves((whole, whole_metrics)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
