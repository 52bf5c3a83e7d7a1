"""The tests see eight virtual CPU devices, so that every placement runs on any machine."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the tests' time is compilation; a third of that is saved by machine code that LLVM has not polished.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax

jax.config.update("jax_num_cpu_devices", 8)

pytest_plugins = ["tests.served_data_sets"]
