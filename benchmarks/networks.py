"""Networks at their published sizes, with random weights, and the same ones with the same weights in diffusers.

    unet                           google/ddpm-cifar10-32 (arXiv:2006.11239): 35.7 M parameters, images 32 x 32 x 3
    dit-s-2, dit-b-2, dit-xl-2     DiT (arXiv:2212.09748) of 33, 130 and 675 M parameters, latents 32 x 32 x 4
    unet-tiny, dit-tiny            the same layers, narrow and few: to see that a benchmark works

All predict noise at diffusers' timesteps, which count from 0. Transformers are told a class, and learn a variance that
samplers leave aside. Weights reach diffusers as files, which a process of its own writes, ``python -m
benchmarks.networks NAME FOLDER``: PyTorch's side runs no JAX.
"""

import functools
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CLASSES = 1000
WEIGHTS = "weights.safetensors"


class Network(NamedTuple):
    """A network of either family.

    Attributes:
        shape: of an image, [height, width, channels].
        options: of `nets.UNet` or `nets.DiT`, beside those that all of a family share.
    """

    shape: tuple[int, int, int]
    options: dict[str, Any]

    @property
    def transformer(self) -> bool:
        """Whether it is one."""
        return "depth" in self.options


def _dit(features: int, depth: int, heads: int, size: int = 32) -> Network:
    return Network((size, size, 4), {"features": features, "depth": depth, "heads": heads})


NETWORKS = {
    "unet": Network((32, 32, 3), {}),
    "unet-tiny": Network((16, 16, 3), {"channels": 32, "multipliers": (1, 2), "blocks": 1}),
    "dit-s-2": _dit(384, 12, 6),
    "dit-b-2": _dit(768, 12, 12),
    "dit-xl-2": _dit(1152, 28, 16),
    "dit-tiny": _dit(64, 2, 2, size=16),
}


def module(name: str, precision: str = "float32", **options: Any) -> Any:
    """The network as jaxgen has it, a Flax module.

    Args:
        name: of `NETWORKS`.
        precision: "float32" or "bfloat16".
        **options: more of the module's.
    """
    import jax.numpy as jnp

    from jaxgen import nets

    network = NETWORKS[name]
    options = {"dtype": jnp.dtype(precision), **network.options, **options}
    channels = network.shape[-1]
    if network.transformer:
        return nets.DiT(out_channels=2 * channels, patch=2, num_classes=CLASSES, **options)
    return nets.UNet(out_channels=channels, attention_levels=(1,), **options)


def labels(batch: int) -> np.ndarray:
    """Classes that transformers are told: [batch]."""
    return np.arange(batch) % CLASSES


def predicted(name: str, precision: str = "float32", **options: Any) -> Callable[[Any, Any, Any], Any]:
    """The noise that the network predicts: (params, x [batch, ...], t [batch]) -> [batch, ...]."""
    network, told = module(name, precision, **options), NETWORKS[name].transformer

    def apply(params: Any, x: Any, t: Any) -> Any:
        output = network.apply(params, x, t, labels(len(x)) if told else None)
        return output[..., : x.shape[-1]]

    return apply


def parameters(name: str) -> Any:
    """The network's parameters, float32 NumPy arrays: the same ones in every process."""
    import jax

    rng = np.random.default_rng(0)

    def drawn(path: Any, leaf: Any) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        kind = path[-1].key
        if kind == "kernel":  # a transformer's blocks are stacked, [depth, in, out]
            return values / np.float32(math.sqrt(math.prod(leaf.shape[-4:-1] if leaf.ndim == 4 else leaf.shape[-2:-1])))
        return np.float32(0.1) * values + np.float32(kind == "scale")

    return jax.tree.map_with_path(drawn, _shapes(name))


def as_published(name: str) -> dict[str, Any]:
    """Options for the operations of the paper: images are doubled, then convolved."""
    import jax.numpy as jnp

    from jaxgen.nets.convolution import convolve

    def upsample(x: Any, kernel: Any) -> Any:
        return convolve(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)

    return {} if NETWORKS[name].transformer else {"upsample": upsample}


def flops(name: str) -> float:
    """Operations of one evaluation for one image, as the network is published."""
    import jax

    from jaxgen.plan.flops import counted

    x = jax.ShapeDtypeStruct((1, *NETWORKS[name].shape), np.float32)
    t = jax.ShapeDtypeStruct((1,), np.float32)
    return counted(predicted(name, **as_published(name)), _shapes(name), x, t)


