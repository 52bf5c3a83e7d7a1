"""Evaluations against double loops in float64, closed forms and scikit-learn's logistic regression."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from jaxgen.contrastive import logistic
from jaxgen.contrastive.evaluation import LinearProbe, alignment, knn_accuracy, linear_probe, uniformity

knn = jax.jit(knn_accuracy, static_argnames=("neighbours", "block_size"))
probe = jax.jit(linear_probe, static_argnames=("classes", "validation", "steps"))
fit = jax.jit(logistic.fit, static_argnames=("classes", "steps"))
aligned = jax.jit(alignment)
even = jax.jit(uniformity, static_argnames="block_size")


def features(rows, *, seed=0, width=5, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(dtype)


def labels(rows, *, seed=0, classes=4):
    return np.random.default_rng(seed + 100).integers(0, classes, rows)


@functools.cache
def digits():
    """Pixels to train on, their labels; pixels to test on, their labels."""
    data = load_digits()
    pixels = data.data.astype(np.float32)
    test = np.arange(len(pixels)) % 5 == 2
    return pixels[~test], data.target[~test], pixels[test], data.target[test]


# --- Nearest neighbours


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def naive_knn(train, train_labels, test, test_labels, neighbours, temperature):
    right = 0
    for x, label in zip(unit(test), test_labels, strict=True):
        similarities = [x @ other for other in unit(train)]
        votes = {}
        for i in np.argsort(similarities)[::-1][:neighbours]:
            votes[train_labels[i]] = votes.get(train_labels[i], 0) + np.exp(similarities[i] / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(test)


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.5), (90, 1.0)])
def test_knn_agrees_with_a_double_loop(neighbours, temperature):
    data = features(90), labels(90), features(41, seed=1), labels(41, seed=1)
    expected = naive_knn(*data, neighbours, temperature)
    got = knn(*data, neighbours=neighbours, temperature=temperature, block_size=16)
    assert got.shape == ()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_knn_weights_and_number_of_neighbours_matter():
    """Two near votes against three far ones, by angle to the test example."""
    angles = np.radians([5, -5, 40, 41, 42])
    train, test = np.stack([np.cos(angles), np.sin(angles)], 1), np.array([[1.0, 0.0]])
    data = train, np.array([1, 1, 0, 0, 0]), test, np.array([1])
    assert knn(*data, neighbours=5, temperature=0.07) == 1
    assert knn(*data, neighbours=5, temperature=10.0) == 0
    assert knn(*data, neighbours=3, temperature=10.0) == 1


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_knn_block_size_changes_nothing(block_size):
    data = features(90), labels(90), features(41, seed=1), labels(41, seed=1)
    expected = naive_knn(*data, 9, 0.2)
    np.testing.assert_allclose(knn(*data, neighbours=9, temperature=0.2, block_size=block_size), expected, atol=1e-6)


def test_knn_sees_directions_and_compares_labels():
    train, train_labels, test, test_labels = digits()
    lengths = np.geomspace(1e-3, 1e3, len(train), dtype=np.float32)[:, None]
    names = np.array([-7, 1000, 3, 12, 4, 77, 6, 5, 0, 1])  # any integers
    got = knn(train * lengths, names[train_labels], 3e-4 * test, names[test_labels], neighbours=9)
    np.testing.assert_allclose(got, knn(*digits(), neighbours=9), atol=1.5 / len(test))


def test_knn_low_temperatures_do_not_overflow():
    """e^100 is no float32: two near votes would be as many as one."""
    angles = np.array([0.0, 0.01, -0.01])
    train, test = np.stack([np.cos(angles), np.sin(angles)], 1), np.array([[1.0, 0.0]])
    assert knn(train, np.array([0, 1, 1]), test, np.array([1]), neighbours=3, temperature=0.01) == 1
    assert knn(train, np.array([0, 1, 1]), test, np.array([0]), neighbours=3, temperature=1e-5) == 1


def test_knn_of_digits():
    assert knn(*digits(), neighbours=20) > 0.97


def test_knn_memory_grows_with_the_block_and_not_with_the_test_examples():
    rows = [jax.ShapeDtypeStruct((4096, 8), jnp.float32), jax.ShapeDtypeStruct((4096,), jnp.int32)] * 2
    memory = knn.lower(*rows, neighbours=200, block_size=16).compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * 4096 * 4096 / 20


# --- The linear probe


def objective(classifier, x, y, weight_decay):
    """The definition, in float64."""
    x = np.asarray(x, np.float64)
    deviation = x.std(0)
    x = (x - x.mean(0)) / np.where(deviation > 0, deviation, 1)
    weights, bias = (np.asarray(part, np.float64) for part in classifier)
    logits = x @ weights + bias
    losses = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return losses.mean() + weight_decay / 2 * np.sum(weights**2)


def sklearn_fit(x, y, weight_decay):
    x = np.asarray(x, np.float64)
    deviation = x.std(0)
    model = LogisticRegression(C=1 / (len(y) * weight_decay), tol=1e-6, max_iter=5000)
    return model.fit((x - x.mean(0)) / np.where(deviation > 0, deviation, 1), y)


DECAYS = np.array([1.0, 1e-1, 1e-2, 1e-3, 1e-4])


def assert_minimises(x, y, decays, gap):
    got = fit(x, y, classes=10, weight_decays=jnp.asarray(decays, jnp.float32), steps=500)
    for i, weight_decay in enumerate(decays):
        model = sklearn_fit(x, y, weight_decay)
        least = objective((model.coef_.T, model.intercept_), x, y, weight_decay)
        assert abs(objective((got.weights[i], got.bias[i]), x, y, weight_decay) - least) < gap
    return got


def test_fit_agrees_with_sklearn_on_digits():
    """Some pixels never vary, others hardly; all decays at once."""
    got = assert_minimises(digits()[0][:600], digits()[1][:600], DECAYS, 1e-4)
    assert np.all(got.gradient_norm < 1e-3)
    assert np.all(got.gradient_norm[:3] < 1e-6)


@pytest.mark.parametrize("kind", ["offset", "correlated", "more features than rows"])
def test_fit_of_difficult_features(kind):
    x, y = digits()[0][:300], digits()[1][:300]
    rng = np.random.default_rng(0)
    if kind == "offset":
        x = x + 1000  # whole numbers: float32 holds them
    elif kind == "correlated":
        x = x @ rng.normal(size=(64, 64)) + 50 * rng.normal(size=(300, 1))
    else:
        x, y = np.maximum(x[:120] @ rng.normal(size=(64, 160)), 0), y[:120]
    assert_minimises(np.asarray(x, np.float32), y, DECAYS[1:4], 1e-4)


def test_fit_descends_without_a_step_size():
    """Whatever the scale of the features."""
    x, y = digits()[0][:300], digits()[1][:300]
    expected = fit(x, y, classes=10, weight_decays=DECAYS[:3].astype(np.float32), steps=100)
    for scale in (1e-6, 1e6):
        got = fit(scale * x, y, classes=10, weight_decays=DECAYS[:3].astype(np.float32), steps=100)
        np.testing.assert_allclose(got.weights, expected.weights, rtol=1e-3, atol=1e-4)
    gaps = [
        objective((c.weights[0], c.bias[0]), x, y, 1e-4)
        for steps in (1, 4, 16)
        for c in [fit(x, y, classes=10, weight_decays=jnp.array([1e-4]), steps=steps)]
    ]
    assert np.all(np.diff(gaps) < 0)
    assert gaps[0] < np.log(10)


def test_fit_does_not_diverge_where_rounding_exceeds_the_weight_decay():
    """400 features, nearly all of whose variance is common to all, and 100 rows: most eigenvalues are rounding's own."""
    x, y = digits()[0][:100], digits()[1][:100]
    rng = np.random.default_rng(0)
    x = x @ rng.normal(size=(64, 400)) * 1e-3 + 30 * rng.normal(size=(100, 1))
    got = fit(x.astype(np.float32), y, classes=10, weight_decays=jnp.array([1e-5, 1e-6]), steps=200)
    assert np.all(got.gradient_norm < 1e-4)


