"""Options of diffusers' U-Net and fields of `nets.UNet`: what each can say in the words of the other."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxgen import nets
from jaxgen.pretrained.files import CONFIG
from jaxgen.pretrained.matching import listed

CLASS = "UNet2DModel"
_UNSAVED = ("parent", "name", "upsample", "zero_init", "axis_name", "dtype")  # how, not what, a network computes


class _Option(NamedTuple):
    """An option of UNet2DModel: its default, and the values that nets.UNet can express."""

    default: Any
    accepts: Callable[[Any], bool]
    expected: str


def _one_of(default: Any, *others: Any) -> _Option:
    return _Option(default, lambda value: value in (default, *others), " or ".join(map(repr, (default, *others))))


def _is_integer(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and low <= value < high


def _integer(default: int) -> _Option:
    return _Option(default, _is_integer, "an integer of at least 1")


def _optional(least: int, default: int | None = None) -> _Option:
    def accepts(value: Any) -> bool:
        return value is None or _is_integer(value, least)

    return _Option(default, accepts, f"None or an integer of at least {least}")


def _kinds(default: tuple[str, ...], *accepted: str) -> _Option:
    def accepts(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(kind in accepted for kind in value)

    return _Option(default, accepts, f"a list of {' and '.join(accepted)}")


_ANYTHING = _Option(None, lambda value: True, "")
OPTIONS = {
    "sample_size": _ANYTHING,
    "in_channels": _integer(3),
    "out_channels": _integer(3),
    "center_input_sample": _one_of(False),
    "time_embedding_type": _one_of("positional"),
    "time_embedding_dim": _optional(1),
    "freq_shift": _Option(0, lambda value: _is_number(value, -math.inf, math.inf), "a number"),
    "flip_sin_to_cos": _one_of(True, False),
    "down_block_types": _kinds(("DownBlock2D", *3 * ("AttnDownBlock2D",)), "DownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": _one_of("UNetMidBlock2D"),
    "up_block_types": _kinds((*3 * ("AttnUpBlock2D",), "UpBlock2D"), "UpBlock2D", "AttnUpBlock2D"),
    "block_out_channels": _Option(
        (224, 448, 672, 896),
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) > 0
            and all(_is_integer(width) for width in value)
            and all(width % value[0] == 0 for width in value)
        ),
        "a list of multiples of its first entry",
    ),
    "layers_per_block": _integer(2),
    "mid_block_scale_factor": _one_of(1),
    "downsample_padding": _one_of(1, 0),
    "downsample_type": _one_of("conv"),
    "upsample_type": _one_of("conv"),
    "dropout": _Option(0.0, lambda value: _is_number(value, 0, 1), "a number in [0, 1)"),
    "act_fn": _one_of("silu", "swish"),
    "attention_head_dim": _optional(1, default=8),
    "norm_num_groups": _integer(32),
    "attn_norm_num_groups": _optional(1),
    "norm_eps": _Option(1e-5, lambda value: _is_number(value, 0, math.inf), "a number of at least 0"),
    "resnet_time_scale_shift": _one_of("default", "scale_shift"),
    "add_attention": _one_of(True, False),
    "class_embed_type": _one_of(None),
    "num_class_embeds": _optional(2),
    "num_train_timesteps": _ANYTHING,  # read for learned time embeddings only
}


def to_network(config: Mapping[str, Any]) -> nets.UNet:
    """The network that a configuration describes; ValueError, by the option's name, where there is none."""
    given = {option: value for option, value in config.items() if not option.startswith("_")}
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"{CONFIG} must hold options of {CLASS} only, got {listed(unknown)}")
    options = {option: given.get(option, known.default) for option, known in OPTIONS.items()}

    def require(holds: bool, option: str, expected: object) -> None:
        if not holds:
            raise ValueError(f"`{option}` in {CONFIG} must be {expected}, got {options[option]!r}")

    for option, known in OPTIONS.items():
        require(known.accepts(options[option]), option, known.expected)
    widths, down, groups = (options[option] for option in ("block_out_channels", "down_block_types", "norm_num_groups"))
    require(len(down) == len(widths), "down_block_types", f"{len(widths)} blocks, one per level")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    require(
        list(options["up_block_types"]) == mirrored, "up_block_types", f"the mirror image of the others, {mirrored}"
    )
    require(options["time_embedding_dim"] in (None, 4 * widths[0]), "time_embedding_dim", 4 * widths[0])
    require(all(width % groups == 0 for width in widths), "norm_num_groups", f"a divisor of all of {list(widths)}")

    levels = tuple(level for level, kind in enumerate(down) if kind.startswith("Attn"))
    attending = _attending(widths, levels, options["add_attention"])
    head_dim = options["attention_head_dim"]
    require(
        head_dim is None or all(width % head_dim == 0 for width in attending),
        "attention_head_dim",
        f"None or a divisor of the channels that attend, {attending}",
    )
    scale_shift = options["resnet_time_scale_shift"] == "scale_shift"
    # With scale and shift, None is no normalisation before the middle's attention.
    same = (groups,) if scale_shift else (groups, None)
    require(
        options["attn_norm_num_groups"] in same or not options["add_attention"],
        "attn_norm_num_groups",
        f"`norm_num_groups`, {groups}",
    )
    return nets.UNet(
        out_channels=options["out_channels"],
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=options["layers_per_block"],
        attention=(),
        attention_levels=levels,
        middle_attention=options["add_attention"],
        head_dim=head_dim,
        num_classes=None if options["num_class_embeds"] is None else options["num_class_embeds"] - 1,
        dropout=options["dropout"],
        scale_shift=scale_shift,
        groups=groups,
        eps=options["norm_eps"],
        downsample_padding=(options["downsample_padding"], 1),
        freq_shift=options["freq_shift"],
        flip_sin_to_cos=options["flip_sin_to_cos"],
    )


