"""Training: ``python -m benchmarks training`` (peers: the extra ``[peers]``).

One step, the optimiser's update and the gradient's norm included, of

    diffusion      the U-Net of `networks` by Adam, noise and times given with the images; beside diffusers' network in
                   PyTorch, channels last, eager and by ``torch.compile``
    adversarial    the residual network of `attacks` by gradient descent with momentum on examples of PGD-7, BatchNorm
                   by the batch; beside PyTorch by hand
    gan            R3GAN's two networks as experiments.cifar10_gan trains them
    simclr         ResNet-50 as experiments.cifar10_simclr trains it

Sides that are compared begin with the same weights, and their loss and gradient's norm in the third step agree. Every
core is a device, to which a part of the batch goes, or as many as divide it. jaxgen's side keeps freed memory
(`jaxgen.memory`). Data is random and stays where it is.

On a machine with an accelerator batches are larger and arithmetic is bfloat16, with parameters in float32.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import attacks, networks
from benchmarks.case import Case, Work, devices
from benchmarks.sampling import accelerated

BEFORE = 2  # steps that are taken before the first one whose outputs are compared
RATE, MOMENTUM, ADVERSARIAL_RATE = 2e-4, 0.9, 0.01
EPS, STEPS = 0.1, 7  # of PGD


class Training(NamedTuple):
    """jaxgen's side, without data.

    Attributes:
        method: a `train.Method`.
        batch: number of images -> a batch, NumPy arrays.
        params: where to begin; None for the method's own draw.
    """

    method: Any
    batch: Callable[[int], Any]
    params: Any = None


def stepped(training: Callable[..., Training], batch: int) -> Work:
    """A method, its state carried from run to run."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxgen import memory, place

    memory.keep_freed()
    mesh, (method, batches, params) = place.mesh(devices(batch)), training()
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    placed, key = place.jit(method, mesh), jax.device_put(jax.random.key(0), everywhere)
    # Parameters that are given would be constants of the compiled ``init``.
    state = placed.init(key) if params is None else jax.device_put(method.init(jax.random.key(0)), everywhere)
    data = jax.device_put(batches(batch), rows)

    def run() -> Any:
        nonlocal state
        state, metrics = placed.step(state, data, key)
        return state, metrics

    for _ in range(BEFORE):
        jax.block_until_ready(run())
    return Work(run, outputs=lambda out: np.stack([out[1][name] for name in sorted(out[1]) if compared(name)]))


def compared(metric: str) -> bool:
    """Whether a metric is an output."""
    return metric.endswith(("loss", "grad_norm"))


def flops(training: Callable[..., Training]) -> float:
    """Of a step, for an image of a batch of two."""
    import jax

    from jaxgen.plan.flops import counted

    method, batches, _ = training()
    key = jax.eval_shape(lambda: jax.random.key(0))
    return counted(method.step, jax.eval_shape(method.init, key), batches(2), key) / 2


def noised(network: str, batch: int) -> dict[str, np.ndarray]:
    """Images, noise and diffusers' timesteps."""
    rng = np.random.default_rng(2)
    shape = (batch, *networks.NETWORKS[network].shape)
    return {
        "image": rng.uniform(-1, 1, shape).astype(np.float32),
        "noise": rng.standard_normal(shape).astype(np.float32),
        "timestep": rng.integers(0, 1000, batch).astype(np.int32),
    }


def diffusion(network: str, precision: str, **options: Any) -> Training:
    """DDPM's training of a network, of which ``options`` are more."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxgen import diffusion, train

    path, predicted = diffusion.linear_beta(), networks.predicted(network, precision, **options)
    params = networks.parameters(network)

    def loss(params: Any, batch: Any, key: Any) -> Any:
        x = diffusion.diffuse(path, batch["image"], batch["timestep"] + 1.0, batch["noise"])
        return jnp.mean(jnp.square(predicted(params, x, batch["timestep"]) - batch["noise"])), {}

    method = train.minimise(loss, optax.adam(RATE), lambda key: jax.tree.map(jnp.asarray, params))
    return Training(method, functools.partial(noised, network), params)


def published(network: str, precision: str) -> Training:
    """`diffusion` with the operations of the network's paper."""
    return diffusion(network, precision, **networks.as_published(network))


def diffusion_in_torch(network: str, precision: str, batch: int, *, by_compiler: bool = False) -> Work:
    """The same with diffusers' network and scheduler and PyTorch's optimiser."""
    import diffusers
    import torch

    device = networks.device()
    module: Any = copy.deepcopy(networks.in_diffusers(network)).train()
    scheduler: Any = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear")
    data = {name: torch.tensor(array, device=device) for name, array in noised(network, batch).items()}
    image, noise = (
        data[name].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last) for name in ("image", "noise")
    )
    times, options = data["timestep"].long(), networks.told_in_diffusers(network, batch)
    predict = torch.compile(module, dynamic=False) if by_compiler else module

    def loss() -> Any:
        x = scheduler.add_noise(image, noise, times)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            predicted = predict(x, times, **options).sample[:, : x.shape[1]]
        return torch.nn.functional.mse_loss(predicted.float(), noise)

    return descended(module, torch.optim.Adam(module.parameters(), RATE, fused=True), loss)


def descended(module: Any, optimiser: Any, loss: Callable[[], Any]) -> Work:
    """PyTorch's side."""
    import torch

    def run() -> Any:
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        slopes = [parameter.grad for parameter in module.parameters()]
        norm = torch.nn.utils.get_total_norm([slope for slope in slopes if slope is not None])
        optimiser.step()
        return norm, value.detach()

    for _ in range(BEFORE):
        run()
    return Work(run, outputs=lambda told: np.asarray([float(number) for number in told]))