def test_features_that_do_not_vary_are_left_out():
    """Not their rounding, either: the mean of 300 times 0.1 is not 0.1."""
    x, y = digits()[0][:300], digits()[1][:300]
    constant = np.full((300, 3), [0.1, 0.7, 1e5], np.float32)
    got = fit(np.concatenate([x, constant], 1), y, classes=10, weight_decays=jnp.array([1e-3]), steps=100)
    np.testing.assert_array_equal(got.scale[64:], 0)
    assert np.all(np.isfinite(got.weights))


@pytest.mark.slow
def test_probe_of_digits_agrees_with_sklearn():
    train, train_labels, test, test_labels = digits()
    got = probe(jax.random.key(0), *digits(), classes=10)
    assert isinstance(got, LinearProbe)
    assert got.accuracy.shape == got.weight_decay.shape == got.gradient_norm.shape == ()
    assert got.validation_accuracies.shape == (6,)
    model = sklearn_fit(train, train_labels, float(got.weight_decay))
    deviation = train.std(0)
    expected = model.score((test - train.mean(0)) / np.where(deviation > 0, deviation, 1), test_labels)
    np.testing.assert_allclose(got.accuracy, expected, atol=1.5 / len(test))
    assert got.accuracy > 0.95


def small(seed=0, rows=120, noise=2.5):
    """Four classes that overlap."""
    y = labels(rows, seed=seed)
    x = features(4, seed=5, width=6)[y] + noise * features(rows, seed=seed, width=6)
    return x.astype(np.float32), y


