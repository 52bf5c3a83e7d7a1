"""VICReg and Barlow Twins against double loops in NumPy, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxgen.contrastive.redundancy import barlow_twins, vicreg

N, D = 16, 5
RNG = np.random.default_rng(0)
FIRST = RNG.normal(size=(N, D)) * [0.3, 0.6, 1, 2, 3] + [0, 1, -2, 3, 5]
SECOND = FIRST + 0.7 * RNG.normal(size=(N, D)) * [0.3, 0.6, 1, 2, 3]
LOSSES = pytest.mark.parametrize("loss", [vicreg, barlow_twins])


def vicreg_in_loops(z, w, *, invariance=25, variance=25, covariance=1, eps=1e-4):
    def regularised(z):
        n, d = z.shape
        mean = [sum(z[i, j] for i in range(n)) / n for j in range(d)]

        def moment(j, k):
            return sum((z[i, j] - mean[j]) * (z[i, k] - mean[k]) for i in range(n)) / (n - 1)

        hinges = sum(max(0, 1 - np.sqrt(moment(j, j) + eps)) for j in range(d)) / d
        shared = sum(moment(j, k) ** 2 for j in range(d) for k in range(d) if j != k) / d
        return variance * hinges + covariance * shared

    distance = sum((z[i, j] - w[i, j]) ** 2 for i in range(len(z)) for j in range(z.shape[1])) / z.size
    return invariance * distance + regularised(z) + regularised(w)


def barlow_twins_in_loops(z, w, *, off_diagonal=0.005, eps=1e-5):
    def standardised(z):
        return [(column - sum(column) / len(column)) / np.sqrt(np.var(column) + eps) for column in z.T]

    total, a, b = 0, standardised(z), standardised(w)
    for j in range(z.shape[1]):
        for k in range(z.shape[1]):
            correlation = sum(a[j] * b[k]) / len(z)
            total += (1 - correlation) ** 2 if j == k else off_diagonal * correlation**2
    return total


IN_LOOPS = {vicreg: vicreg_in_loops, barlow_twins: barlow_twins_in_loops}


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (vicreg, {}),
        (vicreg, {"invariance": 1, "variance": 0, "covariance": 0}),
        (vicreg, {"invariance": 0, "variance": 1, "covariance": 0, "eps": 0.1}),
        (vicreg, {"invariance": 0, "variance": 0, "covariance": 1}),
        (barlow_twins, {}),
        (barlow_twins, {"off_diagonal": 1, "eps": 0.1}),
    ],
)
def test_values_and_gradients_are_those_of_double_loops(loss, options):
    with jax.enable_x64(True):
        value, gradients = jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 1)))(FIRST, SECOND)
    reference = functools.partial(IN_LOOPS[loss], **options)
    np.testing.assert_allclose(value, reference(FIRST, SECOND), rtol=1e-12)
    step = 1e-6 * RNG.normal(size=(2, N, D))
    slope = reference(FIRST + step[0], SECOND + step[1]) - reference(FIRST - step[0], SECOND - step[1])
    np.testing.assert_allclose(np.sum(step * gradients), slope / 2, rtol=1e-6)


def test_defaults_are_the_papers():
    assert vicreg.__kwdefaults__ == {
        "invariance": 25, "variance": 25, "covariance": 1, "eps": 1e-4, "axis_name": None
    }  # fmt: skip
    assert barlow_twins.__kwdefaults__ == {"off_diagonal": 0.005, "eps": 1e-5, "axis_name": None}


def uncorrelated():
    """Eight embeddings of unit variance whose four dimensions share nothing: columns of a Hadamard matrix."""
    pair = np.array([[1, 1], [1, -1]])
    return np.kron(pair, np.kron(pair, pair))[:, 1:5].astype(np.float32)


def test_identity_correlation_has_no_loss():
    z = uncorrelated()
    assert barlow_twins(z, z) < 1e-9
    np.testing.assert_allclose(barlow_twins(z, 3 * z + 2), 0, atol=1e-9)  # shift and scale do not matter
    np.testing.assert_allclose(barlow_twins(z, -z), 4 * 4, rtol=1e-4)
    np.testing.assert_allclose(barlow_twins(z, z[:, [1, 0, 2, 3]], off_diagonal=0.5), 2 + 0.5 * 2, rtol=1e-4)
    assert vicreg(z, z) == 0  # the standard deviation is sqrt(8 / 7), above 1


def test_collapse_costs_its_closed_form_and_is_finite():
    z = jnp.full((N, D), 0.1)
    np.testing.assert_allclose(vicreg(z, z, variance=3, eps=1e-4), 2 * 3 * (1 - 0.01), rtol=1e-6)
    np.testing.assert_allclose(barlow_twins(z, z), D, rtol=1e-6)
    for loss in (vicreg, barlow_twins):
        assert jnp.all(jnp.isfinite(jax.jit(jax.grad(loss))(z, z)))
    # A dimension for two: their covariance is the variance.
    pairs = jnp.repeat(jnp.array([[2.0], [-2.0]]), 2, axis=1)
    np.testing.assert_allclose(vicreg(pairs, pairs), 2 * (2 * 8**2) / 2, rtol=1e-6)


@LOSSES
def test_invariants(loss):
    loss = jax.jit(loss)
    with jax.enable_x64(True):
        value = loss(FIRST, SECOND)
        rows, columns = RNG.permutation(N), RNG.permutation(D)
        np.testing.assert_allclose(loss(FIRST[rows], SECOND[rows]), value, rtol=1e-12)
        np.testing.assert_allclose(loss(FIRST[:, columns], SECOND[:, columns]), value, rtol=1e-12)
        np.testing.assert_allclose(loss(SECOND, FIRST), value, rtol=1e-12)
        np.testing.assert_allclose(loss(FIRST + 7, SECOND + 7), value, rtol=1e-10)


@LOSSES
@pytest.mark.parametrize("mapped", ["pmap", "shard_map", "unchecked shard_map", "jit"])
def test_eight_devices_have_the_loss_and_the_gradients_of_one(loss, mapped):
    """By shared parameters, after the mean over devices, which hold two examples each, or one."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec

    def local(params, axis_name, first, second):
        return loss(jnp.tanh(first @ params), jnp.tanh(second @ params), axis_name=axis_name)

    def averaged(params, first, second):
        value, gradient = jax.value_and_grad(local)(params, "data", first, second)
        return value, jax.lax.pmean(gradient, "data")

    with jax.enable_x64(True):
        params = jnp.asarray(RNG.normal(size=(D, 3)))
        for n in (16, 8) if mapped == "shard_map" else (16,):
            first, second = jnp.asarray(FIRST[:n]), jnp.asarray(SECOND[:n])
            expected = jax.jit(jax.value_and_grad(local), static_argnums=1)(params, None, first, second)
            if mapped == "pmap":
                shards = first.reshape(8, -1, D), second.reshape(8, -1, D)
                got = jax.pmap(averaged, "data", in_axes=(None, 0, 0))(params, *shards)
                assert jax.tree.all(jax.tree.map(lambda leaf: jnp.all(leaf == leaf[0]), got))
                got = jax.tree.map(lambda leaf: leaf[0], got)
            elif mapped == "jit":
                placed = jax.device_put((first, second), jax.sharding.NamedSharding(mesh, spec("data")))
                got = jax.jit(jax.value_and_grad(local), static_argnums=1)(params, None, *placed)
            else:
                in_specs = (spec(), spec("data"), spec("data"))
                checked = mapped == "shard_map"
                run = jax.shard_map(averaged, mesh=mesh, in_specs=in_specs, out_specs=spec(), check_vma=checked)
                got = jax.jit(run)(params, first, second)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), got, expected)


