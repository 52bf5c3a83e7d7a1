"""Saving a function, and what it is once it is loaded."""

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

import jaxgen
from jaxgen.export.file import check_dtype, read, write
from jaxgen.export.trees import Leaf, assembled, described, fitted, leaf, named
from jaxgen.typing import Array

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
_METADATA, _FORMAT = "jaxgen.export", 1
_PROGRAM = "program."


class Program:
    """A function out of a file: called as it was before, without its parameters.

    Arguments go by position or by name, their leaves by name: where a Table was taken, a dict of ``times`` and
    ``weights`` serves too. Numbers and NumPy arrays do as under ``jax.jit``. It may be called in compiled functions; as
    its parameters would be constants there, let them be an argument, for ``apply``. It cannot be differentiated, nor
    mapped by ``jax.vmap``.

    Raises when called: TypeError for an argument too many or too few, or of another dtype; ValueError for one of
    another shape or with other leaves. The message names it, what came and what was expected.

    Attributes:
        name: the function's.
        arguments: what it takes: by the argument's name its leaves by theirs.
        results: what it returns, in the words of `jaxgen.export.trees`.
        params: the parameters by name, on the device.
        platforms: those that the file has programs for.
        platform: the one that this program is for.
        jax: the version of JAX that wrote it.
    """

    def __init__(
        self, exported: jax.export.Exported, words: Mapping[str, Any], params: dict[str, Array], platform: str
    ) -> None:
        self.name, self.jax, self.results, self.params = words["function"], words["jax"], words["results"], params
        self.platforms, self.platform = tuple(words["platforms"]), platform
        self.arguments = {
            name: {path: Leaf(dtype, tuple(shape)) for path, (dtype, shape) in leaves.items()}
            for name, leaves in words["arguments"].items()
        }
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in self.arguments])
        self._call = jax.jit(lambda params, leaves: exported.call(*params, *leaves))

    def __call__(self, *arguments: Any, **by_name: Any) -> Any:
        """Calls the function with the parameters of the file."""
        return self.apply(self.params, *arguments, **by_name)

    def apply(self, params: Mapping[str, Array], /, *arguments: Any, **by_name: Any) -> Any:
        """Calls the function with other parameters of the names, shapes and dtypes of ``params``."""
        given = self.__signature__.bind(*arguments, **by_name).arguments
        lengths: dict[str, Any] = {}
        leaves = [array for name, value in given.items() for array in self._leaves(name, value, lengths)]
        return assembled(self.results, iter(self._call([params[name] for name in self.params], leaves)))

    def _leaves(self, name: str, value: Any, lengths: dict[str, Any]) -> Iterator[Any]:
        expected, came = self.arguments[name], named(name, value)
        if came.keys() != expected.keys():
            wanted, got = (", ".join(leaves) or "None" for leaves in (expected, came))
            raise ValueError(f"`{name}` must have the leaves {wanted}, got {got}")
        for path, one in expected.items():
            yield fitted(path, came[path], one, lengths)

    def __repr__(self) -> str:
        takes = ", ".join(f"{name}: {one}" for leaves in self.arguments.values() for name, one in leaves.items())
        count = sum(math.prod(array.shape) for array in self.params.values())
        return f"{self.name}({takes}), parameters: {count:,}, for {', '.join(self.platforms)}, by JAX {self.jax}"


