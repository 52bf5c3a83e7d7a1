"""Training on images: where a run is placed, what says that a directory is its own, and going on from a checkpoint."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from experiments.image_settings import Settings
from jaxgen import checkpoint, data, hosts, log, loop, nets, place, profile, run, train
from jaxgen.typing import Batch, Params

# Where a run's files are, what it runs on, and what is measured and drawn of it, do not change what it computes.
NOT_IDENTITY = (
    "workdir", "data_dir", "platform", "tensor", "coordinator", "processes", "process", "log_every", "save_every",
    "profile", "grid_every", "judged_steps", "features",
    "label_shares", "label_draws", "neighbours", "measured", "pgd_steps", "curve", "auto_steps", "queries",
    "defended", "purify_noise", "purify_steps", "aware_steps", "aware_draws", "smooth_noise", "smooth_draws",
)  # fmt: skip

CALIBRATED, CALIBRATED_AT_ONCE = 10_000, 500  # images, at most

AnySettings = TypeVar("AnySettings", bound=Settings)


def mesh_for(config: Settings) -> Mesh:
    """The devices that the settings ask for, those of all hosts; meets the other hosts if there are any.

    Raises:
        ValueError: there are none such, or the batch does not divide among them.
        OSError: other hosts are missing.
    """
    hosts.join(config.coordinator, processes=config.processes, process=config.process)
    mesh = place.mesh(place.devices(config.platform), fsdp=config.fsdp, tensor=config.tensor)
    if config.batch_size % (parts := place.row_parts(mesh)):
        raise ValueError(f"`batch_size` must divide among {parts} devices, got {config.batch_size}")
    return mesh


def own(mesh: Mesh) -> Mesh:
    """Those of a mesh's devices that are this host's: what one host alone measures with."""
    return place.mesh(mesh.local_devices)


def opened_log(path: Path | None) -> log.Log:
    """The run's log, to a file if there is a ``path``; of several hosts the first alone tells and writes."""
    return log.Log(path) if hosts.first() else log.Log(None, out=io.StringIO())


def trained(
    config: Settings,
    method: train.Method,
    mesh: Mesh,
    like: Any,
    batches: Callable[[int], Batch],
    records: log.Log,
    every: Sequence[loop.Every] = (),
) -> Any:
    """The state after the last step, from the last checkpoint on if there is one.

    Args:
        config: the settings.
        method: how to train.
        mesh: from `mesh_for`.
        like: ``place.state_shapes(method, mesh)``.
        batches: step -> batch.
        records: where metrics go.
        every: what else to do, and when.
    """
    learners = [leaf for leaf in jax.tree.leaves(like, is_leaf=_is_learner) if _is_learner(leaf)]
    count = sum(leaf.size for learner in learners for leaf in jax.tree.leaves(learner.params))
    records.say(f"{count:,} parameters on {mesh.size} {mesh.devices.flat[0].platform} device(s)")
    recorded = None
    if config.profile is not None:
        recorded = profile.Profile(profile.window(config.profile, steps=config.steps), f"{config.workdir}/profile")
    with checkpoint.Checkpoints(Path(config.workdir) / "checkpoints") as checkpoints:
        if (done := checkpoints.latest()) is not None:
            records.say(f"{config.workdir} holds step {done} of {config.steps}: going on from there")
        return loop.run(
            place.jit(method, mesh),
            batches,
            key=jax.random.key(config.seed),
            steps=config.steps,
            like=like,
            checkpoints=checkpoints,
            save_every=config.save_every,
            log=records,
            log_every=config.log_every,
            every=every,
            profile=recorded,
        )


def restored(workdir: str | Path, method: train.Method, mesh: Mesh) -> Any:
    """The state in the last checkpoint of the run in ``workdir``.

    Raises:
        OSError: there is none.
    """
    with checkpoint.Checkpoints(Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore(place.state_shapes(method, mesh))


def identity(config: Settings, shape: Sequence[int], classes: int) -> dict[str, Any]:
    """What makes a run the one that it is, for `jaxgen.run.claim`."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IDENTITY}
    # Over how many devices the state is split does not change it either: runs say 1, as those did that had no choice.
    settings["fsdp"] = 1
    # Runs from before there was a choice do not have these.
    if settings.get("network") == "unet":
        del settings["network"], settings["dit"]
    if settings["image_size"] is None:
        del settings["image_size"]
    return {**settings, "image_shape": list(shape), "classes": classes}


def recalled(
    workdir: str | Path, settings: type[AnySettings], name: str | None = None
) -> tuple[AnySettings, tuple[int, ...], int]:
    """The settings of the run in ``workdir``, the shape of its images and how many classes they have.

    Args:
        workdir: the directory.
        settings: what the experiment's are.
        name: of the experiment; None for any that has such settings.

    Raises:
        ValueError: the run is another experiment's, or of a version whose settings this one does not read.
        OSError: there is no run in the directory.
    """
    found = run.read_config(workdir)
    if name not in (None, found["experiment"]):
        raise ValueError(f"`workdir` {workdir} is a run of {found['experiment']!r}, not of {name!r}")
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found["config"].items()}
    try:
        defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(settings)}
        for field, value in kept.items():
            if isinstance(value, dict):
                kept[field] = type(defaults[field])(**value)
        shape: tuple[int, ...] = kept.pop("image_shape")
        classes: int = kept.pop("classes")
        return settings(**{**kept, "workdir": str(workdir)}), shape, classes
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{workdir} is a run of {found['experiment']!r} by jaxgen {found['jaxgen']}, whose settings are not those "
            f"of this experiment or of this version ({error})"
        ) from error


def calibrated(network: nn.Module, params: Params, images: np.ndarray) -> Params:
    """Parameters for inference; BatchNorm takes its statistics from training images, uint8."""
    apply = jax.jit(network.apply, static_argnames="mutable")
    some = images[:CALIBRATED]
    parts = (data.to_unit(some[i : i + CALIBRATED_AT_ONCE]) for i in range(0, len(some), CALIBRATED_AT_ONCE))
    return nets.calibrate(apply, params, parts)


def calibrated_shapes(network: nn.Module, params: Params, images: jax.ShapeDtypeStruct) -> Params:
    """The shapes of what `calibrated` makes of parameters of these shapes."""
    found = jax.eval_shape(lambda params, x: nets.calibrate(network.apply, params, [x]), params, images)
    return {**found, **params}


def _is_learner(leaf: Any) -> bool:
    return isinstance(leaf, train.Learner)
