"""Functions in files: a sampler, say, with its parameters, to be run elsewhere and later without the code that made it.

    export.save("digits.jaxgen", draw, params, key, table, labels)        # where the network's code is
    draw = export.load("digits.jaxgen")                                   # where JAX is, and this module
    images = draw(key, table, labels)

The file holds a program for each platform, as `jax.export` writes it, and the parameters. What is an argument can be
another one in every call: a Table, and with it the solver, its steps and eta; labels; the scale of guidance. So one
file is every sampler, and none compiles anything anew.

How long it lasts: JAX promises to run a program with versions up to 6 months newer than the one that wrote it, and up
to 3 weeks older (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees). To keep a model for
longer keep its checkpoint too. The parameters can always be read: the file is one of safetensors.

What it computes is what the function does: on a CPU bit by bit, with the same JAX on the same machine and lengths that
are fixed; to rounding with symbolic ones.
"""

from jaxgen.export.program import Program, load, save
from jaxgen.export.trees import Leaf

__all__ = ["Leaf", "Program", "load", "save"]
