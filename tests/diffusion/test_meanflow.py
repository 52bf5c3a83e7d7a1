"""MeanFlow on Gaussian data, whose average velocity is known: it is the loss's fixed point, and one step is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, nets, testing
from tests.diffusion.oracle import MEAN, PATHS, STD

KEY = jax.random.key(6)
STRAIGHT = ["rectified_flow", "edm"]
RNG = np.random.default_rng(0)


def average_velocity(path):
    """Eq. 1 by the exact flow; r < t."""

    def u(x, t, r):
        return (x - testing.gaussian_flow(path, MEAN, STD, x, t, r)) / (t - r)[:, None]

    return u


def velocity(path):
    """The flow's velocity, from the exact denoiser."""

    def v(x, t):
        c = diffusion.prediction.path_coefficients(path, t, x)
        x0 = testing.gaussian_denoiser(path, MEAN, STD)(x, t)
        return c.alpha_dot * x0 + c.sigma_dot * (x - c.alpha * x0) / c.sigma

    return v


def apart(path):
    """Times in the middle of the path, r at most 0.9 t: far enough from what the closed form divides by."""

    def draw(key):
        first, second = jax.random.uniform(key, (2,))
        t = path.t_max * (0.1 + 0.8 * first)
        return t, t * 0.9 * second

    return draw


@pytest.mark.parametrize("name", PATHS)
def test_the_exact_average_velocity_is_a_fixed_point(name):
    """Given the flow's own velocity, Eq. 2 holds point by point: the loss is 0."""
    path = PATHS[name]
    with jax.enable_x64(True):
        x0 = jnp.asarray(MEAN + STD * RNG.normal(size=(64, 3)))
        options = {"draw_times": apart(path), "guide": lambda x, t, v: velocity(path)(x, t)}
        loss = lambda u: np.asarray(diffusion.meanflow_loss(path, u, x0, KEY, **options))  # noqa: E731
        exact, scale = loss(average_velocity(path)), loss(lambda x, t, r: jnp.zeros_like(x))
        instant = loss(lambda x, t, r: velocity(path)(x, t))
    assert np.all(exact < 1e-16 * scale.mean())
    assert instant.mean() > 1e9 * exact.mean(), "the velocity itself is no average velocity"


def test_single_pairs_pull_nowhere_on_average():
    """With velocities of single pairs of data and noise the mean gradient is 0 at the exact network, to its error."""
    path, n = PATHS["rectified_flow"], 20_000
    x0 = jnp.asarray(MEAN + STD * RNG.normal(size=(n, 3)), jnp.float32)

    def slopes(u):
        def losses(theta):
            net = lambda x, t, r: u(x, t, r) * (1 + theta[0]) + theta[1] + theta[2] * x  # noqa: E731
            return diffusion.meanflow_loss(path, net, x0, KEY, draw_times=apart(path))

        gradients = np.asarray(jax.jit(jax.jacfwd(losses))(jnp.zeros(3)), np.float64)
        return gradients.mean(axis=0) / (gradients.std(axis=0) / np.sqrt(n))

    assert np.all(np.abs(slopes(average_velocity(path))) < 4.5)
    assert np.any(np.abs(slopes(lambda x, t, r: velocity(path)(x, t))) > 20)


def test_no_gradient_flows_through_the_target():
    path, x0 = PATHS["rectified_flow"], jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
    net = lambda a: lambda x, t, r: jnp.tanh(a * x) * (1 + t - r)[:, None]  # noqa: E731
    loss = lambda u, **options: diffusion.meanflow_loss(path, u, x0, KEY, draw_times=apart(path), **options)  # noqa: E731

    def held(a):
        """The mean of 2 (u - target) du/da: the derivative by central differences, the target as it is."""
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), 0))(jnp.arange(8))
        (t, r), seen = jax.vmap(apart(path))(keys), []
        loss(net(a), guide=lambda x, t, v: seen.append((x, v)) or v)
        ((x, v),) = seen
        u, slope = jax.jvp(net(a), (x, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))
        derivative = (net(a + 1e-2)(x, t, r) - net(a - 1e-2)(x, t, r)) / 2e-2
        return (2 * (u - (v - (t - r)[:, None] * slope)) * derivative).mean()

    np.testing.assert_allclose(jax.grad(lambda a: loss(net(a)).mean())(0.7), held(0.7), rtol=1e-3)


