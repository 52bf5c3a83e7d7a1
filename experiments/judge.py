"""An independent judge of generated images: a small classifier, trained on the real ones.

It sees training images only, so its accuracy on held-out ones is honest; what it recognises in generated images, and
the Fréchet distance between its features of generated and of real ones, are then measures of quality that no generator
was trained on. The features can be another network's.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax.sharding import Mesh

from experiments import image_data
from jaxgen import data, loop, metrics, nets, place, train
from jaxgen.images import save_grid
from jaxgen.typing import Array, Batch, Key, Metrics, Params

NEIGHBOURS = 3  # of precision and recall, as their paper chose


class Classifier(nn.Module):
    """Three convolutions and two dense layers: ``apply(params, x [batch, height, width, channels])``.

    Returns (logits [batch, classes], features [batch, features]).
    """

    classes: int
    features: int = 64

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Applies the network."""
        for channels, strides in ((32, 1), (64, 2), (64, 1)):
            x = nn.relu(nets.Conv(channels, strides=strides)(x))
        features = nn.relu(nn.Dense(self.features)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(features), features


class Judge(NamedTuple):
    """A trained classifier.

    Attributes:
        network: the module.
        params: its parameters.
        accuracy: on the held-out images it was given.
    """

    network: Classifier
    params: Params
    accuracy: float

    def __call__(self, images: np.ndarray, *, batch: int = 1000) -> tuple[np.ndarray, np.ndarray]:
        """Classifies images [n, ...] in [-1, 1]: (predicted classes [n], features [n, 64])."""
        apply = jax.jit(self.network.apply)
        parts = [apply(self.params, images[i : i + batch]) for i in range(0, len(images), batch)]
        logits, features = (np.concatenate(part) for part in zip(*parts, strict=True))
        return np.argmax(logits, axis=-1), features


def train_judge(
    training: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray],
    *,
    classes: int,
    mesh: Mesh,
    seed: int,
    steps: int,
) -> Judge:
    """Trains a judge on uint8 images with labels, shifting them by up to a pixel, and measures it on held-out ones."""
    network, batch_size = Classifier(classes), 128
    shape = training["image"].shape[1:]

    def loss(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        logits, _ = network.apply(params, image_data.shifted(key, batch["image"], 1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}

    method = train.minimise(
        loss,
        optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3),
        lambda key: nets.init(network, key, jnp.zeros((1, *shape))),
        average=train.ema(0.99),
    )
    batches = data.batches(training, batch_size=batch_size, seed=seed)
    state = loop.run(place.jit(method, mesh), batches, key=jax.random.key(seed), steps=steps)
    judge = Judge(network, state.average, 0.0)
    predicted, _ = judge(data.to_unit(held_out["image"]))
    return judge._replace(accuracy=float((predicted == held_out["label"]).mean()))


class Real(NamedTuple):
    """Real images, seen once: what samples are measured against.

    Attributes:
        images: [n, ...] in [-1, 1], those of training.
        features: [n, any] of them.
        held_out: how many other images there were.
        few: how many of these, or of samples, precision and recall are of, since both change with the number.
        floor: what the held-out images score, by the names of `report`'s numbers.
    """

    images: np.ndarray
    features: np.ndarray
    held_out: int
    few: int
    floor: dict[str, float]


Features = Callable[[np.ndarray], np.ndarray]
"""Images [n, height, width, channels] in [-1, 1] -> [n, any]."""


def seen(
    features: Features, training: Mapping[str, np.ndarray], held_out: Mapping[str, np.ndarray], *, judged: int
) -> Real:
    """Real uint8 images, and what held-out ones score, for ``judged`` samples to be measured against."""
    real, fresh = data.to_unit(training["image"]), data.to_unit(held_out["image"])
    of_real, few = features(real), min(judged, len(fresh))
    nearest = float(np.median(_neighbours(fresh, real)[0]))
    floor = {**_distances(features(fresh), of_real, few), "nearest_training_image": nearest}
    return Real(real, of_real, len(fresh), few, floor)


def report(
    judge: Judge,
    drawn: np.ndarray,
    labels: np.ndarray,
    real: Real,
    workdir: Path,
    *,
    features: Features | None = None,
    extractor: str = "judge",
) -> str:
    """Measures class-conditional samples [n, ...] in [-1, 1] against real images.

    Writes quality.json and neighbours.png, rows of samples, each above the training images nearest to them, into
    ``workdir``, which it makes if need be.

    Args:
        judge: recognises classes.
        drawn: the samples.
        labels: [n], the classes asked for.
        real: by `seen`, of the same features.
        workdir: where to write.
        features: what to compare; the judge's by default.
        extractor: what to call them in the scores' signatures.

    Returns:
        What a person should read: the share of samples that the judge takes for the class asked for, and of how many
        classes it so takes at least half; the Fréchet distance of the samples' features from the training images', and
        precision and recall of the two; the median distance in pixels to the nearest training image: samples that were
        copies would be nearer than real images are. The last three beside those of held-out images. Below are the
        signatures of the Fréchet distance and of precision and recall: other scores compare where theirs are the same.
    """
    predicted, own = judge(drawn)
    distances, nearest = _neighbours(drawn, real.images)
    right = predicted == labels
    covered = sum(bool(right[labels == label].mean() >= 0.5) for label in set(labels.tolist()))
    scores = {
        **_distances(own if features is None else features(drawn), real.features, real.few),
        "nearest_training_image": float(np.median(distances)),
    }
    held_out = {f"{name}_floor": value for name, value in real.floor.items()}
    told = {"judge_accuracy": judge.accuracy, "recognised": float(right.mean()), "classes_covered": covered}
    workdir.mkdir(exist_ok=True)
    signed = {
        name: metrics.signature(
            score,
            features=extractor,
            resize="none",
            samples=samples,
            references=len(real.images),
            split="train",
            **more,
        )
        for name, score, samples, more in (
            ("frechet", "frechet", len(drawn), {}),
            ("frechet_floor", "frechet", real.held_out, {}),
            ("precision and recall", "precision-recall", real.few, {"neighbours": NEIGHBOURS}),
        )
    }
    written = {**told, **scores, **held_out, "signatures": signed}
    (workdir / "quality.json").write_text(json.dumps(written, indent=2) + "\n")
    rows, columns = 3, judge.network.classes
    pairs = [
        images[row * columns : (row + 1) * columns] for row in range(rows) for images in (drawn, real.images[nearest])
    ]
    save_grid(workdir / "neighbours.png", np.concatenate(pairs), columns=columns)
    floor, whose = real.floor, "its" if features is None else "the encoder's"
    return (
        f"a classifier that is right on {judge.accuracy:.1%} of {real.held_out} held-out images recognises "
        f"{right.mean():.1%} of {len(drawn)} samples as the class asked for, and at least half in "
        f"{covered} of {columns} classes\n"
        f"Fréchet distance on {whose} features from the training images: "
        f"samples {scores['frechet']:.3g}, held-out images {floor['frechet']:.3g}\n"
        f"precision and recall on them: samples {scores['precision']:.2f} and {scores['recall']:.2f}, "
        f"held-out images {floor['precision']:.2f} and {floor['recall']:.2f}\n"
        f"median distance to the nearest training image: samples {scores['nearest_training_image']:.2f}, "
        f"held-out images {floor['nearest_training_image']:.2f} (copies would be near 0); see neighbours.png\n"
        f"{signed['frechet']}\n{signed['precision and recall']}"
    )


_precision_recall = jax.jit(functools.partial(metrics.precision_recall, neighbours=NEIGHBOURS))


def _distances(features: np.ndarray, real: np.ndarray, few: int) -> dict[str, float]:
    """The Fréchet distance, and precision and recall of the first ``few``."""
    precision, recall = map(float, _precision_recall(features[:few], real))
    frechet = float(jax.jit(metrics.frechet_distance)(features, real))
    return {"frechet": frechet, "precision": precision, "recall": recall}


def _neighbours(images: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = (images.reshape(len(images), -1), references.reshape(len(references), -1))
    distance, index = jax.jit(metrics.nearest_neighbours)(*flat)
    return np.asarray(distance), np.asarray(index)
