"""Diffusion in the plane, where everything can be seen: the place to start playing with jaxgen.

    python -m experiments.toy2d
    python -m experiments.toy2d --data moons --recipe ddpm --solver ddim --sample-steps 8

Trains a small network on points of the plane, samples from it, and draws one picture: the data, the samples, their ways
from noise to data, and the density that the model gives to every point. (The second command shows that density to be
right and eight first-order steps to be too few to sample from it.)

The data are a mixture of narrow Gaussians, eight on a ring or many along two moons, so the truth is known. No model
gives fresh data a higher mean log-density than the truth does (Gibbs' inequality); what a model lacks is the
Kullback-Leibler divergence from the truth to it, 0 for a perfect one.

Two CPU cores: 13 seconds, all compilation included. Seed 0: 97.9 % of the samples lie within 3 standard deviations of
a centre, as 99.1 % of data do; all 8 centres are reached; the model lacks 0.026 nats.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import planned
from jaxgen import checks, cli, diffusion, images, nets, place, plan, random, train
from jaxgen.typing import Array, ArrayLike, Denoiser, Key, Metrics, Network, Params, Table

# A recipe is a path from data to noise and what the network predicts on it.
RECIPES = {
    "flow_matching": (diffusion.rectified_flow(), diffusion.velocity),
    "v_diffusion": (diffusion.cosine(), diffusion.v),
    "ddpm": (diffusion.linear_beta(), diffusion.noise),
}
SOLVERS = {"ddim": diffusion.ddim, "heun": diffusion.heun, "dpmpp_2m": diffusion.dpmpp_2m}
HALF = 2.3  # of the picture's side


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; each is an option of the command line."""

    data: Literal["ring", "moons"] = "ring"
    """Eight Gaussians on a ring, or two moons."""
    recipe: Literal["flow_matching", "v_diffusion", "ddpm"] = "flow_matching"
    """Path and prediction."""
    steps: int = 8000
    """Training steps."""
    batch_size: int = 512
    """Points per step."""
    learning_rate: float = 4e-3
    """Peak learning rate of Adam; decays to 0 along a cosine."""
    width: int = 128
    """Features of the network's hidden layers."""
    solver: Literal["ddim", "heun", "dpmpp_2m"] = "dpmpp_2m"
    """Solver that samples."""
    sample_steps: int = 30
    """Its steps."""
    count: int = 2000
    """Points that are drawn and measured."""
    grid: int = 64
    """Points per side of the grid on which its density is drawn."""
    seed: int = 0
    """Seed of everything random."""
    out: str = "runs/toy2d.png"
    """The picture."""


SMOKE = Config(steps=20, batch_size=32, width=16, sample_steps=4, count=100, grid=10, out="runs/toy2d-smoke.png")


