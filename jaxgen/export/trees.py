"""Trees in JSON's words: what a function takes and returns, said without the types of the code that made it.

An argument's leaves go by name, so that whoever has the same names can call: fields of a Table are keys of a dict. What
is returned is put together again from

    {"array": [dtype, shape]}   {"tuple": [..]}   {"list": [..]}   {"dict": {key: ..}}   {"named": [type, {field: ..}]}

or null, where a named tuple becomes one of the same name and fields.
"""

import functools
from collections import namedtuple
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np


class Leaf(NamedTuple):
    """An array: its dtype's name, and its shape, in which a word is a length that may be any."""

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def leaf(array: Any) -> Leaf:
    """What an array, a number or a ``jax.ShapeDtypeStruct`` is."""
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = tuple(str(n) if jax.export.is_symbolic_dim(n) else n for n in array.shape)
        return Leaf(str(array.dtype), shape)
    dtype = array.dtype if isinstance(array, jax.Array) else jnp.result_type(array)
    return Leaf(str(dtype), jnp.shape(array))


def named(name: str, tree: Any) -> dict[str, Any]:
    """A tree's leaves by name: "table.times", or "x" for one that is an array itself.

    Raises:
        ValueError: two have one name.
    """
    leaves: dict[str, Any] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        whole = ".".join(filter(None, (name, jax.tree_util.keystr(path, simple=True, separator="."))))
        if whole in leaves:
            raise ValueError(f"`{name}` must have a name for each of its leaves, got two of {whole}")
        leaves[whole] = value
    return leaves


def fitted(name: str, value: Any, expected: Leaf, lengths: dict[str, Any]) -> Any:
    """The value as an array that is expected, its dtype known for good.

    Args:
        name: the leaf's.
        value: an array, or a number.
        expected: what the program takes.
        lengths: those that are named in shapes, as far as they are known; more are added.

    Raises:
        TypeError: it is of another dtype, or no array at all.
        ValueError: it is of another shape.
    """
    came = leaf(value)
    if came.dtype != expected.dtype:
        raise TypeError(f"`{name}` must be {expected}, got {came}")
    fits = len(came.shape) == len(expected.shape)
    for length, wanted in zip(came.shape, expected.shape, strict=False):
        fits = fits and length == (wanted if isinstance(wanted, int) else lengths.setdefault(wanted, length))
    if not fits:
        told = "".join(f", with {word} = {lengths[word]}" for word in expected.shape if word in lengths)
        raise ValueError(f"`{name}` must be {expected}{told}, got {came}")
    if isinstance(value, jax.Array) and not getattr(value, "weak_type", False):
        return value
    # A weak dtype would be compiled for by itself.
    return (jnp if isinstance(value, jax.core.Tracer) else np).asarray(value, came.dtype)


def described(tree: Any) -> Any:
    """The words for a tree of arrays.

    Raises:
        TypeError: another kind of container is in it.
    """
    if tree is None:
        return None
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {"named": [type(tree).__name__, {name: described(getattr(tree, name)) for name in tree._fields}]}
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [described(part) for part in tree]}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: described(tree[key]) for key in tree}}
    if not jax.tree_util.all_leaves([tree]):
        raise TypeError(
            "`function` must return arrays in tuples, named tuples, lists and dicts whose keys are strings, "
            f"got {type(tree).__name__}"
        )
    return {"array": leaf(tree)}


def assembled(words: Any, leaves: Iterator[Any]) -> Any:
    """The tree of those words, with these leaves."""
    match words:
        case {"array": _}:
            return next(leaves)
        case {"tuple": parts}:
            return tuple(assembled(part, leaves) for part in parts)
        case {"list": parts}:
            return [assembled(part, leaves) for part in parts]
        case {"dict": parts}:
            return {key: assembled(part, leaves) for key, part in parts.items()}
        case {"named": [name, fields]}:
            return _type(name, tuple(fields))(*(assembled(part, leaves) for part in fields.values()))
    return None


@functools.cache
def _type(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)
