"""What representations of images are worth: to classifiers of few labels, to nearest neighbours, and to the eye.

Several representations are measured on the same labels side by side, since a number alone says little: raw pixels are
hard to beat where images are centred and of one size, and an untrained network is better than chance.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from jaxgen import contrastive, data
from jaxgen.images import save_figure

Features = Callable[[np.ndarray], np.ndarray]
"""Images [n, height, width, channels] in [-1, 1] -> [n, any]."""

MAPPED = 1000  # images, at most, on a map


def check(shares: Sequence[float], neighbours: int, labels: int) -> None:
    """Raises ValueError where so many training labels are too few to draw ``shares`` of or ``neighbours`` from."""
    if any(round(share * labels) < 2 for share in shares):
        raise ValueError(f"`label_shares` must hold two of {labels} labels at least, got {list(shares)}")
    if neighbours > labels:
        raise ValueError(f"`neighbours` must be at most {labels}, the training images, got {neighbours}")


def report(
    representations: Mapping[str, Features],
    training: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray],
    workdir: Path,
    *,
    shares: Sequence[float],
    draws: int,
    neighbours: int,
    seed: int,
) -> str:
    """Measures representations, and writes evaluation.json and map.png into ``workdir``.

    Args:
        representations: what to measure, by name.
        training: "image" (uint8) and "label", from which classifiers learn.
        held_out: likewise, which they have to classify.
        workdir: where to write.
        shares: of the training labels that linear classifiers get, balanced among classes; they also get all of them.
        draws: how often each share is drawn anew.
        neighbours: how many classify by vote.
        seed: of the draws.

    Returns:
        A table to read: the accuracy on held-out images, mean and deviation over the draws, for each representation.
    """
    check(shares, neighbours, len(training["label"]))
    labels, asked = (part["label"].astype(np.int32) for part in (training, held_out))
    x, fresh = (data.to_unit(part["image"]) for part in (training, held_out))
    classes = int(labels.max()) + 1
    counts = [round(share * len(labels)) for share in shares]
    chosen = [_balanced(labels, count, draws, np.random.default_rng(seed)) for count in counts]
    key = jax.random.key(seed)

    @jax.jit
    def probe(key: jax.Array, rows: jax.Array, features: jax.Array, of_fresh: jax.Array) -> jax.Array:
        return contrastive.linear_probe(
            key, features[rows], jnp.asarray(labels)[rows], of_fresh, jnp.asarray(asked), classes=classes
        ).accuracy

    probes = jax.jit(jax.vmap(probe, (0, 0, None, None)))
    nearest = jax.jit(functools.partial(contrastive.knn_accuracy, neighbours=neighbours))
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    maps = {}
    for name, represent in representations.items():
        features, of_fresh = represent(x), represent(fresh)
        rows = {
            f"{100 * share:g}% of the labels ({count})": rows
            for share, count, rows in zip(shares, counts, chosen, strict=True)
        }
        accuracies = {
            label: np.asarray(probes(jax.random.split(key, draws), rows, features, of_fresh))
            for label, rows in rows.items()
        }
        accuracies[f"all labels ({len(labels)})"] = np.asarray(probe(key, np.arange(len(labels)), features, of_fresh))
        accuracies[f"{neighbours} nearest neighbours"] = np.asarray(nearest(features, labels, of_fresh, asked))
        scores[name] = {label: (float(of.mean()), float(of.std())) for label, of in accuracies.items()}
        maps[name] = of_fresh[:MAPPED]
    (workdir / "evaluation.json").write_text(json.dumps(scores, indent=2) + "\n")
    _draw_maps(workdir / "map.png", maps, asked[:MAPPED])
    return _table(scores)


def _balanced(labels: np.ndarray, count: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Rows [draws, count] of training examples, of every class as many as of any other, or one more."""

    def draw() -> np.ndarray:
        shuffled = rng.permutation(len(labels))
        order = rng.permutation(labels.max() + 1)  # which classes get one more
        # The i-th example of its class comes before any class's next; within a round, in the classes' order.
        turn = np.empty(len(labels), np.int64)
        for label in order:
            of_class = np.flatnonzero(labels[shuffled] == label)
            turn[of_class] = np.arange(len(of_class))
        return shuffled[np.lexsort((np.argsort(order)[labels[shuffled]], turn))][:count]

    return np.stack([draw() for _ in range(draws)])


def _table(scores: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    names = list(scores)
    rows = list(scores[names[0]])
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>18}" for name in names)]
    for row in rows:
        cells = (scores[name][row] for name in names)
        shown = (f"{mean:.1%} ± {spread:.1%}" if spread else f"{mean:.1%}" for mean, spread in cells)
        lines.append(f"{row:<{width}}" + "".join(f"{cell:>18}" for cell in shown))
    return "\n".join(lines)


def _draw_maps(path: Path, maps: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """A panel for each representation: images as points, neighbours near each other (t-SNE of cosine distances)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(5 * len(maps), 5), layout="constrained")
    for axes, (name, features) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        unit = np.asarray(contrastive.normalise(jnp.asarray(features)))
        perplexity = min(30.0, (len(unit) - 1) / 3)
        points = TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(unit)
        for label in np.unique(labels):
            of_class = points[labels == label]
            axes.scatter(*of_class.T, s=8, color=colormaps["tab10" if labels.max() < 10 else "turbo"](
                int(label) if labels.max() < 10 else label / labels.max()), label=str(label))  # fmt: skip
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([])
    if labels.max() < 20:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", title="class", markerscale=2)
    save_figure(path, figure)
