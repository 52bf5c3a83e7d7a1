"""Loading and saving: a directory of diffusers is a network and its parameters."""

import json
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxgen import checks, nets
from jaxgen.pretrained.config import CLASS, OPTIONS, to_config, to_network
from jaxgen.pretrained.files import CONFIG, WEIGHTS, read_json, read_tensors
from jaxgen.pretrained.matching import match
from jaxgen.pretrained.shapes import parameters
from jaxgen.pretrained.tensors import Tensor, tensor
from jaxgen.typing import Params


def load_diffusers_unet(directory: str | os.PathLike[str]) -> tuple[nets.UNet, Params]:
    """Reads a diffusers ``UNet2DModel``: the network that computes what it computes, and its parameters.

    Images are [batch, height, width, channels] here, of any size that the levels divide. Times are diffusers'
    timesteps: `jaxgen.pretrained` says how to sample. With ``num_class_embeds`` = n, labels lie in [0, n - 1] as they
    do there; the last is what `nets.UNet` calls the null class. Half-precision weights become float32.

    Args:
        directory: holds ``config.json`` and ``diffusion_pytorch_model.safetensors`` or its shards with their index;
            what else it holds is not looked at.

    Returns:
        (network, params), for ``network.apply(params, x, t)`` or ``network.apply(params, x, t, labels)``.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the configuration is not a UNet2DModel's or has an option that `nets.UNet` cannot express; a file is
            damaged, or the index names one outside of the directory; a tensor is missing, unexpected, or of another
            shape or type. The message names which.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    if config.get("_class_name") != CLASS:
        raise ValueError(f"{directory / CONFIG}: `_class_name` must be {CLASS!r}, got {config.get('_class_name')!r}")
    network = to_network(config)
    tensors, structure = jax.tree.flatten(_tensors(network, config.get("in_channels", OPTIONS["in_channels"].default)))
    stored = read_tensors(directory)
    match("the weights", {tensor.name: tensor.shape for tensor in tensors}, stored)
    with ThreadPoolExecutor() as pool:  # NumPy lets go of the interpreter while it copies
        arrays = list(pool.map(lambda tensor: np.ascontiguousarray(tensor.to_ours(stored[tensor.name])), tensors))
    return network, jax.device_put(jax.tree.unflatten(structure, arrays))


def save_diffusers_unet(
    directory: str | os.PathLike[str], network: nets.UNet, params: Params, *, sample_size: int | None = None
) -> None:
    """Writes a network as diffusers' ``UNet2DModel.from_pretrained`` reads it, the whole directory or nothing.

    Timesteps there are the network's own times: one trained on t = 1, 2, ... is off by one in their pipelines.

    Args:
        directory: created; must not exist yet, or be empty.
        network: one that a UNet2DModel can express: ``time_scale`` 1, one ``head_dim`` at all levels that attend, and a
            first multiplier of 1.
        params: its parameters, float32: ``{'params': ...}``.
        sample_size: the images' height and width, for diffusers' pipelines; the network itself takes any.

    Raises:
        FileExistsError: ``directory`` holds something already.
        OSError: it cannot be written.
        ValueError: diffusers cannot express the network, or ``params`` are not its parameters. The message names what.
    """
    directory = Path(os.path.abspath(directory))
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"`directory` must not exist yet or be empty, got {directory}")
    if sample_size is not None:
        checks.positive_integer("sample_size", sample_size)
    leaves = _by_name(params)
    config = to_config(network, leaves, sample_size)
    tensors = _by_name(_tensors(to_network(config), config["in_channels"]))
    match("`params`", {name: tensor.our_shape for name, tensor in tensors.items()}, leaves)
    for name, leaf in leaves.items():
        if leaf.dtype != np.float32:
            raise ValueError(f"`params` must be float32, got {leaf.dtype} for {name}")
    arrays = {tensor.name: tensor.to_theirs(np.asarray(leaves[name])) for name, tensor in tensors.items()}
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside it and under a name of its own: a rename is all or nothing.
    temporary = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(arrays, temporary / WEIGHTS, metadata={"format": "pt"})
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensors(network: nets.UNet, in_channels: int) -> Any:
    """The tree of the network's parameters, a Tensor in the place of each."""
    levels = len(network.multipliers)
    return jax.tree.map_with_path(
        lambda path, leaf: tensor(_name(path), leaf.shape, levels), parameters(network, in_channels)
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Tensor))
    return {_name(path): leaf for path, leaf in leaves}
