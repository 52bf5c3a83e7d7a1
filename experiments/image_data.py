"""The images that an experiment trains on: all of them in memory, or each shrunk and cropped as it is read."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.image_settings import Settings
from jaxgen import data, place, random
from jaxgen.typing import Array, Batch, Key

AHEAD = 8  # steps whose images are decoded meanwhile, each by a thread


class Images(NamedTuple):
    """A training set.

    Attributes:
        batches: step -> this process's rows of the batch, "image" [batch, height, width, channels] in [-1, 1] and
            "label" [batch].
        examples: how many there are.
        shape: of one of them.
        classes: of the labels, a number.
        arrays: "image" (uint8) and "label" of all of them, where they are in memory.
    """

    batches: Callable[[int], Batch]
    examples: int
    shape: tuple[int, ...]
    classes: int
    arrays: Mapping[str, np.ndarray] | None = None


def opened(config: Settings, mesh: Mesh) -> Images:
    """Opens the settings' training set, and prepares it where that has not been done.

    Args:
        config: the settings.
        mesh: over which batches are split: each process loads the rows that its devices hold.
    """
    if config.image_size is None:
        arrays = data.load(config.dataset, split="train", data_dir=config.data_dir)
        shape, classes = arrays["image"].shape[1:], int(arrays["label"].max()) + 1
        return Images(_shared(data.batches, arrays, config, mesh), len(arrays["image"]), shape, classes, arrays)

    import grain

    size = config.image_size
    records = data.source(config.dataset, split="train", data_dir=config.data_dir)
    squares = grain.MapDataset.source(records).map(
        lambda record: {"image": data.centred_square(record["image"], size), "label": record["label"]}
    )
    batches = data.prefetched(_shared(data.stream, squares, config, mesh), ahead=AHEAD)
    channels = records.features["image"][0][-1]
    return Images(batches, len(records), (size, size, channels), records.classes["label"])


class Described(NamedTuple):
    """A training set that need not be there.

    Attributes:
        batch: shapes and dtypes of a batch.
        shape: of an image.
        classes: of the labels, a number.
    """

    batch: Batch
    shape: tuple[int, ...]
    classes: int


def described(config: Settings) -> Described:
    """What `opened` would open, without data.

    Raises:
        ValueError: there is no such data set, or its images differ in size and no ``image_size`` is set.
    """
    features, classes = data.described(config.dataset, data_dir=config.data_dir)
    height, width, channels = features["image"][0]
    if config.image_size is not None:
        height = width = config.image_size
    if height is None or width is None or channels is None:
        raise ValueError(f"`image_size` must be set for {config.dataset!r}, whose images differ in size")
    shape, size = (height, width, channels), config.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    return Described(batch, shape, classes["label"])


def mirrored(key: Key, images: Array) -> Array:
    """Mirrors half of the images, by chance."""
    return jnp.where(coins(key, len(images), 0.5)[:, None, None, None], images[:, :, ::-1], images)


def shifted(key: Key, images: Array, most: int) -> Array:
    """Shifts each image by up to ``most`` pixels along both axes, by chance; the border repeats."""

    def shift(key: Key, image: Array) -> Array:
        padded = jnp.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
        top, left = jax.random.randint(key, (2,), 0, 2 * most + 1)
        return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

    return random.per_image(shift, key, images)


def coins(key: Key, batch: int, probability: float) -> Array:
    """One biased coin per example."""
    keys = random.example_keys(key, batch)
    return random.draw(jax.random.uniform, keys, (), jnp.float32) < probability


def _shared(make: Callable[..., data.Batches], source: Any, config: Settings, mesh: Mesh) -> Callable[[int], Batch]:
    """This process's rows of the batches that ``make`` makes, part by part."""
    numbers, parts = place.share(mesh)
    each = [
        make(source, batch_size=config.batch_size, seed=config.seed, process_index=number, process_count=parts)
        for number in numbers
    ]
    if len(each) == 1:
        return each[0]
    return lambda step: jax.tree.map(lambda *rows: np.concatenate(rows), *(part(step) for part in each))
