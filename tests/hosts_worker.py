"""What test_hosts.py runs in each of several processes: a little training, with checkpoints."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen import data, hosts, loop, place, train
from jaxgen.checkpoint import Checkpoints
from jaxgen.log import Log

STEPS = int(os.environ.get("STEPS", "120"))


def method():
    def loss(params, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        return jnp.mean((jnp.tanh(batch["x"] @ params["in"] + noise) @ params["out"] - batch["x"]) ** 2), {}

    def init(key):
        one, other = jax.random.split(key)
        return {"in": jax.random.normal(one, (64, 64)) / 8, "out": jax.random.normal(other, (64, 64)) / 8}

    return train.minimise(loss, optax.adam(0.01), init, average=train.ema(0.9))


def main(workdir, coordinator="", processes="1", process="0"):
    if coordinator:
        hosts.join(coordinator, processes=int(processes), process=int(process), timeout=60)
    mesh, ours = place.mesh(fsdp=2), method()
    arrays = {"x": np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)}
    (number,), parts = place.share(mesh)
    batches = data.batches(arrays, batch_size=16, seed=1, process_index=number, process_count=parts)
    with Checkpoints(Path(workdir) / "checkpoints") as checkpoints:
        state = loop.run(
            place.jit(ours, mesh, rules=[("w", (None, "fsdp"))]), batches, key=jax.random.key(0), steps=STEPS,
            like=place.state_shapes(ours, mesh), checkpoints=checkpoints, save_every=40,
            log=Log(Path(workdir) / "metrics.jsonl" if hosts.first() else None), log_every=10,
        )  # fmt: skip
    final = place.gathered(state)
    if hosts.first():
        np.savez(Path(workdir) / "final.npz", **{str(i): leaf for i, leaf in enumerate(jax.tree.leaves(final))})


if __name__ == "__main__":
    main(*sys.argv[1:])
