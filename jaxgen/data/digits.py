"""The embedded data set: scikit-learn's 1,797 handwritten digits, as a tensorflow-datasets builder.

They are real (E. Alpaydin and C. Kaynak, UCI, 1998: the test part of "Optical Recognition of Handwritten
Digits"), small, BSD-licensed and inside a wheel that jaxgen depends on, so every experiment and every test
runs without a network.

A module of its own, within a package, because tensorflow-datasets derives the name and the place of a data
set from the module of its builder, and because importing this imports tensorflow-datasets.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_EVERY = 5
"""Of each class, in the order of the file, every fifth digit is a test digit, beginning with the third."""


class Digits(tfds.core.GeneratorBasedBuilder):
    """8 x 8 grey digits: 1,438 to train on and 359 to test on, both with all ten classes in equal parts.

    The file's values v, 0 to 16, are stored as ``round(v 255 / 16)`` in uint8, so that they fill the range
    that images have; ``round(x 16 / 255)`` inverts it. The split depends on no random generator.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits of 8 x 8 grey values, from scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            license="BSD-3-Clause (scikit-learn's copy), CC BY 4.0 (UCI)",
            # Records keep the order of scikit-learn's file, so that anyone can compare the two.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = np.round(raw.images * 255 / 16).astype(np.uint8)
        labels = raw.target
        test = test_rows(labels)
        return {
            "train": self._generate_examples(images[~test], labels[~test]),
            "test": self._generate_examples(images[test], labels[test]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield row, {"image": io.BytesIO(png(image)), "label": int(label)}


def test_rows(labels: np.ndarray) -> np.ndarray:
    """Says which rows [n] are for testing: within each class every fifth, beginning with the third."""
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[TEST_EVERY // 2 :: TEST_EVERY]] = True
    return test


def png(image: np.ndarray) -> bytes:
    """Encodes a uint8 image [height, width] or [height, width, 1, 3 or 4] as PNG, without TensorFlow."""
    from PIL import Image

    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "png")
    return file.getvalue()
