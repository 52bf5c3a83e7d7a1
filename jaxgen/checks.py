"""Bad input is refused where it enters: by name, with what came and what was expected.

These run on shapes and dtypes, which are known while tracing, so a compiled function pays nothing for them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def shape(name: str, x: Any, expected: Sequence[int | None]) -> None:
    """Raises ValueError unless ``x`` has the ``expected`` shape; None stands for any length."""
    came = jnp.shape(x)
    if len(came) != len(expected) or any(e is not None and e != c for c, e in zip(came, expected, strict=True)):
        wanted = "[" + ", ".join("any" if e is None else str(e) for e in expected) + "]"
        raise ValueError(f"`{name}` must have shape {wanted}, got {list(came)}")


def same_shape(name: str, x: Any, other_name: str, other: Any) -> None:
    """Raises ValueError unless ``x`` and ``other`` have one shape."""
    if jnp.shape(x) != jnp.shape(other):
        raise ValueError(
            f"`{name}` must have the shape of `{other_name}`, {list(jnp.shape(other))}, got {list(jnp.shape(x))}"
        )


def rank_at_least(name: str, x: Any, rank: int) -> None:
    """Raises ValueError unless ``x`` has at least ``rank`` axes."""
    if jnp.ndim(x) < rank:
        raise ValueError(f"`{name}` must have at least {rank} axes, got shape {list(jnp.shape(x))}")


def floating(name: str, x: Any) -> None:
    """Raises TypeError unless ``x`` is of a floating dtype: integer images are the most frequent silent mistake."""
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating-point (images, for one, in [-1, 1]), got dtype {dtype}")


def key(name: str, x: Any) -> None:
    """Raises TypeError unless ``x`` is a typed PRNG key (or an array of them)."""
    if not isinstance(x, jax.Array) or not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        came = f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
        raise TypeError(f"`{name}` must be a typed PRNG key, jax.random.key(seed), got {came}")


def interval(name: str, x: Any, low: float, high: float) -> None:
    """Raises ValueError unless every value of ``x`` lies in [low, high] (NaN does not).

    Values that are not known yet, because a function is being traced, are not looked at.
    """
    if isinstance(x, jax.core.Tracer):
        return
    values = np.asarray(x)
    if values.size and not (np.all(values >= low) and np.all(values <= high)):
        raise ValueError(f"`{name}` must lie in [{low:g}, {high:g}], got {_range(values)}")


def finite(name: str, x: Any) -> None:
    """Raises ValueError unless every value of ``x`` is finite; traced values are not looked at."""
    if not isinstance(x, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(x))):
        raise ValueError(f"`{name}` must be finite, got {_range(np.asarray(x))}")


def positive(name: str, x: Any) -> None:
    """Raises ValueError unless every value of ``x`` is finite and above 0; traced values are not looked at."""
    if isinstance(x, jax.core.Tracer):
        return
    values = np.asarray(x)
    if not (np.all(values > 0) and np.all(np.isfinite(values))):
        raise ValueError(f"`{name}` must be above 0 and finite, got {_range(values)}")


def positive_integer(name: str, x: Any) -> None:
    """Raises ValueError unless ``x`` is an integer of at least 1."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer) or x < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {x!r}")


def _range(values: np.ndarray) -> str:
    if values.ndim == 0:
        return f"{values:g}"
    if not np.all(np.isfinite(values)):
        return "values that are not finite"
    return f"values from {values.min():g} to {values.max():g}"
