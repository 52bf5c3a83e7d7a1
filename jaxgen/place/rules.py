"""Which leaves of a state are split, along which of their axes, and why.

A rule is data, a pattern and axes: a leaf whose path the pattern finds is split as the axes say, counted from the last,

    ("mlp_1/kernel$", ("tensor", None))     rows over "tensor", whatever axes a scan has stacked before them     (1)
    ("embedding$", ())                      kept whole on every device                                           (2)

The first rule that fits decides. What no rule gives to "fsdp" is split along the longest axis that divides, as is a
leaf for which there is no rule; small leaves are not, since splitting them costs a collective and saves nothing.

Splitting a pair of linear layers over "tensor" by columns and then by rows, with what lies between them element by
element or head by head, needs one sum per pair (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.place.meshes import AXES
from jaxgen.train import Learner, Method

SMALLEST_SHARDED_LEAF = 2**14  # numbers

Rule = tuple[str, tuple[str | None, ...]]
"""A pattern (``re.search``) of a leaf's path, "blocks/mlp_0/kernel", and what its last axes are split over."""

TRANSFORMER: tuple[Rule, ...] = (
    (r"attention/qkv/(kernel|bias)$", ("tensor",)),
    (r"attention/out/kernel$", ("tensor", None)),
    (r"mlp_0/(kernel|bias)$", ("tensor",)),
    (r"mlp_1/kernel$", ("tensor", None)),
)
"""Megatron's split of the attention and of the MLP of `nets.DiT`: by columns, then by rows.

The columns of "qkv" are queries, keys and values, not heads: these activations are gathered once more, before they part
by heads.
"""


class Leaf(NamedTuple):
    """Where leaves of a state lie that are alike, such as a parameter and Adam's moments of it.

    Attributes:
        path: of the parameter, or of the leaf within the state where it belongs to none.
        copies: how many leaves.
        shape: of each.
        dtype: of each.
        axes: what each axis is split over, or None.
        bytes: of all of them, per device.
        why: the rule.
    """

    path: str
    copies: int
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    bytes: int
    why: str

    def __str__(self) -> str:
        """One line for people."""
        axes = ", ".join(f"{n} / {axis}" if axis else str(n) for n, axis in zip(self.shape, self.axes, strict=True))
        times = f"{self.copies} x " if self.copies > 1 else ""
        return f"{self.path}: {times}{self.dtype}[{axes}], {self.bytes:,} bytes per device: {self.why}"


def state_shapes(method: Method, mesh: Mesh, *, rules: Sequence[Rule] = TRANSFORMER) -> Any:
    """The state's shapes, dtypes and shardings on a mesh, nothing computed: what a checkpoint is restored into.

    Args:
        method: a method for the global batch.
        mesh: from `mesh`.
        rules: how leaves are split.

    Returns:
        A tree of ``jax.ShapeDtypeStruct`` like the state.

    Raises:
        ValueError: a rule names an axis that meshes do not have, or one that does not divide a leaf's.
    """

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        axes, _ = _split(_name(path), leaf.shape, mesh, rules)
        while axes and axes[-1] is None:  # as JAX prints them
            axes = axes[:-1]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(placed, _shapes(method))


def explain(method: Method, mesh: Mesh, *, rules: Sequence[Rule] = TRANSFORMER) -> list[Leaf]:
    """Says where the state lies, and why: a line for each parameter, to be printed.

    Args:
        method: a method for the global batch.
        mesh: from `mesh`.
        rules: how leaves are split.

    Returns:
        A `Leaf`, which prints as a line, for each parameter with all that is like it; those that take most first.

    Raises:
        ValueError: as `state_shapes`.
    """
    state = _shapes(method)
    learners = [node for node in jax.tree.leaves(state, is_leaf=_is_learner) if _is_learner(node)]
    parameters = {
        _name(path) for learner in learners for path, _ in jax.tree_util.tree_leaves_with_path(learner.params)
    }
    groups: dict[Any, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        axes, why = _split(_name(path), leaf.shape, mesh, rules)
        group = (_parameter(_name(path), parameters), leaf.shape, leaf.dtype, axes, why)
        groups[group] = groups.get(group, 0) + 1
    found = []
    for (path, shape, dtype, axes, why), count in groups.items():
        parts = int(np.prod([mesh.shape[axis] for axis in axes if axis]))
        found.append(
            Leaf(path, count, shape, str(dtype), axes, count * dtype.itemsize * int(np.prod(shape)) // parts, why)
        )
    return sorted(found, key=lambda leaf: -leaf.bytes)


def _shapes(method: Method) -> Any:
    return jax.eval_shape(method.init, jax.random.key(0))


def _split(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]) -> tuple[tuple[str | None, ...], str]:
    """What each axis is split over, and why."""
    axes: list[str | None] = [None] * len(shape)
    why = "no rule"
    for pattern, named in rules:
        if len(named) <= len(shape) and re.search(pattern, path):
            if not named:
                return tuple(axes), f"kept whole by rule {pattern!r}"
            for axis, name in enumerate(named, len(shape) - len(named)):
                axes[axis] = _over(name, path, shape, axis, mesh, pattern)
            why = f"rule {pattern!r}"
            break
    parts = mesh.shape["fsdp"]
    if parts == 1 or "fsdp" in axes:
        return tuple(axes), why
    if np.prod(shape) < SMALLEST_SHARDED_LEAF:
        return tuple(axes), f'{why}; too small for "fsdp"'
    free = [axis for axis, length in enumerate(shape) if axes[axis] is None and length % parts == 0]
    if not free:
        return tuple(axes), f'{why}; "fsdp" divides no axis'
    # Ties go to the last, which holds a kernel's output features.
    axes[max(free, key=lambda axis: (shape[axis], axis))] = "fsdp"
    return tuple(axes), f'{why}; longest axis over "fsdp"'


def _over(name: str | None, path: str, shape: tuple[int, ...], axis: int, mesh: Mesh, pattern: str) -> str | None:
    """The axis of the mesh that a rule names, None where that has no length."""
    if name is None:
        return None
    if name not in AXES[1:]:
        raise ValueError(f"`rules` may name the axes {', '.join(AXES[1:])}, got {name!r} in that of {pattern!r}")
    parts = mesh.shape[name]
    if shape[axis] % parts:
        raise ValueError(f"`{name}` must divide axis {axis} of {path}, {list(shape)}, by rule {pattern!r}, got {parts}")
    return name if parts > 1 else None


def _name(path: Any) -> str:
    """A path as rules see it: the fields, keys and places on the way to a leaf."""
    return "/".join(str(next(getattr(k, a) for a in ("name", "key", "idx") if hasattr(k, a))) for k in path)


def _parameter(path: str, parameters: set[str]) -> str:
    """The parameter whose path a leaf's path ends in, or the path."""
    words = path.split("/")
    return next((end for i in range(len(words)) if (end := "/".join(words[i:])) in parameters), path)


def _is_learner(node: Any) -> bool:
    return isinstance(node, Learner)
