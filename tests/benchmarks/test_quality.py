"""Quality against cost: what is counted, scored, refused and drawn."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from benchmarks import quality, record, rounds
from experiments import digits_diffusion, image_diffusion, image_training
from jaxgen import place, run

SIZE = quality.Size(images=12, batch=4, evaluations=(3, 8))
FEATURES = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def judge(images):
    """Sees the class in the first pixel."""
    return images[:, 0, 0, 0].astype(int), images[:, 0, :3, 0].astype(np.float32)


judge.network = SimpleNamespace(classes=2)


def stub(samples):
    return quality.Model(samples, None, judge, SimpleNamespace(features=FEATURES, floor={"frechet": 0.5}), "abc")


@pytest.fixture(scope="module")
def real():
    config = image_diffusion.smoke(dataclasses.replace(digits_diffusion.CONFIG, workdir="nowhere"))
    return stub(image_diffusion.Samples(config, (8, 8, 1), 10, place.mesh()))


@pytest.mark.parametrize("solver", get_args(image_diffusion.Solver))
def test_as_many_steps_as_the_evaluations_allow(solver, real):
    cases = [case for case, _ in quality.cases_of(real, solver, SIZE)]
    needed = [case.settings["evaluations"] for case in cases]
    twice = solver in ("heun", "edm_stochastic", "dpmpp_2s")
    assert needed == ([3, 7] if twice else [3, 8])  # the last step to the data is Euler's
    assert [case.settings["steps"] for case in cases] == ([2, 4] if twice else [3, 8])
    assert cases[0].name == f"{solver}-3"


def drawn(params, labels, how, *, seed, batch_size):
    assert batch_size == len(labels) == 4
    images = np.random.default_rng(seed).normal(size=(4, 8, 8, 1))
    images[:, 0, 0, 0] = labels
    return images


def test_what_is_measured():
    model = stub(drawn)
    seconds, told = quality.measured(model, None, None, SIZE, lambda: 0)
    assert len(seconds) == 3  # batches
    images, labels, _ = quality.draw(model, None, SIZE)
    assert images.shape == (12, 8, 8, 1)
    assert len(np.unique(images[:, 1, 1, 0])) == 12  # no batch is drawn twice
    assert told["quality"]["recognised"] == 1.0
    assert told["quality"]["frechet_held_out"] == 0.5
    a, b = images[:, 0, :3, 0].astype(np.float32), FEATURES
    roots = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).astype(complex) ** 0.5
    exact = (
        np.sum((a.mean(0) - b.mean(0)) ** 2) + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * roots.sum().real
    )
    assert told["quality"]["frechet"] == pytest.approx(exact, rel=1e-4)
    assert quality.score(model, images, 1 - labels)["recognised"] == 0.0


def test_refused():
    case = SimpleNamespace(name="one")
    counts = iter(range(10))
    with pytest.raises(rounds.RefusedError, match="one: programs were compiled"):
        quality.measured(stub(drawn), case, None, SIZE, lambda: next(counts))
    with pytest.raises(rounds.RefusedError, match="one: images are not finite"):
        quality.measured(stub(lambda *_, **__: np.full((4, 8, 8, 1), np.nan)), case, None, SIZE, lambda: 0)


def test_a_directory_that_holds_no_trained_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no"):
        quality.model(tmp_path, quick=True, images=4)
    config = image_diffusion.smoke(dataclasses.replace(digits_diffusion.CONFIG, workdir=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    run.claim(tmp_path, "digits_diffusion", image_training.identity(config, (8, 8, 1), 10))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="step None of 20: it has not been trained"):
        quality.model(tmp_path, quick=True, images=4)


def test_a_picture_of_both_scores(tmp_path):
    scores = {"frechet": 2.0, "recognised": 0.5, "frechet_held_out": 1.0}
    records = [
        SimpleNamespace(p50=0.1 * n, batch=4, quality=scores, settings={"solver": solver, "evaluations": n})
        for solver in ("ddim", "heun")
        for n in (8, 3)
    ]
    quality.plot(tmp_path / "quality.png", records)
    with Image.open(tmp_path / "quality.png") as image:
        assert min(image.size) > 400


@pytest.mark.slow
def test_all_solvers_of_a_run(tmp_path):
    """A minute: the command trains a tiny run and draws by every solver."""
    words = [sys.executable, "-m", "benchmarks", "quality", "--quick", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=Path(quality.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = record.read(tmp_path / "quality.jsonl")
    assert {r.settings["solver"] for r in found} == set(get_args(image_diffusion.Solver))
    assert all(r.quality.keys() == {"frechet", "recognised", "frechet_held_out"} for r in found)
    with Image.open(tmp_path / "quality.png") as image:
        assert min(image.size) > 400
