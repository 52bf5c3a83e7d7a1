"""Contrastive experiments: a run of the digits end to end, its features elsewhere, and the published settings reduced."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import cifar10_simclr, digits_contrastive, image_contrastive, image_training, judge, representation
from jaxgen import data, metrics, place
from jaxgen.checkpoint import Checkpoints

SHAPE = (8, 8, 1)


def smoke(workdir, experiment=digits_contrastive, **fields):
    return dataclasses.replace(
        image_contrastive.smoke(experiment.CONFIG), workdir=str(workdir), platform="cpu", **fields
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the digits, ten steps, and what it said."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    image_contrastive.fit("digits_contrastive", smoke(workdir, steps=10, save_every=5, label_shares=(0.1,)))
    return workdir


def one_device():
    return place.mesh(jax.devices()[:1])


def test_a_run_leaves_what_it_says(trained):
    for picture in ("map.png", "curves.png"):
        with Image.open(trained / picture) as image:
            assert min(image.size) >= 100
    scores = json.loads((trained / "evaluation.json").read_text())
    assert scores.keys() == {"pixels", "untrained", "trained"}
    for rows in scores.values():
        assert list(rows) == ["10% of the labels (144)", "all labels (1438)", "20 nearest neighbours"]
        assert all(0.2 < mean <= 1 and 0 <= spread < 0.5 for mean, spread in rows.values())
    assert scores["pixels"]["20 nearest neighbours"][0] > 0.95
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(image_contrastive.CURVES) <= last.keys()


def test_embed_writes_the_features_of_the_last_checkpoint(trained, tmp_path, capsys):
    out = tmp_path / "features.npz"
    image_contrastive.embed("digits_contrastive", image_contrastive.Embed(str(trained), out=str(out)))
    held_out = data.load("digits", split="test")
    with np.load(out) as arrays:
        features, label = arrays["features"], arrays["label"]
    np.testing.assert_array_equal(label, held_out["label"])
    config = smoke(trained)
    state = image_training.restored(trained, image_contrastive.method(config, SHAPE), one_device())
    network = image_contrastive.encoder_of(config)
    wanted = network.apply(state.average["encoder"], data.to_unit(held_out["image"][:5]))
    np.testing.assert_allclose(features[:5], wanted, atol=1e-5)
    assert f"{features.shape[1]} features of 359 images" in capsys.readouterr().out


def test_what_embed_cannot_do_is_refused(trained, tmp_path):
    embed = functools.partial(image_contrastive.embed, "digits_contrastive")
    with pytest.raises(ValueError, match=r"`out` must be a \.npz file, got 'features.csv'"):
        embed(image_contrastive.Embed(str(trained), out="features.csv"))
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        embed(image_contrastive.Embed(str(tmp_path)))
    with pytest.raises(ValueError, match="is a run of 'digits_contrastive', not of 'cifar10_simclr'"):
        image_contrastive.embed("cifar10_simclr", image_contrastive.Embed(str(trained)))
    with pytest.raises(
        ValueError, match=r"`features` must be of images of shape \[32, 32, 3\], got a run of \[8, 8, 1\]"
    ):
        image_contrastive.encoder(str(trained), (32, 32, 3), one_device())


def test_another_experiments_run_has_no_such_features(tmp_path):
    from experiments import digits_gan, image_gan
    from jaxgen import run

    config = image_gan.smoke(digits_gan.CONFIG)
    run.claim(tmp_path / "run", "digits_gan", image_training.identity(config, SHAPE, 10))
    with pytest.raises(
        ValueError, match=r"is a run of 'digits_gan' .* whose settings are not those of this experiment"
    ):
        image_contrastive.encoder(str(tmp_path / "run"), SHAPE, one_device())


def test_features_serve_for_the_distance_of_samples(trained, tmp_path):
    """The Fréchet distance of the judge's report is then of the encoder's features, and nothing else changes."""
    features = image_contrastive.encoder(str(trained), SHAPE, one_device())
    training, held_out = (data.load("digits", split=split) for split in ("train", "test"))
    samples = np.clip(data.to_unit(held_out["image"][:40]) + 0.3, -1, 1)
    network = judge.Classifier(10)
    ours = judge.Judge(network, network.init(jax.random.key(0), jnp.zeros((1, *SHAPE))), 0.5)
    labels = np.arange(40) % 10
    scores = {}
    for name, function in (("judge", lambda x: ours(x)[1]), ("encoder", features)):
        real = judge.seen(function, training, held_out, judged=40)
        text = judge.report(
            ours, samples, labels, real, tmp_path / name, features=function if name == "encoder" else None
        )
        assert ("the encoder's features" in text) == (name == "encoder")
        scores[name] = json.loads((tmp_path / name / "quality.json").read_text())
        of_real = function(data.to_unit(training["image"]))
        for key, images in (("frechet", samples), ("frechet_floor", data.to_unit(held_out["image"]))):
            wanted = metrics.frechet_distance(function(images), of_real)
            np.testing.assert_allclose(scores[name][key], wanted, rtol=1e-4)
    assert abs(scores["judge"]["frechet"] / scores["encoder"]["frechet"] - 1) > 0.1
    same = ("recognised", "classes_covered", "judge_accuracy", "nearest_training_image")
    assert all(scores["judge"][name] == scores["encoder"][name] for name in same)


def batches(count):
    return data.batches(data.load("digits", split="train"), batch_size=count, seed=0)


def test_a_state_that_was_stored_goes_on_bit_by_bit(tmp_path):
    mesh = one_device()
    ours = image_contrastive.method(smoke(tmp_path / "run"), SHAPE)
    placed, images = place.jit(ours, mesh), batches(16)

    def steps(state, first, last):
        for step in range(first, last):
            state, _ = placed.step(state, images(step), jax.random.key(1))
        return state

    whole = steps(placed.init(jax.random.key(0)), 0, 4)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, steps(placed.init(jax.random.key(0)), 0, 2))
        checkpoints.wait()
        state = checkpoints.restore(place.state_shapes(ours, mesh))
    for got, wanted in zip(jax.tree.leaves(steps(state, 2, 4)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_training_does_not_see_labels(tmp_path):
    ours = image_contrastive.method(smoke(tmp_path), SHAPE)
    state = jax.eval_shape(ours.init, jax.random.key(0))
    only_images = {"image": jax.ShapeDtypeStruct((16, *SHAPE), np.float32)}
    after, _ = jax.eval_shape(ours.step, state, only_images, jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_microbatches_save_memory_and_change_nothing(tmp_path):
    """Each image is still compared with those of the whole batch."""
    batch, key = batches(16)(0), jax.random.key(0)
    states = []
    for microbatches in (1, 4):
        ours = image_contrastive.method(smoke(tmp_path, microbatches=microbatches, norm="group"), SHAPE)
        _, metrics = jax.jit(ours.step)(ours.init(key), batch, key)
        states.append(metrics)
    for name in ("loss", "grad_norm", "uniformity"):
        np.testing.assert_allclose(states[1][name], states[0][name], rtol=1e-4)


@pytest.mark.parametrize("optimiser", ["adamw", "lars"])
def test_weights_decay_and_biases_do_not(optimiser):
    """Without a gradient, decay alone moves parameters."""
    config = dataclasses.replace(
        digits_contrastive.CONFIG, optimiser=optimiser, weight_decay=0.5, learning_rate=0.1, warmup=1, steps=10
    )
    transformation = image_contrastive._optimiser(config)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    state, still = transformation.init(params), jax.tree.map(jnp.zeros_like, params)
    _, state = transformation.update(still, state, params)
    updates, _ = transformation.update(still, state, params)
    assert (updates["kernel"] < 0).all()
    assert (updates["bias"] == 0).all()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_features_of_an_image_are_its_own(norm, tmp_path):
    """Whatever is encoded with it, and on how many devices."""
    config = smoke(tmp_path, norm=norm)
    training = data.load("digits", split="train")["image"][:32]
    params = image_contrastive.method(config, SHAPE).init(jax.random.key(0)).average["encoder"]
    x = data.to_unit(training[:7])
    alone = image_contrastive.Encoding(config, one_device()).by(params, training)
    on_eight = image_contrastive.Encoding(config, place.mesh()).by(params, training)
    np.testing.assert_allclose(alone(x)[:3], alone(x[:3][::-1])[::-1], atol=1e-6)
    np.testing.assert_allclose(on_eight(x), alone(x), atol=1e-5)
    assert alone(x).std(axis=0).max() > 0


@pytest.mark.parametrize("count", [3, 10, 57])
def test_labels_are_drawn_evenly(count):
    labels = np.repeat(np.arange(5), [40, 13, 20, 30, 25])
    rows = representation._balanced(labels, count, 20, np.random.default_rng(0))
    assert rows.shape == (20, count)
    for draw in rows:
        assert len(set(draw)) == count
        drawn = np.bincount(labels[draw], minlength=5)
        assert drawn.max() - drawn.min() <= 1
    assert len({tuple(sorted(draw)) for draw in rows}) > 1
    if count % 5:
        assert len({tuple(np.bincount(labels[draw], minlength=5)) for draw in rows}) > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"area": 2.0}, r"`area` must lie in \[0, 1\]"),
        ({"batch_size": 1}, "`batch_size` must be at least 2"),
        ({"warmup": 20}, "`warmup` must be shorter than `steps`, 20, got 20"),
        ({"label_shares": (0.0001,)}, r"`label_shares` must hold two of 1438 labels at least, got \[0.0001\]"),
        ({"label_shares": (1.5,)}, r"`label_shares` must lie in \(0, 1\)"),
        ({"neighbours": 2000}, "`neighbours` must be at most 1438, the training images, got 2000"),
        ({"image_size": 8}, "`image_size` must be none"),
        ({"head": ()}, "`widths` must hold at least one width"),
        ({"groups": 3}, "groups"),
        ({"block_size": 0}, "`block_size` must be an integer of at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        image_contrastive.fit("digits_contrastive", smoke(tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("images", [(32, 32, 3)], indirect=True)
def test_published_settings_reduced(cifar10, tmp_path):
    """The whole experiment on served data: same code, fewer channels, two steps."""
    config = smoke(
        tmp_path / "run", cifar10_simclr, data_dir=str(tmp_path / "data"), steps=2, warmup=1, save_every=2,
        label_shares=(0.5,),
    )  # fmt: skip
    image_contrastive.fit("cifar10_simclr", config)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 2


def test_published_settings_are_a_resnet_50():
    """23.5 M parameters below the head, as published, in a step that can be traced."""
    ours = image_contrastive.method(cifar10_simclr.CONFIG, (32, 32, 3))
    state = jax.eval_shape(ours.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.learner.params["encoder"]))
    # 25,557,032 with 1,000 classes and a 7 x 7 stem of three channels.
    assert count == 25_557_032 - (2048 * 1000 + 1000) - (49 - 9) * 3 * 64
