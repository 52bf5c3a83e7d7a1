"""An independent judge of generated images: a small classifier, trained on the real ones.

It sees training images only, so its accuracy on held-out ones is honest; what it recognises in generated images, and
the Fréchet distance between its features of generated and of real ones, are then measures of quality that no generator
was trained on.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgen import data, loop, metrics, nets, place, random, train
from jaxgen.images import save_grid
from jaxgen.typing import Array, Batch, Key, Metrics, Params


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
        images = jax.vmap(_shifted)(random.example_keys(key, batch_size), batch["image"])
        logits, _ = network.apply(params, images)
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


def report(
    judge: Judge,
    drawn: np.ndarray,
    labels: np.ndarray,
    training: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray],
    workdir: Path,
) -> str:
    """Measures class-conditional samples [n, ...] in [-1, 1] against the real images.

    Writes quality.json and neighbours.png, rows of samples, each above the training images nearest to them, into
    ``workdir``, which it makes if need be.

    Returns:
        What a person should read: the share of samples that the judge takes for the class asked for, and of how many
        classes it so takes at least half; the Fréchet distance of the samples' features from the training images', and
        precision and recall of the two; the median distance in pixels to the nearest training image: samples that were
        copies would be nearer than real images are. The last three beside those of held-out images.
    """
    real, fresh = data.to_unit(training["image"]), data.to_unit(held_out["image"])
    predicted, features = judge(drawn)
    (_, real_features), (_, fresh_features) = judge(real), judge(fresh)
    distance, manifolds = jax.jit(metrics.frechet_distance), jax.jit(metrics.precision_recall)
    few = min(len(features), len(fresh_features))  # both change with the number of points
    (precision, recall), (fresh_precision, fresh_recall) = (
        map(float, manifolds(seen[:few], real_features)) for seen in (features, fresh_features)
    )
    distances, nearest = _neighbours(drawn, real)
    right = predicted == labels
    scores = {
        "judge_accuracy": judge.accuracy,
        "recognised": float(right.mean()),
        "classes_covered": sum(bool(right[labels == label].mean() >= 0.5) for label in set(labels.tolist())),
        "frechet": float(distance(features, real_features)),
        "frechet_floor": float(distance(fresh_features, real_features)),
        "precision": precision,
        "recall": recall,
        "precision_floor": fresh_precision,
        "recall_floor": fresh_recall,
        "nearest_training_image": float(np.median(distances)),
        "nearest_training_image_floor": float(np.median(_neighbours(fresh, real)[0])),
    }
    workdir.mkdir(exist_ok=True)
    (workdir / "quality.json").write_text(json.dumps(scores, indent=2) + "\n")
    rows, columns = 3, judge.network.classes
    pairs = [images[row * columns : (row + 1) * columns] for row in range(rows) for images in (drawn, real[nearest])]
    save_grid(workdir / "neighbours.png", np.concatenate(pairs), columns=columns)
    return (
        f"a classifier that is right on {scores['judge_accuracy']:.1%} of {len(fresh)} held-out images recognises "
        f"{scores['recognised']:.1%} of {len(drawn)} samples as the class asked for, and at least half in "
        f"{scores['classes_covered']} of {judge.network.classes} classes\n"
        f"Fréchet distance on its features from the training images: samples {scores['frechet']:.2f}, "
        f"held-out images {scores['frechet_floor']:.2f}\n"
        f"precision and recall on them: samples {precision:.2f} and {recall:.2f}, "
        f"held-out images {fresh_precision:.2f} and {fresh_recall:.2f}\n"
        f"median distance to the nearest training image: samples {scores['nearest_training_image']:.2f}, "
        f"held-out images {scores['nearest_training_image_floor']:.2f} (copies would be near 0); see neighbours.png"
    )


def _neighbours(images: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = (images.reshape(len(images), -1), references.reshape(len(references), -1))
    distance, index = jax.jit(metrics.nearest_neighbours)(*flat)
    return np.asarray(distance), np.asarray(index)


def _shifted(key: Key, image: Array) -> Array:
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    top, left = jax.random.randint(key, (2,), 0, 3)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
