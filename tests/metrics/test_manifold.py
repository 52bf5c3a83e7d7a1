"""Precision and recall against a double loop in float64, and on sets whose answers are known."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.metrics import PrecisionRecall, precision_recall
from tests.metrics import peers

score = jax.jit(precision_recall, static_argnames=("neighbours", "block_size"))


def naive(generated, real, neighbours):
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)

    def radius(i, points):
        return sorted(np.sum((points[i] - other) ** 2) for j, other in enumerate(points) if j != i)[neighbours - 1]

    def share(queries, points):
        balls = [(point, radius(i, points)) for i, point in enumerate(points)]
        return np.mean([any(np.sum((query - point) ** 2) <= squared for point, squared in balls) for query in queries])

    return share(generated, real), share(real, generated)


def points(rows, features=4, *, seed=0, offset=0.0, spread=1.0):
    return (np.random.default_rng(seed).normal(size=(rows, features)) * spread + offset).astype(np.float32)


def assert_scores(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("n", "m", "neighbours"), [(37, 53, 3), (53, 37, 1), (4, 37, 3), (37, 30, 5)])
@pytest.mark.parametrize("offset", [0, 1000])
def test_agrees_with_a_double_loop(n, m, neighbours, offset):
    """An offset common to all features costs no digits."""
    generated, real = points(n, offset=offset, spread=0.8), points(m, seed=1, offset=offset + 0.1)
    got = score(generated, real, neighbours=neighbours)
    assert isinstance(got, PrecisionRecall)
    assert got.precision.shape == got.recall.shape == ()
    assert_scores(got, naive(generated, real, neighbours))


def test_narrow_modes_keep_their_digits():
    """Ten modes, a thousand times narrower than they are apart, where |x|^2 - 2 x . p + |p|^2 has no digits left."""
    modes = points(10, 64)
    generated, real = (modes[np.arange(n) % 10] + points(n, 64, seed=n, spread=1e-3) for n in (60, 80))
    generated[:20] += 2e-3
    expected = naive(generated, real, 1)
    assert 0.2 < min(expected) < max(expected) < 0.9
    assert_scores(score(generated, real, neighbours=1), expected)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_block_size_changes_nothing(block_size):
    generated, real = points(23), points(40, seed=1)
    assert_scores(score(generated, real, block_size=block_size), naive(generated, real, 3))


def test_memory_grows_with_the_block_and_not_with_the_points():
    shapes = [jax.ShapeDtypeStruct((rows, 4), jnp.float32) for rows in (2048, 1000)]
    memory = score.lower(*shapes, block_size=16).compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * 2048 * 1000 / 10


def test_a_set_against_itself_and_against_one_far_away():
    x = points(47, offset=3)
    assert_scores(score(x, x[::-1]), (1, 1))
    assert_scores(score(x + 100, x), (0, 0))


def test_a_generator_that_drops_a_mode_loses_recall_and_one_that_invents_a_mode_loses_precision():
    modes = [points(40, seed=seed, offset=offset) for seed, offset in ((0, 0), (1, 50), (2, 100))]
    dropped = score(modes[0], np.concatenate(modes[:2]))
    assert_scores(dropped, (1, 1 / 2))
    assert_scores(score(np.concatenate(modes), np.concatenate(modes[:2])), (2 / 3, 1))
    fresh = score(points(40, seed=3), np.concatenate(modes[:2]))
    assert fresh.precision > 0.7
    assert 0.3 < fresh.recall <= 0.5


def test_a_ball_holds_its_boundary():
    real = jnp.array([[0.0], [2.0]])
    generated = jnp.array([[4.0], [4.5], [-2.0], [-2.5], [1.0]])  # the balls are [-2, 2] and [0, 4]
    assert_scores(score(generated, real, neighbours=1).precision, 3 / 5)


def test_copies_count_as_inside_and_repeated_points_reach_their_copies_alone():
    real = np.concatenate([points(29, 64, offset=100, spread=1e-3), np.zeros((4, 64), np.float32) + 0.7])
    generated = np.stack([real[28], real[28], real[7], real[30], real[30] + 1e-6, real[30] - 1e-6, real[0] + 1e-6])
    assert_scores(score(generated[:4], real).precision, 1)
    assert_scores(score(generated, real).precision, 5 / 7)


def lattice(rows):
    """Whole numbers: float32 is exact, and ties and repeated points are frequent."""
    return hypothesis.extra.numpy.arrays(np.float32, (rows, 2), elements=st.integers(-4, 4).map(float))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    lattice(7), lattice(9), st.sampled_from([1, 5]), st.permutations(range(7)), st.permutations(range(9)), lattice(1)
)
def test_ties_moves_and_the_order_of_points(generated, real, neighbours, generated_order, real_order, shift):
    expected = naive(generated, real, neighbours)
    assert_scores(score(generated, real, neighbours=neighbours), expected)
    quarter_turn = np.array([[0, 1], [-1, 0]], np.float32)
    moved = (x @ quarter_turn + 7 * shift for x in (generated[generated_order], real[real_order]))
    assert_scores(score(*moved, neighbours=neighbours), expected)


def test_does_not_see_rotations():
    generated, real = points(60, 9, spread=0.8), points(50, 9, seed=1)
    rotation = np.linalg.qr(points(9, 9, seed=2))[0]
    expected = score(generated, real)
    assert 0 < expected.precision < 1
    assert_scores(score(generated @ rotation + 7, real @ rotation + 7), expected)


def test_half_precision_is_computed_in_float32():
    generated, real = jnp.asarray(points(37), jnp.bfloat16), jnp.asarray(points(53, seed=1), jnp.bfloat16)
    expected = naive(generated, real, 3)
    for pair in ((generated, real), (np.asarray(generated, np.float32), real)):
        got = score(*pair)
        assert got.precision.dtype == got.recall.dtype == jnp.float32
        assert_scores(got, expected)


@pytest.mark.parametrize("poisoned", ["generated", "real"])
def test_nan_comes_out(poisoned):
    """Not as points that merely lie outside."""
    sets = {"generated": points(37), "real": points(53, seed=1)}
    sets[poisoned][3, 1] = np.nan
    assert np.isnan(score(**sets)).all()


def test_without_jit():
    generated, real = points(6), points(9, seed=1)
    assert_scores(precision_recall(generated, real), naive(generated, real, 3))


def test_under_vmap():
    generated, real = (np.stack([points(rows, seed=rows + i) for i in range(3)]) for rows in (20, 30))
    batched = jax.vmap(precision_recall)(generated, real)
    assert_scores(np.transpose(batched), [naive(*pair, 3) for pair in zip(generated, real, strict=True)])


def test_agrees_with_torch_fidelity():
    peer = peers.torch_fidelity("prc")
    import torch

    generated, real = points(37, spread=0.8), points(53, seed=1, offset=0.1)
    pair = (torch.tensor(x).double() for x in (generated, real))
    assert_scores(score(generated, real), peer.calculate_precision_recall_full(*pair))


@pytest.mark.parametrize(
    ("generated", "real", "options", "error", "message"),
    [
        (jnp.ones(5), jnp.ones((5, 3)), {}, ValueError, r"`generated` must have shape \[any, any\], got \[5\]"),
        (jnp.ones((5, 3)), jnp.ones((5, 3, 1)), {}, ValueError, r"`real` must have shape \[any, any\], got \[5, 3, 1\]"),
        (jnp.ones((5, 3), jnp.uint8), jnp.ones((5, 3)), {}, TypeError, "`generated` must be floating-point.*, got dtype uint8"),
        (jnp.ones((5, 3)), jnp.ones((5, 3), int), {}, TypeError, "`real` must be floating-point.*, got dtype int32"),
        (jnp.ones((5, 3)), jnp.ones((5, 4)), {}, ValueError, "`generated` and `real` must hold features of one length, got 3 and 4"),
        (jnp.ones((3, 2)), jnp.ones((5, 2)), {}, ValueError, "`neighbours` must be less than the number of rows of `generated`, 3, got 3"),
        (jnp.ones((9, 2)), jnp.ones((5, 2)), {"neighbours": 6}, ValueError, "`neighbours` must be less than the number of rows of `real`, 5, got 6"),
        (jnp.ones((5, 2)), jnp.ones((5, 2)), {"neighbours": 0}, ValueError, "`neighbours` must be an integer of at least 1, got 0"),
        (jnp.ones((5, 2)), jnp.ones((5, 2)), {"block_size": 0}, ValueError, "`block_size` must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(generated, real, options, error, message):
    for function in (precision_recall, score):
        with pytest.raises(error, match=message):
            function(generated, real, **options)
