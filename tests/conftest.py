"""The tests see eight virtual CPU devices, so that every placement runs on any machine."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)

pytest_plugins = ["tests.served_data_sets"]
