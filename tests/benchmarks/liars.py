"""Sides that behave in all the ways that a benchmark has to refuse, and honest ones."""

import functools
import os
import time

import numpy as np

from benchmarks.case import Case, Work

RESULT = np.linspace(-1, 1, 50)


def sleeping(batch, milliseconds=2.0, result=RESULT, **fields):
    def run():
        time.sleep(milliseconds * batch / 1e3)
        return result

    return Work(run, **fields)


def large(batch):
    """8 MB an example."""

    def run():
        time.sleep(batch / 500)
        return float(np.ones(2**20 * batch).sum()) * RESULT

    return Work(run, outputs=lambda out: RESULT)


def at_once(batch):
    return Work(lambda: RESULT)


def last_run_is_nan(batch):
    runs = iter([RESULT] * 4)

    def run():
        time.sleep(batch / 500)
        return next(runs, RESULT * np.nan)

    return Work(run)


def on_all_cores(batch):
    os.sched_setaffinity(0, range(os.cpu_count()))
    return sleeping(batch)


def compiling(batch):
    import jax
    import jax.numpy as jnp

    sizes = iter(range(1, 1000))

    def run():
        jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(next(sizes))))
        time.sleep(batch / 100)
        return jnp.asarray(RESULT)

    return Work(run)


def leaving(batch):
    raise SystemExit(3)


def failing(batch):
    raise ValueError("of all things")


SIDES = {
    "honest": functools.partial(sleeping, quality=lambda result: {"largest": float(result.max())}),
    "slower": functools.partial(sleeping, milliseconds=6.0),
    "large": large,
    "at once": at_once,
    "not finite": functools.partial(sleeping, result=np.full(50, np.inf)),
    "not finite later": last_run_is_nan,
    "other work": functools.partial(sleeping, result=RESULT + 0.01),
    "other shape": functools.partial(sleeping, result=RESULT[:-1]),
    "on all cores": on_all_cores,
    "compiling": compiling,
    "leaving": leaving,
    "failing": failing,
}


def cases(quick):
    return [
        Case(
            name="sleep",
            settings={"network": "none", "precision": "float32"},
            sides=SIDES,
            batch=2,
            libraries={name: ("numpy",) for name in SIDES if name != "compiling"},
            flops=lambda: 10.0,
        )
    ]
