"""Data, host side: whole sets in memory, or records by index, and batches that are functions of the step.

* ``load``: a data set by name, as NumPy arrays. ``"digits"``, 1,797 real handwritten digits, needs no
  network.
* ``source``: the records of a data set by index, for one that does not fit into memory.
* ``described``: what records hold, of a data set that need not be there.
* ``batches``, ``stream``: ``step -> batch``, from arrays and from a source. There is no iterator and hence no
  iterator state to save: the batch of a step is a pure function of (data, seed, step), so resuming a run is
  exact.
* ``prefetched``: the same function, with the next steps' batches made meanwhile.
* ``to_unit``, ``to_uint8``, ``unit_images``: images between uint8 and float32 in [-1, 1]; ``centred_square``:
  images of any size to one.

TensorFlow is not needed, neither to prepare a data set nor to read it.

tensorflow-datasets, grain and scikit-learn are imported inside the functions that need them: together they
take seconds, and a program that prints its ``--help`` needs none of them.
"""

from jaxgen.data.images import centred_square, to_uint8, to_unit, unit_images
from jaxgen.data.records import Source, described, load, source
from jaxgen.data.steps import Batches, batches, prefetched, stream

__all__ = [
    "Batches",
    "Source",
    "batches",
    "centred_square",
    "described",
    "load",
    "prefetched",
    "source",
    "stream",
    "to_uint8",
    "to_unit",
    "unit_images",
]
