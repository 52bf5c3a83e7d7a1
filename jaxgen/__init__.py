"""Generative modelling in JAX: pure functions that compose.

Nothing is imported here, so that ``import jaxgen`` costs nothing; import the room you need:

* ``jaxgen.diffusion``: paths, predictions, losses, samplers as tables.
* ``jaxgen.metrics``: functions of two sets of features.
* ``jaxgen.nets``: Flax modules.
* ``jaxgen.train``, ``jaxgen.place``: losses into steps, steps onto devices.
* ``jaxgen.plan``: the same compiled for TPUs by name, without one.
* ``jaxgen.data``, ``jaxgen.checkpoint``, ``jaxgen.loop``, ``jaxgen.cli``: the host's side of a run.
* ``jaxgen.export``: functions in files, run without their code.
* ``jaxgen.testing``: models whose answers are known in closed form.
"""

__version__ = "0.1.0"
