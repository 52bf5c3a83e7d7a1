"""The square attack: the optimum of linear objectives, its geometry against the paper's, and what it may know."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import random
from jaxgen.attacks.objectives import margin
from jaxgen.attacks.square import _pair, _rebump, _tiles, _window, square
from jaxgen.attacks.threat import ThreatModel, distance
from tests.attacks.peers import network, one_thread

KEY = jax.random.key(0)
NORMS = [math.inf, 2, 1]
SHAPE = (3, 6, 8, 2)
X = jax.random.uniform(jax.random.key(1), SHAPE, minval=0.2, maxval=0.8)
W = jax.random.normal(jax.random.key(2), SHAPE[1:])
linear = lambda x: jnp.sum(x * W, axis=(1, 2, 3))  # noqa: E731


@functools.partial(jax.jit, static_argnames=["norm", "queries"])
def compiled(keys, x, norm, eps, low, high, queries):
    return square(keys, linear, x, ThreatModel(norm, eps=eps, low=low, high=high), queries=queries)


def searched(key, x, norm, eps, *, low=-9.0, high=9.0, queries=60):
    """One program for each norm and number of queries, whatever else."""
    eps = jnp.broadcast_to(jnp.float32(eps), len(x))
    return compiled(random.keys_for(key, len(x)), x, norm, eps, jnp.float32(low), jnp.float32(high), queries)


def test_it_finds_the_best_corner_of_a_linear_objective():
    x = searched(KEY, X, math.inf, 0.3, low=0.0, high=1.0, queries=4000)
    np.testing.assert_allclose(x, jnp.clip(X + 0.3 * jnp.sign(W), 0, 1), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_it_uses_all_of_the_ball_and_more_queries_gain_more(norm):
    eps = jnp.array([0.1, 0.5, 2.0])
    values = []
    for queries in (60, 400):
        x = searched(KEY, X, norm, eps, queries=queries)
        np.testing.assert_allclose(distance(norm, x, X), eps, rtol=1e-5)
        if norm == math.inf:
            np.testing.assert_allclose(jnp.abs(x - X), jnp.broadcast_to(eps[:, None, None, None], SHAPE), rtol=1e-5)
        values.append(linear(x - X))
    assert np.all(values[0] < values[1])
    dual = {math.inf: 1, 2: 2, 1: math.inf}[norm]
    gained = values[1] / eps / np.linalg.norm(W.ravel(), dual)
    assert np.all(gained < 1 + 1e-5)
    assert np.all(gained > {math.inf: 0.7, 2: 0.4, 1: 0.2}[norm]), gained


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(NORMS), st.floats(0, 4, width=32), st.floats(-1, 0.5, width=32), st.integers(0, 9))
def test_ball_and_bounds_hold_and_nothing_comes_back_worse(norm, eps, low, seed):
    low, high = np.float32(low), np.float32(low + 0.7)
    x = jnp.clip(X, low, high)
    found = searched(jax.random.key(seed), x, norm, eps, low=low, high=high)
    assert np.all((found >= low) & (found <= high))
    assert np.all(distance(norm, found, x) <= eps * (1 + 1e-5) + 1e-6)
    assert np.all(linear(found) >= linear(x) - 1e-6)
    np.testing.assert_array_equal(searched(jax.random.key(seed), x, norm, 0.0, low=low, high=high), x)


@pytest.mark.parametrize("norm", [math.inf, 2])
def test_examples_draw_their_own_squares(norm):
    x = searched(KEY, X, norm, 0.5)
    np.testing.assert_allclose(searched(KEY, X[:2], norm, 0.5), x[:2], atol=1e-6)
    keys = random.example_keys(KEY, 3)
    other = searched(keys.at[0].set(jax.random.key(9)), X, norm, 0.5)
    np.testing.assert_array_equal(np.any(np.asarray(other != x), axis=(1, 2, 3)), [True, False, False])


@pytest.mark.parametrize(("norm", "queries"), [(math.inf, 2), (math.inf, 23), (2, 23)])
def test_queries_are_counted_and_gradients_never_taken(norm, queries):
    calls = []

    @jax.custom_vjp
    def objective(x):
        jax.debug.callback(lambda: calls.append(1))
        return linear(x)

    def refuse(*_):
        raise AssertionError("a gradient was taken")

    objective.defvjp(refuse, refuse)
    threat = ThreatModel(norm, eps=0.1, low=-9.0, high=9.0)
    jax.jit(lambda x: square(KEY, objective, x, threat, queries=queries))(X)
    jax.effects_barrier()
    assert len(calls) == queries


def test_what_is_won_rests_and_the_search_ends_with_the_last_win():
    calls = []
    rows = jnp.array([0.0, 3.0, -1e3])  # by how much the examples of the three classes lead

    def apply(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.stack([jnp.zeros(len(x)), linear(x) - linear(X[: len(x)]) - rows[: len(x)]], axis=1)

    objective = lambda n: margin(apply, jnp.zeros(n, int))  # noqa: E731
    threat = ThreatModel(math.inf, eps=0.3, low=-9.0, high=9.0)
    two = jax.jit(lambda x: square(KEY, objective(2), x, threat, queries=500))(X[:2])
    jax.effects_barrier()
    needed = len(calls)
    assert 2 <= needed < 500
    assert np.all(objective(2).judge(two)[1])
    one = jax.jit(lambda x: square(KEY, objective(1), x, threat, queries=500))(X[:1])
    jax.effects_barrier()
    assert len(calls) - needed < needed
    np.testing.assert_allclose(two[:1], one, atol=1e-6)
    three = jax.jit(lambda x: square(KEY, objective(3), x, threat, queries=500))(X)
    np.testing.assert_array_equal(three[2], X[2])
    np.testing.assert_allclose(three[:2], two, atol=1e-6)


def test_gradients_that_vanish_do_not_help():
    """A classifier of rounded images: its gradient is zero everywhere."""
    masked = margin(lambda x: jnp.stack([jnp.zeros(3), linear(jnp.round(x * 64) / 64) - 8], axis=1), jnp.zeros(3, int))
    x = X - (linear(X) / jnp.sum(W**2))[:, None, None, None] * W
    assert not np.any(jax.grad(lambda x: masked(x).sum())(x))
    assert not np.any(masked.judge(x)[1])
    threat = ThreatModel(math.inf, eps=0.3, low=-9.0, high=9.0)
    found = jax.jit(lambda x: square(KEY, masked, x, threat, queries=200))(x)
    assert np.all(masked.judge(found)[1])


pair_of = jax.jit(functools.partial(_pair, 2))


def paper_pair(height, width):
    """The paper's Eq. 2 by its text, pixels counted from 1: the upper half's bump and, negated, the lower half's."""

    def bump(h, w):
        n = max(h, w) // 2
        eta = np.zeros((h, w))
        for r in range(1, h + 1):
            for s in range(1, w + 1):
                far = max(abs(r - h // 2 - 1), abs(s - w // 2 - 1))
                eta[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(n - far + 1))
        return eta / max(np.linalg.norm(eta), 1e-30)

    pair = np.concatenate([bump(height // 2, width), -bump(height - height // 2, width)])
    return pair / np.linalg.norm(pair)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (3, 3), (4, 9), (9, 4), (1, 5)])
def test_pairs_of_bumps_are_the_papers(height, width):
    rows, columns = jnp.arange(12)[:, None] - 2, jnp.arange(14) - 3
    expected = np.zeros((12, 14))
    expected[2 : 2 + height, 3 : 3 + width] = paper_pair(height, width)
    np.testing.assert_allclose(pair_of(rows, columns, height, width), expected, atol=1e-6)


def test_windows_are_uniform_over_all_places_and_no_larger_than_the_image():
    draw = jax.jit(jax.vmap(lambda u: _window(u, (5, 4, 1), jnp.array(2)).mask))
    masks = np.asarray(draw(jax.random.uniform(KEY, (4000, 2))))
    ends = draw(jnp.array([[0.0, 0.0], [1 - 2**-23, 1 - 2**-23]]))
    assert ends[0, 0, 0]
    assert ends[1, 4, 3]
    corners, counts = np.unique(np.argmax(masks.reshape(4000, -1), axis=1), return_counts=True)
    assert np.all(np.sum(masks, axis=(1, 2)) == 4)
    np.testing.assert_array_equal(corners, [4 * top + left for top in range(4) for left in range(3)])
    assert np.all(np.abs(counts - 4000 / 12) < 5 * np.sqrt(4000 / 12))
    assert np.all(_window(jnp.array([0.9, 0.9]), (5, 4, 1), jnp.array(9)).mask)


def test_the_first_bumps_are_tiles_that_fill_the_image():
    tiles = np.asarray(jax.jit(functools.partial(_tiles, (17, 23, 2), 2))(KEY, jnp.float32(0.5)))
    np.testing.assert_allclose(np.linalg.norm(tiles), 0.5, rtol=1e-5)
    # Five rows of seven tiles, 3 x 3, with a frame of what is left over; each is a pair or a turned one.
    frame = tiles.copy()
    frame[1:16, 1:22] = 0
    np.testing.assert_array_equal(frame, 0)
    pair = paper_pair(3, 3) * 0.5 / np.sqrt(5 * 7 * 2)
    seen = set()
    for i in range(5):
        for j in range(7):
            for c in range(2):
                tile = tiles[1 + 3 * i : 4 + 3 * i, 1 + 3 * j : 4 + 3 * j, c]
                near = [k for k, p in enumerate((pair, -pair, pair.T, -pair.T)) if np.allclose(tile, p, atol=1e-5)]
                seen.update(near)
                assert len(near) == 1
    assert seen == {0, 1, 2, 3}


def test_a_step_of_bumps_is_eqs_2_and_3():
    """What a proposal does to a perturbation, in NumPy, from the windows that it drew."""
    delta = 0.1 * np.asarray(jax.random.normal(jax.random.key(5), (9, 10, 3)), float)
    eps = 1.2 * np.linalg.norm(delta)
    u = np.asarray(jax.random.uniform(KEY, (8,)))
    w, v = (np.asarray(_window(corner, delta.shape, jnp.array(5)).mask) for corner in (u[:2], u[2:4]))
    signs = np.where(u[5:] < 0.5, -1, 1)
    pair = paper_pair(5, 5).T if u[4] < 0.5 else paper_pair(5, 5)
    new = delta.copy()
    for c in range(3):
        d = delta[..., c]
        shape = signs[c] * pair.ravel() + d[w] / np.linalg.norm(d[w])
        budget = np.sqrt(np.sum(d[w | v] ** 2) + (eps**2 - np.sum(delta**2)) / 3)
        new[v, c] = 0
        new[w, c] = budget * shape / np.linalg.norm(shape)
    new *= eps / np.linalg.norm(new)
    step = jax.jit(functools.partial(_rebump, 2))
    for side in (4, 5):  # even sides grow by one
        ours = step(KEY, jnp.asarray(delta, jnp.float32), jnp.float32(eps), jnp.array(side))
        np.testing.assert_allclose(ours, new, atol=1e-5)


def test_what_the_bounds_cut_off_is_spent_on_the_next_bumps():
    """The perturbation that Eq. 3 starts from is that of the image that was shown."""
    shown = []

    def objective(x):
        jax.debug.callback(lambda x: shown.append(np.asarray(x)), x, ordered=True)
        return jnp.sum(x, axis=(1, 2, 3))

    threat = ThreatModel(2, eps=5.0, low=0.0, high=1.0)
    jax.jit(lambda x: square(KEY, objective, x, threat, queries=3))(X)
    jax.effects_barrier()
    delta = shown[1] - np.asarray(X)
    assert np.all(distance(2, jnp.asarray(shown[1]), X) < 4.9)
    side = round(math.sqrt(0.8 / 2**8 * 6 * 8))
    keys = random.fold(random.example_keys(KEY, 3), 2)
    step = jax.jit(jax.vmap(functools.partial(_rebump, 2), (0, 0, None, None)))
    expected = np.clip(X + step(keys, jnp.asarray(delta), jnp.float32(5), jnp.array(side)), 0, 1)
    np.testing.assert_allclose(shown[2], expected, atol=1e-5)


def test_the_side_falls_as_the_paper_has_it():
    """Of a constant objective nothing is ever taken, so that proposals show their squares, one a query."""
    shown = []

    def objective(x):
        jax.debug.callback(lambda x: shown.append(np.asarray(x)), x, ordered=True)
        return jnp.zeros(1)

    x = jnp.zeros((1, 20, 20, 1))
    threat = ThreatModel(math.inf, eps=1.0, low=-1.0, high=1.0)
    jax.jit(lambda x: square(KEY, objective, x, threat, queries=400, share=0.5))(x)
    jax.effects_barrier()
    stripes = shown[1]
    heights = []
    for i, image in enumerate(shown[2:], start=2):
        changed = np.argwhere((image != stripes)[0, :, :, 0])
        if len(changed):
            # A square recolours the stripes of the other sign, from top to bottom.
            heights.append((i / 400 * 10_000, np.ptp(changed[:, 0]) + 1))
    for progress, height in heights:
        j = sum(progress > n for n in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        assert height == max(round(math.sqrt(0.5 * 400 / 2**j)), 1)
    assert len(heights) > 200


@pytest.mark.parametrize("norm", [math.inf, 2])
def test_it_is_no_weaker_than_torchattacks(norm):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    net = network(batch=40)
    eps = {math.inf: 0.04, 2: 0.25}[norm]
    peer = torchattacks.Square(net.torch, norm={math.inf: "Linf", 2: "L2"}[norm], eps=eps, n_queries=200, seed=0)
    with one_thread():
        theirs = net.images(peer(net.torch_x, net.torch_labels))
    threat = ThreatModel(norm, eps=eps, low=0.0, high=1.0)
    ours = jax.jit(lambda x: square(KEY, margin(net.apply, net.labels), x, threat, queries=200))(net.x)
    won, peer_won = (np.mean(np.argmax(net.apply(x), axis=1) != net.labels) for x in (ours, theirs))
    assert won >= peer_won - 0.05
    assert 0.1 < won < 0.9


def test_refusals():
    threat = ThreatModel(2, eps=0.1, low=0.0, high=1.0)
    with pytest.raises(ValueError, match=r"`x` must have shape \[any, any, any, any\], got \[3, 96\]"):
        square(KEY, linear, X.reshape(3, -1), threat)
    with pytest.raises(ValueError, match=r"`threat.eps` must be finite, got inf"):
        square(KEY, linear, X, ThreatModel(2, eps=math.inf, low=0.0, high=1.0))
    with pytest.raises(ValueError, match="`queries` must be an integer of at least 2, got 1"):
        square(KEY, linear, X, threat, queries=1)
    with pytest.raises(ValueError, match="`share` must be above 0 and finite, got 0"):
        square(KEY, linear, X, threat, share=0.0)
    with pytest.raises(ValueError, match=r"`share` must lie in \[0, 1\], got 2"):
        square(KEY, linear, X, threat, share=2.0)
    with pytest.raises(ValueError, match=r"`objective\(x\)` must have shape \[3\], got \[\]"):
        square(KEY, lambda x: jnp.sum(x), X, threat)
    with pytest.raises(TypeError, match="`key` must be a typed PRNG key"):
        square(0, linear, X, threat)
