"""One side of a case in a process of its own: ``python -m benchmarks.side MODULE CASE SIDE THREADS QUICK FILE``.

It binds itself to its cores before any library has counted them, gets ready, runs the work, leaves its output in FILE
and says so; then it does what it is told, a line of JSON for a line of JSON:

    {"do": "run"}                   runs the work once          -> {"seconds", "compilations"}
    {"do": "grow", "factor": 2, "times": 3}
                                    of so many times the batch  -> {"seconds"}, the least of so many runs
    {"do": "end"}                                               -> {"finite", "peak_bytes", "peak_flops"}
"""

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from benchmarks import record

WARM_UP = 2


def main(arguments: list[str]) -> None:
    """Gets ready, answers, ends with its input."""
    module, case_name, name, threads, quick, file = arguments
    # What libraries print goes elsewhere: this process's own output is the answers alone.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        bind(int(threads))
        serve(module, case_name, name, quick == "quick", file, answers)


def serve(module: str, case_name: str, name: str, quick: bool, file: str, answers: IO[str]) -> None:
    """The process's life."""
    cases = {case.name: case for case in importlib.import_module(module).cases(quick)}
    case = cases[case_name]
    start = time.perf_counter()
    libraries = case.libraries.get(name, ("jax",))
    for library in libraries:
        importlib.import_module(library)
    imported = time.perf_counter() - start
    framework = libraries[0]
    compilations = compilation_counter() if framework == "jax" else lambda: 0
    settled = functools.partial(_settled, framework)
    before = _resident()
    start = time.perf_counter()
    work = case.sides[name](case.batch)
    ready = time.perf_counter()
    outputs = settled(work.run())
    first = time.perf_counter() - ready
    result = np.asarray(work.outputs(outputs), np.float32)
    np.save(file, result)
    for _ in range(WARM_UP):
        settled(work.run())

    def tell(**told: Any) -> None:
        answers.write(json.dumps(told) + "\n")

    known = sum(work.phases.values())
    tell(
        ready=True,
        phases={"import": imported, "build": ready - start - known, **work.phases, "first": first},
        flops=work.flops,
        temporary_bytes=work.temporary_bytes,
        quality=dict(work.quality(result)),
        **machine(framework),
    )
    used = 0
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "run":
            compiled = compilations()
            start = time.perf_counter()
            outputs = settled(work.run())
            tell(seconds=time.perf_counter() - start, compilations=compilations() - compiled)
            used = max(_peak(framework) - before, 0)  # here, for larger batches than the case's own come later
        elif order["do"] == "grow":
            grown = case.sides[name](order["factor"] * case.batch)
            settled(grown.run())
            tell(seconds=min(_timed(settled, grown.run) for _ in range(order["times"])))
        else:
            finite = bool(np.isfinite(work.outputs(outputs)).all())  # the first one's has been looked at
            peak = _peak_flops(case.settings.get("precision")) if framework == "jax" else None
            tell(finite=finite, peak_bytes=used, peak_flops=peak)
            return


def _settled(framework: str, outputs: Any) -> Any:
    """The outputs, when the device has computed all of them."""
    if framework == "jax":
        import jax

        jax.block_until_ready(outputs)
    elif _cuda():
        sys.modules["torch"].cuda.synchronize()
    return outputs


def machine(framework: str) -> dict[str, Any]:
    """What this side runs on, and how many cores and threads it would use."""
    found: dict[str, Any] = {"device": record.processor(), "devices": 1}
    if framework == "jax":
        import jax

        if jax.default_backend() != "cpu":
            found = {"device": jax.devices()[0].device_kind, "devices": len(jax.devices())}
    elif framework == "torch":
        torch = sys.modules["torch"]
        found["torch_threads"] = torch.get_num_threads()
        if _cuda():
            found["device"] = torch.cuda.get_device_name(0)
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return found


def _cuda() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_available()


def bind(threads: int) -> None:
    """Leaves this process so many of its cores. To be called before any library counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))


def _timed(settled: Callable[[Any], Any], run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    settled(run())
    return time.perf_counter() - start


def compilation_counter() -> Callable[[], int]:
    """How many programs JAX has compiled from here on."""
    from jax import monitoring

    count = 0

    def heard(event: str, *_: Any, **__: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    monitoring.register_event_duration_secs_listener(heard)
    return lambda: count


def _resident() -> int:
    """Memory of the process now, bytes; of an accelerator nothing is used yet."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _peak(framework: str) -> int:
    """The most memory used until now, bytes: with the accelerator's, where there is one."""
    if framework == "jax":
        import jax

        told = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in told:
            return int(told["peak_bytes_in_use"]) + _resident()
    elif _cuda():
        return int(sys.modules["torch"].cuda.max_memory_allocated()) + _resident()
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        return 0


def _peak_flops(precision: Any) -> float | None:
    """At the precision that a case names."""
    if precision not in ("float32", "bfloat16"):
        return None
    import jax.numpy as jnp

    from benchmarks import peak

    return peak.matmul_flops(jnp.dtype(precision))


if __name__ == "__main__":
    main(sys.argv[1:])
