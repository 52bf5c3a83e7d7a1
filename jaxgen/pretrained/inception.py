"""The weights of the Inception network that published scores are made with, from the file that pytorch-fid publishes.

That is ``pt_inception-2015-12-05-6726825d.pth``, 95.6 MB, of the releases of github.com/mseitzer/pytorch-fid, which
torch-fidelity publishes too. Nothing is downloaded here. The file is a pickle: PyTorch opens it with ``weights_only``,
after its SHA-256, whose first digits its name carries, has been found right. Where PyTorch is not wanted, convert once
where it is,

    import torch, safetensors.torch
    weights = torch.load("pt_inception-2015-12-05-6726825d.pth", map_location="cpu", weights_only=True)
    safetensors.torch.save_file(weights, "inception.safetensors")

and read that. A safetensors file has no published digest: names, shapes and types are all that is checked of it.
"""

import functools
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgen import nets
from jaxgen.pretrained.matching import match
from jaxgen.pretrained.tensors import Tensor
from jaxgen.typing import Params

_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def load_inception(path: str | os.PathLike[str]) -> Params:
    """Reads the weights of `nets.Inception`.

    Each tensor becomes one of the parameters, but for the counters of batches seen (``num_batches_tracked``), which
    inference has no use for and which may be absent.

    Args:
        path: pytorch-fid's file, ``.pth``, which needs PyTorch; or the same tensors by the same names,
            ``.safetensors``.

    Returns:
        ``{'params': ..., 'batch_stats': ...}``, float32.

    Raises:
        OSError: the file cannot be read.
        ImportError: it is a ``.pth`` and PyTorch is not installed.
        ValueError: it is neither; it is another ``.pth`` than the published one, or damaged; a tensor is missing,
            unexpected, or of another shape or type. The message names which.
    """
    path = Path(path)
    readers = {".pth": _read_pth, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise ValueError(f"`path` must end in {' or '.join(readers)}, got {path}")
    stored = readers[path.suffix](path)
    tensors = _tensors()
    expected = {tensor.name: tensor.shape for tensor in jax.tree.leaves(tensors)}
    counters = {name.replace("running_var", "num_batches_tracked") for name in expected} - expected.keys()
    match("the weights", expected, {name: array for name, array in stored.items() if name not in counters})
    for name in expected:
        if stored[name].dtype != np.float32:
            raise ValueError(f"the weights must be float32, got {stored[name].dtype} for {name}")
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.to_ours(stored[tensor.name])), tensors)


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()  # once: what was checked is what is opened
    digest = hashlib.sha256(content).hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{path} must have the SHA-256 of pytorch-fid's file, {_SHA256}, got {digest}")
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch: `pip install torch`, or convert it to safetensors where PyTorch is, as "
            "`jaxgen.pretrained.inception` says"
        ) from error
    weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in weights.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dictionary)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error


@functools.cache
def _tensors() -> Any:
    """The tree of the network's parameters and statistics, a Tensor in the place of each."""
    network, x = nets.Inception(), jnp.zeros((1, 75, 75, 3))

    def variables() -> Params:
        return nets.calibrate(network.apply, network.init(jax.random.key(0), x), [x])

    return jax.tree.map_with_path(_tensor, jax.eval_shape(variables))


def _tensor(path: Any, leaf: jax.ShapeDtypeStruct) -> Tensor:
    """Theirs of ours: layers have the same names, below 'params' or 'batch_stats'."""
    _, *layers, ours = (entry.key for entry in path)
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
    return Tensor(".".join([*layers, _LEAVES[ours]]), tuple(leaf.shape[axis] for axis in axes), leaf.shape, axes)
