"""The training loop: it sees a method and batches, and never looks inside the state.

The state after k steps is a function of (key, batches, k) alone, so a run that was stopped, or killed, and is started
again from its last checkpoint ends bit by bit where one that was left alone ends.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxgen import checks, hosts
from jaxgen.checkpoint import Checkpoints
from jaxgen.log import Log
from jaxgen.profile import Profile
from jaxgen.train import Method
from jaxgen.typing import Batch, Key


class Every(NamedTuple):
    """Something to do in between: ``call(step, state)`` after each ``steps`` steps.

    The call must not keep the state, which the next step is given as its own.
    """

    steps: int
    call: Callable[[int, Any], None]


class Stopped(Exception):  # noqa: N818 - no error: somebody asked for it
    """Training was asked to stop by a signal, and has saved its state.

    Attributes:
        step: the number of steps taken.
        signum: the signal.
    """

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.step, self.signum = step, signum


def run(
    method: Method,
    batches: Callable[[int], Batch],
    *,
    key: Key,
    steps: int,
    like: Any = None,
    checkpoints: Checkpoints | None = None,
    save_every: int = 1000,
    log: Log | None = None,
    log_every: int = 50,
    every: Sequence[Every] = (),
    profile: Profile | None = None,
) -> Any:
    """Trains, from the last checkpoint if there is one.

    On SIGTERM or SIGINT the loop finishes its step, saves and raises `Stopped`; a second signal acts at once. Of
    several hosts a SIGTERM to one has all stop after the same step, and SIGINT has its usual effect.

    Args:
        method: compiled, as by `place.jit`.
        batches: ``step -> batch``, counted from 0, a pure function such as `data.batches` makes.
        key: a single key: the state's first draw and all steps' randomness come from it.
        steps: how many steps the whole run has, at least 1.
        like: what checkpoints are restored into, `place.state_shapes(...)`; needed with ``checkpoints``.
        checkpoints: where to save and to look for a state to go on from; None to keep nothing.
        save_every: steps between checkpoints; the last step is always saved.
        log: where metrics go.
        log_every: steps between records. Metrics are read one step late, when the device is busy with the next step, so
            that it never waits for the host.
        every: what else to do, and when.
        profile: which steps to record, and where; None for none.

    Returns:
        The state after the last step.

    Raises:
        FloatingPointError: a metric was not finite at a step that was logged or about to be saved; the last checkpoint
            stands.
        Stopped: a signal came.
        ValueError: an argument is out of range; the checkpoint is further than ``steps``.
    """
    for name, number in (("steps", steps), ("save_every", save_every), ("log_every", log_every)):
        checks.positive_integer(name, number)
    init_key, step_key = jax.random.split(key)
    start = checkpoints.latest() if checkpoints is not None else None
    if checkpoints is None or start is None:
        start, state = 0, method.init(init_key)
    elif start > steps:
        raise ValueError(f"`steps` must be at least {start}, the checkpoint in {checkpoints.directory}, got {steps}")
    else:
        state = checkpoints.restore(like)
    if start == steps:
        return state

    reader = _Reader(log)
    with _signals() as received, profile or contextlib.nullcontext():
        for step in range(start, steps):
            if profile is not None:
                profile.before(step, state)
            batch = batches(step)
            # By its number a step is known in a recording.
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = method.step(state, batch, step_key)
            done = step + 1
            if step == start and log is not None:
                # From here: the first call also compiled.
                log.begin(start, steps, len(jax.tree.leaves(batch)[0]) * jax.process_count())
            reader.read()
            if done % log_every == 0 or done == steps:
                reader.hold(done, metrics)
            stopping = done < steps and (bool(received) or hosts.stopping())
            saving = checkpoints is not None and (done % save_every == 0 or done == steps or stopping)
            recorded = profile is not None and done == profile.window.stop
            due = [task for task in every if done % task.steps == 0]
            if due or saving or recorded:
                jax.block_until_ready(metrics)  # as what follows would; from here on the time is none of the training's
                began = time.perf_counter()
                if profile is not None and recorded:
                    profile.stop()
                _finite(done, metrics)  # before anything is drawn or stored of a state that is lost
                for task in due:
                    task.call(done, state)
                if checkpoints is not None and saving:
                    # First the record, then the checkpoint: a kill in between leaves a line to drop, not one that is
                    # missing.
                    reader.read()
                    if log is not None:
                        log.flush()
                    checkpoints.save(done, state)
                if log is not None:
                    log.aside(time.perf_counter() - began)
            if stopping:
                if checkpoints is not None:
                    checkpoints.wait()
                raise Stopped(done, received[0] if received else signal.SIGTERM)
    reader.read()
    if log is not None:
        log.flush()
    if checkpoints is not None:
        checkpoints.wait()
    return state


class _Reader:
    """Holds a step's metrics on the device until it is time to read them."""

    def __init__(self, log: Log | None) -> None:
        self._log = log
        self._held: tuple[int, Any] | None = None

    def hold(self, step: int, metrics: Any) -> None:
        self._held = (step, metrics)

    def read(self) -> None:
        if self._held is not None:
            numbers = _finite(*self._held)
            if self._log is not None:
                self._log.metrics(self._held[0], numbers)
        self._held = None


def _finite(step: int, metrics: Any) -> dict[str, float]:
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not all(map(math.isfinite, numbers.values())):
        raise FloatingPointError(f"metrics are not finite at step {step}: {numbers}")
    return numbers


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the first SIGTERM or SIGINT; the second has its usual effect."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield received  # Python delivers signals to the main thread only; of several hosts, `hosts.stopping` tells
        return
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: Any) -> None:
        received.append(signum)
        restore()

    for signum in previous:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        restore()
