"""How classifiers stand up to attacks, as tables and pictures.

An accuracy under attack is a claim about the attack as much as about the classifier: it is an upper bound of what is
true. So every classifier meets the same ones, the weakest first, and a defence that draws meets one that knows of it.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from experiments.image_settings import Settings
from jaxgen import attacks, data, diffusion, place, random
from jaxgen.images import save_figure
from jaxgen.typing import Array, Key, Params

Apply = Callable[[Params, Array], Any]
"""``(params, x [n, height, width, channels]) -> logits [n, classes]``."""

SHOWN = 10  # images of the picture


@dataclasses.dataclass(frozen=True)
class Measured(Settings):
    """Settings of a training run, of the attacks that measure it and of the defences by a diffusion model."""

    eps: float = 16 / 255
    """How far a pixel may move, images being in [-1, 1]: twice what papers say of [0, 1]."""

    measured: int = 1000
    """Held-out images that are attacked, at most."""
    pgd_steps: int = 50
    """Steps of the attack that measures."""
    curve: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    """Radii of the robust curve, as multiples of ``eps``."""
    auto_steps: int = 100
    """Steps of AutoAttack's attacks by gradients; its own number is 100."""
    queries: int = 5000
    """Queries of its black-box attack; its own number is 5000."""

    defended: int = 64
    """Held-out images that the diffusion model defends, at most."""
    purify_noise: float = 0.5
    """Noise that purification drowns attacks in."""
    purify_steps: int = 5
    """Steps of the solver that takes it away."""
    aware_steps: int = 20
    """Steps of the attack that knows of purification."""
    aware_draws: int = 4
    """Draws of the noise that it expects over."""
    smooth_noise: float = 0.5
    """Noise of the smoothed classifier."""
    smooth_draws: int = 500
    """Draws that its certificates count."""


