"""Attacks: ``python -m benchmarks attacks`` (peers: ``[peers]``, torchattacks, adversarial-robustness-toolbox).

Two pieces of work, each on one set of weights, which every side loads:

    curve    PGD of 40 steps at 8 radii, on a perceptron of two hidden layers, 16 images of 28 x 28
    resnet   PGD of 20 steps, on a residual network of 0.7 M parameters with BatchNorm as in inference, 16 images of
             32 x 32 x 3

jaxgen's side is one compiled program, the radii its data; every core is a device, to which a part of the images goes.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.case import Case, Work, devices

EPS = 0.1
RADII = tuple(np.linspace(0.02, 0.16, 8).tolist())
STEPS = {"curve": 40, "resnet": 20}
SHAPES = {"curve": (28, 28, 1), "resnet": (32, 32, 3)}
WIDTHS, DEPTHS = (32, 64, 128), (2, 2, 2)


def weights(task: str) -> dict[str, np.ndarray]:
    """The network's weights by name: kernels [in, out] or [height, width, in, out], and what follows them."""
    rng = np.random.default_rng(0)

    def kernel(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[:-1]))).astype(np.float32)

    if task == "curve":
        sizes = (math.prod(SHAPES[task]), 256, 256, 10)
        return {f"dense_{i}": kernel(*pair) for i, pair in enumerate(itertools.pairwise(sizes))}
    found = {"stem": kernel(3, 3, 3, WIDTHS[0])}
    before = WIDTHS[0]
    for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        for j in range(depth):
            name = f"stage_{i}_block_{j}"
            found |= {f"{name}/conv_0": kernel(3, 3, before, width), f"{name}/conv_1": kernel(3, 3, width, width)}
            if before != width:
                found[f"{name}/shortcut"] = kernel(1, 1, before, width)
            before = width
    return found | {"logits": kernel(before, 10)}


