"""Draws images of given classes in batches of one size, by one compiled program."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgen import place, random
from jaxgen.typing import Array, Key, Params


class Draws:
    """Draws from a network; another seed, number of images or ``how`` compiles nothing."""

    def __init__(self, draw: Callable[[Params, Any, Key, Array], Array], mesh: Mesh) -> None:
        """Prepares ``draw(params, how, keys [batch], labels [batch]) -> images``; ``how`` is any tree of arrays."""
        self._devices = mesh.size
        self._draw = place.rows(lambda shared, rows: draw(*shared, *rows), mesh)

    def __call__(self, params: Params, labels: np.ndarray, how: Any, *, seed: int, batch_size: int = 100) -> np.ndarray:
        """Draws one image [height, width, channels] in [-1, 1] per label [n]."""
        labels = np.asarray(labels, np.int32)
        batch_size = -(-batch_size // self._devices) * self._devices
        padded = np.append(labels, np.zeros(-len(labels) % batch_size, np.int32))
        drawn = []
        for start in range(0, len(padded), batch_size):
            keys = random.example_keys(jax.random.key(seed), batch_size, start=start)
            drawn.append(self._draw((params, how), (keys, padded[start : start + batch_size])))
        return np.concatenate([np.asarray(part) for part in drawn])[: len(labels)]
