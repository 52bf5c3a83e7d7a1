"""The machine's peak: what its matrix products reach, measured where a side has just been."""

import time

import jax
import jax.numpy as jnp

SIZES = {"cpu": (384, 768, 1536), "gpu": (4096, 8192), "tpu": (4096, 8192)}
REPEATS = 15


def matmul_flops(dtype: jnp.dtype = jnp.float32) -> float:
    """The most floating-point operations per second of a square matrix product on all devices at once.

    Args:
        dtype: of its factors.

    Returns:
        Operations per second, a product and a sum being two: of the quickest of fifteen runs of the quickest size.
    """
    devices = jax.devices()
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype))

    def reached(size: int) -> float:
        pairs = [(jax.device_put(jnp.ones((size, size), dtype), d),) * 2 for d in devices]

        def run() -> float:
            start = time.perf_counter()
            jax.block_until_ready([product(*pair) for pair in pairs])
            return time.perf_counter() - start

        run()
        return 2 * size**3 * len(devices) / min(run() for _ in range(REPEATS))

    return max(reached(size) for size in SIZES.get(devices[0].platform, (4096,)))
