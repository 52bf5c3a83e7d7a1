"""Experiments as users run them: the command line, a kill in the middle, samples, and the published settings reduced."""

import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
import typing

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import (
    cifar10_diffusion,
    digits_diffusion,
    digits_meanflow,
    image_diffusion,
    image_export,
    image_meanflow,
    image_run,
    image_training,
    mnist_diffusion,
)
from jaxgen import diffusion, export, place
from jaxgen.checkpoint import Checkpoints

OPTIONS = [
    "--smoke", "--steps", "60", "--save-every", "7", "--log-every", "5", "--grid-every", "1000", "--judged", "0",
]  # fmt: skip


def start(*words, **options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.digits_diffusion", *map(str, words)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finished(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


def state(workdir):
    method = image_diffusion.method(*image_training.recalled(workdir, image_diffusion.Config, "digits_diffusion"))
    like = place.state_shapes(method, place.mesh(jax.devices()[:1]))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.latest(), jax.tree.leaves(checkpoints.restore(like))


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_and_started_again_ends_bit_by_bit_the_same(signum, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    code, _, err = finished(start(*OPTIONS, "--workdir", undisturbed))
    assert code == 0, err
    process = start(*OPTIONS, "--workdir", killed)
    lines, deadline = random.randrange(1, 8), time.monotonic() + 200
    metrics = killed / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= lines):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signum)
    code, _, err = finished(process)
    assert code == (-signum if signum == signal.SIGKILL else 0), err
    code, _, err = finished(start(*OPTIONS, "--workdir", killed))
    assert code == 0, err
    (step, got), (wanted_step, wanted) = state(killed), state(undisturbed)
    assert step == wanted_step == 60
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert records(killed) == records(undisturbed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A smoke run of the digits, in this process."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    config = dataclasses.replace(image_diffusion.smoke(digits_diffusion.CONFIG), workdir=str(workdir), platform="cpu")
    image_run.fit("digits_diffusion", config, image_diffusion)
    return workdir


def test_a_run_leaves_what_it_says(trained):
    for picture in ("samples.png", "film.png", "curves.png", "neighbours.png", "samples/0000010.png"):
        with Image.open(trained / picture) as image:
            assert min(image.size) >= 100
    quality = json.loads((trained / "quality.json").read_text())
    signed = quality.pop("signatures")
    assert signed["frechet"].startswith("frechet|features:judge-20-steps-seed-0|resize:none|n:20+1438|reference:train|")
    assert "|n:359+1438|" in signed["frechet_floor"]
    assert all(np.isfinite(value) for value in quality.values())
    assert 0 <= quality["recognised"] <= 1
    assert not list(trained.rglob("*.tmp"))


def draw(trained, **options):
    out = trained / "drawn.npz"
    defaults = image_diffusion.Sample(str(trained), out=str(out), count=6, batch_size=8)
    image_run.draw("digits_diffusion", dataclasses.replace(defaults, **options), image_diffusion)
    with np.load(out) as arrays:
        return arrays["image"], arrays["label"]


@pytest.mark.slow
def test_samples_are_functions_of_seed_index_and_class(trained):
    image, label = draw(trained, classes=(3, 7))
    assert image.shape == (6, 8, 8, 1)
    assert label.tolist() == [3, 7, 3, 7, 3, 7]
    more, _ = draw(trained, classes=(3, 7), count=11, batch_size=16)
    np.testing.assert_allclose(more[:6], image, atol=1e-5)
    other, _ = draw(trained, classes=(3, 7), seed=1)
    assert np.abs(other - image).max() > 0.1


def test_an_exported_sampler_draws_what_the_command_draws(trained, tmp_path):
    image, label = draw(trained, classes=(3, 7), solver="heun", steps=3, guidance=2.0, seed=5)
    options = image_export.Export(str(trained), str(tmp_path / "sampler"), ("cpu",))
    image_export.write("digits_diffusion", options, image_diffusion)
    config, _, _ = image_training.recalled(trained, image_diffusion.Config, "digits_diffusion")
    path = diffusion.edm(config.sigma_min, config.sigma_max)
    table = diffusion.pad(diffusion.heun(path, diffusion.karras_times(path, 3)), rows=256, slots=4)
    program = export.load(tmp_path / "sampler")
    for count in (6, 1):
        drawn = program(jax.random.key(5), label[:count], {"table": table, "guidance": 2.0})
        np.testing.assert_allclose(drawn, image[:count], rtol=0, atol=1e-4)


def test_solvers_steps_guidance_and_seeds_compile_once(trained, monkeypatch):
    traces, compiled = [], []
    original = diffusion.sample

    def counted(*args, **options):
        traces.append(1)
        return original(*args, **options)

    monkeypatch.setattr(diffusion, "sample", counted)
    config, shape, classes = image_training.recalled(trained, image_diffusion.Config, "digits_diffusion")
    mesh = place.mesh(jax.devices()[:1])
    samples = image_diffusion.Samples(config, shape, classes, mesh)
    params = image_diffusion.method(config, shape, classes).init(jax.random.key(0)).average
    for seed, solver in enumerate(typing.get_args(image_diffusion.Solver)):
        options = image_diffusion.Sample(str(trained), solver=solver, steps=1 + 7 * seed, guidance=seed / 2)
        drawn = samples(params, np.arange(4), samples.chosen(options), seed=seed, batch_size=4)
        assert np.isfinite(drawn).all()
        compiled.append(len(traces))
    assert compiled == [1] * 13


@pytest.mark.parametrize(
    ("experiment", "images"),
    [
        pytest.param(mnist_diffusion, (28, 28, 1), id="mnist", marks=pytest.mark.slow),
        pytest.param(cifar10_diffusion, (32, 32, 3), id="cifar10", marks=pytest.mark.slow),
    ],
    indirect=["images"],
)
def test_published_settings_reduced(experiment, images, request, tmp_path):
    """The whole experiment on served data: same code, fewer channels, two steps."""
    name = experiment.CONFIG.dataset
    request.getfixturevalue(name)
    config = dataclasses.replace(
        image_diffusion.smoke(experiment.CONFIG), workdir=str(tmp_path / "run"), data_dir=str(tmp_path / "data"),
        platform="cpu", steps=2, warmup=1, batch_size=8, save_every=2, grid_every=2, sample_steps=2, judged=0,
    )  # fmt: skip
    image_run.fit(f"{name}_diffusion", config, image_diffusion)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 2


@pytest.mark.slow
def test_meanflow_reduced(tmp_path):
    """Few-step samples: trained, judged at one step and two, drawn again from the checkpoint."""
    config = dataclasses.replace(
        image_diffusion.smoke(digits_meanflow.CONFIG),
        workdir=str(tmp_path),
        platform="cpu",
        steps=4,
        warmup=1,
        sample_steps=1,
    )
    image_run.fit("digits_meanflow", config, image_meanflow)
    for quality in ("quality.json", "2_steps/quality.json"):
        assert 0 <= json.loads((tmp_path / quality).read_text())["recognised"] <= 1
    options = image_diffusion.Sample(
        str(tmp_path), out=str(tmp_path / "drawn.npz"), count=6, batch_size=100, solver="euler"
    )
    draw = functools.partial(image_run.draw, "digits_meanflow", recipe=image_meanflow)
    draw(dataclasses.replace(options, steps=2, seed=1))
    with np.load(tmp_path / "drawn.npz") as arrays:
        assert arrays["image"].shape == (6, 8, 8, 1)
    for change, message in (
        ({"guidance": 3.0}, "`guidance` is part of this network, 1.3, got 3"),
        ({"solver": "heun"}, "`solver` must be 'euler', without `eta`, got 'heun' and None"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(dataclasses.replace(options, **change))


def test_another_experiments_directory_is_refused(trained):
    with pytest.raises(ValueError, match="is a run of 'digits_diffusion', not of 'mnist_diffusion'"):
        image_run.draw("mnist_diffusion", image_diffusion.Sample(str(trained)), image_diffusion)


def test_other_settings_are_refused(trained):
    config = dataclasses.replace(image_diffusion.smoke(digits_diffusion.CONFIG), workdir=str(trained), seed=1)
    with pytest.raises(ValueError, match="seed is 0 there, got 1"):
        image_run.fit("digits_diffusion", config, image_diffusion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (3, 10)}, r"`classes` must lie in \[0, 9\], got \[3, 10\]"),
        ({"count": 0}, "`count` must be an integer of at least 1"),
        ({"steps": 0}, "`steps` must be an integer of at least 1"),
        ({"out": "x.gif"}, "`out` must be a .png or .npz file"),
        ({"solver": "heun", "eta": 0.5}, "`eta` is for the solvers ddim"),
        ({"platform": "tpu"}, "`platform` is 'tpu', but JAX finds none here"),
    ],
)
def test_bad_options_are_refused_by_name(trained, options, message):
    with pytest.raises(ValueError, match=message):
        draw(trained, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--platform", "tpu"], "error: `platform` is 'tpu'"),
        (["--dataset", "nonesuch"], "nonesuch"),
        (["--warmup", "99999"], "error: `warmup` must lie in"),
        (["--batch-size", "0"], "error: `batch_size` must be an integer of at least 1, got 0"),
        (["sample", "--workdir", "/nonexistent"], "error: `directory` /nonexistent holds no config.json"),
        (["--workdir", "/proc/run"], "`directory` /proc/run cannot be written"),
    ],
)
def test_the_command_line_refuses_in_one_line(words, message, tmp_path):
    code, _, err = finished(start(*([] if "--workdir" in words else ["--workdir", tmp_path / "run"]), *words))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_help_is_complete_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from experiments import digits_diffusion\n"
        "try: digits_diffusion.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'orbax', 'tensorflow_datasets', 'grain', 'sklearn', 'matplotlib', 'scipy.stats'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for field in dataclasses.fields(digits_diffusion.CONFIG):
        assert f"--{field.name.replace('_', '-')}" in done.stdout
    assert "--smoke" in done.stdout
