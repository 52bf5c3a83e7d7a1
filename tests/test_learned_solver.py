"""A learned solver begins as DPM-Solver++(2M), keeps what every solver must have, and beats it on an exact model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import digits_diffusion, image_diffusion, image_training, learned_solver
from jaxgen import diffusion, place, run, testing
from jaxgen.checkpoint import Checkpoints

PATH = diffusion.edm(0.02, 20.0)
MEANS = jnp.array([[1.0, 0.5], [-1.0, 0.5], [0.0, -1.0]])
MIXTURE = testing.mixture_denoiser(PATH, MEANS, 0.2, jnp.ones(3) / 3)
KEY = jax.random.key(0)
TIMES = diffusion.log_snr_times(PATH, 4)


def some_steps(seed=0):
    """Far from any known solver."""
    rng = np.random.default_rng(seed)
    return learned_solver.Steps(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3,), (4, 4), (4,))))


@pytest.mark.parametrize("path", [PATH, diffusion.linear_beta()], ids=["edm", "ddpm"])
def test_it_begins_as_dpmpp_2m(path):
    times = diffusion.log_snr_times(path, 5)
    ours, theirs = (
        learned_solver.table(path, learned_solver.dpmpp_2m_steps(path, times)),
        diffusion.dpmpp_2m(path, times),
    )
    np.testing.assert_allclose(ours.times, theirs.times, rtol=1e-4)
    denoise = testing.mixture_denoiser(path, MEANS, 0.2, jnp.ones(3) / 3)
    x = diffusion.prior(KEY, path, path.t_max, (64, 2))
    got, wanted = (diffusion.sample(KEY, denoise, table, x) for table in (ours, theirs))
    np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_whatever_is_learned_a_constant_denoiser_is_reached():
    x = diffusion.prior(KEY, PATH, PATH.t_max, (8, 2))
    table = learned_solver.table(PATH, some_steps())
    np.testing.assert_allclose(diffusion.sample(KEY, lambda x, t: jnp.full_like(x, 0.7), table, x), 0.7, atol=1e-4)
    assert np.all(np.asarray(table.times) <= PATH.t_max)


def test_every_row_remembers_all_outputs():
    """Against the recursion of Eqs. 1 and 2, written as a loop."""
    steps = some_steps(1)
    x = start = np.asarray(diffusion.prior(KEY, PATH, PATH.t_max, (8, 2)), np.float64)
    levels = np.append(20.0 * np.exp(-np.append(0.0, np.cumsum(np.exp(steps.gaps)))), 0.0)
    outputs = []
    for i in range(4):
        told = min(levels[i] * np.exp(steps.factors[i]), 20.0)
        outputs.append(np.asarray(MIXTURE(jnp.float32(x), jnp.full(8, told, jnp.float32)), np.float64))
        shares = [*np.asarray(steps.shares, np.float64)[i, :i]]
        shares.append(1 - sum(shares))
        ratio = levels[i + 1] / levels[i]
        x = ratio * x + (1 - ratio) * sum(w * d for w, d in zip(shares, outputs, strict=True))
    got = diffusion.sample(KEY, MIXTURE, learned_solver.table(PATH, steps), jnp.float32(start))
    np.testing.assert_allclose(got, x, atol=1e-3)


def test_learning_four_rows_beats_dpmpp_2m_on_new_starts():
    start = diffusion.prior(KEY, PATH, PATH.t_max, (512, 2))
    fine = diffusion.dpmpp_2m(PATH, diffusion.log_snr_times(PATH, 200))
    reference = diffusion.sample(KEY, MIXTURE, fine, start)
    initial = learned_solver.dpmpp_2m_steps(PATH, TIMES)
    method = learned_solver.method(PATH, lambda batch: MIXTURE, initial, learning_rate=0.03, steps=150)
    step, state = jax.jit(method.step), method.init(KEY)
    for _ in range(150):
        state, _ = step(state, {"start": start[:256], "reference": reference[:256]}, KEY)
    before, after = (
        learned_solver.distance(
            diffusion.sample(KEY, MIXTURE, learned_solver.table(PATH, steps), start[256:]), reference[256:]
        ).mean()
        for steps in (initial, state.average)
    )
    assert after < 0.6 * before


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run of the digits experiment that has taken no step, of the smallest network."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    config = dataclasses.replace(
        image_diffusion.smoke(digits_diffusion.CONFIG), workdir=str(workdir), multipliers=(1,), attention=()
    )
    run.claim(workdir, "digits_diffusion", image_training.identity(config, (8, 8, 1), 10))
    method = place.jit(image_diffusion.method(config, (8, 8, 1), 10), place.mesh(jax.devices()[:1]))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, method.init(jax.random.key(0)))
        checkpoints.wait()
    return workdir


@pytest.mark.slow
def test_a_run_is_read_and_the_learned_table_can_be_used_again(untrained, tmp_path, capsys):
    before = sorted(untrained.rglob("*"))
    learned_solver.fit(dataclasses.replace(learned_solver.SMOKE, run=str(untrained), out=str(tmp_path / "made")))
    assert sorted(untrained.rglob("*")) == before
    said = capsys.readouterr().out
    assert "learned (3)" in said
    assert "unipc, Karras (3)" in said
    assert (tmp_path / "made" / "solver.png").stat().st_size > 10_000
    with np.load(tmp_path / "made" / "table.npz") as arrays:
        table = diffusion.Table(**arrays)
    assert table.weights.shape == (3, 3, 5)
    x = diffusion.prior(KEY, PATH, PATH.t_max, (8, 2))
    assert np.isfinite(diffusion.sample(KEY, MIXTURE, table, x)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "/nonexistent"}, "/nonexistent holds no config.json: it is not the directory of a run"),
        ({"evaluations": 1}, "`evaluations` must be at least 2, got 1"),
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"batch_size": 9}, "`batch_size` must be at most `training_starts`, 8, got 9"),
        ({"learning_rate": -1.0}, "`learning_rate` must be above 0"),
        ({"held_out_classes": (3, 10)}, r"`held_out_classes` must be some and not all of 0 to 9, got \[3, 10\]"),
        ({"held_out_classes": tuple(range(10))}, "`held_out_classes` must be some and not all of 0 to 9"),
    ],
)
def test_bad_settings_are_refused_by_name(untrained, options, message, tmp_path):
    config = dataclasses.replace(learned_solver.SMOKE, run=str(untrained), out=str(tmp_path / "made"))
    with pytest.raises((ValueError, OSError), match=message):
        learned_solver.fit(dataclasses.replace(config, **options))
    assert not (tmp_path / "made").exists()


def test_a_run_of_another_kind_is_refused(tmp_path):
    run.claim(tmp_path / "run", "digits_meanflow", {})
    with pytest.raises(ValueError, match="is a run of 'digits_meanflow', not of one of digits_diffusion"):
        learned_solver.recalled(tmp_path / "run")