def test_test_examples_choose_nothing():
    train, test = small(), small(1)
    first = probe(jax.random.key(0), *train, *test, classes=4, steps=50)
    second = probe(jax.random.key(0), *train, 9 * test[0][::-1], 3 - test[1], classes=4, steps=50)
    assert first.accuracy != second.accuracy
    jax.tree.map(np.testing.assert_array_equal, first[1:], second[1:])


def test_validation_examples_are_not_fitted():
    """Labels without meaning, fewer than features: what is fitted is reached, what is not is chance."""
    x, y = features(60, width=200), labels(60)
    got = probe(jax.random.key(0), x, y, x, y, classes=4, validation=0.5, weight_decays=jnp.array([1e-4]), steps=100)
    assert got.accuracy == 1
    assert got.validation_accuracies[0] < 0.6


def test_validation_chooses_and_ties_go_to_the_strongest():
    train, test = small(), small(1)
    for decays in ([1e-3, 1e-1, 1.0, 1e3], [1e3, 1.0, 1e-1, 1e-3]):
        got = probe(
            jax.random.key(3), *train, *test, classes=4, weight_decays=jnp.array(decays), validation=0.3, steps=50
        )
        best = np.max(got.validation_accuracies)
        tied = [decay for decay, value in zip(decays, got.validation_accuracies, strict=True) if value == best]
        assert np.float32(max(tied)) == got.weight_decay
    easy = small(noise=0.01)
    got = probe(
        jax.random.key(3),
        *easy,
        *easy,
        classes=4,
        weight_decays=jnp.array([1e-2, 1e-1, 1e-3, 1e-4]),
        validation=0.3,
        steps=50,
    )
    np.testing.assert_array_equal(got.validation_accuracies, 1)
    assert got.weight_decay == np.float32(0.1)


def test_the_key_draws_the_validation_part():
    keys = jax.random.split(jax.random.key(0), 6)
    run = functools.partial(linear_probe, classes=4, weight_decays=jnp.array([1e-2]), steps=20)
    scores = jax.jit(jax.vmap(lambda key: run(key, *small(), *small(1)).validation_accuracies[0]))(keys)
    assert len(set(scores.tolist())) > 1


def test_names_of_classes_change_nothing():
    (x, y), (test, test_labels) = small(), small(1)
    names = np.array([2, 0, 3, 1])
    first = probe(jax.random.key(0), x, y, test, test_labels, classes=4, steps=100)
    second = probe(jax.random.key(0), x, names[y], test, names[test_labels], classes=4, steps=100)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), first, second)


def test_one_compilation_for_all_weight_decays():
    before = probe._cache_size()
    for scale in (1, 10):
        probe(jax.random.key(0), *small(), *small(1), classes=4, weight_decays=scale * DECAYS[:2], steps=30)
    assert probe._cache_size() == before + 1


# --- Alignment and uniformity


def circle(angles):
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_of_turned_views(alpha):
    """Of a turn by an angle: a chord of 2 sin(angle / 2), to the power."""
    angles = jnp.linspace(0, 5, 20)
    turned = 3 * circle(angles + 0.4)
    np.testing.assert_allclose(aligned(circle(angles), turned, alpha=alpha), (2 * np.sin(0.2)) ** alpha, rtol=1e-5)
    assert aligned(circle(angles), 7 * circle(angles), alpha=alpha) < 1e-6
    np.testing.assert_allclose(aligned(circle(angles), -circle(angles), alpha=alpha), 2**alpha, rtol=1e-5)


def test_alignment_is_a_mean_over_examples():
    first, second = features(9), features(9, seed=1)
    expected = np.mean([np.linalg.norm(a - b) ** 1.5 for a, b in zip(unit(first), unit(second), strict=True)])
    np.testing.assert_allclose(aligned(first, second, alpha=1.5), expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment_has_a_gradient_where_views_fall_together(alpha):
    first, second = jnp.array([[1.0, 2.0], [3.0, 1.0], [0.0, 0.0]]), jnp.array([[1.0, 2.0], [1.0, 3.0], [0.0, 0.0]])
    gradient = jax.jit(jax.grad(lambda x: alignment(x, second, alpha=alpha)))(first)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[jnp.array([0, 2])], 0)
    assert np.any(gradient[1] != 0)


