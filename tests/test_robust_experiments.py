"""Robust experiments: a run of the digits end to end, its numbers against attacks done again, and settings refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import cifar10_robust, digits_diffusion, digits_robust, image_robust, image_training, robustness
from jaxgen import attacks, data, place
from jaxgen.checkpoint import Checkpoints

SHAPE, CLASSES = (8, 8, 1), 10


def smoke(workdir, experiment=digits_robust, **fields):
    return dataclasses.replace(image_robust.smoke(experiment.CONFIG), workdir=str(workdir), platform="cpu", **fields)


def one_device():
    return place.mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the digits, one training, and what it says."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    image_robust.fit("digits_robust", smoke(workdir, trainings=("pgd",), denoiser_steps=0))
    return workdir


@pytest.mark.slow
def test_a_run_leaves_what_it_says(trained):
    for picture in ("attacks.png", "robust_curve.png", "pgd/curves.png"):
        with Image.open(trained / picture) as image:
            assert min(image.size) >= 100
    told = json.loads((trained / "robustness.json").read_text())
    assert told["images"] == 16
    assert told["accuracy"].keys() == {"pgd"}
    scores = told["accuracy"]["pgd"]
    assert list(scores) == ["clean", "FGSM", "PGD-3", "AutoAttack", "curve"]
    assert scores["AutoAttack"] <= scores["clean"]
    assert scores["curve"][0] == scores["clean"]
    assert np.all(np.diff(scores["curve"]) <= 0)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_attacks(trained):
    """The classifier of the last checkpoint, attacked again by hand."""
    config = smoke(trained, trainings=("pgd",), denoiser_steps=0)
    ours = image_robust.method(config, "pgd", SHAPE, CLASSES)
    state = image_training.restored(trained / "pgd", ours, one_device())
    apply = functools.partial(image_robust.classifier(config, CLASSES).apply, state.average)
    held_out = data.load("digits", split="test")
    x, labels = data.to_unit(held_out["image"][:16]), held_out["label"][:16]
    objective = attacks.cross_entropy(apply, jnp.asarray(labels, jnp.int32))
    told = json.loads((trained / "robustness.json").read_text())["accuracy"]["pgd"]
    moved = attacks.fgsm(jax.random.key(0), objective, x, image_robust.threat_of(config))
    for name, at in (("clean", x), ("FGSM", moved)):
        np.testing.assert_allclose(told[name], (np.argmax(apply(at), axis=1) == labels).mean(), atol=1e-6)


def perfect(params, x):
    """A classifier of two classes, by the sign of the mean, that no attack within 0.2 deceives."""
    mean = jnp.mean(x, axis=(1, 2, 3))
    return params * jnp.stack([-mean, mean, jnp.full_like(mean, -9.0), jnp.full_like(mean, -9.0)], axis=1)


def test_what_withstands_and_what_does_not(tmp_path):
    """Images of +-0.3 everywhere: moved by 0.2 they keep their sign, moved by 0.4 they lose it."""
    labels = np.arange(8) % 2
    x = np.broadcast_to((0.6 * labels - 0.3)[:, None, None, None], (8, *SHAPE)).astype(np.float32)
    config = smoke(tmp_path, curve=(0.0, 1.0, 2.0), pgd_steps=10)
    text = robustness.attacked(
        perfect,
        {"mean": 1.0, "inverted": -1.0},
        x,
        labels,
        config,
        image_robust.threat_of(config),
        one_device(),
        tmp_path,
    )
    told = json.loads((tmp_path / "robustness.json").read_text())["accuracy"]
    assert [told["mean"][name] for name in ("clean", "FGSM", "PGD-10", "AutoAttack")] == [1.0] * 4
    assert told["mean"]["curve"] == [1.0, 1.0, 0.0]
    assert [told["inverted"][name] for name in ("clean", "FGSM", "PGD-10", "AutoAttack")] == [0.0] * 4
    assert "100.0%" in text


def test_a_diffusion_model_defends(tmp_path):
    """Of an exact denoiser of two images, purification undoes attacks, and certificates reach as far as they may."""
    labels = np.arange(8) % 2
    x = np.broadcast_to((0.6 * labels - 0.3)[:, None, None, None], (8, *SHAPE)).astype(np.float32)

    def denoise(weights, x, t):  # E[x0 | x_t] of images that are +-0.3 everywhere
        total = jnp.sum(x, axis=(1, 2, 3)) * 0.3 / jnp.maximum(t, 1e-3) ** 2
        return weights * jnp.broadcast_to(0.3 * jnp.tanh(total)[:, None, None, None], x.shape)

    config = smoke(tmp_path, aware_steps=3, smooth_draws=200, smooth_noise=0.5, purify_noise=0.5, pgd_steps=5)

    # A classifier that sees one pixel alone is deceived, unless it is shown what the denoiser makes of all pixels.
    def single(params, x):
        return perfect(params, x[:, :1, :1])

    threat = dataclasses.replace(image_robust.threat_of(config), eps=0.25)
    robustness.defended(single, 1.0, denoise, 1.0, x, labels, config, threat, one_device(), tmp_path)
    told = json.loads((tmp_path / "defences.json").read_text())
    assert told["purified"]["clean"] == 1.0
    assert told["purified"]["unaware of it"] == 1.0
    assert told["certified"][:2] == [1.0, 1.0]
    assert told["radii"] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.slow
def test_the_defence_is_trained_and_measured(tmp_path, capsys):
    config = smoke(
        tmp_path / "run", trainings=("standard",), steps=2, warmup=1, save_every=2, measured=8, auto_steps=2, queries=2,
        curve=(0.0,), denoiser_steps=5,
    )  # fmt: skip
    image_robust.fit("digits_robust", config, denoiser=digits_diffusion.CONFIG)
    told = json.loads((tmp_path / "run" / "defences.json").read_text())
    assert told["purified"].keys() == {"clean", "unaware of it", "aware of it"}
    assert np.all(np.diff(told["certified"]) <= 0)
    assert "behind a diffusion model" in capsys.readouterr().out
    with Checkpoints(tmp_path / "run" / "denoiser" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 5


@pytest.mark.parametrize("recipe", ["standard", "fgsm_rs", "pgd", "trades"])
def test_what_each_training_sees(recipe, tmp_path):
    """Images as they are, or moved as far as is allowed, within the bounds, to where they are harder."""
    config = smoke(tmp_path, shift=0, eps=0.3, attack_step_size=0.2)
    batch = data.batches(data.load("digits", split="train"), batch_size=16, seed=0)(0)
    weights = jax.random.normal(jax.random.key(0), (64, CLASSES))
    apply = lambda params, x: x.reshape(len(x), -1) @ params  # noqa: E731
    seen = image_robust.attack_of(config, recipe, apply)(jax.random.key(1), weights, batch)
    np.testing.assert_array_equal(seen["clean"], batch["image"])
    np.testing.assert_array_equal(seen["label"], batch["label"])
    moved = np.abs(seen["image"] - batch["image"]).max(axis=(1, 2, 3))
    if recipe == "standard":
        assert not moved.any()
        return
    assert np.all((moved > 0.25) & (moved < 0.3 + 1e-6))
    assert np.abs(seen["image"]).max() <= 1
    objective = attacks.cross_entropy(functools.partial(apply, weights), batch["label"])
    if recipe != "trades":
        assert np.all(objective(seen["image"]) > objective(batch["image"]))


def test_augmentation_moves_what_is_attacked(tmp_path):
    config = smoke(tmp_path, shift=2, flip=True)
    batch = data.batches(data.load("digits", split="train"), batch_size=16, seed=0)(0)
    seen = image_robust.attack_of(config, "standard", perfect)(jax.random.key(1), None, batch)
    np.testing.assert_array_equal(seen["image"], seen["clean"])
    moved = np.abs(seen["image"] - batch["image"]).max(axis=(1, 2, 3)) > 0
    assert moved.sum() >= 8


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_the_rate_falls_where_it_should(optimiser):
    config = dataclasses.replace(
        digits_robust.CONFIG,
        optimiser=optimiser,
        weight_decay=0.0,
        learning_rate=1.0,
        warmup=2,
        decays=(5, 8),
        steps=10,
    )
    transformation = image_robust._optimiser(config)
    params, sizes = {"kernel": jnp.ones((2, 2))}, []
    state = transformation.init(params)
    for step in range(10):
        # Momentum 0.9 keeps a velocity of 1 alive with gradients of 0.1.
        gradient = {"kernel": jnp.full((2, 2), 1.0 if optimiser == "adamw" or step == 0 else 0.1)}
        updates, state = transformation.update(gradient, state, params)
        sizes.append(-float(updates["kernel"][0, 0]))
    np.testing.assert_allclose(sizes, [0, 0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainings": ()}, "`trainings` must name one at least"),
        ({"trainings": ("pgd", "pgd")}, "`trainings` must name one at least, and none twice"),
        ({"eps": 0.0}, "`eps` must be above 0"),
        ({"attack_steps": 0}, "`attack_steps` must be an integer of at least 1"),
        ({"curve": (-1.0,)}, "`curve` must lie in"),
        ({"warmup": 20}, r"`warmup` must lie in \[0, `steps`\)"),
        ({"decays": (30,)}, "`decays` must lie between `warmup` and `steps`"),
        ({"trainings": ("pgd",)}, "`denoiser_steps` must be 0 without the training 'standard'"),
        ({"groups": 3}, "groups"),
        ({"image_size": 8}, "`image_size` must be none"),
        ({"queries": 0}, "`queries` must be an integer of at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        image_robust.fit("digits_robust", smoke(tmp_path / "run", **fields), denoiser=digits_diffusion.CONFIG)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("images", [(32, 32, 3)], indirect=True)
def test_published_settings_reduced(cifar10, tmp_path):
    """The whole experiment on served data: same code, a smaller network, two steps."""
    config = smoke(
        tmp_path / "run", cifar10_robust, data_dir=str(tmp_path / "data"), steps=2, warmup=1, save_every=2,
        batch_size=8, measured=8,
    )  # fmt: skip
    image_robust.fit("cifar10_robust", config)
    assert json.loads((tmp_path / "run" / "robustness.json").read_text())["accuracy"].keys() == {"pgd", "trades"}


def test_published_settings_are_wrn_28_10():
    """36.5 M parameters, as published, in steps that can be traced."""
    config = cifar10_robust.CONFIG
    for recipe in config.trainings:
        ours = image_robust.method(config, recipe, (32, 32, 3), CLASSES)
        state = jax.eval_shape(ours.init, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(state.learner.params)) == 36_479_194