@LOSSES
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_by_embeddings_through_shard_map(loss, check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, one = PartitionSpec("data"), PartitionSpec()
    split = functools.partial(loss, axis_name="data")
    whole = jax.jit(jax.shard_map(split, mesh=mesh, in_specs=(rows, rows), out_specs=one, check_vma=check_vma))
    with jax.enable_x64(True):
        for got, expected in zip(
            jax.jit(jax.grad(whole, (0, 1)))(FIRST, SECOND), jax.jit(jax.grad(loss, (0, 1)))(FIRST, SECOND), strict=True
        ):
            np.testing.assert_allclose(got, expected, atol=1e-12)


@LOSSES
def test_half_precision_is_summed_in_float32(loss):
    first, second = (jnp.asarray(z, jnp.bfloat16) for z in (FIRST, SECOND))
    value, gradient = jax.jit(jax.value_and_grad(loss))(first, second)
    wide = jax.jit(loss)(first.astype(jnp.float32), second.astype(jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wide, rtol=1e-6)
    assert gradient.dtype == jnp.bfloat16


def test_weights_may_be_traced():
    value, slope = jax.jit(jax.value_and_grad(lambda c: vicreg(FIRST, SECOND, covariance=c)))(2.0)
    apart = vicreg(FIRST, SECOND, invariance=0, variance=0)
    np.testing.assert_allclose(slope, apart, rtol=1e-5)
    np.testing.assert_allclose(value, vicreg(FIRST, SECOND, covariance=0) + 2 * apart, rtol=1e-5)


@LOSSES
def test_refusals(loss):
    z = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"`first` must have shape \[any, any\], got \[3\]"):
        loss(z[0], z)
    with pytest.raises(ValueError, match=r"`second` must have shape \[any, any\], got \[4, 1, 3\]"):
        loss(z, z[:, None])
    with pytest.raises(ValueError, match=r"`second` must have the shape of `first`, \[4, 3\], got \[4, 2\]"):
        loss(z, z[:, :2])
    with pytest.raises(TypeError, match="`second` must be floating-point"):
        loss(z, z.astype(jnp.int32))
    with pytest.raises(ValueError, match="`first` must hold at least 2 examples, for their variance, got 1"):
        loss(z[:1], z[:1])
    with pytest.raises(ValueError, match="`eps` must be above 0 and finite, got 0"):
        loss(z, z, eps=0)
    for name in ("off_diagonal",) if loss is barlow_twins else ("invariance", "variance", "covariance"):
        with pytest.raises(ValueError, match=rf"`{name}` must lie in \[0, inf\], got -1"):
            loss(z, z, **{name: -1})
        with pytest.raises(ValueError, match=rf"`{name}` must be finite, got inf"):
            loss(z, z, **{name: np.inf})
        with pytest.raises(ValueError, match=rf"`{name}` must have shape \[\], got \[2\]"):
            loss(z, z, **{name: jnp.ones(2)})