@pytest.mark.parametrize("t", [0.5, 2.0, 5.0])
def test_uniformity_of_the_circle(t):
    """E exp(-t |x - y|^2) = e^(-2t) I_0(2t), which a regular polygon's mean over all pairs, x = y too, attains."""
    n = 100
    expected = np.log((n * scipy.special.ive(0, 2 * t) - 1) / (n - 1))
    np.testing.assert_allclose(even(circle(2 * jnp.pi * jnp.arange(n) / n), t=t, block_size=32), expected, atol=1e-5)


def test_uniformity_of_the_sphere():
    """E exp(-t |x - y|^2) = (1 - e^(-4t)) / 4t: |x - y|^2 is uniform on [0, 4]."""
    for t in (1.0, 3.0):
        np.testing.assert_allclose(even(features(3000, width=3), t=t), np.log(-np.expm1(-4 * t) / (4 * t)), atol=0.01)


def test_uniformity_of_collapsed_and_of_orthogonal_embeddings():
    np.testing.assert_allclose(even(features(1) * np.geomspace(1, 9, 30, dtype=np.float32)[:, None]), 0, atol=1e-5)
    np.testing.assert_allclose(even(jnp.eye(7), t=3.0), -6, rtol=1e-6)
    np.testing.assert_allclose(even(jnp.eye(7), t=100.0), -200, rtol=1e-6)  # e^(-200) is no float32
    np.testing.assert_allclose(even(jnp.array([[0.0, 0.0], [0.0, 2.0]]), t=3.0), -3, rtol=1e-6)  # zero stays zero


@pytest.mark.parametrize("block_size", [5, 64])
def test_uniformity_agrees_with_a_double_loop_in_value_and_gradient(block_size):
    with jax.enable_x64(True):
        x = features(23, dtype=np.float64)
        pairs = [
            np.exp(-2 * np.sum((a - b) ** 2)) for i, a in enumerate(unit(x)) for j, b in enumerate(unit(x)) if i != j
        ]
        np.testing.assert_allclose(even(x, block_size=block_size), np.log(np.mean(pairs)), rtol=1e-12)

        def dense(x):
            x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
            i, j = np.triu_indices(23, 1)
            return jnp.log(jnp.mean(jnp.exp(-2 * jnp.sum((x[i] - x[j]) ** 2, axis=1))))

        gradient = jax.jit(jax.grad(lambda x: uniformity(x, block_size=block_size)))(x)
        np.testing.assert_allclose(gradient, jax.jit(jax.grad(dense))(x), rtol=1e-9, atol=1e-12)


def test_uniformity_memory_grows_with_the_block():
    x = jax.ShapeDtypeStruct((4096, 16), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda x: uniformity(x, block_size=32)))
    assert step.lower(x).compile().memory_analysis().temp_size_in_bytes < 4 * 4096 * 4096 / 10


# --- All


