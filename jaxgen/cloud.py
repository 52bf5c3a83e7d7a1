"""Runs on Cloud TPU, from the machine in front of you: each command is a few calls of Google's ``gcloud``.

    python -m jaxgen.cloud                                           what there is, and costs
    python -m jaxgen.cloud create --topology v5e:4x4                 ask for TPUs
    python -m jaxgen.cloud wait                                      until they are there
    python -m jaxgen.cloud install                                   this checkout, on every worker
    python -m jaxgen.cloud doctor                                    is everything as a run needs it?
    python -m jaxgen.cloud run -- experiments.NAME --option value    start a run
    python -m jaxgen.cloud status, logs, stop                        look at it; have it save and end
    python -m jaxgen.cloud profile --workdir DIRECTORY               fetch what --profile recorded
    python -m jaxgen.cloud delete                                    give the TPUs back

With ``--dry-run`` a command prints what it would call, to be read or to be pasted, and calls nothing. Zone and project
are gcloud's own unless they are given (``gcloud config set compute/zone ZONE``). docs/tpu.md goes through all of it.

A slice has several workers, machines with some of the chips each; one program runs on all, and so does every command.
The run is a service of systemd named jaxgen: it outlives the ssh that started it, there is one at a time, and ``stop``,
as the shutdown before a preemption, is a SIGTERM, at which it saves.
"""

import dataclasses
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxgen import cli
from jaxgen.plan.topology import parsed

