"""Some steps of training, recorded by JAX's profiler for XProf or TensorBoard to show.

    python -m experiments.NAME --profile 100:110 ...     steps 100 to 109, counted from 0, into WORKDIR/profile
    xprof --port 6006 --logdir WORKDIR/profile           pip install xprof

The device is waited for at the two ends of the window and nowhere between, so that what is recorded is these steps, as
fast as they are when nobody looks. A window that begins with a run's first step records its compilation as well.
"""

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax


def window(text: str, *, steps: int) -> range:
    """The steps that "START:STOP" names, as a slice of Python's does.

    Args:
        text: two numbers, 0 <= START < STOP <= steps.
        steps: how many steps the whole run has.

    Raises:
        ValueError: the text is not that.

    >>> window("100:110", steps=4000)
    range(100, 110)
    """
    start, colon, stop = text.partition(":")
    if not (colon and start.isascii() and start.isdigit() and stop.isascii() and stop.isdigit()):
        raise ValueError(f"`profile` must be START:STOP, two steps counted from 0 such as 100:110, got {text!r}")
    if not int(start) < int(stop) <= steps:
        raise ValueError(f"`profile` must be START:STOP with START < STOP <= `steps`, {steps}, got {text!r}")
    return range(int(start), int(stop))


class Profile:
    """Records the steps of a window as training comes by them; a run that begins within it records the rest.

    Use it as a context: leaving writes what was recorded, however the steps ended.
    """

    def __init__(self, window: range, directory: str | os.PathLike[str]) -> None:
        """Prepares to record.

        Args:
            window: the steps, of stride 1.
            directory: where the recording goes, a bucket as well; in one of several processes each writes its own.
        """
        self.window = window
        self._directory = directory
        self._recorded: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def before(self, step: int, state: Any) -> None:
        """Begins to record before ``step`` if that is in the window and recording has not begun."""
        if step in self.window and self._recorded is None:
            jax.block_until_ready(state)  # what came before is not to be seen
            self._recorded = tempfile.TemporaryDirectory(prefix="jaxgen-profile-")
            jax.profiler.start_trace(self._recorded.name)

    def stop(self) -> None:
        """Ends the recording, if there is one, and writes it; the device must be ready."""
        from etils import epath

        if self._recorded is None:
            return
        with self._recorded as recorded:
            self._recorded = None
            jax.profiler.stop_trace()  # by way of this disk: the profiler itself knows no buckets
            for file in sorted(Path(recorded).rglob("*")):
                if file.is_file():
                    target = epath.Path(self._directory) / file.relative_to(recorded)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