class Mixture(NamedTuple):
    """Equally likely Gaussians: their means [components, 2] and the standard deviation of all."""

    means: np.ndarray
    std: float

    def draw(self, key: Key, count: int) -> Array:
        """Fresh points [count, 2]."""
        which, noise = jax.random.split(key)
        component = jax.random.randint(which, (count,), 0, len(self.means))
        return jnp.asarray(self.means, jnp.float32)[component] + self.std * jax.random.normal(noise, (count, 2))

    def log_density(self, x: ArrayLike) -> Array:
        """Of each point [count, 2], in nats."""
        squares = jnp.sum((jnp.asarray(x)[:, None] - self.means) ** 2, axis=-1) / self.std**2
        return jax.nn.logsumexp(-0.5 * squares, axis=-1) - np.log(len(self.means) * 2 * np.pi * self.std**2)

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which component is nearest to each point [count, 2], and its distance in standard deviations."""
        distance = np.linalg.norm(x[:, None] - self.means, axis=-1)
        return distance.argmin(axis=1), distance.min(axis=1) / self.std


def mixture(data: str) -> Mixture:
    """The data of that name."""
    if data == "ring":
        angle = 2 * np.pi * np.arange(8) / 8
        return Mixture(1.5 * np.stack([np.cos(angle), np.sin(angle)], axis=-1), std=0.1)
    angle = np.linspace(0, np.pi, 48)
    moon = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=-1)
    return Mixture(1.25 * np.concatenate([moon, -moon]), std=0.08)


class MLP(nn.Module):
    """A multilayer perceptron: ``apply(params, x [batch, 2], t [batch] in [0, 1]) -> [batch, 2]``."""

    width: int

    @nn.compact
    def __call__(self, x: Array, t: Array) -> Array:
        """Applies the network."""
        h = jnp.concatenate([x, nets.time_embedding(1000 * t, 32)], axis=-1)
        for _ in range(3):
            h = nn.silu(nn.Dense(self.width)(h))
        return nn.Dense(2)(h)


def denoiser(config: Config, params: Params) -> Denoiser:
    """The model as a denoiser."""
    path, prediction = RECIPES[config.recipe]
    return diffusion.denoiser(path, prediction, _net(config, params))


def _net(config: Config, params: Params) -> Network:
    network, (path, _) = MLP(config.width), RECIPES[config.recipe]
    return lambda x, t: network.apply(params, x, t / path.t_max)  # type: ignore[return-value]


def method(config: Config) -> train.Method:
    """How the model is trained, on points [batch, 2]."""
    path, prediction = RECIPES[config.recipe]

    def loss(params: Params, x0: Array, key: Key) -> tuple[Array, Metrics]:
        return diffusion.denoising_loss(path, prediction, _net(config, params), x0, key).mean(), {}

    return train.minimise(
        loss,
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        lambda key: nets.init(MLP(config.width), key, jnp.zeros((1, 2)), jnp.zeros(1)),
        average=train.ema(0.995),
    )


def fit(config: Config, truth: Mixture) -> Denoiser:
    """Trains on fresh data at every step, all steps in one compiled scan; the trained model as a denoiser."""
    ours = method(config)

    @jax.jit
    def trained(key: Key) -> Params:
        init_key, data_key, step_key = jax.random.split(key, 3)

        def step(state: Any, index: Array) -> tuple[Any, Metrics]:
            x0 = truth.draw(jax.random.fold_in(data_key, index), config.batch_size)
            return ours.step(state, x0, step_key)

        state, _ = jax.lax.scan(step, ours.init(init_key), jnp.arange(config.steps))
        return state.average

    return denoiser(config, trained(jax.random.key(config.seed)))


def check(config: Config) -> None:
    """Raises ValueError where a setting is out of range."""
    for field in ("steps", "batch_size", "width", "sample_steps", "count", "grid"):
        checks.positive_integer(field, getattr(config, field))
    checks.positive("learning_rate", config.learning_rate)


def solver(config: Config) -> Table:
    """What samples."""
    path, _ = RECIPES[config.recipe]
    return SOLVERS[config.solver](path, diffusion.uniform_times(path, config.sample_steps))


def programs(config: Any, mesh: Mesh, effort: plan.Effort) -> dict[str, Callable[[], plan.Program]]:
    """What the experiment computes, for the command ``plan``: a step of its training, and its sampler."""
    check(config)
    ours, (path, _), table = method(config), RECIPES[config.recipe], solver(config)

    def draw(params: Params, keys: Key) -> Array:
        start = diffusion.prior(keys, path, path.t_max, (len(keys), 2))
        return diffusion.sample(keys, denoiser(config, params), table, start)

    def sampler() -> plan.Program:
        count = -(-config.count // place.row_parts(mesh)) * place.row_parts(mesh)
        keys = jax.eval_shape(lambda: random.example_keys(jax.random.key(0), count))
        return plan.rows(draw, mesh, place.state_shapes(ours, mesh).average, keys, effort=effort)

    points = jax.ShapeDtypeStruct((config.batch_size, 2), jnp.float32)
    return {"training step": lambda: plan.step(ours, mesh, points, effort=effort), "sampler": sampler}


def run(config: Config) -> None:
    """Trains, samples, measures, draws.

    Args:
        config: the settings.

    Raises:
        ValueError: a setting is out of range.
        OSError: the picture cannot be written.
    """
    check(config)
    truth, (path, _) = mixture(config.data), RECIPES[config.recipe]
    denoise = fit(config, truth)
    start_key, data_key = jax.random.split(jax.random.key(config.seed + 1))
    data = np.asarray(truth.draw(data_key, config.count))

    table = solver(config)
    start = diffusion.prior(start_key, path, path.t_max, data.shape)
    ways = np.asarray(jax.jit(lambda x: diffusion.trajectory(start_key, denoise, table, x, path=path))(start))

    # The model's density, by following its probability flow from each point to noise; the exact one uses no key.
    times = diffusion.log_snr_times(path, 32, t_max=0.995 * path.t_max)[-2::-1]
    side = np.linspace(-HALF, HALF, config.grid, dtype=np.float32)
    plane = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    log_density = jax.jit(lambda x: diffusion.log_density(data_key, path, denoise, x, times))
    of_data, of_plane = np.split(np.asarray(log_density(np.concatenate([data, plane]))), [config.count])

    centre, deviations = truth.nearest(ways[-1])
    near, near_data = deviations < 3, truth.nearest(data)[1] < 3
    best = np.mean(truth.log_density(data))
    print(
        f"{near.mean():.1%} of {config.count} samples lie within 3 standard deviations of a centre, as do "
        f"{near_data.mean():.1%} of data; they reach {len(set(centre[near]))} of {len(truth.means)} centres\n"
        f"mean log-density of {config.count} fresh points: {of_data.mean():.3f} nats under the model, {best:.3f} under "
        f"the truth: the model lacks {best - of_data.mean():.3f}"
    )
    titles = (
        "data",
        f"samples: {near.mean():.1%} near a centre",
        "from noise to data",
        f"the model's density: lacks {best - of_data.mean():.3f} nats",
    )
    draw(config.out, titles, truth, data, ways, np.exp(of_plane).reshape(config.grid, config.grid))
    print(f"the picture is {config.out}")


def draw(
    out: str, titles: Sequence[str], truth: Mixture, data: np.ndarray, ways: np.ndarray, density: np.ndarray
) -> None:
    """Draws data [count, 2], ways [states, count, 2] and density [grid, grid]; colours tell where points end."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    def colours(x: np.ndarray) -> np.ndarray:
        return colormaps["turbo"]((truth.nearest(x)[0] + 0.5) / len(truth.means))

    figure = Figure(figsize=(16, 4.4), layout="constrained")
    panels = figure.subplots(1, 4)
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlim=(-HALF, HALF), ylim=(-HALF, HALF), aspect="equal", xticks=[], yticks=[])
    panels[0].scatter(*data.T, c=colours(data), s=4, linewidths=0)
    panels[1].scatter(*ways[-1].T, c=colours(ways[-1]), s=4, linewidths=0)
    some = ways[:, :250]
    lines = LineCollection(list(some.swapaxes(0, 1)), colors=colours(some[-1]), linewidths=0.6, alpha=0.6)
    panels[2].add_collection(lines)
    panels[2].scatter(*some[0].T, c="0.6", s=4, linewidths=0)
    panels[2].scatter(*some[-1].T, c=colours(some[-1]), s=8, linewidths=0, zorder=3)
    extent = (-HALF, HALF, -HALF, HALF)
    norm = PowerNorm(0.5)  # so that faint bridges between the centres show
    panels[3].imshow(density, origin="lower", extent=extent, cmap="magma", interpolation="bicubic", norm=norm)
    images.save_figure(out, figure)


def main() -> None:
    """Runs the command line."""
    cli.main(__doc__, cli.Command(run, Config(), SMOKE), {"plan": planned.command("toy2d", programs, Config(), SMOKE)})


if __name__ == "__main__":
    main()
