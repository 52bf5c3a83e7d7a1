"""Checkpoints: the state of a step, written while training goes on and read onto any devices.

Orbax does the work (``CheckpointManager``), and this is the only module that names it. What is added is what
a long run needs besides: refusals before any work is done, and errors of one line that say where, which step
and what to do.

A save is a directory ``N.orbax-checkpoint-tmp`` that is renamed to ``N`` when it is complete. So a step that
has a name is whole, and a process killed in the middle of a save leaves the steps before it as they were.

Orbax is imported when a ``Checkpoints`` is made: it takes seconds, and ``--help`` needs none of it.
"""

import contextlib
import operator
import os
import uuid
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from jaxgen import checks, hosts

_SHOWN = 5  # mismatching leaves that an error names before it counts the others


class Checkpoints:
    """The checkpoints of one run, by step.

    Use it as a context: leaving waits for the save under way.

        with Checkpoints(directory) as checkpoints:
            if (step := checkpoints.latest()) is not None:
                state = checkpoints.restore(jax.eval_shape(init, key))
            ...
            checkpoints.save(step, state)
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2, read_only: bool = False) -> None:
        """Opens a directory of checkpoints, which need not exist yet.

        Args:
            directory: where they are; also on other file systems that ``etils.epath`` knows, such as gs://.
            keep: how many of the newest steps to keep; older ones are deleted once a newer one is complete.
            read_only: for reading the checkpoints of a run that may be under way: nothing is written, created
                or cleaned. Otherwise what saves that were killed left behind is deleted here.

        Raises:
            OSError: ``directory`` cannot be written (PermissionError where that is the reason); with
                ``read_only``: it does not exist (FileNotFoundError).
            ValueError: ``keep`` is less than 1.
        """
        checks.positive_integer("keep", keep)
        from etils import epath

        path = epath.Path(os.path.abspath(directory) if "://" not in os.fspath(directory) else directory)
        self.directory = os.fspath(path)
        if not read_only:
            _check_writable(path)
        elif not path.is_dir():
            raise FileNotFoundError(f"`directory` {self.directory} does not exist: no checkpoints to read")
        import orbax.checkpoint as ocp

        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            path,
            # Without it a new manager could not tell what is in a step before it has restored one.
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=not read_only,
                create=False,
            ),
        )
        self._read_only = read_only
        self._saving: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hosts.lost(error):
            return  # without the other no save can end
        try:
            self.close()
        except Exception as closing:
            if error is None:
                raise
            error.add_note(f"besides: {closing}")  # the first error is the one to show

    def steps(self) -> list[int]:
        """The steps that are there and whole, ascending; waits for the save under way, as ``wait`` does."""
        self.wait()
        if self._read_only:
            self._manager.reload()  # another process adds and deletes them
        return sorted(int(step) for step in self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest of ``steps``, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any) -> None:
        """Saves ``state`` as ``step``, in the background.

        The state may be donated, and arrays of NumPy overwritten, as soon as this returns. A save that is
        still under way is waited for first.

        Args:
            step: greater than every step that is there.
            state: a pytree of arrays (typed PRNG keys and bfloat16 included) and numbers; None and () may be
                in it.

        Raises:
            ValueError: ``step`` is not greater than the latest.
            RuntimeError: this save could not be begun, or the one before failed in the background.
        """
        step = operator.index(step)
        if self._read_only:
            raise ValueError(f"cannot save step {step}: {self.directory} was opened with `read_only`")
        latest = self.latest()
        # Orbax would return without a word and without having saved.
        if step < 0 or (latest is not None and step <= latest):
            floor = "-1" if latest is None else f"the latest in {self.directory}, {latest}"
            raise ValueError(f"`step` must be greater than {floor}, got {step}")
        try:
            self._manager.save(step, args=self._args.StandardSave(state))
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step

    def wait(self) -> None:
        """Waits for the save under way, if any.

        Raises:
            RuntimeError: it failed.
        """
        if self._saving is None:
            return
        step = self._saving
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._saving = None
            raise self._failed(step, error) from error
        self._saving = None

    def close(self) -> None:
        """Waits for the save under way and gives up the threads; the object is of no use afterwards.

        Raises:
            RuntimeError: the save failed.
        """
        try:
            self.wait()
        finally:
            # What it raises is the failure again that wait is telling, or has told.
            with contextlib.suppress(Exception):
                self._manager.close()

    def restore(self, like: Any, *, step: int | None = None) -> Any:
        """Reads a state.

        Args:
            like: what is expected: a pytree as the one that was saved, whose leaves are arrays,
                ShapeDtypeStructs (``jax.eval_shape``) or numbers. Each array is put where its counterpart's
                ``sharding`` says, whatever devices it was saved from; on the default device where it says
                nothing.
            step: the step; by default the latest.

        Returns:
            A pytree like ``like``, with the values that were saved.

        Raises:
            FileNotFoundError: there is no such step, or none at all.
            ValueError: what is stored does not fit ``like``; names the leaves.
            RuntimeError: the step cannot be read; names it, its directory and the other steps.
        """
        steps = self.steps()
        if step is None and not steps:
            raise FileNotFoundError(f"there is no checkpoint in {self.directory}")
        step = steps[-1] if step is None else operator.index(step)
        if step not in steps:
            raise FileNotFoundError(f"there is no checkpoint of step {step} in {self.directory}, only {steps}")
        try:
            stored = _stored_leaves(self._manager.item_metadata(step).tree)
        except Exception as error:
            raise self._unreadable(step, steps, error) from error
        if mismatches := _mismatches(_expected_leaves(like), stored):
            shown = "; ".join(mismatches[:_SHOWN])
            more = f"; and {len(mismatches) - _SHOWN} more" if len(mismatches) > _SHOWN else ""
            raise ValueError(f"step {step} in {self.directory} does not fit `like`: {shown}{more}")
        try:
            return self._manager.restore(step, args=self._args.StandardRestore(jax.tree.map(_target, like)))
        except Exception as error:
            raise self._unreadable(step, steps, error) from error

    def _failed(self, step: int, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"saving step {step} in {self.directory} failed ({_line(error)}); the steps before it stand"
        )

    def _unreadable(self, step: int, steps: list[int], error: Exception) -> RuntimeError:
        others = [other for other in steps if other != step]
        advice = f"delete that directory, or give `step`, one of {others}" if others else "no other step is there"
        return RuntimeError(f"step {step} in {self.directory}/{step} cannot be read ({_line(error)}); {advice}")


def _check_writable(path: Any) -> None:
    """Raises OSError unless a file can be made in ``path``: permission bits tell root nothing."""
    probe = path / f".probe-{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        message = f"`directory` {path} cannot be written: {error.strerror or error}"
        raise OSError(error.errno, message) from error


def _target(leaf: Any) -> Any:
    """What Orbax is to restore: arrays with shardings, or it would look for the devices of the save."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


