"""The parameters of a `nets.UNet` by their shapes, from its fields: to trace the network for them takes a while.

A kernel is [height, width, in, out] or [in, out]; e is four times the network's ``channels``.
"""

from typing import Any

import jax
import numpy as np

from jaxgen import nets


def parameters(network: nets.UNet, in_channels: int) -> Any:
    """The tree that ``network.init`` makes, a ``jax.ShapeDtypeStruct`` in the place of each array.

    Args:
        network: one that is told its ``attention_levels`` and one time.
        in_channels: of its images.
    """
    e, levels = 4 * network.channels, list(enumerate(network.multipliers))
    attending = network.attention_levels or ()

    def block(inputs: int, outputs: int) -> dict[str, Any]:
        layers = {
            "norm_0": _norm(inputs),
            "conv_0": _linear(3, 3, inputs, outputs),
            "embedding": _linear(e, 2 * outputs if network.scale_shift else outputs),
            "norm_1": _norm(outputs),
            "conv_1": _linear(3, 3, outputs, outputs),
        }
        return layers if inputs == outputs else {**layers, "shortcut": _linear(1, 1, inputs, outputs)}

    h = network.channels
    made = {"conv_in": _linear(3, 3, in_channels, h), "time_0": _linear(h, e), "time_1": _linear(e, e)}
    if network.num_classes is not None:
        made["label"] = {"embedding": _shape(network.num_classes + 1, e)}
    skips = [h]
    for level, multiplier in levels:
        for i in range(network.blocks):
            made[f"down_{level}_block_{i}"] = block(h, network.channels * multiplier)
            h = network.channels * multiplier
            if level in attending:
                made[f"down_{level}_attention_{i}"] = _attention(h)
            skips.append(h)
        if level < len(levels) - 1:
            made[f"down_{level}_sample"] = _linear(3, 3, h, h)
            skips.append(h)
    made["middle_block_0"] = made["middle_block_1"] = block(h, h)
    if attending if network.middle_attention is None else network.middle_attention:
        made["middle_attention"] = _attention(h)
    for level, multiplier in reversed(levels):
        for i in range(network.blocks + 1):
            made[f"up_{level}_block_{i}"] = block(h + skips.pop(), network.channels * multiplier)
            h = network.channels * multiplier
            if level in attending:
                made[f"up_{level}_attention_{i}"] = _attention(h)
        if level > 0:
            made[f"up_{level}_sample"] = _linear(3, 3, h, h)
    return {"params": {**made, "norm_out": _norm(h), "conv_out": _linear(3, 3, h, network.out_channels)}}


def _attention(channels: int) -> dict[str, Any]:
    roles = ("query", "key", "value", "out")
    return {"norm": _norm(channels), **dict.fromkeys(roles, _linear(1, 1, channels, channels))}


def _norm(channels: int) -> dict[str, Any]:
    return {"scale": _shape(channels), "bias": _shape(channels)}


def _linear(*shape: int) -> dict[str, Any]:
    return {"kernel": _shape(*shape), "bias": _shape(shape[-1])}


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)
