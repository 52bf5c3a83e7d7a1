"""Attacks against those of other libraries: ``python -m benchmarks.attacks`` (needs the extra ``[peers]``).

Two tasks, each on one set of weights, which every side loads, and whose outputs are compared before anything is timed:

    curve    PGD of 40 steps at 8 radii, on a perceptron of two hidden layers, 16 images of 28 x 28
    resnet   PGD of 20 steps, on a residual network of 0.7 M parameters with BatchNorm as in inference, 16 images of
             32 x 32 x 3

Every side is a process of its own, bound to the same cores; they take turns, one run each, so that whatever else the
machine does meets all of them alike. Numbers are medians of a run's time and, for each round, of the ratio to jaxgen's.

A Zen 4 machine, otherwise idle, jax 0.10.2, torch 2.13.0: milliseconds, and how many times jaxgen's on

                              one core               two cores
    curve    jaxgen             28.2                   24.6
             foolbox-jax       852.0   30.1           802.7   32.3
             foolbox-torch     107.7    3.9           123.3    4.9
    resnet   jaxgen            693.1                  391.5
             torch             971.1    1.37          570.3    1.52
             torch-compiled    923.7    1.33          480.2    1.26
             torchattacks      900.7    1.30          547.9    1.42
             foolbox-torch     916.9    1.28          550.7    1.40
             foolbox-jax       868.5    1.22          745.1    1.93
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, EPS = 16, 0.1
RADII = tuple(np.linspace(0.02, 0.16, 8).tolist())
STEPS = {"curve": 40, "resnet": 20}
SHAPES = {"curve": (28, 28, 1), "resnet": (32, 32, 3)}
SIDES = {
    "curve": ("jaxgen", "foolbox-jax", "foolbox-torch"),
    "resnet": ("jaxgen", "torch", "torch-compiled", "torchattacks", "foolbox-torch", "foolbox-jax"),
}
WIDTHS, DEPTHS = (32, 64, 128), (2, 2, 2)
SAME = 0.8  # share of pixels

Run = Callable[[], np.ndarray]
"""Runs the task once and gives what says whether it was the same work: the adversarial examples [.., batch, ...]."""


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


def images(task: str) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1] and labels."""
    rng = np.random.default_rng(1)
    return rng.uniform(size=(BATCH, *SHAPES[task])).astype(np.float32), np.arange(BATCH) % 10


def jax_network(task: str) -> Callable[[Any], Any]:
    """The network in JAX: x [n, height, width, channels] -> logits [n, 10]."""
    import jax
    import jax.numpy as jnp

    from jaxgen import nets

    held = {name: jnp.asarray(value) for name, value in weights(task).items()}
    if task == "curve":

        def perceptron(x: Any) -> Any:
            h = x.reshape(len(x), -1)
            for i in range(3):
                h = (jax.nn.relu(h) if i else h) @ held[f"dense_{i}"]
            return h

        return perceptron

    network = nets.ResNet(blocks=DEPTHS, stem=nets.cifar_stem, width=WIDTHS[0], num_classes=10)
    variables: dict[str, Any] = {"params": {"logits": {"bias": jnp.zeros(10)}}, "batch_stats": {}}

    def put(collection: str, name: str, leaf: str, value: Any) -> None:
        node = functools.reduce(lambda tree, part: tree.setdefault(part, {}), name.split("/"), variables[collection])
        node[leaf] = value

    for name, value in held.items():
        put("params", name, "kernel", value)
        if name != "logits":
            norm, channels = norm_of(name), value.shape[-1]
            put("params", norm, "scale", jnp.ones(channels))
            put("params", norm, "bias", jnp.zeros(channels))
            put("batch_stats", norm, "mean", jnp.zeros(channels))
            put("batch_stats", norm, "var", jnp.ones(channels))
    return functools.partial(network.apply, variables)


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
                self.register_buffer(name.replace("/", "__"), kernel)
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
            return functional.linear(h.mean((2, 3)), getattr(self, "logits"))  # noqa: B009 - a buffer

    return Network().eval().requires_grad_(False)


def jaxgen_side(task: str) -> Run:
    """One compiled program, the radii its data; every core is a device, to which a part of the images goes."""
    import jax
    import jax.numpy as jnp

    from jaxgen import attacks, place

    jax.config.update("jax_num_cpu_devices", int(os.environ["OMP_NUM_THREADS"]))
    network, (x, labels) = jax_network(task), images(task)
    keys = jax.random.split(jax.random.key(0), BATCH)  # unused: nothing is drawn

    def attacked(keys: Any, x: Any, labels: Any, eps: Any) -> Any:
        threat = attacks.ThreatModel(math.inf, eps=eps, low=0.0, high=1.0)
        return attacks.pgd(
            keys, attacks.cross_entropy(network, labels), x, threat, steps=STEPS[task], step_size=eps / 10,
            random_start=False, keep_best=False,
        )  # fmt: skip

    def each(radii: Any, rows: Any) -> Any:
        keys, x, labels = rows
        return jax.vmap(lambda eps: attacked(keys, x, labels, eps), out_axes=1)(radii)

    compiled = place.rows(each, place.mesh())
    radii = jnp.asarray(RADII if task == "curve" else (EPS,))

    def run() -> np.ndarray:
        found = np.asarray(compiled(radii, (keys, x, labels))).swapaxes(0, 1)
        return found if task == "curve" else found[0]

    return run


