"""States gathered in pieces, as a run of padded batches gathers them."""

import numpy as np


def gathered(state, update, x, sizes, *, rows):
    """The state of all rows of x, in pieces of these sizes, each padded to ``rows`` with rows that are not to count."""
    start = 0
    for size in sizes:
        piece = np.full((rows, x.shape[1]), np.nan, np.float32)
        piece[:size] = x[start : start + size]
        state, start = update(state, piece, mask=np.arange(rows) < size), start + size
    assert start == len(x)
    return state