def save(
    file: str | os.PathLike[str],
    function: Callable[..., Any],
    params: Any,
    *arguments: Any,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes a function and its parameters, the whole file or nothing.

    Args:
        file: the file; one that is there is replaced.
        function: ``(params, *arguments) -> results``, jitted or not. Results are arrays in tuples, named tuples, lists
            and dicts.
        params: a pytree of arrays of numbers.
        *arguments: pytrees of arrays, typed PRNG keys among them, or of ``jax.ShapeDtypeStruct``: what they hold does
            not matter here. A length of ``jax.export.symbolic_shape`` may be any in a call, which compiles when it is
            new.
        platforms: of "cpu", "cuda", "tpu" and "rocm"; none of them needs to be there.

    Raises:
        TypeError: what is given is no array, or results are in another kind of container.
        ValueError: a platform is none of these, a parameter is of a dtype that files cannot hold, two arguments or
            leaves have one name, or JAX cannot promise to run the program later.
        OSError: the file cannot be written.

    >>> import pathlib, tempfile
    >>> def affine(params, x, shift): return params["scale"] * x + shift
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "affine.jaxgen"
    >>> save(file, affine, {"scale": np.float32(3)}, jax.ShapeDtypeStruct((2,), np.float32), 0.0)
    >>> load(file)
    affine(x: float32[2], shift: float32[]), parameters: 1, for cpu, cuda, tpu, by JAX ...
    >>> load(file)(np.array([1.0, 2.0]), shift=0.5)
    Array([3.5, 6.5], dtype=float32)
    """
    for platform in platforms:
        if platform not in PLATFORMS:
            raise ValueError(f"`platforms` must be of {', '.join(PLATFORMS)}, got {platform!r}")
    shapes, *taken = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), jax.eval_shape(lambda *given: given, params, *arguments)
    )
    expected = named("params", shapes)
    for name, one in expected.items():
        check_dtype(name, one.dtype)
    names = _argument_names(function, len(arguments))
    if len(set(names)) < len(names):
        raise ValueError(f"`function` must have arguments of different names, got {', '.join(names)}")
    words = {
        "format": _FORMAT,
        "function": getattr(function, "__name__", type(function).__name__),
        "arguments": {
            name: {path: leaf(one) for path, one in named(name, tree).items()}
            for name, tree in zip(names, taken, strict=True)
        },
        "results": described(jax.eval_shape(function, shapes, *taken)),
        "params": list(expected),
        "platforms": list(platforms),
        "jax": jax.__version__,
        "jaxgen": jaxgen.__version__,
    }
    structure = jax.tree.structure((shapes, *taken))
    # Leaves go in and out: the program knows nothing of types that the reader may not have.
    flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves))))
    arrays = {
        name: np.asarray(value, one.dtype)
        for (name, one), value in zip(expected.items(), jax.tree.leaves(params), strict=True)
    }
    for platform in platforms:
        exported = jax.export.export(flat, platforms=[platform])(*jax.tree.leaves((shapes, *taken)))
        arrays[_PROGRAM + platform] = np.frombuffer(exported.serialize(), np.uint8)
    write(file, arrays, {_METADATA: json.dumps(words)})


def load(file: str | os.PathLike[str], *, platform: str | None = None) -> Program:
    """Reads a function of `save`, its parameters on the device.

    Args:
        file: the file, from someone you trust: a checksum finds damage, not malice, and JAX runs what it is given. On a
            CPU it is mapped, not copied: do not write into it.
        platform: of those that the file is for; the default device's if None.

    Returns:
        The function; it compiles when it is first called.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, not one of `save`, not for the platform, or of a version of JAX that this one cannot
            read. The message names the file.
    """
    arrays, metadata = read(file)
    words = json.loads(metadata.get(_METADATA, "{}"))
    if words.get("format") != _FORMAT:
        raise ValueError(
            f"{file} must be a file of `jaxgen.export.save`, of format {_FORMAT}, got {words.get('format')}"
        )
    own = jax.export.default_export_platform() if platform is None else platform
    if own not in words["platforms"]:
        raise ValueError(f"{file} must be for the platform {own!r}, got one for {', '.join(words['platforms'])}")
    try:
        exported = jax.export.deserialize(bytearray(arrays[_PROGRAM + own]))
    except Exception as error:
        raise ValueError(f"{file}, by JAX {words['jax']}, cannot be read by JAX {jax.__version__}: {error}") from error
    device = jax.local_devices(backend=own)[0]
    params = jax.device_put([arrays[name] for name in words["params"]], device)
    return Program(exported, words, dict(zip(words["params"], params, strict=True)), own)


def _argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """The arguments' own names, without that of the parameters; "images_0", "images_1" for ``*images``."""
    names: list[str] = []
    for parameter in inspect.signature(function).bind(*range(count + 1)).signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count + 1 - len(names))]
        elif len(names) <= count and parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[1:]