def _shapes(name: str) -> Any:
    import jax

    network = NETWORKS[name]
    x = jax.ShapeDtypeStruct((1, *network.shape), np.float32)
    told = (jax.ShapeDtypeStruct((1,), np.int32),) if network.transformer else ()
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(module(name).init, key, x, jax.ShapeDtypeStruct((1,), np.float32), *told)


@functools.cache
def in_diffusers(name: str, precision: str = "float32") -> Any:
    """The network as diffusers has it, a PyTorch module of the same weights, on the accelerator if there is one."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        subprocess.run(
            [sys.executable, "-m", "benchmarks.networks", name, str(folder)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True,
        )  # fmt: skip
        if NETWORKS[name].transformer:
            network = _empty_transformer(name)
            # Each of their blocks has an embedding of its own, all with the same weights.
            missing, unexpected = network.load_state_dict(load_file(folder / WEIGHTS), strict=False)
            if unexpected or any(".norm1.emb." not in key for key in missing):
                raise ValueError(f"{name}: diffusers lacks {unexpected} and wants {missing}")
            for block in network.transformer_blocks:
                block.norm1.emb = network.transformer_blocks[0].norm1.emb
        else:
            network = diffusers.UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
            network = network.to(memory_format=torch.channels_last)
    network = network.eval().to(device())
    return network if precision == "float32" else network.to(getattr(torch, precision))


def told_in_diffusers(name: str, batch: int) -> dict[str, Any]:
    """What else diffusers' network takes."""
    import torch

    return {"class_labels": torch.tensor(labels(batch), device=device())} if NETWORKS[name].transformer else {}


def device() -> str:
    """Where PyTorch computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _empty_transformer(name: str) -> Any:
    import diffusers

    shape, options = NETWORKS[name].shape, NETWORKS[name].options
    network: Any = diffusers.DiTTransformer2DModel(
        num_attention_heads=options["heads"],
        attention_head_dim=options["features"] // options["heads"],
        in_channels=shape[-1],
        out_channels=2 * shape[-1],
        num_layers=options["depth"],
        sample_size=shape[0],
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    embedding = network.transformer_blocks[0].norm1.emb
    embedding.time_proj.downscale_freq_shift = 0  # the paper's waves; diffusers' own are of slightly other lengths
    embedding.class_embedder.dropout_prob = 0.0  # all are told their class in training
    return network


def save(name: str, folder: Path) -> None:
    """Writes the weights as diffusers reads them."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    params = parameters(name)
    if NETWORKS[name].transformer:
        folder.mkdir(parents=True)
        arrays = transformer_tensors(params["params"], NETWORKS[name].shape[-1])
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / WEIGHTS)
    else:
        from jaxgen.pretrained import save_diffusers_unet

        size = NETWORKS[name].shape[0]
        save_diffusers_unet(folder, module(name), jax.tree.map(jnp.asarray, params), sample_size=size)


def transformer_tensors(params: Any, channels: int) -> dict[str, np.ndarray]:
    """The parameters of a `nets.DiT` under the names that ``DiTTransformer2DModel`` has for them.

    The embeddings of time and class are given once, for the first block.
    """
    found = {}

    def dense(theirs: str, kernel: np.ndarray, bias: np.ndarray) -> None:
        found[f"{theirs}.weight"], found[f"{theirs}.bias"] = kernel.T, bias

    patches = params["patches"]["kernel"]
    found["pos_embed.proj.weight"] = patches.reshape(2, 2, channels, -1).transpose(3, 2, 0, 1)
    found["pos_embed.proj.bias"] = params["patches"]["bias"]
    embedding = "transformer_blocks.0.norm1.emb"
    found[f"{embedding}.class_embedder.embedding_table.weight"] = params["label"]["embedding"]
    for i in range(2):
        dense(f"{embedding}.timestep_embedder.linear_{i + 1}", **params[f"time_{i}"])
    blocks = params["blocks"]
    for i in range(len(blocks["mlp_0"]["bias"])):
        block = f"transformer_blocks.{i}"
        qkv = blocks["attention"]["qkv"]
        parts = zip(np.split(qkv["kernel"][i], 3, axis=1), np.split(qkv["bias"][i], 3), strict=True)
        for role, (kernel, bias) in zip("qkv", parts, strict=True):
            dense(f"{block}.attn1.to_{role}", kernel, bias)
        for theirs, ours in {
            "norm1.linear": blocks["modulation"],
            "attn1.to_out.0": blocks["attention"]["out"],
            "ff.net.0.proj": blocks["mlp_0"],
            "ff.net.2": blocks["mlp_1"],
        }.items():
            dense(f"{block}.{theirs}", ours["kernel"][i], ours["bias"][i])
    dense("proj_out_1", **params["modulation"])
    dense("proj_out_2", **params["out"])
    return found


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
