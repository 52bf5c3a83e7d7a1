"""The sampler itself: compiled once, per-example randomness, gradients, padding, refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion, random, testing
from tests.diffusion import oracle
from tests.diffusion.oracle import MEAN, PATHS, STD, interior_times

KEY = jax.random.key(7)
PATH = diffusion.edm()
EXACT = testing.gaussian_denoiser(PATH, MEAN, STD)


def test_one_trace_serves_every_solver_step_count_and_guidance_scale():
    traces = 0

    def denoise(x, t):
        nonlocal traces
        traces += 1
        return EXACT(x, t)

    def guided(table, x, scale):
        return diffusion.sample(KEY, diffusion.cfg(denoise, EXACT, scale), table, x)

    oracle.check_one_program(jax.jit(guided))
    assert traces == 1


def test_padding_changes_nothing_and_calls_nothing():
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return EXACT(x, t)

    table = diffusion.ddim(PATH, diffusion.karras_times(PATH, 5), eta=1.0)
    x = diffusion.prior(KEY, PATH, table.times[0], (2, 3))
    plain = diffusion.sample(KEY, EXACT, table, x)
    padded = diffusion.sample(KEY, denoise, diffusion.pad(table, rows=40, slots=4), x)
    jax.effects_barrier()
    np.testing.assert_allclose(plain, padded, rtol=1e-6)
    np.testing.assert_allclose(sorted(calls, reverse=True), table.times, rtol=1e-6)


def test_an_example_depends_on_its_key_and_index_alone():
    table = diffusion.ddpm(PATH, diffusion.karras_times(PATH, 6))
    run = jax.jit(
        lambda key, n: diffusion.sample(key, EXACT, table, diffusion.prior(key, PATH, table.times[0], (n, 3))),
        static_argnums=1,
    )
    eight = run(KEY, 8)
    # Programs of other shapes may round otherwise in the last bit: XLA vectorises each in its own way.
    np.testing.assert_allclose(eight[:3], run(KEY, 3), rtol=1e-6)
    np.testing.assert_allclose(eight[5:], run(random.example_keys(KEY, 3, start=5), 3), rtol=1e-6)
    # In one program it is exact: other neighbours and another place in the batch change nothing.
    keys, others = random.example_keys(KEY, 8), random.example_keys(jax.random.key(9), 8)
    mixed = run(jnp.concatenate([others[:3], keys[:5]]), 8)
    np.testing.assert_array_equal(mixed[3:], run(keys, 8)[:5])
    assert not np.allclose(eight, run(jax.random.key(8), 8))


def test_draws_of_rows_and_prior_are_independent():
    """Noise reused between rows, or between the prior and a row, would show as correlation."""
    n = 20_000
    keep_noise = diffusion.Table(
        np.ones(2),
        np.array(
            [
                [
                    [0, 0, 1],
                ]
            ]
            * 2,
            float,
        ),
    )  # x <- fresh noise
    x = diffusion.prior(KEY, PATH, 1.0, (n, 1))
    states = diffusion.trajectory(KEY, lambda x, t: x, keep_noise, x)[..., 0]
    correlation = np.corrcoef(states)
    np.testing.assert_allclose(correlation, np.eye(3), atol=5 / np.sqrt(n))


def test_trajectory_holds_start_and_end():
    table = diffusion.heun(PATH, diffusion.karras_times(PATH, 4))
    x = diffusion.prior(KEY, PATH, table.times[0], (2, 3))
    states = diffusion.trajectory(KEY, EXACT, table, x)
    assert states.shape == (len(table.times) + 1, 2, 3)
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_array_equal(states[-1], diffusion.sample(KEY, EXACT, table, x))


def test_vmap_over_stacked_tables():
    """Every solver at once, on two grids, against one by one."""
    times = diffusion.karras_times(PATH, 6)
    tables = [
        build(PATH, grid)
        for build, grid in zip(oracle.EVERY.values(), itertools.cycle([times, times[1:]]), strict=False)
    ]
    x = diffusion.prior(KEY, PATH, times[0], (2, 3))
    sampler = jax.jit(lambda table: diffusion.sample(KEY, EXACT, table, x))
    stacked = diffusion.stack(tables)
    rows, slots = stacked.weights.shape[1:3]
    for got, table in zip(jax.vmap(sampler)(stacked), tables, strict=True):
        np.testing.assert_allclose(got, sampler(diffusion.pad(table, rows=rows, slots=slots)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [diffusion.heun, diffusion.ddpm, diffusion.unipc, diffusion.deis])
def test_gradients_reach_start_and_table(build):
    """Against central differences in float64, along random directions."""
    path = PATHS["cosine"]
    denoise = testing.mixture_denoiser(path, jnp.array([[1.0, 0.0], [-1.0, 0.5]]), 0.3, jnp.array([0.4, 0.6]))
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        table = jax.tree.map(jnp.asarray, build(path, interior_times(path, 5)))
        x = jnp.asarray(rng.normal(size=(3, 2)))

        def value(x, table):
            return jnp.sum(jnp.sin(diffusion.sample(KEY, denoise, table, x)))

        grads = jax.grad(value, argnums=(0, 1), allow_int=False)(x, table)
        mask = jax.tree.map(lambda leaf: (leaf != 0).astype(leaf.dtype), table)  # a zero column stays uncalled
        direction = (
            jnp.asarray(rng.normal(size=x.shape)),
            jax.tree.map(lambda leaf, m: m * rng.normal(size=leaf.shape), table, mask),
        )
        step = 1e-6
        moved = [jax.tree.map(lambda a, d, s=s: a + s * step * d, (x, table), direction) for s in (1, -1)]
        numeric = (value(*moved[0]) - value(*moved[1])) / (2 * step)
        exact = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(exact, numeric, rtol=1e-6)


def test_cfg_is_affine_in_its_scale():
    conditional, unconditional = (lambda x, t: 2 * x), (lambda x, t: -x)
    x, t = jnp.ones((2, 3)), jnp.ones(2)
    for scale, expected in ((0.0, -1.0), (1.0, 2.0), (2.5, 6.5)):
        np.testing.assert_allclose(diffusion.cfg(conditional, unconditional, scale)(x, t), expected)


def test_guiding_by_classes_sharpens_a_mixture():
    """Guidance of exact denoisers: scale 1 samples the class itself, larger scales move away from the other class."""
    path = PATHS["rectified_flow"]
    means, share = jnp.array([[1.0], [-1.0]]), jnp.array([0.5, 0.5])
    everything = testing.mixture_denoiser(path, means, 0.5, share)
    one = testing.gaussian_denoiser(path, jnp.array([1.0]), 0.5)
    table = diffusion.ddim(path, diffusion.uniform_times(path, 100))
    x = diffusion.prior(KEY, path, 1.0, (20_000, 1))
    ends = [diffusion.sample(KEY, diffusion.cfg(one, everything, s), table, x) for s in (0.0, 1.0, 3.0)]
    assert abs(float(ends[0].mean())) < 0.03
    np.testing.assert_allclose(float(ends[1].mean()), 1.0, atol=0.03)
    np.testing.assert_allclose(float(ends[1].std()), 0.5, rtol=0.03)
    assert float(ends[2].mean()) > 1.1


TABLE = diffusion.ddim(PATH, [1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diffusion.sample(KEY, EXACT, TABLE, jnp.ones((2, 3), jnp.int32)), TypeError, "`x` must be floating"),
        (lambda: diffusion.sample(jax.random.PRNGKey(0), EXACT, TABLE, jnp.ones((2, 3))), TypeError, "`key` must be a typed"),
        (lambda: diffusion.sample(0, EXACT, TABLE, jnp.ones((2, 3))), TypeError, "`key` must be a typed PRNG key.*got int"),
        (lambda: diffusion.sample(random.example_keys(KEY, 3), EXACT, TABLE, jnp.ones((2, 3))), ValueError, r"`key` must have shape \[2\], got \[3\]"),
        (lambda: diffusion.sample(KEY, lambda x, t: x[:, :1], TABLE, jnp.ones((2, 3))), ValueError, r"`denoise\(x, t\)` must have the shape of `x`"),
        (lambda: diffusion.sample(KEY, EXACT, TABLE._replace(times=np.ones(2)), jnp.ones((2, 3))), ValueError, "`table.weights` must have shape"),
        (lambda: diffusion.sample(KEY, EXACT, TABLE, jnp.ones((2, 3)), unroll=0), ValueError, "`unroll` must be an integer of at least 1"),
        (lambda: diffusion.prior(KEY, PATH, 81.0, (2, 3)), ValueError, r"`time` must lie in \[0, 80\], got 81"),
        (lambda: diffusion.prior(KEY, PATH, 1.0, ()), ValueError, "`shape` must hold the batch"),
        (lambda: diffusion.pad(TABLE, rows=0), ValueError, "cannot pad"),
        (lambda: diffusion.stack([]), ValueError, "`tables` must hold"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("own", PATHS)
@pytest.mark.parametrize("solver", oracle.EVERY)
def test_a_table_for_another_path_is_refused(solver, own):
    table = oracle.EVERY[solver](PATHS[own], diffusion.uniform_times(PATHS[own], 10))
    table = diffusion.pad(table, rows=30, slots=6)
    for name, path in PATHS.items():

        def run(path=path):
            return jax.eval_shape(lambda x: diffusion.sample(KEY, EXACT, table, x, path=path), jnp.zeros((1, 3)))

        if name == own:
            run()
        elif (own, name) == ("rectified_flow", "edm") and solver in oracle.ORDERS:
            run()  # one sigma, one flow: the same numbers
        else:
            with pytest.raises(ValueError, match=r"`table` must be made for this path|`table.times` must lie in"):
                run()
