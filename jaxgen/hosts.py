"""More than one host: the processes of a run meet, and say who is missing.

Each host runs the same program, and each process sees its own devices until it has called `join`; from then on
``jax.devices()`` are those of all, and what is compiled over them runs on all. That is the doing of
``jax.distributed``, whose service the first process runs. It aborts the program where hosts stay away, and does not say
which. So there is a roll call before it, on the same port: each process tells the first its number, the first waits for
all and then tells everyone to go on, or who is missing.

When a host is lost later, the others cannot go on: their next sum waits for it, or fails. They end, and all are started
again from the last checkpoint.
"""

import contextlib
import itertools
import os
import re
import socket
import sys
import time
from types import TracebackType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from jaxgen import checks

_PATIENCE = 5.0  # seconds for a line that is on its way
_PAUSE = 0.2  # seconds between attempts to reach the first host
_DAY = 24 * 3600
# In what JAX says of a sum or a save that cannot end, in words of its service, of gRPC or of Gloo.
_LOST = re.compile("unavailable|deadline|aborted|connect|heartbeat|gloo|barrier|peer", re.IGNORECASE)
_steps = itertools.count(1)  # for `stopping`: not a training's steps, which begin anew with each


def join(
    coordinator: str | None = None, *, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> None:
    """Meets the other processes of this run; does nothing where there are none, or they have met.

    To be called before anything asks JAX for its devices. From then on an error that nobody catches ends the process as
    `leave` does. On Cloud TPU, and under Slurm, Open MPI or Kubernetes, JAX
    finds the others by itself; elsewhere ``coordinator``, ``processes`` and ``process`` are needed, all three.

    Args:
        coordinator: HOST:PORT of the first process, on which it will serve and which all others reach.
        processes: how many there are; 1 for this one alone, whatever the cluster says.
        process: which one this is, in [0, processes).
        timeout: seconds to wait for the others.

    Raises:
        ValueError: some of the three are given without the others, or are out of range.
        TimeoutError: hosts are missing; says how many came and which did not.
        ConnectionError: the first host cannot be reached.
        OSError: the first process cannot serve on that port.

    >>> join()  # alone
    """
    checks.positive_integer("timeout", timeout)
    if processes == 1 or jax.distributed.is_initialized():
        return
    _check(coordinator, processes, process)
    if coordinator is None or processes is None or process is None:
        coordinator, processes, process = _detected(timeout)
        _check(coordinator, processes, process)
        if coordinator is None or processes is None or process is None or processes == 1:
            return
    _roll_call(coordinator, processes, process, timeout)
    sys.excepthook = _ended
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=timeout,
        # The first process measures and draws when training is over, and the others wait for it.
        shutdown_timeout_seconds=_DAY,
    )


def leave(code: int) -> NoReturn:
    """Ends the program; of several processes this one at once.

    JAX would wait at the door for the others, who wait for this process where its part of a sum is missing.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def first() -> bool:
    """Whether this process is the one that writes what is written once: metrics, pictures, scores."""
    return jax.process_index() == 0


def lost(error: BaseException | None) -> bool:
    """Whether an error is what one host sees when another is gone; never where there is one process."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error))) and jax.process_count() > 1


def stopping() -> bool:
    """Whether all processes are to stop now, because one has got a SIGTERM.

    To be called by every process after every step but the last of a training: the answer is yes in all of them at the
    same call, soon after the signal. Always no where there is one process.
    """
    return jax.process_count() > 1 and bool(multihost_utils.reached_preemption_sync_point(next(_steps)))


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if coordinator is not None and processes is not None and process is not None:
        checks.positive_integer("processes", processes)
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(f"`coordinator` must be HOST:PORT, got {coordinator!r}")
        if not 0 <= process < processes:
            raise ValueError(f"`process` must lie in [0, `processes`), [0, {processes}), got {process}")
    elif len(missing) < 3:
        raise ValueError(f"`coordinator`, `processes` and `process` belong together, got no `{missing[0]}`")


def _detected(timeout: int) -> tuple[str | None, int | None, int | None]:
    """What JAX finds out about this cluster; it has no public name for that."""
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout
    )
    return found[:3]


def _roll_call(coordinator: str, processes: int, process: int, timeout: int) -> None:
    """Returns when all processes are there."""
    host, port = coordinator.rsplit(":", 1)
    if process == 0:
        verdict = _asked(int(port), processes, timeout)
    else:
        verdict = _answered(host.strip("[]"), int(port), process, timeout)
    if verdict:
        raise TimeoutError(verdict)


def _asked(port: int, processes: int, timeout: int) -> str:
    """The first process's part: waits for the others and tells them the verdict, nothing if all is well."""
    deadline = time.monotonic() + timeout
    arrived: dict[int, socket.socket] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=dual))
        except OSError as error:
            raise OSError(error.errno, f"`coordinator` cannot serve on port {port}: {error.strerror}") from error
        while len(arrived) < processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # a stranger's call
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(_PATIENCE)
                with caller.makefile() as lines:
                    number = int(lines.readline(20))
                if 0 < number < processes:
                    arrived[number] = caller
        missing = sorted(set(range(1, processes)) - arrived.keys())
        verdict = ""
        if missing:
            verdict = (
                f"{processes - len(missing)} of {processes} hosts arrived within {timeout} s, missing: "
                + ", ".join(f"process {number}" for number in missing)
            )
        for caller in arrived.values():
            with contextlib.suppress(OSError):  # it has left meanwhile
                caller.sendall(f"{verdict}\n".encode())
    return verdict


def _answered(host: str, port: int, process: int, timeout: int) -> str:
    """The other processes' part: tells the first that this one is there, and returns its verdict."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=_PATIENCE) as first:
                first.sendall(f"{process}\n".encode())
                # It waits for others as long as this process would; its own time may have begun later.
                first.settimeout(2 * timeout)
                with first.makefile() as lines:
                    line = lines.readline()
            if line:
                return line.strip()
        except (OSError, UnicodeDecodeError) as error:  # JAX's service, while an earlier run has not ended
            why = str(error)
        else:
            why = "it has hung up"
        if time.monotonic() > deadline:
            raise ConnectionError(f"the first host cannot be reached at {host}:{port} within {timeout} s ({why})")
        time.sleep(_PAUSE)


def _ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    leave(1)
