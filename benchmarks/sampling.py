"""Sampling: ``python -m benchmarks sampling`` (peers: the extra ``[peers]``).

Images a second, and with a batch of 1 the latency, of `networks` by solver, steps, batch and precision. All start from
the same noise and walk the same times, diffusers' "trailing" ones (arXiv:2305.08891), so that they end with the same
images. A case's sides are

    jaxgen               one compiled program, the solver's table its data; every core is a device, to which a part of
                         the images goes, or as many as divide the batch
    jaxgen-one-device    likewise, all cores one device
    diffusers            its network and its scheduler, channels last, eager
    diffusers-compiled   likewise, the network by ``torch.compile``
    flaxdiff             FlaxDiff's sampler on jaxgen's network (``pip install --no-deps flaxdiff``)
    network-only         as many evaluations of jaxgen's network and nothing else, at the very states that sampling
                         meets: what its time is short of the sampler's is the sampler's own

Precision is that of the network, whose input and output are float32, as are states. Weights are random and solvers
magnify rounding: of a thousand pixels one may differ, and in bfloat16 most agree, loosely, as `_case` has it.

On a machine with an accelerator other cases are listed, in bfloat16 alone.
"""

import functools
import glob
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks import networks
from benchmarks.case import Case, Work, compiled, devices


class Task(NamedTuple):
    """What is sampled and how.

    Attributes:
        network: of `networks.NETWORKS`.
        solver: of `SOLVERS`.
        steps: of the solver.
        batch: images.
        precision: of the network.
    """

    network: str
    solver: str
    steps: int
    batch: int
    precision: str = "float32"

    @property
    def name(self) -> str:
        """What tells it from the others."""
        name = f"{self.network}-{self.solver}-{self.steps}-batch{self.batch}"
        return name if self.precision == "float32" else f"{name}-{self.precision}"

    @property
    def evaluations(self) -> int:
        """Of the network, for an image."""
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps

    def settings(self) -> dict[str, str | int]:
        """As a `Case` has them."""
        return {**self._asdict(), "evaluations": self.evaluations}


class Solver(NamedTuple):
    """A solver of jaxgen's and the scheduler of diffusers that is the same.

    Attributes:
        scheduler: its class.
        options: of the scheduler.
        step_options: of its ``step``.
        clip: whether estimates of the image are clipped to [-1, 1].
    """

    scheduler: str
    options: dict[str, Any]
    step_options: dict[str, Any]
    clip: bool


SOLVERS = {
    "ddim": Solver("DDIMScheduler", {"clip_sample": True}, {"use_clipped_model_output": True}, clip=True),
    "dpmpp_2m": Solver("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}, {}, clip=False),
    "heun": Solver("HeunDiscreteScheduler", {"clip_sample": True}, {}, clip=True),
}

ON_CPU = (
    Task("unet", "ddim", 20, 16),
    Task("unet", "ddim", 20, 1),
    Task("unet", "ddim", 20, 16, "bfloat16"),
    Task("unet", "ddim", 50, 1),
    Task("unet", "dpmpp_2m", 20, 4),
    Task("unet", "heun", 10, 4),
    Task("dit-s-2", "dpmpp_2m", 20, 4),
    Task("dit-b-2", "dpmpp_2m", 20, 2),
    Task("dit-xl-2", "dpmpp_2m", 20, 1),
)
ON_ACCELERATOR = (
    Task("unet", "ddim", 20, 256, "bfloat16"),
    Task("unet", "ddim", 20, 1, "bfloat16"),
    Task("unet", "dpmpp_2m", 20, 256, "bfloat16"),
    Task("unet", "heun", 10, 256, "bfloat16"),
    Task("dit-s-2", "dpmpp_2m", 20, 64, "bfloat16"),
    Task("dit-b-2", "dpmpp_2m", 20, 64, "bfloat16"),
    Task("dit-xl-2", "dpmpp_2m", 20, 64, "bfloat16"),
    Task("dit-xl-2", "dpmpp_2m", 20, 1, "bfloat16"),
)
QUICK = (
    Task("unet-tiny", "ddim", 4, 2),  # steps that divide 1,000: diffusers' own are a little uneven otherwise
    Task("unet-tiny", "ddim", 4, 2, "bfloat16"),
    Task("unet-tiny", "dpmpp_2m", 4, 2),
    Task("unet-tiny", "heun", 4, 2),
    Task("dit-tiny", "dpmpp_2m", 4, 2),
)


def start(network: str, batch: int) -> np.ndarray:
    """Noise to start from, [batch, height, width, channels]."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((batch, *networks.NETWORKS[network].shape)).astype(np.float32)


def table(solver: str, steps: int) -> Any:
    """The sampler, jaxgen's."""
    from jaxgen import diffusion

    path = diffusion.linear_beta()
    return getattr(diffusion, solver)(path, diffusion.trailing_times(path, steps))


def denoiser(task: Task) -> Callable[[Any], Any]:
    """Params to jaxgen's Denoiser."""
    from jaxgen import diffusion

    predicted = networks.predicted(task.network, task.precision)

    def of(params: Any) -> Any:
        denoise = diffusion.denoiser(diffusion.linear_beta(), diffusion.noise, lambda x, t: predicted(params, x, t - 1))
        return diffusion.clip_data(denoise, -1.0, 1.0) if SOLVERS[task.solver].clip else denoise

    return of


class Placed(NamedTuple):
    """Where a side of jaxgen computes.

    Attributes:
        mesh: its devices.
        params: the network's parameters, in its precision, on every device.
        rows: how a batch is split among them.
    """

    mesh: Any
    params: Any
    rows: Any

    def everywhere(self, tree: Any) -> Any:
        """NumPy arrays on every device."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))


def placed(task: Task, batch: int, *, one_device: bool = False) -> Placed:
    """On `devices`, or on one that has all cores."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxgen import place

    mesh = place.mesh(jax.devices()[:1] if one_device else devices(batch))
    where = Placed(mesh, None, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    dtype = jnp.dtype(task.precision)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), networks.parameters(task.network))
    return where._replace(params=where.everywhere(params))


