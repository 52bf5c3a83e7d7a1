"""What is written down: one line of JSON for each side of a case, with all that its number depends on."""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
PACKAGES = (
    "jaxgen",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "torch",
    "diffusers",
    "foolbox",
    "torchattacks",
    "lightly",
    "scipy",
)
FLAGS = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_NUM_CPU_DEVICES",
    "GLIBC_TUNABLES",
)

Kind = Literal["measured", "estimate"]
"""Whether a clock gave the numbers, or a model of a machine that was not there."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a number depends on beside the work.

    Attributes:
        device: the accelerator's name, or the processor's.
        devices: how many of them a side could use.
        threads: cores that each side was bound to.
        versions: of the packages that were there.
        flags: environment variables that compilers read.
        commit: of this repository, with "+" where files had been changed; "" where it is unknown.
        python: its version.
        load: the machine's load average before the first turn and after the last.
        time: when, UTC.
    """

    device: str
    devices: int
    threads: int
    versions: Mapping[str, str]
    flags: Mapping[str, str]
    commit: str
    python: str
    load: tuple[float, float]
    time: str

    def comparable(self) -> tuple[Any, ...]:
        """What has to be equal for two numbers to be compared."""
        return self.device, self.devices, self.threads, tuple(sorted(self.flags.items()))


@dataclasses.dataclass(frozen=True)
class Record:
    """One side of one case.

    Attributes:
        suite: its benchmark's name.
        case: the case's.
        side: the side's.
        settings: the case's.
        config: a digest of suite, case, settings and batch: what is compared over time has the same one.
        unit: what there are ``batch`` of.
        batch: how many in a run.
        phases: seconds of "build", "lower", "compile", where they are known, and of the "first" run.
        seconds: of every timed run, in their order.
        p50: quantiles of them.
        p90: likewise.
        p99: likewise.
        low: where the median lies with a confidence of 95 %: from here
        high: to here.
        per_second: units per second at the median.
        ratio: seconds of this side to the first one's, run by run: the median, or None of the first side.
        ratio_low: its interval.
        ratio_high: likewise.
        alike: share of the output's numbers that agree with the first side's.
        flops: of a run, counted from the model; None where unknown.
        compiler_flops: of a run, as the compiler counts them.
        peak_flops: per second, of matrix products measured in the same process.
        utilisation: flops / p50 / peak_flops.
        peak_bytes: memory beyond what the process had before it built anything.
        temporary_bytes: of a run, as the compiler plans it.
        context: what else it depends on.
        quality: scores, by name, where the work has any.
        kind: "measured" or "estimate".
        schema: the version of all this.
    """

    suite: str
    case: str
    side: str
    settings: Mapping[str, Any]
    config: str
    unit: str
    batch: int
    phases: Mapping[str, float]
    seconds: tuple[float, ...]
    p50: float
    p90: float
    p99: float
    low: float
    high: float
    per_second: float
    context: Context
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    alike: float | None = None
    flops: float | None = None
    compiler_flops: float | None = None
    peak_flops: float | None = None
    utilisation: float | None = None
    peak_bytes: int | None = None
    temporary_bytes: int | None = None
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kind: Kind = "measured"
    schema: int = SCHEMA

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is a number of."""
        return self.suite, self.config, self.side


def digest(*parts: Any) -> str:
    """Twelve digits that tell configurations apart."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """This repository's commit, with "+" where files have been changed."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def flags() -> dict[str, str]:
    """Of the environment's variables those that compilers read."""
    return {name: os.environ[name] for name in FLAGS if name in os.environ}


def append(path: Path, record: Record) -> None:
    """Adds a line to a file, which is made with its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dataclasses.asdict(record), allow_nan=False)
    with path.open("a") as file:
        file.write(line + "\n")


def read(path: Path) -> list[Record]:
    """The records of a file, or of a folder's ``*.jsonl``: the newest of each side of each case.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a line is no record, or of another schema.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    files: Iterable[Path] = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    newest: dict[tuple[Kind, tuple[str, str, str]], Record] = {}
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            record = _parsed(line, f"{file}:{number}")
            newest[record.kind, record.key] = record
    return list(newest.values())


def _parsed(line: str, place: str) -> Record:
    try:
        fields = json.loads(line)
        if fields["schema"] != SCHEMA:
            raise ValueError(f"{place} is of schema {fields['schema']}, this reads {SCHEMA}")
        fields["context"] = Context(**{**fields["context"], "load": tuple(fields["context"]["load"])})
        return Record(**{**fields, "seconds": tuple(fields["seconds"])})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is no record: {error}") from error