def images(task: str, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1] and labels."""
    rng = np.random.default_rng(1)
    return rng.uniform(size=(batch, *SHAPES[task])).astype(np.float32), np.arange(batch) % 10


def jax_network(task: str) -> Callable[[Any], Any]:
    """The network in JAX: x [n, height, width, channels] -> logits [n, 10]."""
    import jax
    import jax.numpy as jnp

    if task == "curve":
        held = {name: jnp.asarray(value) for name, value in weights(task).items()}

        def perceptron(x: Any) -> Any:
            h = x.reshape(len(x), -1)
            for i in range(3):
                h = (jax.nn.relu(h) if i else h) @ held[f"dense_{i}"]
            return h

        return perceptron

    network, variables = resnet()
    return functools.partial(network.apply, variables)


def resnet() -> tuple[Any, dict[str, Any]]:
    """The residual network in JAX, a Flax module, and its variables as in inference."""
    import jax.numpy as jnp

    from jaxgen import nets

    network = nets.ResNet(blocks=DEPTHS, stem=nets.cifar_stem, width=WIDTHS[0], num_classes=10)
    variables: dict[str, Any] = {"params": {"logits": {"bias": jnp.zeros(10)}}, "batch_stats": {}}

    def put(collection: str, name: str, leaf: str, value: Any) -> None:
        node = functools.reduce(lambda tree, part: tree.setdefault(part, {}), name.split("/"), variables[collection])
        node[leaf] = value

    for name, kernel in weights("resnet").items():
        value = jnp.asarray(kernel)
        put("params", name, "kernel", value)
        if name != "logits":
            norm, channels = norm_of(name), value.shape[-1]
            put("params", norm, "scale", jnp.ones(channels))
            put("params", norm, "bias", jnp.zeros(channels))
            put("batch_stats", norm, "mean", jnp.zeros(channels))
            put("batch_stats", norm, "var", jnp.ones(channels))
    return network, variables


def norm_of(name: str) -> str:
    """The name of the BatchNorm that follows a convolution."""
    return name.replace("conv_", "norm_") if "conv_" in name else f"{name}_norm"


def torch_network(task: str) -> Any:
    """The same network in PyTorch, a module: x [n, channels, height, width] -> logits [n, 10]."""
    import torch
    from torch.nn import functional

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in weights(task).items():
                axes = (3, 2, 0, 1) if value.ndim == 4 else (1, 0)
                kernel = torch.tensor(np.ascontiguousarray(value.transpose(axes)))
                if value.ndim == 4:
                    kernel = kernel.contiguous(memory_format=torch.channels_last)
                self.register_parameter(name.replace("/", "__"), torch.nn.Parameter(kernel))
            self.bias = torch.nn.Parameter(torch.zeros(10))
            self.norms = torch.nn.ModuleDict(
                {name.replace("/", "__"): torch.nn.BatchNorm2d(w.shape[-1]) for name, w in weights(task).items()}
            )

        def convolved(self, name: str, h: Any, stride: int = 1) -> Any:
            kernel = getattr(self, name)
            return self.norms[name](functional.conv2d(h, kernel, stride=stride, padding=kernel.shape[-1] // 2))

        def forward(self, x: Any) -> Any:
            if task == "curve":
                h = x.permute(0, 2, 3, 1).flatten(1)
                for i in range(3):
                    h = functional.linear(functional.relu(h) if i else h, getattr(self, f"dense_{i}"))
                return h
            h = functional.relu(self.convolved("stem", x))
            for i, depth in enumerate(DEPTHS):
                for j in range(depth):
                    name, stride = f"stage_{i}_block_{j}", 2 if i and not j else 1
                    inner = self.convolved(
                        f"{name}__conv_1", functional.relu(self.convolved(f"{name}__conv_0", h, stride))
                    )
                    h = self.convolved(f"{name}__shortcut", h, stride) if stride == 2 else h
                    h = functional.relu(h + inner)
            return functional.linear(h.mean((2, 3)), getattr(self, "logits"), self.bias)  # noqa: B009 - a parameter

    return Network().eval().requires_grad_(False)


def jaxgen(task: str, steps: int, batch: int) -> Work:
    """One program for all radii, on all cores."""
    import jax
    import jax.numpy as jnp

    from jaxgen import attacks, place

    mesh = place.mesh(devices(batch))
    network, (x, labels) = jax_network(task), images(task, batch)
    keys = jax.random.split(jax.random.key(0), batch)  # nothing is drawn from them
    radii = jnp.asarray(RADII if task == "curve" else (EPS,))

    def attacked(keys: Any, x: Any, labels: Any, eps: Any) -> Any:
        threat = attacks.ThreatModel(math.inf, eps=eps, low=0.0, high=1.0)
        return attacks.pgd(
            keys, attacks.cross_entropy(network, labels), x, threat, steps=steps, step_size=eps / 10,
            random_start=False, keep_best=False,
        )  # fmt: skip

    def each(radii: Any, rows: Any) -> Any:
        keys, x, labels = rows
        return jax.vmap(lambda eps: attacked(keys, x, labels, eps), out_axes=1)(radii)

    program = place.rows(each, mesh)
    return Work(lambda: program(radii, (keys, x, labels)), outputs=lambda found: np.asarray(found).swapaxes(0, 1))


def by_hand(task: str, steps: int, batch: int, *, compiled: bool = False) -> Work:
    """PGD in PyTorch, channels last."""
    import torch
    from torch.nn import functional

    network, (x, labels) = torch_network(task), images(task, batch)
    clean = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    classes = torch.tensor(labels)

    def loss(moved: Any) -> Any:
        return functional.cross_entropy(network(moved), classes, reduction="sum")

    value = torch.compile(loss) if compiled else loss

    def run() -> Any:
        moved = clean
        for _ in range(steps):
            moved = moved.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(value(moved), moved)
            moved = moved.detach() + EPS / 10 * slope.sign()
            moved = torch.clamp(torch.minimum(torch.maximum(moved, clean - EPS), clean + EPS), 0, 1)
        return moved

    return Work(run, outputs=lambda moved: from_torch([moved]))


def torchattacks(task: str, steps: int, batch: int) -> Work:
    """The PGD of torchattacks."""
    import torch
    import torchattacks

    x, labels = images(task, batch)
    attack = torchattacks.PGD(torch_network(task), eps=EPS, alpha=EPS / 10, steps=steps, random_start=False)
    clean = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    classes = torch.tensor(labels)
    return Work(lambda: attack(clean, classes), outputs=lambda moved: from_torch([moved]))


def art(task: str, steps: int, batch: int) -> Work:
    """The PGD of the Adversarial Robustness Toolbox, which takes and returns NumPy arrays."""
    import torch
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    (x, labels), (height, width, channels) = images(task, batch), SHAPES[task]
    classifier = PyTorchClassifier(
        torch_network(task), torch.nn.CrossEntropyLoss(), (channels, height, width), 10, clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=EPS / 10, max_iter=steps, batch_size=batch, verbose=False
    )
    clean = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return Work(lambda: attack.generate(clean, labels), outputs=lambda moved: from_torch([moved]))


def foolbox(task: str, steps: int, batch: int, *, framework: str) -> Work:
    """The PGD of foolbox, one radius after the other, on a PyTorch module or a jitted function."""
    import foolbox

    x, labels = images(task, batch)
    inputs: Any
    if framework == "torch":
        import torch

        model: Any = foolbox.PyTorchModel(torch_network(task), bounds=(0, 1), device="cpu")
        inputs = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        classes: Any = torch.tensor(labels)
    else:
        import jax
        import jax.numpy as jnp

        model = foolbox.JAXModel(jax.jit(jax_network(task)), bounds=(0, 1))
        inputs, classes = jnp.asarray(x), jnp.asarray(labels)
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=steps, random_start=False)
    radii = RADII if task == "curve" else (EPS,)
    return Work(
        lambda: [attack.run(model, inputs, classes, epsilon=eps) for eps in radii],
        outputs=from_torch if framework == "torch" else np.stack,
    )


def from_torch(moved: Any) -> np.ndarray:
    """Images of each radius: [radii, batch, height, width, channels]."""
    return np.stack([np.asarray(one).transpose(0, 2, 3, 1) for one in moved])


def cases(quick: bool) -> list[Case]:
    """The two."""
    found = []
    tasks: dict[str, dict[str, Callable[..., Work]]] = {
        "curve": {"jaxgen": jaxgen, "foolbox-jax": _foolbox("jax"), "foolbox-torch": _foolbox("torch")},
        "resnet": {
            "jaxgen": jaxgen,
            "torch": by_hand,
            "torch-compiled": functools.partial(by_hand, compiled=True),
            "torchattacks": torchattacks,
            "art": art,
            "foolbox-torch": _foolbox("torch"),
            "foolbox-jax": _foolbox("jax"),
        },
    }
    for task, sides in tasks.items():
        steps, batch = (2, 4) if quick else (STEPS[task], 16)
        found.append(
            Case(
                name=f"{task}-pgd{steps}",
                settings={"network": task, "steps": steps, "batch": batch, "precision": "float32"},
                sides={name: functools.partial(side, task, steps) for name, side in sides.items()},
                batch=batch,
                libraries={
                    "torch": ("torch",),
                    "torch-compiled": ("torch",),
                    "torchattacks": ("torch", "torchattacks"),
                    "art": ("torch", "art"),
                    "foolbox-torch": ("torch", "foolbox"),
                    "foolbox-jax": ("jax", "foolbox"),
                },
                # Rounding decides the sign of a gradient that is nearly zero: the same work is not the same everywhere.
                alike=0.8,
            )
        )
    return found


def _foolbox(framework: str) -> Callable[..., Work]:
    return functools.partial(foolbox, framework=framework)