def some(held_out: Mapping[str, np.ndarray], most: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The first images in [-1, 1] and their labels, as many as divide among the devices."""
    count = max(min(most, len(held_out["label"])) // mesh.size, 1) * mesh.size
    return data.to_unit(held_out["image"][:count]), held_out["label"][:count].astype(np.int32)


def judged(apply: Apply, attack: Any, threat: attacks.ThreatModel) -> Callable[[Params, tuple[Key, Array, Array]], Any]:
    """An attack as a function of (params, (keys, x, labels)): the images that it makes and the logits of these."""

    def run(params: Params, rows: tuple[Key, Array, Array]) -> tuple[Array, Array]:
        keys, x, labels = rows
        objective = attacks.cross_entropy(functools.partial(apply, params), labels)
        moved = attack(keys, objective, x, threat)
        return moved, objective.logits(moved)

    return run


def attacked(
    apply: Apply,
    params: Mapping[str, Params],
    x: np.ndarray,
    labels: np.ndarray,
    config: Measured,
    threat: attacks.ThreatModel,
    mesh: Mesh,
    workdir: Path,
) -> str:
    """Attacks classifiers; writes robustness.json, robust_curve.png and attacks.png.

    Args:
        apply: the network of all of them.
        params: each one's parameters, by name.
        x: [n, height, width, channels] in [-1, 1].
        labels: [n].
        config: the attacks' settings.
        threat: what they may do.
        mesh: where to compute.
        workdir: where to write.

    Returns:
        A table to read.
    """
    classes = jax.eval_shape(apply, next(iter(params.values())), x).shape[1]
    stages = attacks.standard(threat.norm, classes, steps=config.auto_steps, queries=config.queries)
    suite: dict[str, Any] = {
        "clean": lambda key, objective, x, threat: x,
        "FGSM": attacks.fgsm,
        f"PGD-{config.pgd_steps}": functools.partial(attacks.pgd, steps=config.pgd_steps),
        "AutoAttack": functools.partial(attacks.auto_attack, stages=stages),
    }
    rows = (random.example_keys(jax.random.key(config.seed), len(x)), x, labels)

    def curve(shared: tuple[Params, Array], rows: tuple[Key, Array, Array]) -> Array:
        (params, radii), (keys, x, labels) = shared, rows
        objective = attacks.cross_entropy(functools.partial(apply, params), labels)
        attack = suite[f"PGD-{config.pgd_steps}"]
        return attacks.robust_curve(keys, objective, x, threat, radii, attack=attack, at_once=1).won.T

    runs = {name: place.rows(judged(apply, attack, threat), mesh) for name, attack in suite.items()}
    curves = place.rows(curve, mesh)
    radii = config.eps * np.asarray(config.curve, np.float32)
    scores: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for name, part in params.items():
        found[name] = {attack: jax.tree.map(np.asarray, run(part, rows)) for attack, run in runs.items()}
        scores[name] = {
            attack: float((logits.argmax(axis=1) == labels).mean()) for attack, (_, logits) in found[name].items()
        }
        scores[name]["curve"] = (1 - np.asarray(curves((part, radii), rows)).mean(axis=0)).tolist()
    told = {"eps": config.eps, "images": len(x), "radii": radii.tolist(), "accuracy": scores}
    (workdir / "robustness.json").write_text(json.dumps(told, indent=2) + "\n")
    _draw_curves(workdir / "robust_curve.png", radii, scores, config)
    _draw_attacks(workdir / "attacks.png", x, labels, found, config.eps)
    width = max(map(len, scores))
    lines = [
        f"accuracy on {len(x)} held-out images, each pixel moved by at most {config.eps:.3g} of [-1, 1]:",
        " " * width + "".join(f"{attack:>12}" for attack in suite),
    ]
    lines += [f"{name:<{width}}" + "".join(f"{of[attack]:>12.1%}" for attack in suite) for name, of in scores.items()]
    return "\n".join(lines)


def defended(
    apply: Apply,
    params: Params,
    denoise: Callable[[Params, Array, Array], Array],
    weights: Params,
    x: np.ndarray,
    labels: np.ndarray,
    config: Measured,
    threat: attacks.ThreatModel,
    mesh: Mesh,
    workdir: Path,
) -> str:
    """Attacks a classifier behind a diffusion model, and certifies it; writes defences.json.

    Args:
        apply: the network.
        params: its parameters, of a training that knew no attacks.
        denoise: ``(weights, x, t) -> x0``, of a diffusion on the path `diffusion.edm`.
        weights: the diffusion model's parameters.
        x: [n, height, width, channels] in [-1, 1].
        labels: [n].
        config: settings of the defences and of the attacks.
        threat: what these may do.
        mesh: where to compute.
        workdir: where to write.

    Returns:
        A table to read.
    """
    path = diffusion.edm()
    table = diffusion.ddpm(path, config.purify_noise * np.linspace(1, 0, config.purify_steps + 1))
    key, unseen = jax.random.split(jax.random.key(config.seed))
    expected_over, judged_by = jax.random.split(key, config.aware_draws), jax.random.split(unseen, config.aware_draws)
    rows = (random.example_keys(key, len(x)), x, labels)

    def purified(shared: tuple[Params, Params], keys: Key, x: Array) -> Array:
        params, weights = shared
        sample = functools.partial(_sampled, functools.partial(denoise, weights), table)
        clean = attacks.purify(keys, sample, x, alpha=1.0, sigma=config.purify_noise)
        logits: Array = apply(params, clean)
        return logits

    def run(shared: tuple[Params, Params], rows: tuple[Key, Array, Array]) -> dict[str, Array]:
        keys, x, labels = rows
        plain = attacks.cross_entropy(functools.partial(apply, shared[0]), labels)
        defence = functools.partial(purified, shared)
        aware = attacks.expected(attacks.cross_entropy, defence, labels, expected_over)
        moved = {
            "clean": x,
            "unaware of it": attacks.pgd(keys, plain, x, threat, steps=config.pgd_steps),
            "aware of it": attacks.pgd(keys, aware, x, threat, steps=config.aware_steps),
        }

        def accuracy(x: Array) -> Array:
            logits = jax.vmap(lambda key: defence(random.example_keys(key, len(x)), x))(judged_by)
            return jnp.mean(jnp.argmax(logits, axis=2) == labels, axis=0)

        return {name: accuracy(at) for name, at in moved.items()}

    def smooth(shared: tuple[Params, Params], rows: tuple[Key, Array, Array]) -> attacks.Smoothed:
        (params, weights), (keys, x, _) = shared, rows
        base = attacks.denoised(
            functools.partial(apply, params),
            functools.partial(denoise, weights),
            time=diffusion.time_at_ratio(path, config.smooth_noise),
            alpha=1.0,
        )
        return attacks.smooth(keys, base, x, sigma=config.smooth_noise, draws=config.smooth_draws)

    found = place.rows(run, mesh)((params, weights), rows)  # whose names JAX has sorted
    shares = {name: float(found[name].mean()) for name in ("clean", "unaware of it", "aware of it")}
    certificate = jax.tree.map(np.asarray, place.rows(smooth, mesh)((params, weights), rows))
    radii = [config.smooth_noise * share for share in (0.0, 0.5, 1.0, 1.5, 2.0)]
    certified = [float(((certificate.certified == labels) & (certificate.radius >= r)).mean()) for r in radii]
    told = {"images": len(x), "purified": shares, "radii": radii, "certified": certified}
    (workdir / "defences.json").write_text(json.dumps(told, indent=2) + "\n")
    return "\n".join(
        [
            f"the standard classifier behind a diffusion model, on {len(x)} of these images:",
            f"purified of noise {config.purify_noise:g}"
            + "".join(f"{'; PGD' if name != 'clean' else ','} {name} {share:.1%}" for name, share in shares.items()),
            f"smoothed by noise {config.smooth_noise:g}, right for certain however the image moves by an L2 distance of"
            + ",".join(f" {radius:.3g}: {share:.1%}" for radius, share in zip(radii, certified, strict=True)),
        ]
    )


def _sampled(denoise: Callable[[Array, Array], Array], table: diffusion.Table, keys: Key, x: Array) -> Array:
    return diffusion.sample(keys, denoise, table, x)


def _draw_curves(path: Path, radii: np.ndarray, scores: Mapping[str, Mapping[str, Any]], config: Measured) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, of in scores.items():
        (line,) = axes.plot(radii, of["curve"], marker=".", label=f"{name}, PGD-{config.pgd_steps}")
        axes.plot([config.eps], [of["AutoAttack"]], "x", color=line.get_color(), label=f"{name}, AutoAttack")
    axes.set_xlabel("how far a pixel may move, images in [-1, 1]")
    axes.set_ylabel("accuracy under attack")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(path, figure)


def _draw_attacks(
    path: Path, x: np.ndarray, labels: np.ndarray, found: Mapping[str, Mapping[str, Any]], eps: float
) -> None:
    """The first images clean, and for each classifier what PGD adds to them and what becomes of them."""
    from matplotlib.figure import Figure

    columns = min(SHOWN, len(x))
    rows: list[tuple[str, np.ndarray, np.ndarray | None]] = [("clean", x, labels)]
    for name, results in found.items():
        moved, logits = next(results[attack] for attack in results if attack.startswith("PGD"))
        rows += [(f"{name}: added", (moved - x) / eps, None), (f"{name}: attacked", moved, logits.argmax(axis=1))]
    figure = Figure(figsize=(1.1 * columns, 1.3 * len(rows)), layout="constrained")
    for row, panels in zip(rows, figure.subplots(len(rows), columns, squeeze=False), strict=True):
        title, pictures, predicted = row
        for i, axes in enumerate(panels):
            axes.imshow(np.clip((pictures[i] + 1) / 2, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if predicted is not None:
                wrong = predicted[i] != labels[i]
                axes.set_title(str(predicted[i]), fontsize=9, color="red" if wrong else "black", pad=2)
        panels[0].set_ylabel(title, fontsize=7)
    save_figure(path, figure)
