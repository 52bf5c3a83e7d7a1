"""A solver of six evaluations, learned for one model by gradient descent through the sampler.

    python -m experiments.digits_diffusion && python -m experiments.learned_solver

A sampler is a table of numbers, and gradients reach it. With d_j the denoiser's output in row j, and alpha, sigma the
path's values at the noise levels t_0 > t_1 > ... > t_n = 0, every solver that remembers all it has seen steps by

    x_{i+1} = sigma_{i+1} / sigma_i x_i + (alpha_{i+1} - alpha_i sigma_{i+1} / sigma_i) sum_j w_ij d_j    (1)
    d_i = denoise(x_i, r_i t_i),    sum_{j <= i} w_ij = 1                                                 (2)

DPM-Solver++(2M) is the case w_{i,i-1} = -h_i / (2 h_{i-1}), h_i the step in log(alpha / sigma), and r_i = 1
(arXiv:2211.01095). Learning starts there, and moves all levels but the first, the shares w_ij, j < i, and the factors
r_i by which the time that the denoiser is told departs from the level: 26 numbers for six rows. Eq. 2 keeps what every
solver must have: if the denoiser is constant, the sample is that constant. What is minimised is the distance between
the six-row sample and a fine solver's from the same start, as in LD3 (Tong et al. 2024, arXiv:2405.15506) and S4S
(Frankel et al. 2025, arXiv:2502.17423).

Nothing of the classes held out is seen in learning, nor of the starts on which it is measured. The run's directory
holds solver.png and table.npz, which samples with any code of one's own:

    table = diffusion.Table(**np.load("runs/learned_solver/table.npz"))

Two CPU cores: 2 minutes. Seed 0, digits of 3,000 steps, root mean squared distance per pixel from 200 steps of
DPM-Solver++(2M), mean and standard error over 128 new starts each of the classes learned from and of the two held out:

    ddim, log-SNR grid              6 evaluations    0.1285 ± 0.0044    0.1352 ± 0.0045
    heun, Karras's grid             7                0.7289 ± 0.0070    0.7295 ± 0.0062
    dpmpp_2m, Karras's grid         6                0.0796 ± 0.0034    0.0877 ± 0.0033
    dpmpp_2m, log-SNR grid          6                0.0635 ± 0.0034    0.0738 ± 0.0042
    unipc, log-SNR grid             6                0.0615 ± 0.0032    0.0729 ± 0.0040
    learned                         6                0.0181 ± 0.0012    0.0214 ± 0.0016
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax.sharding import Mesh

from experiments import digits_diffusion, image_data, image_diffusion, image_training, planned
from jaxgen import checks, cli, diffusion, images, loop, place, plan, profile, run, train
from jaxgen.diffusion.path import noise_ratio
from jaxgen.typing import Array, Batch, Denoiser, Key, Metrics, Params, Table

EXPERIMENTS = ("digits_diffusion", "mnist_diffusion", "cifar10_diffusion")
GRIDS = {"Karras": diffusion.karras_times, "log-SNR": diffusion.log_snr_times}
SOLVERS = {
    "ddim": diffusion.ddim,
    "heun": diffusion.heun,
    "dpmpp_2m": diffusion.dpmpp_2m,
    "dpmpp_3m": diffusion.dpmpp_3m,
    "unipc": diffusion.unipc,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    run: str = "runs/digits_diffusion"
    """Directory of a trained run of the experiments on digits, MNIST or CIFAR-10; it is only read."""
    out: str = "runs/learned_solver"
    """Directory for the learned table and the picture."""
    evaluations: int = 6
    """Rows of the table, at least 2."""
    reference_steps: int = 200
    """Steps of the fine solver, DPM-Solver++(2M)."""
    training_starts: int = 256
    """Starts to learn from."""
    held_out_starts: int = 128
    """Starts to measure on: so many of the classes learned from, and so many of those held out."""
    held_out_classes: tuple[int, ...] = (8, 9)
    """Classes that are not learned from."""
    steps: int = 200
    """Training steps."""
    batch_size: int = 32
    """Starts per step."""
    learning_rate: float = 0.03
    """Peak learning rate of Adam; decays to 0 along a cosine."""
    seed: int = 0
    """Seed of the starts and of the order in which they are learned from."""
    profile: str | None = None
    """Steps to record with JAX's profiler, START:STOP as in 100:110, counted from 0."""


SMOKE = Config(
    run="runs/digits_diffusion-smoke", out="runs/learned_solver-smoke", evaluations=3, reference_steps=8,
    training_starts=8, held_out_starts=4, steps=4, batch_size=4,
)  # fmt: skip


