"""Coupled critics are refused, exactly where the Jacobian has entries between examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxgen import gan, nets
from jaxgen.gan import coupling

X = jax.random.normal(jax.random.key(0), (4, 4, 4, 3))
W = jax.random.normal(jax.random.key(1), (3, 3, 3, 6))
V = jax.random.normal(jax.random.key(2), (3, 3))
ROWS = jnp.arange(4)


def score(x):
    return jnp.tanh(x).reshape(x.shape[0], -1).sum(1)


def refused(critic, x=X):
    try:
        jax.eval_shape(lambda x: gan.penalised(critic, x), x)
    except ValueError as error:
        assert "`critic` must score each example by itself" in str(error)  # noqa: PT017
        return True
    return False


def jacobian_couples(critic, x=X):
    slopes = jax.jit(jax.jacobian(critic))(x).reshape(x.shape[0], x.shape[0], -1)
    between = jnp.abs(slopes).max(-1) * (1 - jnp.eye(x.shape[0]))
    return bool(between.max() > 1e-7)


def over(axes, groups=None):
    """Standard deviations over a batch, or groups of it, as a further channel (Karras et al. 2018)."""

    def critic(x):
        grouped = x.reshape(groups or 1, -1, *x.shape[1:])
        spread = jnp.sqrt(jnp.var(grouped, axes) + 1e-8).mean((-3, -2, -1), keepdims=True)
        if groups is not None:
            spread = jnp.tile(spread, (x.shape[0] // spread.shape[0], 1, 1, 1))
        channel = jnp.broadcast_to(spread, (x.shape[0], *x.shape[1:3], 1))
        return score(nets.convolve(jnp.concatenate([x, channel], axis=3), jnp.concatenate([W, W[:, :, :1]], axis=2)))

    return critic


def flax(module, **kwargs):
    variables = module.init(jax.random.key(0), X)
    return lambda x: score(module.apply(variables, x, **kwargs))


def attention(x, within):
    tokens = x.reshape(x.shape[0], -1, 3) if within else x.reshape(1, x.shape[0], -1)
    weights = jax.nn.softmax(0.1 * tokens @ tokens.swapaxes(1, 2))
    return score((weights @ tokens).reshape(x.shape))


def looped(body):
    def critic(x):
        x, ys = jax.lax.scan(lambda x, w: (body(jnp.tanh(x @ w)), x), x, jnp.stack([V, V, V]))
        return score(x) + score(jnp.moveaxis(ys, 0, 1))

    return critic


@jax.custom_vjp
def own_rule(x):
    return jnp.sin(x - x.mean(0))


def own_rule_backward(x, ct):
    slope = ct * jnp.cos(x - x.mean(0))
    return (slope - slope.mean(0),)


own_rule.defvjp(lambda x: (own_rule(x), x), own_rule_backward)


def augmented(x):
    return jax.vmap(
        lambda x, i: jax.lax.dynamic_slice(jnp.pad(x, ((1, 1), (1, 1), (0, 0))), (i % 2, i % 2, 0), x.shape)
    )(x, ROWS)


COUPLED = {
    "mean": lambda x: score(x - x.mean(0)),
    "mean at the end": lambda x: score(x) - score(x).mean(),
    "variance": lambda x: score(x / x.std()),
    "batch norm": flax(nets.BatchNorm()),
    "flax batch norm": lambda x: score(nn.BatchNorm(use_running_average=False).init_with_output(jax.random.key(0), x)[0]),
    "standard deviation of the batch": over((0, 1)),
    "standard deviation of groups": over((0,), 2),
    "standard deviation within groups": over((1,), 2),
    "group by striding": lambda x: score(x - x.reshape(-1, 2, 4, 4, 3).mean(0, keepdims=True).repeat(2, 0).reshape(x.shape)),
    "sort": lambda x: score(jnp.sort(x, axis=0) * x),
    "cumulative sum": lambda x: score(jnp.cumsum(x, axis=0)),
    "reverse": lambda x: score(x * x[::-1]),
    "roll": lambda x: score(x * jnp.roll(x, 1, axis=0)),
    "the first": lambda x: score(x * x[:1]),
    "the first by its index": lambda x: score(x * x[0]),
    "differences": lambda x: score(x - jnp.pad(x[1:], ((0, 1), (0, 0), (0, 0), (0, 0)))),
    "order": lambda x: score(x[::-1]),
    "attention": lambda x: attention(x, within=False),
    "contraction": lambda x: score(x) * jnp.einsum("nhwc,mhwc->n", x, x),
    "merged axes": lambda x: score((x.reshape(-1, 3) - x.reshape(-1, 3).mean(0)).reshape(x.shape)),
    "transposed": lambda x: score(x.transpose(3, 1, 2, 0).mean(3)[..., None].transpose(3, 1, 2, 0) * x),
    "behind a convolution": lambda x: score(nets.convolve(x - x.mean(0), W)),
    "behind a strided transposed one": lambda x: score(nets.convolve_transpose(x - x.mean(0), W.swapaxes(2, 3), strides=2)),
    "behind a grouped one": lambda x: score(nets.convolve(x - x.mean(0), W[:, :, :1], groups=3)),
    "behind pads": lambda x: score(nets.convolve(jnp.pad(x - x.mean(0), ((0, 0), (2, 2), (2, 2), (0, 0))), W, padding="VALID")),
    "behind flax's": lambda x: score(jax.lax.conv_general_dilated(x - x.mean(0), W, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))),
    "behind pooling": lambda x: score(nn.max_pool(nn.avg_pool(x - x.mean(0), (2, 2)), (2, 2), strides=(2, 2))),
    "behind dropout": lambda x: score(jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x - x.mean(0), 0)),
    "behind elu and relu": lambda x: score(jax.nn.relu(jax.nn.elu(x - x.mean(0)))),
    "behind resizing": lambda x: score(jax.image.resize(x - x.mean(0), (4, 8, 8, 3), "bilinear")),
    "behind channels taken": lambda x: score((x - x.mean(0))[..., jnp.array([2, 0])]),
    "behind crops": lambda x: score(jax.vmap(lambda x, i: jax.lax.dynamic_slice(x, (i, i, 0), (2, 2, 3)))(x - x.mean(0), ROWS)),
    "behind a split": lambda x: score(jnp.split(x - x.mean(0), 3, axis=3)[1]),
    "behind cutout": lambda x: score(x * jnp.where(ROWS[:, None] > 1, x, 0).mean(0)),
    "behind stacking": lambda x: score(jnp.stack([x, x - x.mean(0)], axis=1)),
    "behind tiling": lambda x: score(jnp.tile(x, (1, 2, 1, 1)) * jnp.tile(x[:2], (2, 2, 1, 1))),
    "behind augmentation": lambda x: score(augmented(x) - augmented(x).mean(0)),
    "in jit": jax.jit(lambda x: score(x - x.mean(0))),
    "in a checkpoint": jax.checkpoint(lambda x: score(x - x.mean(0))),
    "in a custom gradient": lambda x: score(own_rule(x)),
    "in a custom derivative": lambda x: score(jax.nn.softplus(x - x.mean(0))),
    "in a scan": looped(lambda x: x - x.mean(0)),
    "in its last step": looped(lambda x: x[::-1] + x),
    "in both branches": lambda x: jax.lax.cond(ROWS[0] > 1, lambda x: score(x - x.mean(0)), lambda x: score(x / x.std()), x),
}  # fmt: skip

UNCOUPLED = {
    "linear": lambda x: score(x @ V),
    "group norm": flax(nets.GroupNorm(3)),
    "layer norm": lambda x: score(nets.layer_norm(x)),
    "rms norm": flax(nets.RMSNorm()),
    "calibrated batch norm": lambda x: score(nets.BatchNorm().apply(nets.calibrate(nets.BatchNorm().apply, nets.BatchNorm().init(jax.random.key(0), X), [X]), x)),
    "flax running averages": flax(nn.BatchNorm(use_running_average=True)),
    "constants of differentiation": lambda x: score(x - jax.lax.stop_gradient(x.mean(0))),
    "signs": lambda x: score(x * (x > x.mean(0))),
    "attention within": lambda x: attention(x, within=True),
    "convolution": lambda x: score(nets.convolve(x, W, strides=2)),
    "grouped by reshaping": lambda x: score(x.reshape(2, 2, 4, 4, 3).mean((2, 3))[:, :, :, None].reshape(4, 3)),
    "merged and split": lambda x: score(x.reshape(-1, 3).reshape(4, 16, 3).mean(1)),
    "merged with a part": lambda x: score(x.reshape(8, 24).reshape(4, -1).mean(1, keepdims=True)),
    "reversed twice": lambda x: score(x[::-1][::-1] * x),
    "put together again": lambda x: score(jnp.concatenate([x[:1], x[1:]]) * x),
    "pads": lambda x: score(jnp.pad(x, ((0, 0), (1, 1), (2, 0), (0, 0))) @ V),
    "reflections": lambda x: score(jnp.pad(x, ((0, 0), (1, 1), (2, 0), (0, 0)), mode="reflect") @ V),
    "labels": lambda x: score(x * jax.nn.one_hot(ROWS % 3, 3)[:, None, None]),
    "a channel of constants": lambda x: score(jnp.concatenate([x, jnp.ones((4, 4, 4, 1))], axis=3)),
    "sorted channels": lambda x: score(jnp.sort(x, axis=3) * x),
    "one by one": lambda x: jax.lax.map(lambda x: jnp.sin(x).mean(), x),
    "per example": lambda x: jax.vmap(lambda x: jnp.mean((x - x.mean()) ** 2))(x),
    "per example's kernel": lambda x: jax.vmap(lambda x: nets.convolve(x[None], W * x.mean()).sum())(x),
    "shuffled in place": lambda x: score(jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1) * x),
    "mask between packed examples": lambda x: score(jnp.where(jnp.eye(64, dtype=bool), x.reshape(-1, 3) @ x.reshape(-1, 3).T, 0).reshape(4, -1)),
    "scan": looped(lambda x: x),
    "fixed": lambda x: jnp.arange(4.0),
    "norms off a diagonal": lambda x: jnp.diagonal(x.reshape(4, -1) @ x.reshape(4, -1).T),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_critics_are_refused(name):
    assert jacobian_couples(COUPLED[name])
    assert refused(COUPLED[name])


@pytest.mark.parametrize("name", UNCOUPLED)
def test_uncoupled_critics_are_not(name):
    assert not jacobian_couples(UNCOUPLED[name])
    assert not refused(UNCOUPLED[name])


ENTRY_BY_ENTRY = (
    jnp.abs, jnp.arccos, jnp.arccosh, jnp.arcsin, jnp.arcsinh, jnp.arctan, jnp.arctanh, jnp.cbrt, jnp.cos, jnp.cosh, jnp.exp,
    jnp.exp2, jnp.expm1, jnp.log, jnp.log1p, jnp.negative, jnp.sin, jnp.sinh, jnp.sqrt, jnp.square, jnp.tan, jnp.tanh,
    jax.lax.rsqrt, jax.lax.erf, jax.lax.erfc, jax.lax.erf_inv, jax.lax.lgamma, jax.lax.digamma, jax.lax.logistic,
    jax.lax.optimization_barrier, lambda x: x**3, lambda x: x**0.3, lambda x: jnp.arctan2(x, 2), lambda x: 1 / x,
    lambda x: jnp.minimum(x, 1), lambda x: jax.lax.clamp(-1.0, x, 1.0), lambda x: jax.lax.reduce_precision(x, 8, 7),
    lambda x: x.astype(jnp.bfloat16), lambda x: jnp.where((x > 0) & (x < 1) | ~(x != 2) ^ (x <= 1), x, 0), jnp.copy,
    lambda x: jnp.where((x == 0) | (x >= 1) | jnp.isfinite(x), 1, x), jax.jit(jnp.sin), jax.nn.gelu, jax.nn.silu, jax.nn.elu,
    lambda x: jax.lax.dynamic_slice_in_dim(x, ROWS[1], 2, axis=1),
)  # fmt: skip
ALONG_AXES = (
    jnp.sum, jnp.prod, jnp.max, jnp.min, jnp.mean, jnp.std, jnp.median, jax.nn.logsumexp, jnp.linalg.norm, jnp.cumsum, jnp.cumprod,
    jax.lax.cummax, jax.lax.cummin, jax.lax.cumlogsumexp, jnp.sort, jax.nn.softmax, jax.nn.log_softmax, jnp.diff, jnp.flip,
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(ENTRY_BY_ENTRY)))
def test_entry_by_entry_nothing_is_lost_or_added(number):
    function = ENTRY_BY_ENTRY[number]
    assert refused(lambda x: jnp.sum(function(x - x.mean(0)).reshape(4, -1), axis=1))
    assert not refused(lambda x: jnp.sum(function(x).reshape(4, -1), axis=1))


@pytest.mark.parametrize("function", ALONG_AXES, ids=lambda function: function.__name__)
def test_along_the_batch_or_within_it(function):
    assert refused(
        lambda x: score(x * jnp.pad(y := function(x, axis=0), [(0, (-len(y)) % 4)] + [(0, 0)] * (y.ndim - 1)))
    )
    assert not refused(lambda x: jnp.sum(function(x, axis=1).reshape(4, -1), axis=1))


def network(module, *arguments):
    """Parameters are traced, so nothing is computed."""

    def critic(x):
        params = module.init(jax.random.key(0), x, *arguments)
        return module.apply(params, x, *arguments).mean((1, 2, 3))

    return critic


IMAGES = jnp.zeros((2, 16, 16, 3))
UNET = nets.UNet(3, channels=32, multipliers=(1, 2), blocks=1, attention=(8,))


@pytest.mark.parametrize(
    "module",
    [
        UNET,
        nets.DiT(3, 32, 2, 2),
        nets.DiT(3, 32, 2, 2, remat=jax.checkpoint_policies.nothing_saveable, qk_norm=True),
    ],
    ids=["UNet", "DiT", "DiT with remat"],
)
def test_networks_with_and_without_a_coupled_input(module):
    times = jnp.zeros(2)
    assert not refused(network(module, times), IMAGES)
    assert refused(lambda x: network(module, times)(x - x.mean(0)), IMAGES)


def test_the_autoencoder_is_refused_until_it_is_calibrated():
    model = nets.ConvAutoencoder()
    assert refused(network(model), IMAGES)

    def calibrated(x):
        params = nets.calibrate(model.apply, model.init(jax.random.key(0), x), [jnp.ones_like(x)])
        return model.apply(params, x).mean((1, 2, 3))

    assert not refused(calibrated, IMAGES)


def coupled(x, w=1.0):
    return score(w * x - x.mean(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: gan.penalised(coupled, X),
        lambda: gan.r1(coupled, X),
        lambda: gan.r2(coupled, X),
        lambda: gan.gradient_penalty(coupled, X, X, jax.random.key(0)),
        lambda: gan.scored(coupled, X, X),
        lambda: jax.jit(lambda x: gan.penalised(coupled, x))(X),
        lambda: jax.grad(lambda w: gan.r1(lambda x: coupled(x, w), X).sum())(1.0),
        lambda: jax.vmap(lambda w: gan.r1(lambda x: coupled(x, w), X))(ROWS),
        lambda: jax.vmap(lambda x: gan.r1(coupled, x))(X[None]),
        lambda: jax.lax.scan(lambda c, x: (c, gan.r1(coupled, x)), 0, X[None]),
        lambda: jax.pmap(lambda x: gan.r1(coupled, x))(X.reshape(2, 2, 4, 4, 3)),
        lambda: jax.pmap(lambda x: gan.r1(lambda x: score(x - jax.lax.pmean(x.mean(0), "i")), x), axis_name="i")(X[None]),
        lambda: in_shard_map(lambda x: gan.r1(coupled, x)),
    ],
)  # fmt: skip
def test_wherever_it_is_traced(call):
    with pytest.raises(
        ValueError, match="`critic` must score each example by itself: the logit of example 1 depends on"
    ):
        call()


def in_shard_map(function):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("i")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows))(X)


def test_an_uncoupled_critic_passes_wherever_it_is_traced():
    def norms(x, w=1.0):
        return gan.r1(lambda x: score(nets.convolve(w * x, W)), x)

    expected = norms(X)
    for values in (
        jax.jit(norms)(X),
        jax.vmap(norms)(X[None])[0],
        jax.pmap(norms)(X.reshape(2, 2, 4, 4, 3)).reshape(4),
        in_shard_map(norms),
        jax.vmap(lambda w: norms(X, w))(jnp.ones(1))[0],
    ):
        np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_the_first_coupling_is_named():
    critic = lambda x: score(jnp.concatenate([x[:2], x[2:3] * x[3:], x[3:]]))  # noqa: E731
    with pytest.raises(ValueError, match="the logit of example 2 depends on example 3"):
        gan.penalised(critic, X)


def test_a_critic_with_a_state_of_its_own_is_not_remembered():
    class Critic:
        scale = 1.0

        def __call__(self, x):
            return self.scale * score(x)

    critic = Critic()
    before = gan.r1(critic, X)
    critic.scale = 2.0
    np.testing.assert_allclose(gan.r1(critic, X), 4 * before, rtol=1e-6)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("augment", [gan.ada, gan.diffaugment])
def test_every_operation_of_our_critics_has_a_rule(normalised, augment, monkeypatch):
    """Where JAX words an operation anew, detection falls silent by design; this test does not."""

    class Strict(dict):
        def get(self, name):
            if name == "stop_gradient":  # passes nothing on
                return None

            def rule(equation, operands):
                try:
                    return self[name](equation, operands)
                except Exception as error:
                    raise AssertionError(f"no rule follows {equation}") from error

            return rule

    monkeypatch.setattr(coupling, "_RULES", Strict(coupling._RULES))
    key, x, labels = jax.random.key(0), jnp.zeros((4, 8, 8, 3)), jnp.zeros(4, jnp.int32)
    options = {"probability": 0.5} if augment is gan.ada else {}
    if normalised:
        networks = [nets.DCGANDiscriminator(8, 3, 10, (8, 16), nets.BatchNorm)]
    else:
        networks = [
            nets.DCGANDiscriminator(8, 3, 10, (8, 16)),
            nets.R3GANDiscriminator(3, 10, (16, 8), group_size=8),
        ]
    for network in networks:
        params = jax.eval_shape(network.init, key, x, labels)

        def logits(params, x, network=network):
            return gan.penalised(lambda x: network.apply(params, augment(key, x, **options), labels), x)

        if normalised:
            with pytest.raises(ValueError, match="must score each example by itself"):
                jax.eval_shape(logits, params, x)
        else:
            jax.eval_shape(logits, params, x)
