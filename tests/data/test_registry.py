"""mnist and cifar10 through tensorflow-datasets' own builders, from a server on this machine, without
TensorFlow.

The server has files of the original formats with fewer images: everything after the address is what users
    run.
"""

import importlib.util

import numpy as np
import pytest

from jaxgen import data


def check(name, images, directory):
    shape = images["train"][0].shape[1:]
    for split, (pixels, labels) in images.items():
        arrays = data.load(name, split=split, data_dir=directory)
        assert sorted(arrays) == ["image", "label"]
        assert (arrays["image"].dtype, arrays["label"].dtype) == (np.uint8, np.int32)
        assert arrays["image"].shape == (len(pixels), *shape)
        # tensorflow-datasets stores them in an order of its own.
        stored = {(image.tobytes(), int(label)) for image, label in zip(*arrays.values(), strict=True)}
        assert stored == {(image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)}
    records = data.source(name, split="train", data_dir=directory, download=False)
    arrays = data.load(name, split="train", data_dir=directory)
    for of_step in (
        data.batches(arrays, batch_size=16, seed=0),
        data.stream(records, batch_size=16, seed=0),
    ):
        batch = of_step(7)
        assert batch["image"].shape == (16, *shape)
        assert batch["image"].dtype == np.float32
        assert -1 <= batch["image"].min() < -0.9
        assert 0.9 < batch["image"].max() <= 1
        assert batch["label"].shape == (16,)
        assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("images", [(28, 28, 1)], indirect=True)
def test_mnist_is_prepared_and_read_without_tensorflow(mnist, tmp_path):
    assert importlib.util.find_spec("tensorflow") is None
    check("mnist", mnist, tmp_path / "tfds")


@pytest.mark.parametrize("images", [(32, 32, 3)], indirect=True)
def test_cifar10_is_prepared_and_read_without_tensorflow(cifar10, tmp_path):
    check("cifar10", cifar10, tmp_path / "tfds")


@pytest.mark.parametrize("images", [(28, 28, 1)], indirect=True)
def test_failed_download_names_the_data_set_and_the_directory(mnist, served, tmp_path):
    (served[0] / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(RuntimeError, match=rf"'mnist' could not be downloaded and prepared in {tmp_path}.*404"):
        data.load("mnist", split="train", data_dir=tmp_path)


@pytest.mark.parametrize("images", [(28, 28, 1)], indirect=True)
def test_tensorflow_datasets_is_left_as_it_was(mnist, tmp_path):
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features import image_feature

    from jaxgen.data.prepare import _StandIn

    data.source("mnist", split="train", data_dir=tmp_path)
    assert image_feature._ImageEncoder._encode_image.__module__ == image_feature.__name__
    assert type(extractor.tf) is not _StandIn


def test_what_only_tensorflow_can_do_is_refused_by_name():
    from jaxgen.data.prepare import _StandIn

    with pytest.raises(ImportError, match=r"calls tf.data: install tensorflow"):
        _StandIn().data  # noqa: B018