class Steps(NamedTuple):
    """What is learned of a solver of n rows, free of constraints.

    Attributes:
        gaps: [n - 1], the logarithms of log t_i - log t_{i+1}.
        shares: [n, n], w_ij for j < i; the rest is not used.
        factors: [n], log r_i.
    """

    gaps: Array
    shares: Array
    factors: Array


def dpmpp_2m_steps(path: diffusion.Path, times: np.ndarray) -> Steps:
    """DPM-Solver++(2M) on a grid that begins at path.t_max and ends at 0."""
    n = len(times) - 1
    h = -np.diff(np.log(noise_ratio(path, times[:-1])))
    shares = np.zeros((n, n))
    inner = np.arange(1, n - 1)
    shares[inner, inner - 1] = -0.5 * h[1:] / h[:-1]
    gaps = np.log(-np.diff(np.log(times[:-1])))
    return Steps(*(jnp.asarray(array, jnp.float32) for array in (gaps, shares, np.zeros(n))))


def table(path: diffusion.Path, steps: Steps) -> Table:
    """The solver as a table of n rows and n slots: the state, and the outputs of all rows but the last."""
    n = len(steps.shares)
    levels = path.t_max * jnp.exp(-jnp.append(0.0, jnp.cumsum(jnp.exp(steps.gaps))))
    alpha, sigma = (f(jnp.append(levels, 0.0)) for f in (path.alpha, path.sigma))
    per_x = sigma[1:] / sigma[:-1]
    per_d = alpha[1:] - alpha[:-1] * per_x
    past = jnp.tril(steps.shares, -1)
    now = 1 - jnp.sum(past, axis=1)
    update = jnp.column_stack([per_x, per_d[:, None] * past[:, :-1], per_d * now, jnp.zeros(n)])
    kept = np.zeros((n, n, n + 2), np.float32)
    kept[:, range(1, n), range(1, n)] = 1
    for row in range(n - 1):  # slot row + 1 begins to hold this row's output
        kept[row, row + 1, [row + 1, n]] = 0, 1
    told = jnp.minimum(levels * jnp.exp(steps.factors), path.t_max)
    return Table(told, jnp.asarray(kept).at[:, 0].set(update))


def distance(x: Array, reference: Array) -> Array:
    """Root of the mean squared difference of each example, [batch]."""
    squares = jnp.square(x - reference).reshape(len(x), -1)
    return jnp.sqrt(jnp.mean(squares, axis=1) + 1e-12)  # the root alone has no gradient at 0


def method(
    path: diffusion.Path,
    denoiser: Callable[[Batch], Denoiser],
    initial: Steps,
    *,
    learning_rate: float,
    steps: int,
) -> train.Method:
    """How a solver is learned, from batches of "start" and "reference" and whatever ``denoiser`` takes from them."""

    def loss(solver: Steps, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        x = diffusion.sample(key, denoiser(batch), table(path, solver), batch["start"])
        return distance(x, batch["reference"]).mean(), {}

    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, steps), b2=0.99)
    return train.minimise(
        loss,
        optax.chain(optax.clip_by_global_norm(1.0), optimiser),
        lambda key: jax.tree.map(jnp.copy, initial),
        average=train.ema(0.95),
    )


class Model(NamedTuple):
    """A trained run: its path, ``denoiser(labels)``, guided as the run's own samples are, and its images.

    Attributes:
        path: the Gaussian path.
        denoiser: labels [batch] -> Denoiser.
        shape: of an image.
        classes: how many there are.
    """

    path: diffusion.Path
    denoiser: Callable[[Array], Denoiser]
    shape: tuple[int, ...]
    classes: int


def recalled(workdir: Path) -> Model:
    """The model of the run in ``workdir``."""
    name = run.read_config(workdir)["experiment"]
    if name not in EXPERIMENTS:
        raise ValueError(f"`run` {workdir} is a run of {name!r}, not of one of {', '.join(EXPERIMENTS)}")
    config, shape, classes = image_training.recalled(workdir, image_diffusion.Config, name)
    mesh = place.mesh(jax.devices()[:1])
    params = image_training.restored(workdir, image_diffusion.method(config, shape, classes), mesh).average
    return _model(config, shape, classes, params, mesh)


def _model(config: image_diffusion.Config, shape: tuple[int, ...], classes: int, params: Params, mesh: Mesh) -> Model:
    samples = image_diffusion.Samples(config, shape, classes, mesh)
    any_table = samples.table("ddim", 1)  # which these denoisers do not look at

    def denoiser(labels: Array) -> Denoiser:
        return samples.denoiser(params, labels, any_table, jnp.float32(config.guidance))

    return Model(samples.path, denoiser, shape, classes)


