"""The input pipeline alone: ``python -m benchmarks data``: images a second of `jaxgen.data`, and nothing on a device.

    digits         the embedded digits, 8 x 8, in memory
    records-32     PNG files of 32 x 32 x 3 in array_record, as tensorflow-datasets writes CIFAR-10
    records-256    JPEG files of some 330 x 290 x 3 there, cropped and shrunk to 256 x 256

A run makes 32 batches, the first of which nothing has been prepared for. The sides have the same images:

    jaxgen         of digits, batches as they are; of records, `data.prefetched`: 8 steps ahead, each by a thread
    jaxgen-alone   of records: one batch after the other, by the thread that asks for it

The images have structure of every size, the finer the fainter, so that their files are about as long as those of
photographs; tensorflow-datasets writes them to a temporary folder when a side begins.
"""

import atexit
import functools
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.case import Case, Work

BATCHES = 32  # of a run
AHEAD = 8


class Images(NamedTuple):
    """A data set that is written.

    Attributes:
        height: of the images.
        width: of the images.
        format: of their files, "png" or "jpeg".
        examples: how many.
        batch: how many of them are put together.
        size: side of the square that each becomes; None to leave it as it is.
    """

    height: int
    width: int
    format: str
    examples: int
    batch: int
    size: int | None = None


SETS = {"records-32": Images(32, 32, "png", 1024, 64), "records-256": Images(288, 328, "jpeg", 256, 16, size=256)}


def pictures(images: Images) -> Iterator[bytes]:
    """Files of random images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for _ in range(images.examples):
        image, cells = np.full((images.height, images.width, 3), 128, np.float32), 2
        while cells <= min(images.height, images.width):
            grain = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            wide = grain.resize((images.width, images.height), Image.Resampling.BICUBIC)
            image += (np.asarray(wide, np.float32) - 128) * cells**-0.4
            cells *= 2
        file = io.BytesIO()
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file, images.format)
        yield file.getvalue()


@functools.cache
def written(name: str) -> Any:
    """The records of one of `SETS`, written once by tensorflow-datasets to a folder that ends with the process."""
    import tensorflow_datasets as tfds

    from jaxgen import data

    images, builder = SETS[name], f"benchmark_{SETS[name].format}"

    class Builder(tfds.core.GeneratorBasedBuilder):
        """Enters the registry of data sets by being defined."""

        VERSION = tfds.core.Version("1.0.0")
        name = builder

        def _info(self) -> Any:
            image = tfds.features.Image(shape=(images.height, images.width, 3), encoding_format=images.format)
            features = {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, file in enumerate(pictures(images)):
                yield number, {"image": io.BytesIO(file), "label": number % 10}

    tfds.disable_progress_bar()
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return data.source(builder, split="train", data_dir=folder.name)


def digits(examples: int) -> Work:
    """Batches of arrays in memory."""
    import tensorflow_datasets as tfds

    from jaxgen import data

    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        arrays = data.load("digits", split="train", data_dir=folder)
    return read(data.batches(arrays, batch_size=examples // BATCHES, seed=0))


def files(name: str, examples: int, *, ahead: int | None = AHEAD) -> Work:
    """Batches of files, made ahead or not."""
    import grain

    from jaxgen import data

    source, size = written(name), SETS[name].size
    if size is not None:
        source = grain.MapDataset.source(source).map(
            lambda record: {**record, "image": data.centred_square(record["image"], size)}
        )
    return read(data.stream(source, batch_size=examples // BATCHES, seed=0), ahead)


def read(of_step: Callable[[int], Any], ahead: int | None = None) -> Work:
    """Runs of 32 steps; the next run goes on with the next steps."""
    from jaxgen import data

    starts = itertools.count(0, BATCHES)

    def run() -> np.ndarray:
        start = next(starts)
        steps = range(start, start + BATCHES)
        batches = of_step
        if ahead is not None:  # nothing is made for the run after, which would be for free there
            batches = data.prefetched(lambda step: of_step(step) if step in steps else {}, ahead=ahead)
        last = [batches(step) for step in steps][-1]
        images: np.ndarray = last["image"]
        return images

    return Work(run)


def cases(quick: bool) -> list[Case]:
    """The three."""

    def case(name: str, size: int, batch: int, sides: dict[str, Callable[[int], Work]]) -> Case:
        batch = 4 if quick else batch
        settings = {"size": size, "batch": batch, "batches": BATCHES, "ahead": AHEAD}
        return Case(name=f"{name}-batch{batch}", settings=settings, sides=sides, batch=BATCHES * batch)

    found = [case("digits", 8, 64, {"jaxgen": digits})]
    for name, images in SETS.items():
        sides: dict[str, Callable[[int], Work]] = {
            "jaxgen": functools.partial(files, name),
            "jaxgen-alone": functools.partial(files, name, ahead=None),
        }
        found.append(case(name, images.size or images.height, images.batch, sides))
    return found