def jaxgen(task: Task, batch: int, *, one_device: bool = False) -> Work:
    """One program, to which network and solver are data."""
    import jax

    from jaxgen import diffusion, place

    where, denoise = placed(task, batch, one_device=one_device), denoiser(task)
    key = jax.random.key(0)  # nothing is drawn from it

    def draw(shared: Any, x: Any) -> Any:
        params, table = shared
        return diffusion.sample(key, denoise(params), table, x)

    x = jax.device_put(start(task.network, batch), where.rows)
    return compiled(place.rows(draw, where.mesh), (where.params, where.everywhere(table(task.solver, task.steps))), x)


def network_only(task: Task, batch: int) -> Work:
    """The evaluations that `jaxgen` makes, one call after the other.

    Its output is what the solver makes of them, computed in NumPy when no time is taken: the sampler's, if they are the
    sampler's evaluations.
    """
    import jax
    import jax.numpy as jnp

    from jaxgen import diffusion, place

    where, denoise, sampler = placed(task, batch), denoiser(task), table(task.solver, task.steps)
    predicted = networks.predicted(task.network, task.precision)

    def states(params: Any, x: Any) -> Any:
        return diffusion.trajectory(jax.random.key(0), denoise(params), sampler, x)

    met = np.asarray(jax.jit(states)(where.params, start(task.network, batch)))[:-1]
    seen = [jax.device_put(x, where.rows) for x in met]
    times = [where.everywhere(np.float32(t - 1)) for t in sampler.times]
    evaluate = place.rows(lambda shared, x: predicted(shared[0], x, jnp.full(len(x), shared[1])), where.mesh)

    def solved(noises: Any) -> np.ndarray:
        path, clip = diffusion.linear_beta(), SOLVERS[task.solver].clip
        slots = np.stack([met[0], *(np.zeros_like(met[0]) for _ in sampler.weights[0][1:])])
        for t, weights, noise in zip(sampler.times, sampler.weights, noises, strict=True):
            x0 = (slots[0] - path.sigma(t) * np.asarray(noise)) / path.alpha(t)
            x0 = np.clip(x0, -1, 1) if clip else x0
            slots = np.tensordot(weights[:, :-1], np.stack([*slots, x0]), 1)
        return slots[0]

    return Work(lambda: [evaluate((where.params, t), x) for t, x in zip(times, seen, strict=True)], outputs=solved)