# By family: the software that a machine starts with, and what precedes the number of cores in the name of a type; v4 is
# asked for by its shape. docs.cloud.google.com/tpu/docs/runtimes and /tpu/docs/{v4,v5e,v5p,v6e}, read in November 2026.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
TYPES = {"v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}  # and cores to a chip
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": DEEP}  # a number of chips stands for one shape

EVERY_WORKER = ("--node=all", "--worker=all")
ARCHIVE = "dist/jaxgen.tar.gz"
INSTALL = (
    "rm -rf jaxgen-source && mkdir jaxgen-source && tar -xzf jaxgen.tar.gz -C jaxgen-source"
    # The images' own Python may be older than jaxgen's oldest.
    " && python3 -m pip install --quiet --user uv"
    " && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 jaxgen-env"
    " && ~/.local/bin/uv pip install --quiet --python jaxgen-env/bin/python -e './jaxgen-source[tpu]'"
)
# mixed: the program alone is asked to stop, and its workers end with it.
RUN = (
    'sudo systemctl reset-failed jaxgen 2>/dev/null; sudo systemd-run --unit=jaxgen --uid="$(id -u)" --gid="$(id -g)"'
    ' --working-directory="$HOME" --property=KillMode=mixed --property=TimeoutStopSec=600'
)
JOURNAL = "sudo journalctl --no-pager --output=cat"
NAMED = 'sed -u "s/^/$(hostname): /"'  # each line by its worker
POLL = 20.0  # seconds
PATIENCE = 5  # failures in a row, in a wait of days
PATTERNS = {
    "name": r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
    "zone": r"[a-z]+-[a-z]+\d+-[a-z]",
    "project": r"[a-z][-a-z0-9:.]+",
}

Argv = list[str]


@dataclasses.dataclass(frozen=True)
class Where:
    """Lists the queued resources."""

    zone: str | None = None
    """Zone; gcloud's own by default."""
    project: str | None = None
    """Project; gcloud's own by default."""
    dry_run: bool = False
    """Whether to print the commands only, one a line."""


@dataclasses.dataclass(frozen=True)
class Resource(Where):
    """One queued resource: a TPU machine, a slice or several."""

    name: str = "jaxgen"
    """Name of the queued resource."""


@dataclasses.dataclass(frozen=True)
class Create(Resource):
    """Asks for TPUs: the request waits in a queue until they are free."""

    topology: str = "v5e:2x2"
    """Family and chips along each axis, as for the command ``plan``: v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:16x16; v6e:4x4*2
    for two slices."""
    spot: bool = False
    """Whether they may be taken away at any time, for a lower price."""


@dataclasses.dataclass(frozen=True)
class Install(Resource):
    """Copies the checkout in the present directory onto every worker and installs it."""

    commit: str = "HEAD"
    """Commit to copy; what is not committed is not copied."""


@dataclasses.dataclass(frozen=True)
class Run(Resource):
    """Starts what stands behind -- on every worker, as ``python -m`` would."""

    env: tuple[str, ...] = ()
    """Environment variables, NAME=VALUE."""


@dataclasses.dataclass(frozen=True)
class Logs(Resource):
    """Shows what the run has printed, worker by worker."""

    lines: int = 50
    """How many lines of each, the last ones."""
    follow: bool = False
    """Whether to go on showing what it prints, until Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class Profile(Resource):
    """Fetches what a run's option ``--profile`` recorded."""

    workdir: str = ""
    """Directory of the run, in a bucket or on the first worker."""
    out: str = "."
    """Where to put the directory "profile"."""


class Wait(Resource):
    """Waits until the TPUs are there."""


class Doctor(Resource):
    """Has every worker tell whether everything is as a run needs it; options of jaxgen.doctor stand behind --."""


class Status(Resource):
    """Tells where the request stands and, of each worker, whether its run is active, and the run's last line."""


class Stop(Resource):
    """Has the run save and end on every worker; the same ``run`` goes on from there."""


class Delete(Resource):
    """Gives the TPUs back, or the place in the queue."""


def create(options: Create) -> list[Argv]:
    """The calls that ask for TPUs."""
    accelerator, runtime, slices = _accelerator(options.topology)
    nodes = [f"--node-id={options.name}"]
    if slices > 1:
        nodes = [f"--node-count={slices}", f"--node-prefix={options.name}"]
    spot = ["--spot"] if options.spot else []
    return [_gcloud(options, "create", options.name, *nodes, *accelerator, f"--runtime-version={runtime}", *spot)]


def describe(options: Resource) -> list[Argv]:
    """The call that tells the request's state, one word."""
    return [_gcloud(options, "describe", options.name, "--format=value(state.state)")]


def install(options: Install) -> list[Argv]:
    """The calls that copy the checkout and install it."""
    if not re.fullmatch(r"\w[\w./~^@{}-]*", options.commit):
        raise ValueError(f"`commit` must be a commit, a branch or a tag, got {options.commit!r}")
    archive = ["git", "archive", "--format=tar.gz", f"--output={ARCHIVE}", options.commit]
    copy = _gcloud(options, "scp", ARCHIVE, f"{options.name}:jaxgen.tar.gz", *EVERY_WORKER)
    return [["mkdir", "-p", str(Path(ARCHIVE).parent)], archive, copy, _ssh(options, INSTALL)]


def doctor(options: Resource, words: Sequence[str] = ()) -> list[Argv]:
    """The call that has every worker tell its state; ``words`` are the doctor's own options."""
    examine = " ".join(["~/jaxgen-env/bin/python -m jaxgen.doctor", *map(shlex.quote, words)])
    return [_ssh(options, f"set -o pipefail; {examine} | {NAMED}")]


def run(options: Run, words: Sequence[str] = ()) -> list[Argv]:
    """The call that starts a program, a module and its options, on every worker."""
    if not words or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", words[0]):
        raise ValueError(f"`run` needs a module behind --, such as -- experiments.digits_diffusion, got {list(words)}")
    for variable in options.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", variable):
            raise ValueError(f"`env` must be NAME=VALUE, got {variable!r}")
    environment = "".join(" " + shlex.quote(f"--setenv={variable}") for variable in options.env)
    program = shlex.join(word.replace("$", "$$") for word in words)  # systemd has variables as well
    return [_ssh(options, f'{RUN}{environment} "$HOME"/jaxgen-env/bin/python -m {program}')]


def status(options: Resource) -> list[Argv]:
    """The calls that tell the request's state and, of each worker, whether its run is active and its last line."""
    last = f"{JOURNAL} --lines=1 _SYSTEMD_UNIT=jaxgen.service"
    return [*describe(options), _ssh(options, f'echo "$(hostname): $(systemctl is-active jaxgen), $({last})"')]


def logs(options: Logs) -> list[Argv]:
    """The call that shows what every worker's run has printed."""
    follow = " --follow" if options.follow else ""
    return [_ssh(options, f"{JOURNAL} --unit=jaxgen --lines={options.lines}{follow} | {NAMED}")]


def stop(options: Resource) -> list[Argv]:
    """The call that has the run save and end on every worker."""
    return [_ssh(options, "sudo systemctl stop jaxgen")]


def profile(options: Profile) -> list[Argv]:
    """The call that fetches a recording, from a bucket or from the first worker."""
    for field in ("workdir", "out"):
        if not getattr(options, field) or getattr(options, field).startswith("-"):
            raise ValueError(f"`{field}` must be a directory, got {getattr(options, field)!r}")
    recorded = f"{options.workdir.rstrip('/')}/profile"
    if "://" in recorded:
        project = [] if options.project is None else [f"--project={options.project}"]
        return [["gcloud", "storage", "cp", recorded, options.out, "--recursive", *project]]
    return [_gcloud(options, "scp", "--recurse", f"{options.name}:{recorded}", options.out)]


def delete(options: Resource) -> list[Argv]:
    """The call that gives the TPUs back, or the place in the queue; gcloud asks whether that is meant."""
    return [_gcloud(options, "delete", options.name, "--force")]


def listed(options: Where) -> list[Argv]:
    """The call that lists the queued resources."""
    return [_gcloud(options, "list")]


def _gcloud(options: Where, verb: str, *words: str) -> Argv:
    for field, pattern in PATTERNS.items():
        value = getattr(options, field, None)
        if value is not None and not re.fullmatch(pattern, value):
            raise ValueError(f"`{field}` is no {field} of Google Cloud's: {value!r}")
    place = [f"--{field}={getattr(options, field)}" for field in ("zone", "project") if getattr(options, field)]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *place]


