"""Guidance against closed forms: the exact classifier of a mixture, the algebra of scales, one trace for all scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, testing
from tests.diffusion.oracle import PATHS

KEY = jax.random.key(0)
MEANS = np.array([[1.0, -0.5], [-1.0, 0.8], [0.2, 1.7]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
STD = 0.6
X, T = jnp.linspace(-2, 2, 8).reshape(4, 2), jnp.array([0.1, 0.4, 0.5, 0.9])


def double(x, t):
    return 2 * x


def negative(x, t):
    return -x


def mixture(path, classes):
    share = WEIGHTS[classes] / WEIGHTS[classes].sum()
    return (
        testing.mixture_denoiser(path, MEANS[classes], STD, share),
        testing.mixture_log_density(path, MEANS[classes], STD, share),
    )


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("classes", [[0], [1, 2]], ids=["a Gaussian", "a mixture"])
def test_the_exact_classifier_at_scale_1_gives_the_exact_conditional(path, classes):
    with jax.enable_x64(True):
        everything, density = mixture(path, [0, 1, 2])
        wanted, class_density = mixture(path, classes)
        guided = diffusion.classifier_guidance(
            everything, path, lambda x, t: class_density(x, t) - density(x, t), scale=1.0
        )
        t = jnp.asarray(diffusion.time_at_ratio(path, np.geomspace(20.0, 0.02, 6)))
        x = 1.5 * jax.random.normal(KEY, (6, 2), jnp.float64)
        np.testing.assert_allclose(jax.jit(guided)(x, t), jax.jit(wanted)(x, t), rtol=1e-9, atol=1e-9)
        assert float(jnp.abs(everything(x, t) - wanted(x, t)).max()) > 0.1


def test_a_classifier_guides_where_alpha_is_0():
    path = PATHS["rectified_flow"]
    everything, density = mixture(path, [0, 1, 2])
    wanted, class_density = mixture(path, [1])
    guided = diffusion.classifier_guidance(everything, path, lambda x, t: class_density(x, t) - density(x, t), 1.0)
    for t in (1.0, jnp.array([1.0, 1.0, 0.7, 0.2])):
        np.testing.assert_allclose(jax.jit(guided)(X, t), jax.jit(wanted)(X, t), atol=0.01)


def test_classifier_guided_sampling_samples_the_class():
    path = PATHS["rectified_flow"]
    everything, density = mixture(path, [0, 1, 2])
    _, class_density = mixture(path, [0])
    guided = diffusion.classifier_guidance(everything, path, lambda x, t: class_density(x, t) - density(x, t), 1.0)
    table = diffusion.ddim(path, diffusion.uniform_times(path, 100))
    end = diffusion.sample(KEY, guided, table, diffusion.prior(KEY, path, 1.0, (20_000, 2)))
    np.testing.assert_allclose(end.mean(0), MEANS[0], atol=0.02)
    np.testing.assert_allclose(np.cov(end.T), STD**2 * np.eye(2), atol=0.02)


@pytest.mark.parametrize("guide", [diffusion.cfg, diffusion.autoguidance])
def test_scales_extrapolate_from_the_second_denoiser_through_the_first(guide):
    for scale, expected in ((0.0, -1.0), (1.0, 2.0), (2.5, 6.5), (jnp.array([[0.0], [1.0], [1.0], [2.0]]), None)):
        got = guide(double, negative, scale)(X, T)
        factor = jnp.array([[-1.0], [2.0], [2.0], [5.0]]) if expected is None else expected
        np.testing.assert_allclose(got, factor * X, rtol=1e-6)


def test_an_interval_guides_each_example_by_its_own_time():
    guided = diffusion.cfg_interval(double, negative, 2.5, low=0.4, high=0.5)
    np.testing.assert_allclose(guided(X, T), jnp.array([[2.0], [6.5], [6.5], [2.0]]) * X, rtol=1e-6)
    np.testing.assert_allclose(guided(X, 0.45), 6.5 * X, rtol=1e-6)
    np.testing.assert_allclose(guided(X, 0.55), 2.0 * X, rtol=1e-6)
    everywhere = diffusion.cfg_interval(double, negative, 2.5, low=0.0, high=1.0)
    np.testing.assert_allclose(everywhere(X, T), diffusion.cfg(double, negative, 2.5)(X, T), rtol=1e-6)


def test_outside_of_the_interval_the_unconditional_denoiser_is_not_called():
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return -x

    path = PATHS["rectified_flow"]
    table = diffusion.ddim(path, diffusion.uniform_times(path, 10))
    guided = diffusion.cfg_interval(double, counted, 2.0, low=0.35, high=0.75)
    jax.block_until_ready(diffusion.sample(KEY, guided, table, X))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), [0.4, 0.5, 0.6, 0.7], rtol=1e-6)


def test_a_curve_over_scales_and_intervals_compiles_once():
    traces = 0
    path = PATHS["edm"]
    everything, density = mixture(path, [0, 1, 2])
    one, class_density = mixture(path, [0])
    table = diffusion.ddim(path, diffusion.karras_times(path, 5))

    @jax.jit
    def run(scale, low):
        nonlocal traces
        traces += 1
        guided = diffusion.cfg_interval(one, everything, scale, low=low, high=10.0)
        guided = diffusion.autoguidance(guided, everything, scale)
        guided = diffusion.classifier_guidance(guided, path, lambda x, t: class_density(x, t) - density(x, t), scale)
        guided = diffusion.dynamic_threshold(diffusion.clip_data(guided, -scale, scale), quantile=scale / 10)
        return diffusion.sample(KEY, guided, table, X)

    ends = [run(scale, low) for scale, low in zip(np.linspace(1, 8, 8), np.linspace(0.1, 0.8, 8), strict=True)]
    assert traces == 1
    assert np.all(np.isfinite(ends))
    assert not np.allclose(ends[0], ends[-1])


COMPOSED = {
    "cfg_interval": lambda denoise: diffusion.cfg_interval(double, denoise, 3.0, low=0.3, high=0.6),
    "autoguidance": lambda denoise: diffusion.autoguidance(denoise, negative, 3.0),
    "classifier_guidance": lambda denoise: diffusion.classifier_guidance(
        denoise, PATHS["rectified_flow"], lambda x, t: -jnp.sum(x**4, axis=1), 2.0
    ),
    "clip_data": lambda denoise: diffusion.clip_data(denoise, -1.0, 1.0),
    "dynamic_threshold": lambda denoise: diffusion.dynamic_threshold(denoise, quantile=0.7),
}


@pytest.mark.parametrize("guide", COMPOSED.values(), ids=COMPOSED)
def test_examples_do_not_see_each_other(guide):
    guided = guide(double)
    together = guided(X, T)
    assert together.shape == X.shape
    assert together.dtype == X.dtype
    for i in range(4):
        np.testing.assert_allclose(together[i], guided(X[i : i + 1], T[i : i + 1])[0], rtol=1e-6)


@pytest.mark.parametrize("guide", COMPOSED.values(), ids=COMPOSED)
def test_half_precision_stays_half_precision(guide):
    got = jax.jit(guide(double))(X.astype(jnp.bfloat16), T)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), guide(double)(X, T), rtol=0.05, atol=0.1)


def test_clipping_and_thresholding():
    np.testing.assert_array_equal(diffusion.clip_data(double, -1.0, 0.5)(X, T), jnp.clip(2 * X, -1.0, 0.5))
    x = jax.random.normal(KEY, (3, 4, 5, 2)) * jnp.array([0.1, 1.0, 10.0]).reshape(3, 1, 1, 1)
    got = np.asarray(diffusion.dynamic_threshold(lambda x, t: x, quantile=0.9)(x, 0.0))
    for example, expected in zip(got, np.asarray(x), strict=True):
        bound = max(np.quantile(np.abs(expected), 0.9), 1.0)
        np.testing.assert_allclose(example, np.clip(expected, -bound, bound) / bound, rtol=1e-5)
    assert np.abs(got).max() <= 1
    np.testing.assert_array_equal(got[0], x[0])  # in range already: untouched


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusion.cfg(double, negative, np.nan), "`scale` must be finite, got nan"),
        (lambda: diffusion.autoguidance(double, negative, np.inf), "`scale` must be finite, got inf"),
        (lambda: diffusion.cfg_interval(double, negative, np.nan, low=0.0, high=1.0), "`scale` must be finite"),
        (lambda: diffusion.cfg_interval(double, negative, 2.0, low=0.6, high=0.5), "`low` must be at most `high`, got 0.6 and 0.5"),
        (lambda: diffusion.classifier_guidance(double, PATHS["edm"], negative, np.inf), "`scale` must be finite"),
        (lambda: diffusion.classifier_guidance(double, PATHS["edm"], negative, 1.0)(X, T), r"`log_probability\(x, t\)` must have shape \[4\], got \[4, 2\]"),
        (lambda: diffusion.clip_data(double, 1.0, -1.0), "`low` must be at most `high`, got 1.0 and -1.0"),
        (lambda: diffusion.dynamic_threshold(double, quantile=99.5), r"`quantile` must lie in \[0, 1\], got 99.5"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refusals_look_at_known_values_only():
    guided = jax.jit(lambda scale: diffusion.cfg_interval(double, negative, scale, low=scale, high=0.0)(X, T))
    assert guided(jnp.inf).shape == X.shape
    known = jax.jit(
        lambda x: diffusion.cfg_interval(double, negative, jnp.float32(2), low=jnp.float32(0.3), high=0.6)(x, T)
    )
    assert known(X).shape == X.shape
