"""The first experiment: what it prints is true of what it has learned, and bad settings are refused by name."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import toy2d

SMALL = dataclasses.replace(toy2d.SMOKE, steps=4000, batch_size=256, width=64, sample_steps=20, count=500)


def numbers(text):
    """Share of samples near a centre, centres reached, log-densities under the model and the truth, what is lacking."""
    return [
        float(number) for number in re.findall(r"-?\d+\.?\d*(?=%| of 8| nats under the m| under the truth|\n)", text)
    ]


def test_it_learns_the_ring_and_says_so(tmp_path, capsys):
    toy2d.run(dataclasses.replace(SMALL, out=str(tmp_path / "made" / "ring.png")))
    near, near_data, reached, ours, truth, lacking = numbers(capsys.readouterr().out)[:6]
    assert near > 85
    assert near_data > 97
    assert reached == 8
    assert truth == pytest.approx(-0.36, abs=0.1)  # the entropy of eight Gaussians apart, log 8 + log(2 pi e 0.01)
    assert 0 < lacking < 0.5
    assert lacking == pytest.approx(truth - ours, abs=0.002)
    with Image.open(tmp_path / "made" / "ring.png") as picture:
        assert picture.size == (1920, 528)


def test_every_recipe_runs_on_the_moons(tmp_path, capsys):
    config = dataclasses.replace(
        toy2d.SMOKE, data="moons", recipe="ddpm", solver="ddim", out=str(tmp_path / "moons.png")
    )
    toy2d.run(config)
    assert "of 96 centres" in capsys.readouterr().out
    assert (tmp_path / "moons.png").exists()


@pytest.mark.parametrize("data", ["ring", "moons"])
def test_the_truth_is_a_density_and_the_data_are_drawn_from_it(data):
    truth = toy2d.mixture(data)
    side = np.linspace(-3, 3, 301)
    plane = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    density = np.exp(truth.log_density(plane))
    assert density.sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=1e-3)
    drawn = np.asarray(truth.draw(jax.random.key(0), 20_000))
    np.testing.assert_allclose(drawn.mean(axis=0), density @ plane / density.sum(), atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(plane.T, aweights=density), atol=0.03)
    entropy = float(-np.sum(density * truth.log_density(plane)) / density.sum())
    assert float(np.mean(truth.log_density(drawn))) == pytest.approx(-entropy, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"count": 2.5}, "`count` must be an integer of at least 1, got 2.5"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0 and finite, got 0"),
    ],
)
def test_bad_settings_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy2d.run(dataclasses.replace(toy2d.SMOKE, out=str(tmp_path / "x.png"), **options))
    assert not (tmp_path / "x.png").exists()