@pytest.mark.slow
def test_half_precision_is_computed_in_single():
    x, other = (features(40, seed=seed).astype(jnp.bfloat16) for seed in (0, 1))
    wide, other_wide = x.astype(np.float32), other.astype(np.float32)
    assert aligned(x, other).dtype == even(x).dtype == jnp.float32
    assert aligned(x, other) == aligned(wide, other_wide)
    assert even(x) == even(wide)
    y = labels(40)
    assert knn(x, y, other, y, neighbours=5) == knn(wide, y, other_wide, y, neighbours=5)
    got, expected = (
        probe(jax.random.key(0), *data, classes=4, steps=9) for data in ((x, y, other, y), (wide, y, other_wide, y))
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("poisoned", ["train", "test"])
def test_nan_comes_out(poisoned):
    """Not as the accuracy of some class."""
    sets = {"train": features(40), "test": features(40, seed=1)}
    sets[poisoned][3, 1] = np.nan
    data = sets["train"], labels(40), sets["test"], labels(40, seed=1)
    assert np.isnan(knn(*data, neighbours=40))
    assert np.isnan(probe(jax.random.key(0), *data, classes=4, steps=9).accuracy)
    assert np.isnan(aligned(*sets.values()))
    assert np.isnan(even(sets[poisoned]))


X, Y, KEY = jnp.ones((6, 3)), jnp.arange(6) % 2, jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: knn_accuracy(X[0], Y, X, Y, neighbours=2), ValueError, r"`train_features` must have shape \[any, any\], got \[3\]"),
        (lambda: knn_accuracy(X, Y, X[:, :2], Y, neighbours=2), ValueError, "`train_features` and `test_features` must hold features of one length, got 3 and 2"),
        (lambda: knn_accuracy(X, Y[:5], X, Y, neighbours=2), ValueError, r"`train_labels` must have shape \[6\], got \[5\]"),
        (lambda: knn_accuracy(X, Y, X, Y[:, None], neighbours=2), ValueError, r"`test_labels` must have shape \[6\], got \[6, 1\]"),
        (lambda: knn_accuracy(X, Y, X, 1.0 * Y, neighbours=2), TypeError, "`test_labels` must be integers, got dtype float32"),
        (lambda: knn_accuracy(X, Y, X[:0], Y[:0], neighbours=2), ValueError, r"`test_features` must hold at least 1 row, got shape \[0, 3\]"),
        (lambda: knn_accuracy(X.astype(int), Y, X, Y, neighbours=2), TypeError, "`train_features` must be floating-point.*, got dtype int32"),
        (lambda: knn_accuracy(X, Y, X, Y), ValueError, "`neighbours` must be at most the number of rows of `train_features`, 6, got 200"),
        (lambda: knn_accuracy(X, Y, X, Y, neighbours=0), ValueError, "`neighbours` must be an integer of at least 1, got 0"),
        (lambda: knn_accuracy(X, Y, X, Y, neighbours=2, block_size=0), ValueError, "`block_size` must be an integer of at least 1, got 0"),
        (lambda: knn_accuracy(X, Y, X, Y, neighbours=2, temperature=0.0), ValueError, "`temperature` must be above 0 and finite, got 0"),
        (lambda: linear_probe(0, X, Y, X, Y, classes=2), TypeError, "`key` must be a typed PRNG key.*, got int"),
        (lambda: linear_probe(KEY, X, Y, X, Y, classes=1), ValueError, "`classes` must be at least 2, got 1"),
        (lambda: linear_probe(KEY, X, Y + 1, X, Y, classes=2), ValueError, r"`train_labels` must lie in \[0, 1\], got values from 1 to 2"),
        (lambda: linear_probe(KEY, X, Y, X, -Y, classes=2), ValueError, r"`test_labels` must lie in \[0, 1\], got values from -1 to 0"),
        (lambda: linear_probe(KEY, X, Y, X, Y, classes=2, steps=0), ValueError, "`steps` must be an integer of at least 1, got 0"),
        (lambda: linear_probe(KEY, X, Y, X, Y, classes=2, weight_decays=()), ValueError, r"`weight_decays` must hold at least 1 row, got shape \[0\]"),
        (lambda: linear_probe(KEY, X, Y, X, Y, classes=2, weight_decays=1.0), ValueError, r"`weight_decays` must have shape \[any\], got \[\]"),
        (lambda: linear_probe(KEY, X, Y, X, Y, classes=2, weight_decays=[0.1, 0.0]), ValueError, "`weight_decays` must be above 0 and finite, got values from 0 to 0.1"),
        (lambda: linear_probe(KEY, X, Y, X, Y, classes=2, validation=1.5), ValueError, r"`validation` must lie in \[0, 1\], got 1.5"),
        (lambda: linear_probe(KEY, X, Y, X, Y, classes=2, validation=0.01), ValueError, "`validation` must leave rows to choose by and rows to fit to, got 0.01, 0 of 6"),
        (lambda: linear_probe(KEY, X, Y, X, Y, classes=2, validation=1.0), ValueError, "`validation` must leave rows to choose by and rows to fit to, got 1, 6 of 6"),
        (lambda: alignment(X, X[:5]), ValueError, r"`second` must have the shape of `first`, \[6, 3\], got \[5, 3\]"),
        (lambda: alignment(X[0], X[0]), ValueError, r"`first` must have shape \[any, any\], got \[3\]"),
        (lambda: alignment(X, X, alpha=0.0), ValueError, "`alpha` must be above 0 and finite, got 0"),
        (lambda: alignment(X, X.astype(int)), TypeError, "`second` must be floating-point.*, got dtype int32"),
        (lambda: uniformity(X[:1]), ValueError, r"`embeddings` must hold at least 2 rows, got shape \[1, 3\]"),
        (lambda: uniformity(X.astype(int)), TypeError, "`embeddings` must be floating-point.*, got dtype int32"),
        (lambda: uniformity(X, t=-1.0), ValueError, "`t` must be above 0 and finite, got -1"),
        (lambda: uniformity(X, block_size=0), ValueError, "`block_size` must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
