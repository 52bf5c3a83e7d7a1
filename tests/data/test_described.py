"""What data sets hold, known without having them."""

import dataclasses

import pytest

from experiments import cifar10_diffusion, image_data, imagenet_dit
from jaxgen import data


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (8, 8, 1), 10),
        ("mnist", (28, 28, 1), 10),
        ("cifar10", (32, 32, 3), 10),
        ("cifar100", (32, 32, 3), 100),
        ("imagenet2012", (None, None, 3), 1000),
    ],
)
def test_published_data_sets(name, shape, classes, tmp_path):
    features, found = data.described(name, data_dir=tmp_path)
    assert (features["image"][0], found["label"]) == (shape, classes)
    assert list(tmp_path.iterdir()) == []


def test_what_is_described_is_what_is_read(tmp_path):
    read = data.source("digits", split="train", data_dir=tmp_path)
    assert data.described("digits", data_dir=tmp_path) == (read.features, read.classes)


def test_unknown_data_sets_are_refused():
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        data.described("cifar1O")


def test_batches_of_experiments():
    batch, shape, classes = image_data.described(cifar10_diffusion.CONFIG)
    assert (batch["image"].shape, shape, classes) == ((512, 32, 32, 3), (32, 32, 3), 10)
    assert image_data.described(imagenet_dit.CONFIG).shape == (256, 256, 3)
    with pytest.raises(ValueError, match="`image_size` must be set for 'imagenet2012', whose images differ in size"):
        image_data.described(dataclasses.replace(imagenet_dit.CONFIG, image_size=None))