def diffusers(task: Task, batch: int, *, by_compiler: bool = False) -> Work:
    """Network and scheduler of diffusers."""
    import diffusers
    import torch

    device, dtype = networks.device(), getattr(torch, task.precision)
    network: Any = networks.in_diffusers(task.network, task.precision)
    options = networks.told_in_diffusers(task.network, batch)
    if by_compiler:
        network = torch.compile(network, dynamic=False)
    solver = SOLVERS[task.solver]
    scheduler = getattr(diffusers, solver.scheduler)(
        1000, 1e-4, 0.02, "linear", timestep_spacing="trailing", **solver.options
    )
    noise = torch.tensor(start(task.network, batch).transpose(0, 3, 1, 2), device=device)
    noise = noise.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> Any:
        scheduler.set_timesteps(task.steps, device=device)
        # Where the state is x / alpha, the start is too.
        x = noise * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 if task.solver == "heun" else noise
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            predicted = network(seen.to(dtype), t.expand(batch), **options).sample[:, : x.shape[1]]
            x = scheduler.step(predicted.float(), t, x, **solver.step_options).prev_sample
        return x

    return Work(run, outputs=lambda x: x.permute(0, 2, 3, 1).cpu().numpy())


def flaxdiff(task: Task, batch: int) -> Work:
    """FlaxDiff's DDIM on jaxgen's network: a loop in Python around a compiled evaluation."""
    import jax.numpy as jnp
    from flaxdiff.inputs import DiffusionInputConfig
    from flaxdiff.predictors import EpsilonPredictionTransform
    from flaxdiff.samplers.ddim import DDIMSampler
    from flaxdiff.schedulers import LinearNoiseSchedule

    class Clipped(EpsilonPredictionTransform):
        def backward_diffusion(self, x_t: Any, preds: Any, rates: Any) -> Any:
            x0 = jnp.clip(super().backward_diffusion(x_t, preds, rates)[0], -1, 1)
            return x0, (x_t - rates[0] * x0) / rates[1]

    class Model(NamedTuple):
        apply: Callable[[Any, Any, Any], Any]

    where, x = placed(task, batch, one_device=True), jnp.asarray(start(task.network, batch))
    sampler = DDIMSampler(
        Model(networks.predicted(task.network, task.precision)),
        LinearNoiseSchedule(1000),
        Clipped(),
        DiffusionInputConfig("image", networks.NETWORKS[task.network].shape, []),
    )
    steps = np.asarray(table(task.solver, task.steps).times - 1, np.int32)
    size = x.shape[1]
    return Work(lambda: sampler.generate_samples(where.params, batch, size, steps_override=steps, priors=x))


def accelerated() -> bool:
    """Whether this machine has an accelerator that JAX is to use."""
    found = glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/accel[0-9]*")
    return bool(found) and not os.environ.get("JAX_PLATFORMS", "").startswith("cpu")


def cases(quick: bool) -> list[Case]:
    """A case for each task, and the sampler's own time on the first."""
    tasks = QUICK if quick else ON_ACCELERATOR if accelerated() else ON_CPU
    found = []
    for task in tasks:
        peer = "diffusers" if task.precision == "float32" else "diffusers-bf16"
        sides = {
            "jaxgen": functools.partial(jaxgen, task),
            peer: functools.partial(diffusers, task),
            f"{peer}-compiled": functools.partial(diffusers, task, by_compiler=True),
        }
        if task == tasks[0]:
            sides["jaxgen-one-device"] = functools.partial(jaxgen, task, one_device=True)
        if (task.solver, task.batch, task.precision) == ("ddim", 1, "float32"):
            sides["flaxdiff"] = functools.partial(flaxdiff, task)
        found.append(_case(task.name, task, sides))
    own = {"jaxgen": functools.partial(jaxgen, tasks[0]), "network-only": functools.partial(network_only, tasks[0])}
    return [*found, _case(f"own-time-{tasks[0].name}", tasks[0], own)]


def _case(name: str, task: Task, sides: Mapping[str, Callable[[int], Work]]) -> Case:
    # Without clipping states grow a hundredfold, and so would what passes for agreement.
    tolerances = (
        {"float32": 1e-3, "bfloat16": 0.2} if SOLVERS[task.solver].clip else {"float32": 1e-4, "bfloat16": 0.05}
    )
    libraries = {side: ("torch", "diffusers") for side in sides if side.startswith("diffusers")}
    return Case(
        name=name,
        settings=task.settings(),
        sides=sides,
        batch=task.batch,
        libraries={**libraries, "flaxdiff": ("jax", "flaxdiff")},
        flops=lambda: task.evaluations * networks.flops(task.network),
        tolerance=tolerances[task.precision],
        alike=0.999 if task.precision == "float32" else 0.9,
    )
