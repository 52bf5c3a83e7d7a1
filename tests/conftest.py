"""The tests see eight virtual CPU devices, so that every placement runs on any machine."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the tests' time is compilation; a third of that is saved by machine code that LLVM has not polished.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

pytest_plugins = ["tests.served_data_sets"]

# Each compiled program holds memory maps. Linux grants a process 65,530 of them, and without one more LLVM crashes.
_MAPS, _MANY = Path("/proc/self/maps"), 20_000


@pytest.fixture(autouse=True, scope="module")
def _programs_end_with_their_module():
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()
        gc.collect()