def adversarial(precision: str) -> Training:
    """Madry et al.'s training of a classifier, without a random start."""
    import jax.numpy as jnp
    import optax

    from jaxgen import attacks as attacking
    from jaxgen import train

    network, variables = attacks.resnet()
    network = network.clone(dtype=jnp.dtype(precision))
    params = {"params": variables["params"]}
    threat = attacking.ThreatModel(math.inf, eps=EPS, low=0.0, high=1.0)

    def attack(key: Any, params: Any, batch: Any) -> Any:
        objective = attacking.cross_entropy(lambda x: network.apply(params, x), batch["label"])
        moved = attacking.pgd(
            key, objective, batch["image"], threat, steps=STEPS, step_size=EPS / 4, random_start=False, keep_best=False
        )
        return {**batch, "image": moved}

    def loss(params: Any, batch: Any, key: Any) -> Any:
        logits = network.apply(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}

    method = train.minimise(
        attacking.adversarial(loss, attack), optax.sgd(ADVERSARIAL_RATE, momentum=MOMENTUM), lambda key: params
    )
    return Training(method, labelled, params)


def adversarial_in_torch(precision: str, batch: int, *, by_compiler: bool = False) -> Work:
    """The same by hand."""
    import torch
    from torch.nn import functional

    device = networks.device()
    module = attacks.torch_network("resnet").train().requires_grad_(True).to(device)
    data = labelled(batch)
    clean = torch.tensor(data["image"], device=device).permute(0, 3, 1, 2)
    clean = clean.contiguous(memory_format=torch.channels_last)
    classes = torch.tensor(data["label"], device=device).long()
    apply = torch.compile(module, dynamic=False) if by_compiler else module

    def entropy(x: Any, reduction: str) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = apply(x)
        return functional.cross_entropy(logits.float(), classes, reduction=reduction)

    def loss() -> Any:
        moved = clean
        for _ in range(STEPS):
            moved = moved.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(entropy(moved, "sum"), moved)
            moved = moved.detach() + EPS / 4 * slope.sign()
            moved = torch.clamp(torch.minimum(torch.maximum(moved, clean - EPS), clean + EPS), 0, 1)
        return entropy(moved.detach(), "mean")

    return descended(module, torch.optim.SGD(module.parameters(), ADVERSARIAL_RATE, momentum=MOMENTUM), loss)


def labelled(batch: int) -> dict[str, np.ndarray]:
    """Images of 32 x 32 x 3 and their classes."""
    x, labels = attacks.images("resnet", batch)
    return {"image": x, "label": labels.astype(np.int32)}


def gan(precision: str, *, quick: bool) -> Training:
    """R3GAN on CIFAR-10."""
    from experiments import cifar10_gan, image_gan

    config = dataclasses.replace(cifar10_gan.CONFIG, bfloat16=precision == "bfloat16")
    return Training(image_gan.method(image_gan.smoke(config) if quick else config, (32, 32, 3), 10), labelled)


def simclr(precision: str, *, quick: bool) -> Training:
    """SimCLR on CIFAR-10."""
    from experiments import cifar10_simclr, image_contrastive

    config = dataclasses.replace(cifar10_simclr.CONFIG, bfloat16=precision == "bfloat16")
    return Training(
        image_contrastive.method(image_contrastive.smoke(config) if quick else config, (32, 32, 3)), labelled
    )


def cases(quick: bool) -> list[Case]:
    """The four."""
    precision = "bfloat16" if accelerated() and not quick else "float32"
    batches = {"diffusion": 16, "adversarial": 64, "gan": 4, "simclr": 16}
    if accelerated():
        batches = {"diffusion": 256, "adversarial": 512, "gan": 256, "simclr": 512}
    if quick:
        batches = dict.fromkeys(batches, 4)
    # Rounding decides the sign of a gradient that is nearly zero, and so the examples.
    tolerances = {"adversarial": 2e-2}
    network = "unet-tiny" if quick else "unet"
    sides: dict[str, dict[str, Callable[[int], Work]]] = {
        "diffusion": {
            "jaxgen": functools.partial(stepped, functools.partial(diffusion, network, precision)),
            "diffusers": functools.partial(diffusion_in_torch, network, precision),
            "diffusers-compiled": functools.partial(diffusion_in_torch, network, precision, by_compiler=True),
        },
        "adversarial": {
            "jaxgen": functools.partial(stepped, functools.partial(adversarial, precision)),
            "torch": functools.partial(adversarial_in_torch, precision),
            "torch-compiled": functools.partial(adversarial_in_torch, precision, by_compiler=True),
        },
        "gan": {"jaxgen": functools.partial(stepped, functools.partial(gan, precision, quick=quick))},
        "simclr": {"jaxgen": functools.partial(stepped, functools.partial(simclr, precision, quick=quick))},
    }
    trainings = {name: one["jaxgen"].args[0] for name, one in sides.items()}  # type: ignore[attr-defined]
    trainings["diffusion"] = functools.partial(published, network, precision)
    return [
        Case(
            name=f"{name}-batch{batch}",
            settings={"training": name, "batch": batch, "precision": precision},
            sides=sides[name],
            batch=batch,
            libraries={
                side: ("torch", "diffusers") if side.startswith("diffusers") else ("torch",)
                for side in sides[name]
                if side != "jaxgen"
            },
            flops=functools.partial(flops, trainings[name]),
            tolerance=tolerances.get(name, 1e-3) if precision == "float32" else 5e-2,
        )
        for name, batch in batches.items()
    ]
