"""Settings that image experiments share, whatever they train, and what those that generate can be asked to draw."""

import dataclasses
from typing import Literal

from jaxgen import checks, profile

Platform = Literal["cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a training run."""

    workdir: str
    """Directory of the run: settings, checkpoints, metrics, pictures. Run again with the same one to go on."""
    dataset: str
    """Data set: "digits" (embedded) or any of tensorflow-datasets' with "image" and "label"."""
    data_dir: str | None = None
    """Where data sets are kept; tensorflow-datasets' own choice by default."""
    seed: int = 0
    """Seed of everything random."""
    platform: Platform | None = None
    """Devices to run on; JAX's choice by default."""
    fsdp: int = 1
    """Over how many devices the state is split; the batch is split over them, too."""
    tensor: int = 1
    """Over how many devices each layer of a transformer is split; a divisor of its heads."""
    coordinator: str | None = None
    """Of several hosts, where JAX does not find out by itself (it does on Cloud TPU and under Slurm): HOST:PORT of the
    first, on which it will serve. The run's directory must be one that all hosts share."""
    processes: int | None = None
    """How many hosts there are, with `coordinator`."""
    process: int | None = None
    """Which of them this is, from 0, with `coordinator`."""

    steps: int = 4000
    """Training steps."""
    batch_size: int = 128
    """Images per step, over all devices."""
    microbatches: int = 1
    """Parts that each batch is split into, one after the other, to save memory."""
    learning_rate: float = 2e-3
    """Learning rate: its largest, or of a GAN the first."""
    ema: float = 0.999
    """Decay of the average of the parameters, which is what serves after training."""
    image_size: int | None = None
    """Side to which images are cropped and shrunk as they are read, for data sets that do not fit into memory."""
    bfloat16: bool = False
    """Whether to compute in bfloat16; parameters stay float32."""

    log_every: int = 20
    """Steps between records of metrics."""
    save_every: int = 500
    """Steps between checkpoints."""
    profile: str | None = None
    """Steps to record with JAX's profiler, START:STOP as in 100:110, counted from 0; the recording is in the run's
    directory, for XProf to show."""


@dataclasses.dataclass(frozen=True)
class Generating(Settings):
    """Settings of a training run of what makes images."""

    flip: bool = False
    """Whether training images are mirrored at random."""
    grid_every: int = 500
    """Steps between grids of samples."""
    judged: int = 1000
    """Samples that the judge measures at the end; 0 for no judge."""
    judge_steps: int = 1500
    """Training steps of the judge."""
    features: str | None = None
    """Directory of a contrastive run on images of this shape, whose encoder's features serve for the Fréchet distance,
    precision and recall; the judge's by default."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Options of the command ``sample``."""

    workdir: str
    """Directory of the run."""
    out: str | None = None
    """File to write: .png for a grid, .npz for arrays "image" (float32 in [-1, 1]) and "label"; by default drawn.png
    in the run's directory."""
    classes: tuple[int, ...] = ()
    """Classes to draw, in turn; all of them by default."""
    count: int = 100
    """How many images."""
    seed: int = 0
    """Seed of the noise."""
    columns: int = 10
    """Images per row of the grid."""
    batch_size: int = 100
    """Images at a time; another size compiles anew."""
    platform: Platform | None = None
    """Devices to run on; JAX's choice by default."""


def check(config: Settings) -> None:
    """Raises ValueError where a setting is out of range or does not fit another."""
    for field in ("steps", "batch_size", "microbatches", "log_every", "save_every"):
        checks.positive_integer(field, getattr(config, field))
    checks.positive("learning_rate", config.learning_rate)
    if not 0 <= config.ema < 1:
        raise ValueError(f"`ema` must lie in [0, 1), got {config.ema}")
    if config.image_size is not None:
        checks.positive_integer("image_size", config.image_size)
    if config.batch_size % config.microbatches:
        raise ValueError(f"`microbatches` must divide `batch_size`, {config.batch_size}, got {config.microbatches}")
    if config.profile is not None:
        profile.window(config.profile, steps=config.steps)


def check_generating(config: Generating) -> None:
    """Raises ValueError where a setting is out of range or does not fit another."""
    check(config)
    for field in ("judge_steps", "grid_every"):
        checks.positive_integer(field, getattr(config, field))
    if config.judged != 0 and config.judged < 4:
        raise ValueError(f"`judged` must be 0 or at least 4, to have neighbours among the samples, got {config.judged}")
    if config.judged and config.image_size is not None:
        raise ValueError(f"`judged` must be 0 with an `image_size`: the judge needs all images, got {config.judged}")
    if config.features is not None and not config.judged:
        raise ValueError("`features` are the judge's, got a directory and `judged` 0")


def check_sample(options: Sample) -> None:
    """Raises ValueError where an option is out of range."""
    for field in ("count", "columns", "batch_size"):
        checks.positive_integer(field, getattr(options, field))
    if options.out is not None and not options.out.endswith((".png", ".npz")):
        raise ValueError(f"`out` must be a .png or .npz file, got {options.out!r}")
