"""TPU slices by name, without a TPU, and what is published of their chips.

A name is a family and how many chips lie along each axis of a slice; behind a star, how many slices there are.
"v5e:1x1" is one chip, "v6e:16x16" a whole pod of 256, "v5p:4x4x4*2" two slices of 64 chips each.

Google's compiler for TPUs, libtpu, knows these slices by name and compiles for them on any x86-64 Linux.
"""

import functools
import math
import os
import re
from typing import Any, NamedTuple

import jax

GB, GiB = 10**9, 2**30

# What libtpu asks a TPU machine for, answered for a machine that is none; what is set already stays.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Chip(NamedTuple):
    """What is published of a chip.

    Attributes:
        hbm: bytes of its memory.
        flops: operations in bfloat16 a second, at most.
        bandwidth: bytes a second between memory and cores, at most.
        link: bytes a second that a link to a neighbour carries each way, at most.
        wraps: axes of a slice whose length is a multiple of this are rings; others are lines.
        dollars: list prices of an hour on demand, in the cheapest region and in the dearest; None where none is known.
        cores: devices that JAX sees, which share what the chip has.
    """

    hbm: int
    flops: float
    bandwidth: float
    link: float
    wraps: int
    dollars: tuple[float, float] | None = None
    cores: int = 1


class _Family(NamedTuple):
    chip: Chip
    libtpu: str
    axes: int
    options: dict[str, Any] = {}  # noqa: RUF012 - read only


# Memory, operations and bandwidths are those of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in November
# 2026, which give the bandwidth between chips for a chip, both ways: a link's is that divided by two and by the number
# of links, 4 or 6 (v5e 400, v6e 800, v5p and v7x 1200 GB/s). They give none for v4, whose link, and which axes close
# into rings, are jax-ml.github.io/scaling-book/tpus. Prices are Google's on-demand ones by region as the SkyPilot
# catalogue lists them, read in November 2026 (v4: one region; v7x: none); spot prices and commitments are lower.
FAMILIES = {
    "v4": _Family(
        Chip(32 * GiB, 275e12, 1200 * GB, 45 * GB, wraps=4, dollars=(3.22, 3.22)),
        "v4",
        3,
        {"chip_config_name": "megacore"},
    ),
    "v5e": _Family(Chip(16 * GiB, 197e12, 819 * GB, 50 * GB, wraps=16, dollars=(1.20, 1.72)), "v5e", 2),
    "v5p": _Family(Chip(95 * GiB, 459e12, 2765 * GB, 100 * GB, wraps=4, dollars=(4.20, 4.78)), "v5p", 3),
    "v6e": _Family(Chip(32 * GiB, 918e12, 1638 * GB, 100 * GB, wraps=16, dollars=(2.70, 3.24)), "v6e", 2),
    "v7x": _Family(Chip(192 * GiB, 2307e12, 7380 * GB, 100 * GB, wraps=4, cores=2), "tpu7x", 3),
}


class Topology(NamedTuple):
    """One or several slices of TPU chips.

    Attributes:
        name: as in `topology`.
        chip: what each chip is.
        shape: chips along each axis of a slice.
        slices: how many there are.
        devices: all of them, for `place.mesh`; programs can be compiled for them, not run.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: list[jax.Device]

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def interconnect(self) -> float:
        """Bytes a second that a chip sends to others of its slice in a collective over all axes, at most.

        An axis that closes into a ring has two ways out, a line one: at its ends there is no other.
        """
        ways = sum(0 if length == 1 else 2 if length % self.chip.wraps == 0 else 1 for length in self.shape)
        return ways * self.chip.link


def topology(name: str) -> Topology:
    """TPU slices by name: a family, the chips along each axis of a slice, and the slices if there are several.

    Args:
        name: such as "v4:2x2x1", "v5e:4x4", "v5p:2x2x1", "v6e:16x16", "v7x:2x2x1", "v5e:1x1" or "v6e:4x4*2".

    Raises:
        ValueError: there is no such family, or no slice of this shape.
        FileNotFoundError: libtpu is not installed.
    """
    family, shape, slices = parsed(name)
    return Topology(name, family.chip, shape, slices, list(_devices(name)))


def parsed(name: str) -> tuple[_Family, tuple[int, ...], int]:
    """The family, the chips along each axis and the number of slices that a name says; nothing is loaded.

    Raises:
        ValueError: it says none of ours.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    family = FAMILIES.get(found[1]) if found else None
    shape = tuple(map(int, found[2].split("x"))) if found else ()
    slices = int(found[3] or 1) if found else 0
    if family is None or len(shape) != family.axes or 0 in (*shape, slices):
        flat, deep = (", ".join(key for key, each in FAMILIES.items() if each.axes == axes) for axes in (2, 3))
        raise ValueError(
            f"`topology` must be FAMILY:AxB for {flat} or FAMILY:AxBxC for {deep}, such as v5e:1x1, v6e:16x16 or "
            f"v5p:2x2x1, and *N behind it for N slices, got {name!r}"
        )
    return family, shape, slices


@functools.cache
def _devices(name: str) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    family, shape, slices = parsed(name)
    options = dict(family.options)
    if math.prod(shape) == 1:  # part of a host
        options["chips_per_host_bounds"] = [1, 1, 1]
    if slices > 1:
        options["num_slices"] = slices
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(
            f"{family.libtpu}:{'x'.join(map(str, shape))}", platform="tpu", **options
        ).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise FileNotFoundError(
                "compiling for TPUs needs Google's compiler, libtpu, which is not installed: "
                'pip install "jaxgen[tpu-aot]"'
            ) from error
        raise ValueError(f"`topology` {name!r} is refused by libtpu: {str(error).splitlines()[0]}") from error
    return tuple(found)
