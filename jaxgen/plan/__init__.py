"""Training steps and samplers compiled for TPUs that are not there: whether they fit, and what they will wait for.

    slice = plan.topology("v6e:16x16")
    program = plan.step(method, place.mesh(slice.devices), batch_shapes)

What this proves: the program compiles for these chips; how much memory each will need; which collectives it runs, over
how many bytes; that the state is updated in place and nothing waits for the host. It is what Google's compiler, libtpu,
says of the very program that `jaxgen.place` would run there.

What it does not prove: speed, and that numbers come out right. No TPU takes part. Times are bounds from published
numbers of the chips (`roofline`), and what is made of them are estimates, labelled so.

* `topology`: slices by name.
* `step`, `rows`: what `place.jit` and `place.rows` compile, compiled for them; a `Program` of facts.
* `roofline`, `estimate`: the time that operations, memory and collectives need, and what it may reach.
* `Plan`, `table`, `record`, `remedies`: for people, as JSON, and what helps where it does not fit.
* `flops.counted`, `hlo.read`: operations as traced, and what a compiled program's text says.
"""

from jaxgen.plan import flops, hlo
from jaxgen.plan.program import Effort, Program, rows, step
from jaxgen.plan.report import Plan, record, remedies, table
from jaxgen.plan.roofline import EFFICIENCY, Estimate, Roofline, estimate, roofline
from jaxgen.plan.topology import FAMILIES, Chip, Topology, topology

__all__ = [
    "EFFICIENCY",
    "FAMILIES",
    "Chip",
    "Effort",
    "Estimate",
    "Plan",
    "Program",
    "Roofline",
    "Topology",
    "estimate",
    "flops",
    "hlo",
    "record",
    "remedies",
    "roofline",
    "rows",
    "step",
    "table",
    "topology",
]