def torch_side(task: str, *, compiled: bool) -> Run:
    """PGD by hand, channels last."""
    import torch
    from torch.nn import functional

    network, (x, labels) = torch_network(task), images(task)
    clean = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    classes = torch.tensor(labels)

    def loss(moved: Any) -> Any:
        return functional.cross_entropy(network(moved), classes, reduction="sum")

    value = torch.compile(loss) if compiled else loss

    def run() -> np.ndarray:
        moved = clean
        for _ in range(STEPS[task]):
            moved = moved.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(value(moved), moved)
            moved = moved.detach() + EPS / 10 * slope.sign()
            moved = torch.clamp(torch.minimum(torch.maximum(moved, clean - EPS), clean + EPS), 0, 1)
        return moved.permute(0, 2, 3, 1).numpy()

    return run


def torchattacks_side(task: str) -> Run:
    """The PGD of torchattacks."""
    import torch
    import torchattacks

    x, labels = images(task)
    attack = torchattacks.PGD(torch_network(task), eps=EPS, alpha=EPS / 10, steps=STEPS[task], random_start=False)
    clean = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return lambda: attack(clean, torch.tensor(labels)).permute(0, 2, 3, 1).numpy()


def foolbox_side(task: str, *, framework: str) -> Run:
    """The PGD of foolbox, one radius after the other, on a PyTorch module or a jitted function."""
    import foolbox

    x, labels = images(task)
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
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=STEPS[task], random_start=False)

    def run() -> np.ndarray:
        found = [attack.run(model, inputs, classes, epsilon=eps) for eps in (RADII if task == "curve" else (EPS,))]
        results = np.stack([np.asarray(moved) for moved in found])
        results = results.transpose(0, 1, 3, 4, 2) if framework == "torch" else results
        return results if task == "curve" else results[0]

    return run


def side(task: str, name: str) -> Run:
    """One side, ready to run."""
    if name == "jaxgen":
        return jaxgen_side(task)
    if name.startswith("foolbox"):
        return foolbox_side(task, framework=name.split("-")[1])
    if name == "torchattacks":
        return torchattacks_side(task)
    return torch_side(task, compiled=name == "torch-compiled")


def work(task: str, name: str, file: Path) -> None:
    """A process of one side: runs once, stores what came out, then runs and answers with seconds when told to."""
    if hasattr(os, "sched_setaffinity"):  # before any library has counted cores
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])]))
    run = side(task, name)
    np.save(file, run())
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()  # its result is a NumPy array: nothing is left to be waited for
        print(time.perf_counter() - start, flush=True)


def compare(task: str, repeats: int, threads: int) -> None:
    """Runs all sides in turn and prints a line for each."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name in SIDES[task]:
            file = Path(folder) / f"{name}.npy"
            command = [sys.executable, "-m", "benchmarks.attacks", "--work", task, name, str(file)]
            process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert process.stdout is not None
            if "ready" not in (line.strip() for line in iter(process.stdout.readline, "")):  # some have more to say
                raise SystemExit(f"{name} did not start")
            sides[name] = (process, np.load(file))
        # Rounding decides the sign of a gradient that is nearly zero: the same work is not the same to the last pixel.
        ours = sides["jaxgen"][1]
        same = {name: float((np.abs(result - ours) < 1e-4).mean()) for name, (_, result) in sides.items()}
        if min(same.values()) < SAME:
            raise SystemExit(f"{task}: these do not do the same work, shares of equal pixels: {same}")
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, (process, _result) in sides.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                times[name].append(float(process.stdout.readline()))
        for name, (process, _result) in sides.items():
            process.communicate()
            ratio = statistics.median(b / a for a, b in zip(times["jaxgen"], times[name], strict=True))
            middle = statistics.median(times[name]) * 1e3
            print(f"{task:8}{name:16}{middle:10.1f} ms{ratio:8.2f} x   same {same[name]:.1%}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=[], help="curve, resnet; both by default")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="and cores, of each side")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        task, name, file = options.work
        return work(task, name, Path(file))
    if unknown := set(options.tasks) - SIDES.keys():
        parser.error(f"`tasks` must be of {', '.join(SIDES)}, got {', '.join(sorted(unknown))}")
    for task in options.tasks or SIDES:
        compare(task, options.repeats, options.threads)
    print(f"load of the machine: {', '.join(f'{value:.1f}' for value in os.getloadavg())}")
    return None


if __name__ == "__main__":
    main()