@pytest.mark.parametrize("name", STRAIGHT)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_steps_is_the_exact_flow(name, steps):
    path = PATHS[name]
    times = diffusion.uniform_times(path, steps)
    with jax.enable_x64(True):
        x = jnp.asarray(path.t_max * RNG.normal(size=(7, 3)))
        denoise = diffusion.meanflow_denoiser(path, average_velocity(path), times)
        got = diffusion.sample(KEY, denoise, diffusion.pad(diffusion.euler(path, times), rows=8, slots=2), x)
        wanted = testing.gaussian_flow(path, MEAN, STD, x, path.t_max, 0.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


def test_the_network_is_told_where_each_step_ends():
    told, path = [], PATHS["edm"]

    def net(x, t, r):
        told.append((float(t[0]), float(r[0])))
        return x

    denoise = diffusion.meanflow_denoiser(path, net, [80.0, 3.0, 0.5])
    for t in (80.0, 3.0, 10.0, 0.5):
        denoise(jnp.ones((1, 1)), t)
    assert told == [(80.0, 3.0), (3.0, 0.5), (10.0, 3.0), (0.5, 0.0)]


def test_times():
    draw = diffusion.meanflow_times(lambda key: jax.random.uniform(key), distinct=0.3)
    t, r = (np.asarray(time) for time in jax.vmap(draw)(jax.random.split(KEY, 20_000)))
    distinct = t > r
    assert np.all(t >= r)
    assert abs(distinct.mean() - 0.3) < 4.5 * np.sqrt(0.21 / 20_000)
    # of two uniform times the greater has mean 2/3, the smaller 1/3, whether or not the smaller is used
    for values, mean in ((t[distinct], 2 / 3), (t[~distinct], 2 / 3), (r[distinct], 1 / 3)):
        np.testing.assert_allclose(values.mean(), mean, atol=4.5 * np.sqrt(1 / 18 / len(values)))
    assert np.all(np.asarray(jax.vmap(diffusion.meanflow_times(distinct=1.0))(jax.random.split(KEY, 99))) < 1)


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_the_guided_velocity_is_a_fixed_point_of_the_guide(mix):
    x, t = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32), jnp.linspace(0.1, 0.9, 5)
    scale = jnp.array([1.0, 2.0, 0.0, 3.0, 1.5])
    with_class, without = jnp.sin(x), jnp.cos(x)
    guided = without + scale[:, None] * (with_class - without)

    def unconditional(x, t, r):
        np.testing.assert_array_equal(t, r)
        return jnp.cos(x)

    guide = diffusion.meanflow_guide(lambda x, t, r: guided, unconditional, scale, mix=mix)
    np.testing.assert_allclose(guide(x, t, with_class), guided, rtol=1e-5, atol=1e-6)
    for number in (1.0, 1):
        unguided = diffusion.meanflow_guide(lambda x, t, r: guided, unconditional, number)
        np.testing.assert_allclose(unguided(x, t, with_class), with_class, rtol=1e-6)


def test_loss_of_an_example_depends_on_its_index_alone():
    x0 = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    loss = lambda x0: diffusion.meanflow_loss(PATHS["rectified_flow"], lambda x, t, r: x, x0, KEY)  # noqa: E731
    np.testing.assert_allclose(loss(x0)[:2], loss(x0[:2]), rtol=1e-5)


def test_a_unet_told_two_times():
    """Its Jacobian-vector product, which the loss takes, is that of central differences."""
    model = nets.UNet(
        1, channels=8, multipliers=(1,), blocks=1, attention=(4,), groups=4, time_scale=3.0, zero_init=False
    )
    x, t, r = jax.random.normal(KEY, (2, 4, 4, 1)), jnp.array([0.7, 0.9]), jnp.array([0.2, 0.9])
    params = nets.init(model, KEY, x, jnp.stack([t, r], axis=1))
    net = jax.jit(lambda x, t, r: model.apply(params, x, jnp.stack([t, t - r], axis=1)))
    tangent = (jnp.cos(x), jnp.ones(2), jnp.zeros(2))
    _, got = jax.jit(lambda: jax.jvp(net, (x, t, r), tangent))()
    up, down = (net(*(p + h * v for p, v in zip((x, t, r), tangent, strict=True))) for h in (1e-2, -1e-2))
    np.testing.assert_allclose(got, (up - down) / 2e-2, rtol=0.02, atol=0.02 * float(jnp.abs(got).max()))
    one, apply = nets.init(model, KEY, x, t), jax.jit(model.apply)
    np.testing.assert_allclose(apply(one, x, t[:, None]), apply(one, x, t), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`t` must have shape \[2, any\], got \[1, 2\]"):
        model.apply(params, x, t[None])


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diffusion.meanflow_times(distinct=1.2), ValueError, r"`distinct` must lie in \[0, 1\], got 1.2"),
        (lambda: diffusion.meanflow_guide(None, None, 2.0, mix=1.0), ValueError, r"`mix` must lie in \[0, 1\), got 1.0"),
        (lambda: diffusion.meanflow_denoiser(PATHS["cosine"], None, [1.0, 0.0]), ValueError, "`path` must have alpha and sigma straight"),
        (lambda: diffusion.meanflow_loss(PATHS["edm"], lambda x, t, r: x[:, :1], X, KEY), ValueError, r"`net\(x, t, r\)` must have the shape of `x0`"),
        (lambda: diffusion.meanflow_loss(PATHS["edm"], lambda x, t, r: x, X.astype(int), KEY), TypeError, "`x0` must be floating"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
