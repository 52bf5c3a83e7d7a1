"""GAN experiments: a run of the digits end to end, resumed bit by bit, and the published settings reduced."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import (
    cifar10_gan,
    digits_contrastive,
    digits_gan,
    image_contrastive,
    image_gan,
    image_run,
    image_training,
)
from jaxgen import data, metrics, place, run
from jaxgen.checkpoint import Checkpoints

SHAPE, CLASSES = (8, 8, 1), 10


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A contrastive run of the digits that was stopped before its first step."""
    workdir = tmp_path_factory.mktemp("runs") / "contrastive"
    config = image_contrastive.smoke(digits_contrastive.CONFIG)
    run.claim(workdir, "digits_contrastive", image_training.identity(config, SHAPE, CLASSES))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(0, jax.jit(image_contrastive.method(config, SHAPE).init)(jax.random.key(0)))
    return str(workdir)


@pytest.fixture(scope="module")
def trained(encoder, tmp_path_factory):
    """A smoke run of the digits, with all that a GAN's step can hold."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    config = dataclasses.replace(
        image_gan.smoke(digits_gan.CONFIG), workdir=str(workdir), platform="cpu", augment="ada", discriminator_steps=2,
        features=encoder,
    )  # fmt: skip
    image_run.fit("digits_gan", config, image_gan)
    return workdir


def test_a_run_leaves_what_it_says(trained):
    for picture in ("samples.png", "curves.png", "neighbours.png"):
        with Image.open(trained / picture) as image:
            assert min(image.size) >= 100
    frames = sorted(file.name for file in (trained / "film").iterdir())
    assert frames == ["0000005.png", "0000010.png", "0000015.png", "0000020.png"]
    with Image.open(trained / "film.png") as film, Image.open(trained / "film" / frames[0]) as frame:
        assert film.size == (frame.width, 4 * frame.height + 3 * 8)
    quality = json.loads((trained / "quality.json").read_text())
    assert quality.pop("signatures")["frechet"].startswith("frechet|features:encoder-")
    assert all(np.isfinite(value) for value in quality.values())
    assert {"recognised", "classes_covered", "frechet", "precision", "recall"} <= quality.keys()
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(image_gan.CURVES) <= last.keys()


def test_the_frechet_distance_is_of_the_features_asked_for(trained, encoder):
    features = image_contrastive.encoder(encoder, SHAPE, place.mesh(jax.devices()[:1]))
    of_real, of_fresh = (
        features(data.to_unit(data.load("digits", split=split)["image"])) for split in ("train", "test")
    )
    quality = json.loads((trained / "quality.json").read_text())
    np.testing.assert_allclose(quality["frechet_floor"], metrics.frechet_distance(of_fresh, of_real), rtol=1e-3)


def draw(trained, **options):
    out = trained / "drawn.npz"
    options = image_gan.Sample(str(trained), **{"out": str(out), "count": 6, "batch_size": 8, **options})
    image_run.draw("digits_gan", options, image_gan)
    with np.load(out) as arrays:
        return arrays["image"], arrays["label"]


def test_options_of_the_command_sample(trained):
    image, label = draw(trained, classes=(3, 7))
    assert image.shape == (6, *SHAPE)
    assert label.tolist() == [3, 7, 3, 7, 3, 7]
    assert np.abs(draw(trained, classes=(3, 7), seed=1)[0] - image).max() > 0.01
    mean, _ = draw(trained, classes=(3, 7), spread=0.0)
    np.testing.assert_array_equal(mean[0], mean[2])
    assert np.abs(mean[0] - mean[1]).max() > 0
    for options, message in (
        ({"spread": -1.0}, "`spread` must lie in"),
        ({"classes": (10,)}, r"`classes` must lie in \[0, 9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(trained, **options)


@pytest.mark.parametrize("network", ["r3gan", "dcgan"])
def test_an_image_depends_on_seed_index_and_class_alone(network):
    """Not on how many are drawn, how many at a time, or what stands beside it."""
    config = dataclasses.replace(image_gan.smoke(digits_gan.CONFIG), network=network)
    generator, _ = image_gan.networks(config, SHAPE, CLASSES)
    params = generator.init(jax.random.key(0), jnp.zeros((1, config.latent)), jnp.zeros(1, int))
    samples = image_gan.Samples(config, SHAPE, CLASSES, place.mesh(jax.devices()[:1]))
    image = samples(params, np.array([3, 7, 1]), samples.own(), seed=0, batch_size=4)
    for labels, batch_size in (([3, 7, 1, 1, 1, 1, 1, 1], 8), ([3, 7, 1, 0, 5], 2)):
        other = samples(params, np.array(labels), samples.own(), seed=0, batch_size=batch_size)
        np.testing.assert_allclose(other[:3], image, atol=1e-5)


def test_a_state_that_was_stored_goes_on_bit_by_bit(tmp_path):
    """Both players, both optimisers, the average and what feedback carries are in the checkpoint."""
    config = dataclasses.replace(image_gan.smoke(digits_gan.CONFIG), augment="ada", ada_target=-1.0, batch_size=8)
    mesh = place.mesh(jax.devices()[:1])
    method = place.jit(image_gan.method(config, SHAPE, CLASSES), mesh)
    batches = data.batches(data.load("digits", split="train"), batch_size=8, seed=0)

    def steps(state, first, last):
        for step in range(first, last):
            state, _ = method.step(state, batches(step), jax.random.key(1))
        return state

    whole = steps(method.init(jax.random.key(0)), 0, 4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, steps(method.init(jax.random.key(0)), 0, 2))
        checkpoints.wait()
        state = checkpoints.restore(place.state_shapes(image_gan.method(config, SHAPE, CLASSES), mesh))
    assert float(state.carried["probability"]) > 0
    for got, wanted in zip(jax.tree.leaves(steps(state, 2, 4)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("images", [(32, 32, 3)], indirect=True)
def test_published_settings_reduced(cifar10, tmp_path):
    """The whole experiment on served data: same code, fewer channels, two steps."""
    config = dataclasses.replace(
        image_gan.smoke(cifar10_gan.CONFIG), workdir=str(tmp_path / "run"), data_dir=str(tmp_path / "data"),
        platform="cpu", steps=2, burn_in=1, batch_size=8, save_every=2, grid_every=2,
    )  # fmt: skip
    image_run.fit("cifar10_gan", config, image_gan)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 2


@pytest.mark.parametrize("network", ["r3gan", "dcgan"])
@pytest.mark.parametrize("loss", ["relativistic", "hinge"])
def test_settings_reach_the_method(network, loss):
    config = dataclasses.replace(
        digits_gan.CONFIG, network=network, widths=(8, 8), group_size=4, loss=loss, augment="diffaugment", bfloat16=True
    )
    generator, discriminator = image_gan.networks(config, SHAPE, CLASSES)
    assert type(generator).__name__.lower() == network + "generator"
    assert type(discriminator).__name__.lower() == network + "discriminator"
    assert generator.dtype == discriminator.dtype == jnp.bfloat16
    method = image_gan.method(config, SHAPE, CLASSES)
    batch = {
        "image": jax.ShapeDtypeStruct((8, *SHAPE), np.float32),
        "label": jax.ShapeDtypeStruct((8,), np.int32),
    }
    key = jax.random.key(0)
    state = jax.eval_shape(method.init, key)
    after, metrics = jax.eval_shape(method.step, state, batch, key)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert set(image_gan.CURVES) <= metrics.keys()
    assert after.carried.keys() == {"gamma"}


def taken(steps, **fields):
    """The states of a tiny run, after each step."""
    config = dataclasses.replace(image_gan.smoke(digits_gan.CONFIG), batch_size=4, burn_in=2, **fields)
    method = image_gan.method(config, SHAPE, CLASSES)
    step, state = jax.jit(method.step), method.init(jax.random.key(0))
    batches = data.batches(data.load("digits", split="train"), batch_size=4, seed=0)
    states = []
    for i in range(steps):
        state, _ = step(state, batches(i), jax.random.key(1))
        states.append(state)
    assert step._cache_size() == 1
    return states


def test_schedules_are_of_steps_whatever_the_updates_in_one():
    state = taken(3, discriminator_steps=2, learning_rate=1e-3, learning_rate_end=1e-4, beta2_end=0.99)[-1]
    rates, memories = (
        [float(player.opt_state.hyperparams[name]) for player in (state.discriminator, state.generator)]
        for name in ("learning_rate", "b2")
    )
    np.testing.assert_allclose(rates, [1e-4] * 2, rtol=1e-5)
    np.testing.assert_allclose(memories, [0.99] * 2, rtol=1e-5)
    np.testing.assert_allclose(state.carried["gamma"], digits_gan.CONFIG.gamma_end, rtol=1e-5)


@pytest.mark.slow
def test_adas_probability_follows_the_settings():
    ramp = [float(s.carried["probability"]) for s in taken(3, augment="ada", ada_target=None, ada_most=0.5)]
    np.testing.assert_allclose(ramp, [0.25, 0.5, 0.5], rtol=1e-5)
    capped = taken(2, augment="ada", ada_target=-1.0, ada_most=0.3, ada_images=8)
    np.testing.assert_allclose([s.carried["probability"] for s in capped], [0.3, 0.3], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 12, 13, 60, 1000])
def test_a_film_is_thinned_to_frames_ever_further_apart(count):
    files = [Path(f"{i:07}.png") for i in range(count)]
    chosen = [int(file.stem) for file in image_run._thinned(files)]
    assert chosen[0] == 0
    assert chosen[-1] == count - 1
    assert min(count, 8) <= len(chosen) <= image_run.FRAMES
    gaps = np.diff(chosen)
    assert (gaps > 0).all()
    assert (np.diff(gaps) >= -1).all()


def test_schedules_go_from_end_to_end():
    along = image_gan.between(2.0, 0.5, 10)
    np.testing.assert_allclose([along(step) for step in (0, 5, 10, 99)], [2.0, 1.25, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (8,)}, r"`widths` must be 2 for images of 8 pixels, one for each of 4, 8 .. 8, got \(8,\)"),
        ({"ema": 1.0}, r"`ema` must lie in \[0, 1\), got 1.0"),
        ({"judge_steps": 0}, "`judge_steps` must be an integer of at least 1"),
        ({"batch_size": 10, "discriminator_steps": 3}, "`batch_size` must be a multiple of `discriminator_steps`"),
        ({"gamma": -1.0}, "`gamma` must lie in"),
        ({"beta2": 1.0}, r"`beta2` must lie in \[0, 1\), got 1.0"),
        ({"ada_target": 2.0}, "`ada_target` must lie in"),
        ({"latent": 0}, "`latent` must be an integer of at least 1"),
        ({"judged": 2}, "`judged` must be 0 or at least 4"),
        ({"judged": 0, "features": "nowhere"}, "`features` are the judge's, got a directory and `judged` 0"),
        ({"group_size": 7}, "group_size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message, tmp_path):
    config = dataclasses.replace(
        image_gan.smoke(digits_gan.CONFIG), workdir=str(tmp_path / "run"), platform="cpu", **fields
    )
    with pytest.raises(ValueError, match=message):
        image_run.fit("digits_gan", config, image_gan)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((28, 28, 1), "`dataset` must hold images of 4, 8, 16 .. pixels for the network r3gan, got 28"),
     ((8, 16, 1), "`dataset` must hold square images, got 8 x 16")],
)  # fmt: skip
def test_images_that_a_network_cannot_make_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        image_gan.networks(digits_gan.CONFIG, shape, CLASSES)