def _ssh(options: Resource, script: str) -> Argv:
    return _gcloud(options, "ssh", options.name, *EVERY_WORKER, f"--command={script}")


def _accelerator(topology: str) -> tuple[Argv, str, int]:
    """Flags that say what a node is, the software to start it with, and how many nodes."""
    _, shape, slices = parsed(topology)
    family, shown = topology.split(":")[0], "x".join(map(str, shape))
    if family not in RUNTIMES:
        lent = ", ".join(RUNTIMES)
        raise ValueError(f"`topology` must be of {lent}, which Google lends as machines, got {topology!r}")
    if family not in TYPES:
        return [f"--type={family}", f"--topology={shown}"], RUNTIMES[family], slices
    if shown not in SHAPES[family]:
        raise ValueError(f"`topology` of {family} must be one of {', '.join(SHAPES[family])}, got {topology!r}")
    name, cores = TYPES[family]
    return [f"--accelerator-type={name}-{cores * math.prod(shape)}"], RUNTIMES[family], slices


def _call(command: Argv, *, read: bool = False) -> str:
    """Calls a program, whose output is shown or else read; ends as it does if it fails."""
    if shutil.which(command[0]) is None:
        where = ": see https://cloud.google.com/sdk/docs/install" if command[0] == "gcloud" else ""
        raise FileNotFoundError(f"`{command[0]}` is not installed here{where}")
    ended = subprocess.run(command, stdout=subprocess.PIPE if read else None, text=True)
    if ended.returncode:
        print(f"error: ended with {ended.returncode}: {shlex.join(command)}", file=sys.stderr)
        sys.exit(ended.returncode)
    return (ended.stdout or "").strip()


def _calls(commands: Sequence[Argv], options: Where) -> None:
    for command in commands:
        if options.dry_run:
            print(shlex.join(command))
        else:
            _call(command)


def _install(options: Install) -> None:
    commands = install(options)
    if not options.dry_run:
        if not Path("pyproject.toml").is_file():
            raise FileNotFoundError("`install` copies the checkout in the present directory, and here is none")
        if changed := _call(["git", "status", "--porcelain", "--untracked-files=no"], read=True):
            print(f"not committed, so not copied:\n{changed}", file=sys.stderr)
    _calls(commands, options)


def _wait(options: Resource) -> None:
    (state,) = describe(options)
    if options.dry_run:
        _calls([state], options)
        return
    shown, failed = "", 0
    while True:
        try:
            found, failed = _call(state, read=True), 0
        except SystemExit:
            failed += 1
            if not shown or failed == PATIENCE:
                raise
            found = shown
        if found == "ACTIVE":
            break
        if found in ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING"):
            raise ValueError(f"{options.name} is {found} and will not become ACTIVE: `delete` it, `create` it anew")
        if found != shown:
            print(found, flush=True)
        shown = found
        time.sleep(POLL)
    print(found)


def _status(options: Resource) -> None:
    state, workers = status(options)
    if options.dry_run:
        _calls([state, workers], options)
        return
    print(found := _call(state, read=True), flush=True)
    if found == "ACTIVE":
        _call(workers)


def _profile(options: Profile) -> None:
    calls = profile(options)
    if not options.dry_run:
        Path(options.out).mkdir(parents=True, exist_ok=True)  # else it would itself become "profile"
    _calls(calls, options)
    if not options.dry_run:
        directory = shlex.quote(f"{options.out.rstrip('/')}/profile")
        print(f"to look at it: pip install xprof && xprof --port 6006 --logdir {directory}")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; what stands behind -- is for the workers."""
    words, behind = list(sys.argv[1:] if args is None else args), []
    if words[:1] in (["run"], ["doctor"]) and "--" in words:
        split = words.index("--")
        words, behind = words[:split], words[split + 1 :]
    commands = {
        "create": cli.Command(lambda options: _calls(create(options), options), Create()),
        "wait": cli.Command(_wait, Wait()),
        "install": cli.Command(_install, Install()),
        "doctor": cli.Command(lambda options: _calls(doctor(options, behind), options), Doctor()),
        "run": cli.Command(lambda options: _calls(run(options, behind), options), Run()),
        "status": cli.Command(_status, Status()),
        "logs": cli.Command(lambda options: _calls(logs(options), options), Logs()),
        "stop": cli.Command(lambda options: _calls(stop(options), options), Stop()),
        "profile": cli.Command(_profile, Profile()),
        "delete": cli.Command(lambda options: _calls(delete(options), options), Delete()),
    }
    listing = cli.Command(lambda options: _calls(listed(options), options), Where())
    try:
        cli.main(__doc__, listing, commands, args=words)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