class Starts:
    """Where sampling starts, and where a fine solver ends from there; everything by one compiled program.

    Rows are those to learn from, then new ones of the same classes, then new ones of the classes held out.
    """

    def __init__(self, config: Config, model: Model) -> None:
        """Draws the starts and their references."""
        taught = np.setdiff1d(np.arange(model.classes), config.held_out_classes)
        self._config, new = config, config.held_out_starts
        groups = ((taught, config.training_starts), (taught, new), (config.held_out_classes, new))
        self.label = np.concatenate([np.resize(which, count) for which, count in groups]).astype(np.int32)
        key = jax.random.key(config.seed)
        shape = (len(self.label), *model.shape)
        self.start = np.asarray(diffusion.prior(key, model.path, model.path.t_max, shape))
        self._drawn = jax.jit(lambda table, x, label: diffusion.sample(key, model.denoiser(label), table, x))
        times = diffusion.karras_times(model.path, config.reference_steps)
        self.reference = self.solve(diffusion.dpmpp_2m(model.path, times), slice(None))

    def solve(self, table: Table, rows: slice) -> np.ndarray:
        """The samples from these rows."""
        config, start, label = self._config, self.start[rows], self.label[rows]
        most = max(config.reference_steps, 2 * config.evaluations)
        table = diffusion.pad(table, rows=most, slots=max(4, config.evaluations))
        parts = []
        for i in range(0, len(label), config.batch_size):
            part = np.arange(i, i + config.batch_size) % len(label)
            parts.append(np.asarray(self._drawn(table, start[part], label[part])))
        return np.concatenate(parts)[: len(label)]

    def distances(self, table: Table) -> np.ndarray:
        """On new starts, [2, held_out_starts]: of the classes learned from, then of those held out."""
        new = slice(self._config.training_starts, None)
        each = distance(jnp.asarray(self.solve(table, new)), jnp.asarray(self.reference[new]))
        return np.asarray(each).reshape(2, -1)

    def batch(self, step: int) -> Mapping[str, np.ndarray]:
        """What to learn from at a step."""
        config = self._config
        rows = np.random.default_rng((config.seed, step)).choice(
            config.training_starts, config.batch_size, replace=False
        )
        return {"start": self.start[rows], "label": self.label[rows], "reference": self.reference[rows]}


def _learning(config: Config, model: Model) -> train.Method:
    return method(
        model.path,
        lambda batch: model.denoiser(batch["label"]),
        dpmpp_2m_steps(model.path, diffusion.log_snr_times(model.path, config.evaluations)),
        learning_rate=config.learning_rate,
        steps=config.steps,
    )