_Leaf = tuple[tuple[int, ...], np.dtype | None]
"""Shape and dtype, None for a Python number, which is stored in a width of Orbax's choice."""


def _expected_leaves(like: Any) -> dict[str, _Leaf]:
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]:
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        number = not hasattr(leaf, "dtype")
        leaves[".".join(map(_name, path))] = (tuple(np.shape(leaf)), None if number else np.dtype(leaf.dtype))
    return leaves


def _name(key: Any) -> str:
    """A step of a path as Orbax names it: a field, the key of a dict, the place in a sequence."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _stored_leaves(tree: Any, prefix: str = "") -> dict[str, _Leaf]:
    """Flattens Orbax's metadata, nested dicts and sequences, dropping what is empty as JAX does."""
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(place), value) for place, value in enumerate(tree)]
    elif tree is None:
        return {}
    else:
        return {prefix: (tuple(tree.shape), np.dtype(tree.dtype))}
    leaves: dict[str, _Leaf] = {}
    for name, value in items:
        leaves |= _stored_leaves(value, f"{prefix}.{name}" if prefix else name)
    return leaves


def _mismatches(expected: dict[str, _Leaf], stored: dict[str, _Leaf]) -> list[str]:
    lines = [f"{name!r} is not stored" for name in expected if name not in stored]
    lines += [f"{name!r} is stored and not in `like`" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        (shape, dtype), (stored_shape, stored_dtype) = expected[name], stored[name]
        if shape != stored_shape or (dtype is not None and dtype != stored_dtype):
            wanted = f"{dtype or 'a number'}{list(shape)}"
            lines.append(f"{name!r} is stored as {stored_dtype}{list(stored_shape)}, `like` has {wanted}")
    return sorted(lines)


def _line(error: Exception) -> str:
    """The first line of an error: Orbax and TensorStore add pages."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
