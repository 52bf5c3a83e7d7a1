"""What a network expects, against what came."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_SHOWN = 5  # names that an error lists before it counts the others


def match(what: str, expected: Mapping[str, tuple[int, ...]], came: Mapping[str, Any]) -> None:
    """Raises ValueError unless the arrays have the expected names and shapes."""
    if missing := expected.keys() - came.keys():
        raise ValueError(f"{what} must be those of the network, but these are missing: {listed(missing)}")
    if unexpected := came.keys() - expected.keys():
        raise ValueError(f"{what} must be those of the network, but it has no {listed(unexpected)}")
    for name, shape in expected.items():
        if np.shape(came[name]) != shape:
            raise ValueError(f"{what} must have {name} of shape {list(shape)}, got {list(np.shape(came[name]))}")


def listed(names: Iterable[str]) -> str:
    """Names for an error."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
