"""Where arrays live: one training method, placed on one device or on many, on one host or on several.

A `Method` is written for the global batch and knows of no device.

* ``mesh``: devices along the axes "data", "fsdp" and "tensor"; ``devices``: those of a platform.
* ``jit``: the method compiled over a mesh, where XLA inserts the collectives; ``pmap``: for code that is built on
  ``jax.pmap``, with ``first_copy`` of its state. Either gives the parameters that a single device would, to the
  rounding of sums.
* ``rows``: a function of something shared and of rows, such as a sampler, over a mesh; ``gathered``: its results on the
  host.
* ``Rule``, ``TRANSFORMER``: which leaf of the state is split how, as data; ``explain``: what came of it, one
  `Leaf` each; ``state_shapes``: the same, for a checkpoint to be restored into.
* ``share``: which rows of the batch a process loads where there are several.
"""

from jaxgen.place.compiled import gathered, jit, rows
from jaxgen.place.mapped import first_copy, pmap
from jaxgen.place.meshes import devices, mesh, row_parts, share
from jaxgen.place.rules import TRANSFORMER, Leaf, Rule, explain, state_shapes

__all__ = [
    "TRANSFORMER",
    "Leaf",
    "Rule",
    "devices",
    "explain",
    "first_copy",
    "gathered",
    "jit",
    "mesh",
    "pmap",
    "row_parts",
    "rows",
    "share",
    "state_shapes",
]