def to_config(network: nets.UNet, ours: Mapping[str, Any], sample_size: int | None) -> dict[str, Any]:
    """The configuration of a network; ValueError, by the field's name, where there is none.

    Of its parameters, ``ours``, two things are read: the images' channels and, where no field says it, what attends.
    """
    depth, widths = len(network.multipliers), [network.channels * m for m in network.multipliers]
    levels, middle = network.attention_levels, network.middle_attention
    if levels is None:  # they depend on the images' size, which the parameters have seen
        levels = tuple(level for level in range(depth) if f"params/down_{level}_attention_0/norm/scale" in ours)
    levels = tuple(sorted(set(levels)))
    if middle is None:
        middle = "params/middle_attention/norm/scale" in ours
    head_dim, attending = network.head_dim, _attending(widths, levels, middle)
    if head_dim is None and network.heads > 1:
        if len(set(attending)) != 1:
            raise ValueError(f"`network.heads` must be 1 where {attending} channels attend, got {network.heads}")
        head_dim = attending[0] // network.heads
    kinds = ["Attn" * (level in levels) + "DownBlock2D" for level in range(depth)]
    config = {option: known.default for option, known in OPTIONS.items()} | {
        "_class_name": CLASS,
        "sample_size": sample_size,
        "in_channels": (*np.shape(ours.get("params/conv_in/kernel", 0)), 1, 1, 1)[2],  # shapes are checked later
        "out_channels": network.out_channels,
        "freq_shift": network.freq_shift,
        "flip_sin_to_cos": network.flip_sin_to_cos,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "block_out_channels": widths,
        "layers_per_block": network.blocks,
        "downsample_padding": network.downsample_padding[0],
        "dropout": network.dropout,
        "attention_head_dim": head_dim,
        "norm_num_groups": network.groups,
        "attn_norm_num_groups": network.groups if network.scale_shift and middle else None,
        "norm_eps": network.eps,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
        "add_attention": middle,
        "num_class_embeds": None if network.num_classes is None else network.num_classes + 1,
    }
    came = network.clone(attention=(), attention_levels=levels, middle_attention=middle, heads=1, head_dim=head_dim)
    read = to_network(config)
    for field in dataclasses.fields(came):
        if field.name not in _UNSAVED and getattr(came, field.name) != getattr(read, field.name):
            raise ValueError(
                f"`network.{field.name}` must be {getattr(read, field.name)!r} in a {CLASS}, "
                f"got {getattr(came, field.name)!r}"
            )
    return config


def _attending(widths: Iterable[int], levels: tuple[int, ...], middle: bool) -> list[int]:
    """The widths at which attention happens."""
    widths = list(widths)
    return [widths[level] for level in levels] + widths[-1:] * middle
