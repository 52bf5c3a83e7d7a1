"""The transformer in experiments: on digits, on ImageNet's own archives reduced, and what old runs remain."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    digits_diffusion,
    image_data,
    image_diffusion,
    image_flow,
    image_run,
    image_training,
    imagenet_dit,
)
from experiments.image_diffusion import Transformer
from jaxgen import diffusion, nets
from jaxgen.checkpoint import Checkpoints

SHAPE, CLASSES = (8, 8, 1), 10


def reduced(module, **fields):
    config = image_diffusion.smoke(module.CONFIG)
    return dataclasses.replace(
        config, platform="cpu", steps=2, warmup=1, batch_size=8, save_every=2, grid_every=2, sample_steps=2, judged=0,
        **fields,
    )  # fmt: skip


@pytest.mark.slow
def test_published_settings_reduced(imagenet2012, tmp_path):
    """The whole experiment on eight devices: archives, crops, two steps of the flow, a grid."""
    transformer = dataclasses.replace(image_diffusion.smoke(imagenet_dit.CONFIG).dit, features=32)
    config = reduced(
        imagenet_dit, workdir=str(tmp_path / "run"), data_dir=str(imagenet2012), image_size=32, dit=transformer, fsdp=8
    )
    opened = image_data.opened(config, image_training.mesh_for(config))
    assert (opened.examples, opened.shape, opened.classes) == (8, (32, 32, 3), 1000)
    batch = opened.batches(0)
    assert sorted(batch["label"].tolist()) == [3] * 4 + [997] * 4
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 32, 32, 3), np.float32)
    image_run.fit("imagenet_dit", config, image_flow)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 2
    recalled, shape, classes = image_training.recalled(tmp_path / "run", image_flow.Config, "imagenet_dit")
    assert (recalled.dit, shape, classes) == (transformer, (32, 32, 3), 1000)


def test_the_full_size_has_the_parameters_that_its_header_says():
    config = imagenet_dit.CONFIG
    state = jax.eval_shape(image_flow.method(config, (256, 256, 3), 1000).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.learner.params))
    assert f"{count / 1e6:.0f} million parameters" in imagenet_dit.__doc__


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Digits by a transformer, two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    config = reduced(digits_diffusion, workdir=str(workdir), network="dit")
    image_run.fit("digits_diffusion", config, image_diffusion)
    return workdir


@pytest.mark.slow
def test_samples_of_a_transformer(trained):
    out = trained / "drawn.npz"
    for solver in ("heun", "ddim"):
        image_run.draw(
            "digits_diffusion",
            image_diffusion.Sample(str(trained), out=str(out), count=6, steps=3, solver=solver),
            image_diffusion,
        )
        with np.load(out) as arrays:
            assert arrays["image"].shape == (6, *SHAPE)
            assert np.isfinite(arrays["image"]).all()


def test_runs_from_before_there_was_a_choice_are_read_and_resumed(tmp_path):
    config = dataclasses.replace(digits_diffusion.CONFIG, workdir=str(tmp_path))
    identity = image_training.identity(config, SHAPE, CLASSES)
    assert not {"network", "dit", "image_size"} & identity.keys()
    for fields in ({"network": "dit"}, {"image_size": 8}):
        changed = image_training.identity(dataclasses.replace(config, **fields), SHAPE, CLASSES)
        assert fields.items() <= changed.items()
        assert ("dit" in changed) == ("network" in fields)
        json.dumps(changed)


def test_the_flow_weighs_errors_as_velocities():
    """With data prediction and its weight the loss is that of the velocity, where t is above 0.05."""
    x0 = jax.random.normal(jax.random.key(0), (64, 4))
    denoise = lambda x, t: 0.3 * x  # noqa: E731
    draw_time = lambda key: jax.random.uniform(key, minval=0.06)  # noqa: E731
    losses = diffusion.denoising_loss(
        image_flow.PATH,
        diffusion.data,
        denoise,
        x0,
        jax.random.key(1),
        draw_time=draw_time,
        weight=image_flow.velocity_weight,
    )
    velocity = lambda x, t: (x - denoise(x, t)) / t[:, None]  # noqa: E731
    expected = diffusion.denoising_loss(
        image_flow.PATH, diffusion.velocity, velocity, x0, jax.random.key(1), draw_time=draw_time
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_settings_reach_the_network(network):
    config = dataclasses.replace(
        digits_diffusion.CONFIG, network=network, bfloat16=True, dit=Transformer(patch=4, rotary=True, remat=True)
    )
    made = image_diffusion.network(config, SHAPE, CLASSES, time_scale=1.0)
    assert isinstance(made, nets.DiT if network == "dit" else nets.UNet)
    assert (made.dtype, made.num_classes, made.out_channels) == (jnp.bfloat16, 10, 1)
    if network == "dit":
        assert (made.patch, made.positions) == (4, nets.rotary_positions)
        assert made.remat is jax.checkpoint_policies.nothing_saveable


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "dit", "dropout": 0.1}, "`dropout` must be 0 for the network dit"),
        ({"network": "dit", "dit": Transformer(patch=3)}, "`patch` = 3 divides"),
        ({"image_size": 8, "judged": 10}, "`judged` must be 0 with an `image_size`"),
        ({"image_size": 0, "judged": 0}, "`image_size` must be an integer of at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message, tmp_path):
    config = dataclasses.replace(
        image_diffusion.smoke(digits_diffusion.CONFIG), workdir=str(tmp_path / "run"), platform="cpu", **fields
    )
    with pytest.raises(ValueError, match=message):
        image_run.fit("digits_diffusion", config, image_diffusion)