def fit(config: Config) -> None:
    """Learns a solver, measures it beside others, and writes table.npz and solver.png.

    Args:
        config: the settings.

    Raises:
        ValueError: a setting is out of range, or the directory is no run of these experiments.
        OSError: there is no run, or a file cannot be written.
    """
    _check(config)
    model = recalled(Path(config.run))
    held_out = set(config.held_out_classes)
    if not held_out or not held_out < set(range(model.classes)):
        raise ValueError(
            f"`held_out_classes` must be some and not all of 0 to {model.classes - 1}, got {sorted(held_out)}"
        )
    path, n = model.path, config.evaluations
    starts = Starts(config, model)
    print(f"{len(starts.label)} references of {config.reference_steps} steps are drawn", flush=True)

    initial = dpmpp_2m_steps(path, diffusion.log_snr_times(path, n))
    curve = [(0, starts.distances(table(path, initial)).mean(axis=1))]

    def measure(step: int, state: Any) -> None:
        curve.append((step, starts.distances(table(path, state.average)).mean(axis=1)))
        print(
            f"step {step}: distance on new starts {curve[-1][1][0]:.4f}, of new classes {curve[-1][1][1]:.4f}",
            flush=True,
        )

    recorded = None
    if config.profile is not None:
        recorded = profile.Profile(profile.window(config.profile, steps=config.steps), f"{config.out}/profile")
    state = loop.run(
        place.jit(_learning(config, model), place.mesh(jax.devices()[:1])),
        starts.batch,
        key=jax.random.key(config.seed),
        steps=config.steps,
        every=[loop.Every(max(1, config.steps // 10), measure)],
        profile=recorded,
    )
    learned = jax.tree.map(np.asarray, table(path, state.average))
    tables = {**rivals(path, n), f"learned ({n})": learned}
    out = Path(config.out)
    images.save_arrays(out / "table.npz", **learned._asdict())
    scores = {name: starts.distances(each) for name, each in tables.items()}
    for name, values in scores.items():
        known, unknown = (f"{v.mean():.4f} ± {v.std(ddof=1) / np.sqrt(len(v)):.4f}" for v in values)
        print(f"{name:24} {known}   of classes held out {unknown}")
    shown = slice(config.training_starts, config.training_starts + 10)
    rows = {f"{config.reference_steps} steps": starts.reference[shown]}
    for name in (f"dpmpp_2m, log-SNR ({n})", f"learned ({n})"):
        rows[name] = starts.solve(tables[name], shown)
    draw(out / "solver.png", scores, curve, rows)
    print(f"{out} holds table.npz and solver.png")


def programs(config: Any, mesh: Mesh, effort: plan.Effort) -> dict[str, Callable[[], plan.Program]]:
    """What is compiled to learn a solver for the digits' model, for the command ``plan``."""
    _check(config)
    theirs = digits_diffusion.CONFIG
    _, shape, classes = image_data.described(theirs)
    like = place.state_shapes(image_diffusion.method(theirs, shape, classes), mesh).average
    params = jax.tree.map(lambda leaf: 0.02 * jax.random.normal(jax.random.key(0), leaf.shape), like)  # any will do
    ours = _learning(config, _model(theirs, shape, classes, params, mesh))
    start = jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32)
    batch = {"start": start, "label": jax.ShapeDtypeStruct(start.shape[:1], jnp.int32), "reference": start}
    return {"training step": lambda: plan.step(ours, mesh, batch, effort=effort)}


def rivals(path: diffusion.Path, evaluations: int) -> dict[str, Table]:
    """Solvers of so many evaluations, named with their number; Heun's, which has none of six, of fewer and of more."""
    tables = {}
    for grid, times in GRIDS.items():
        for name, build in SOLVERS.items():
            for steps in (evaluations // 2, evaluations // 2 + 1) if name == "heun" else (evaluations,):
                built = build(path, times(path, steps))
                tables[f"{name}, {grid} ({len(np.asarray(built.times))})"] = built
    return tables


def draw(
    out: Path, scores: Mapping[str, np.ndarray], curve: Sequence[tuple[int, np.ndarray]], rows: Mapping[str, np.ndarray]
) -> None:
    """Draws distances [2, n] by solver, their means [2] by training step, and rows of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=(3, 2))
    plots, strips = halves[0].subgridspec(1, 2, width_ratios=(3, 2)), halves[1].subgridspec(len(rows), 1)
    bars, line = figure.add_subplot(plots[0]), figure.add_subplot(plots[1])
    names = sorted(scores, key=lambda name: -scores[name].mean())
    groups = ("new starts", "new starts, classes held out")
    for group, (label, colour) in enumerate(zip(groups, ("C0", "C1"), strict=True)):
        values = np.stack([scores[name][group] for name in names])
        error = values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
        bars.errorbar(values.mean(axis=1), names, xerr=error, fmt="o", markersize=5, color=colour, label=label)
        line.plot(*zip(*((step, means[group]) for step, means in curve), strict=True), "o-", markersize=4, color=colour)
    bars.set(xscale="log", title="distance from the fine solver, by solver (evaluations)")
    bars.legend()
    line.set(yscale="log", xlabel="training step", title="distance of the learned solver")
    for axes in (bars, line):
        axes.grid(alpha=0.3, which="both")
    for i, (name, pictures) in enumerate(rows.items()):
        axes = figure.add_subplot(strips[i])
        axes.imshow(
            np.concatenate(np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0))), axis=1), cmap="gray", vmin=-1, vmax=1
        )
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center")
    images.save_figure(out, figure)


def _check(config: Config) -> None:
    for field in ("evaluations", "reference_steps", "training_starts", "held_out_starts", "steps", "batch_size"):
        checks.positive_integer(field, getattr(config, field))
    for field, least in (("evaluations", 2), ("held_out_starts", 2)):
        if getattr(config, field) < least:
            raise ValueError(f"`{field}` must be at least {least}, got {getattr(config, field)}")
    if config.batch_size > config.training_starts:
        raise ValueError(
            f"`batch_size` must be at most `training_starts`, {config.training_starts}, got {config.batch_size}"
        )
    checks.positive("learning_rate", config.learning_rate)
    if config.profile is not None:
        profile.window(config.profile, steps=config.steps)


def main() -> None:
    """Runs the command line."""
    cli.main(
        __doc__,
        cli.Command(fit, Config(), SMOKE),
        {"plan": planned.command("learned_solver", programs, Config(), SMOKE)},
    )


if __name__ == "__main__":
    main()
