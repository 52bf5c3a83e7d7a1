"""Tensors of diffusers' U-Net and ours: one is the other with its axes in another order.

Where we keep a kernel as [height, width, in, out],

    a convolution is [out, in, height, width],    a linear layer is [out, in]                             (1)

and the four 1 x 1 convolutions of attention are linear layers there.
"""

import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """A tensor of theirs: its axis i is axis ``axes[i]`` of ours, once ours has lost the 1 x 1 of a linear layer."""

    name: str
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    axes: tuple[int, ...]

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Our array, as they keep it."""
        kept = ours.reshape(self.our_shape[-len(self.axes) :])
        return np.ascontiguousarray(kept.transpose(self.axes))

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """Their array, as we keep it."""
        return theirs.transpose(np.argsort(self.axes)).reshape(self.our_shape)


_MODULES = {
    "conv_in": "conv_in",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "label": "class_embedding",
    "middle_block_0": "mid_block.resnets.0",
    "middle_attention": "mid_block.attentions.0",
    "middle_block_1": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_BLOCK = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "embedding": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
}
_LINEAR = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
_LAYERS = _BLOCK | _LINEAR | {"norm": "group_norm"}
# What the layers of attention were called in diffusers' first year.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(name: str) -> str:
    """Their name of a tensor, whatever year it is of."""
    return re.sub(r"\.(query|key|value|proj_attn)\.", lambda found: f".{_FORMER[found[1]]}.", name)


def tensor(name: str, shape: tuple[int, ...], levels: int) -> Tensor:
    """Theirs of ours, which is called params/module/leaf or params/module/layer/leaf (Eq. 1)."""
    _, module, *layer, leaf = name.split("/")
    theirs = _MODULES.get(module)
    if theirs is None:
        side, level, kind, *i = module.split("_")
        index = int(level) if side == "down" else levels - 1 - int(level)
        parts = {"block": "resnets.", "attention": "attentions.", "sample": f"{side}samplers.0.conv"}
        theirs = f"{side}_blocks.{index}.{parts[kind]}{''.join(i)}"
    names = [theirs, *(_LAYERS[one] for one in layer), "bias" if leaf == "bias" else "weight"]
    kept = shape[2:] if layer and layer[0] in _LINEAR and leaf == "kernel" else shape
    axes = tuple(range(len(kept)))
    if leaf == "kernel":
        axes = (3, 2, 0, 1) if len(kept) == 4 else (1, 0)
    return Tensor(".".join(names), tuple(kept[axis] for axis in axes), shape, axes)
