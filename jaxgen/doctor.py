"""Is this machine fit for a run? Looks at what runs on TPUs have been seen to fail of, and says what to do.

    python -m jaxgen.doctor [--workdir gs://bucket/run] [--json]

One line for each finding: "ok", "warn" for what a run survives, "FAIL" for what it does not; the command ends with 1 if
anything failed. What is found and what is made of it are apart: the ``find_...`` look, and know nothing; the others
judge what they are given, and look at nothing.

Nothing of jaxgen or JAX is imported here, since an installation in which that fails is one of the things to tell.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LOCK = "/tmp/libtpu_lockfile"
DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
GOOGLE, TPUS = "0x1ae0", {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # on the PCI bus
PORTS = {8476: "libtpu's", 8482: "JAX's coordinator's"}
SHOWN = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")
GiB = 2**30
PROGRAM = """
import json, jax, jax.numpy as jnp
assert float((jnp.ones(8) + 1).sum()) == 16
device = jax.local_devices()[0]
print(json.dumps({"platform": device.platform, "kind": device.device_kind, "local": jax.local_device_count(),
                  "all": jax.device_count(), "processes": jax.process_count()}))
"""


class Verdict(NamedTuple):
    """What is to be said of a subject.

    Attributes:
        grade: "ok", "warn" or "FAIL".
        subject: of what.
        found: what there is.
        advice: what to do about it; empty where nothing is to be done.
    """

    grade: str
    subject: str
    found: str
    advice: str = ""


class Holder(NamedTuple):
    """A process that has the TPU: its number and its command line."""

    pid: int
    command: str


def devices(found: Mapping[str, Any] | str, chips: int) -> Verdict:
    """Judges what JAX computes on.

    Args:
        found: platform, kind, local, all, processes, as JAX tells; or why it does not.
        chips: TPU chips on this machine's bus.
    """
    if isinstance(found, str):
        return Verdict("FAIL", "devices", f"JAX does not compute: {found}", "see the other lines, then this error")
    shown = f"{found['local']} x {found['kind']} ({found['platform']})"
    if found["processes"] > 1:
        shown += f", {found['all']} in {found['processes']} processes"
    if chips and found["platform"] != "tpu":
        return Verdict("FAIL", "devices", f"{shown}, though there are {chips} TPU chips", 'pip install "jax[tpu]"')
    if found["platform"] == "cpu":
        return Verdict("warn", "devices", shown, "no accelerator here: runs will be slow")
    return Verdict("ok", "devices", shown)


def versions(installed: Mapping[str, str], requirements: Sequence[str], *, tpu: bool) -> list[Verdict]:
    """Judges whether installed packages go together.

    Args:
        installed: versions by name, normalised: lower case, - for _.
        requirements: what jaxgen and JAX ask for, as their metadata has it.
        tpu: whether what their extra "tpu" asks for is needed.
    """
    from packaging.requirements import Requirement

    verdicts = []
    for line in requirements:
        wanted = Requirement(line)
        if wanted.marker is not None and not any(
            wanted.marker.evaluate({"extra": extra}) for extra in ("", *(("tpu",) if tpu else ()))
        ):
            continue
        name = wanted.name.lower().replace("_", "-")
        if name not in installed:
            verdicts.append(Verdict("FAIL", "versions", f"{name} is not installed", f'pip install "{_plain(wanted)}"'))
        elif not wanted.specifier.contains(installed[name], prereleases=True):
            found = f"{name} is {installed[name]}, and {wanted.specifier} is asked for"
            verdicts.append(Verdict("FAIL", "versions", found, f'pip install "{_plain(wanted)}"'))
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
    grade = "ok" if not verdicts else "warn"
    return [Verdict(grade, "versions", f"Python {platform.python_version()}, {shown}"), *dict.fromkeys(verdicts)]


def lock(holders: Sequence[Holder], *, left: bool, ours: bool) -> Verdict:
    """Judges whether the TPU is free: libtpu gives it to one process at a time.

    Args:
        holders: processes that have it, as far as this user may see them.
        left: whether libtpu's lock file is there.
        ours: whether this user may write to it.
    """
    if holders:
        shown = "; ".join(f"process {holder.pid}, {holder.command}" for holder in holders)
        pids = " ".join(str(holder.pid) for holder in holders)
        return Verdict("FAIL", "TPU lock", f"held by {shown}", f"wait for it to end, or kill {pids}")
    if left and not ours:
        return Verdict("FAIL", "TPU lock", f"{LOCK} is another user's", f"if no run of theirs goes on: sudo rm {LOCK}")
    return Verdict("ok", "TPU lock", "free")


def ports(taken: Sequence[int]) -> Verdict:
    """Judges the ports through which the workers of a slice find each other, given those that are taken."""
    if taken:
        shown = ", ".join(f"{port} ({PORTS.get(port, 'a')} port)" for port in taken)
        return Verdict("FAIL", "ports", f"taken: {shown}", f"see who has it: sudo ss -ltnp 'sport = :{taken[0]}'")
    return Verdict("ok", "ports", f"free: {', '.join(map(str, PORTS))}")


def disk(free: int, where: str) -> Verdict:
    """Judges the bytes that are free where a run writes."""
    shown = f"{free / GiB:.1f} GiB free in {where}"
    if free < GiB:
        return Verdict("FAIL", "disk", shown, "delete something, or give a --workdir elsewhere, such as in a bucket")
    if free < 10 * GiB:
        return Verdict("warn", "disk", shown, "little for checkpoints and data sets: think of a --workdir in a bucket")
    return Verdict("ok", "disk", shown)


def writable(subject: str, where: str, error: str | None) -> Verdict:
    """Judges a directory into which a small file was written, read back and deleted, or why that did not work."""
    if error is None:
        return Verdict("ok", subject, f"{where} can be written")
    advice = f"who may write here? ls -ld {where}"
    if "://" in where:
        bucket = "/".join(where.split("/")[:3])
        advice = (
            f"gcloud storage ls {bucket}: is there such a bucket? Its writers need the role Storage Object Admin, and "
            'Python the package gcsfs, which "jaxgen[tpu]" brings'
        )
    return Verdict("FAIL", subject, f"{where} cannot be written: {error}", advice)


def cache(where: str, mode: int | None, *, ours: bool) -> Verdict:
    """Judges the directory of compiled programs, which are machine code that a run trusts.

    Args:
        where: the directory.
        mode: its permissions; None where there is none yet.
        ours: whether it is this user's.
    """
    if mode is not None and not ours:
        return Verdict("warn", "cache", f"{where} is another user's", "point JAX_COMPILATION_CACHE_DIR elsewhere")
    if mode is not None and mode & 0o022:
        shown = f"{where} can be written by others, whose programs would run as you"
        return Verdict("warn", "cache", shown, f"chmod go-w {where}")
    return Verdict("ok", "cache", f"compiled programs are kept in {where}")


def hosts(environment: Mapping[str, str], chips: int) -> list[Verdict]:
    """Judges the variables by which JAX chooses a platform and the workers of a slice find each other."""
    verdicts = []
    chosen = environment.get("JAX_PLATFORMS", "")
    if chips and chosen and "tpu" not in chosen.split(","):
        verdicts.append(Verdict("FAIL", "environment", f"JAX_PLATFORMS={chosen} hides the TPU", "unset JAX_PLATFORMS"))
    for name, does in (
        ("TPU_SKIP_MDS_QUERY", "keeps the workers of a slice from finding each other"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "lets processes fight for the TPU"),
    ):
        if chips and name in environment:
            verdicts.append(Verdict("warn", "environment", f"{name} is set, which {does}", f"unset {name}"))
    names, worker = environment.get("TPU_WORKER_HOSTNAMES"), environment.get("TPU_WORKER_ID")
    if names is not None and worker is not None:
        count = len(names.split(","))
        if not worker.isdigit() or int(worker) >= count:
            found = f"TPU_WORKER_ID={worker} of {count} in TPU_WORKER_HOSTNAMES"
            verdicts.append(Verdict("FAIL", "environment", found, "both must be those of the slice, or neither be set"))
    told = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
    shown = ", ".join(f"{name}={environment[name]}" for name in told if name in environment)
    return [*verdicts, Verdict("ok", "environment", shown or "no variable of JAX's or libtpu's is set")]


def find_chips() -> int:
    """TPU chips on the PCI bus."""
    found = 0
    for vendor in map(Path, glob.glob("/sys/bus/pci/devices/*/vendor")):
        device = vendor.with_name("device")
        found += vendor.read_text().strip() == GOOGLE and device.read_text().strip() in TPUS
    return found


def find_devices(timeout: float) -> dict[str, Any] | str:
    """What JAX computes on, found in a process of its own, which frees the TPU when it ends."""
    try:
        ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout:g} s; in a slice, all workers must be asked at once"
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        return said[-1] if said else f"exit status {ended.returncode}"
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def find_requirements() -> tuple[dict[str, str], list[str]]:
    """Versions that are installed, and what jaxgen and JAX ask for."""
    installed: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        if found.name:  # half removed packages have none
            installed.setdefault(found.name.lower().replace("_", "-"), found.version)
    requirements: list[str] = []
    for name in ("jaxgen", "jax"):
        if name in installed:
            requirements += importlib.metadata.requires(name) or []
    return installed, requirements


def find_holders(paths: Sequence[str]) -> list[Holder]:
    """Processes that have one of the files open, of those that this user may look into."""
    holders = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = set()
            for file in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    opened.add(os.readlink(file))
            if opened & set(paths):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                holders.append(Holder(int(process.name), words[:80]))
        except OSError:  # it is another user's, or has ended
            continue
    return sorted(holders)


def find_taken(candidates: Sequence[int]) -> list[int]:
    """Those of the ports that somebody listens on."""
    taken = []
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(port)
    return taken


def find_error(directory: str, timeout: float) -> str | None:
    """Why a small file cannot be written to a directory, read back and deleted; None where it can."""
    answer: list[str | None] = []

    def attempt() -> None:
        try:
            from etils import epath

            path = epath.Path(directory)
            while "://" not in directory and not path.exists():
                path = path.parent  # what is missing will be made
            file, text = path / f".doctor-{uuid.uuid4().hex}", "written by jaxgen.doctor"
            file.write_text(text)
            try:
                answer.append(None if file.read_text() == text else "what was written does not come back")
            finally:
                file.unlink()
        except Exception as error:
            answer.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0] if answer else f"no answer in {timeout:g} s"


def examine(workdir: str, timeout: float) -> list[Verdict]:
    """Looks at everything, and judges it."""
    chips = find_chips()
    installed, requirements = find_requirements()
    holders = find_holders([LOCK, *(file for pattern in DEVICE_FILES for file in glob.glob(pattern))])
    verdicts = versions(installed, requirements, tpu=chips > 0)
    verdicts += hosts(os.environ, chips)
    verdicts.append(lock(holders, left=os.path.lexists(LOCK), ours=os.access(LOCK, os.W_OK)))
    if holders:  # JAX would wait for them, or take the CPU
        verdicts.append(Verdict("warn", "devices", "not looked at, while another process has them"))
    else:
        verdicts.append(devices(find_devices(timeout), chips))
    verdicts.append(ports(find_taken(tuple(PORTS))))
    verdicts.append(writable("workdir", workdir, find_error(workdir, timeout)))
    if "://" not in workdir:
        there = next(path for path in (Path(workdir).absolute(), *Path(workdir).absolute().parents) if path.exists())
        verdicts.append(disk(shutil.disk_usage(there).free, str(there)))
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(root, "jaxgen", "compiled")
    if "://" in compiled:
        verdicts.append(writable("cache", compiled, find_error(compiled, timeout)))
    else:
        found = os.stat(compiled) if os.path.isdir(compiled) else None
        mode = None if found is None else stat.S_IMODE(found.st_mode)
        verdicts.append(cache(compiled, mode, ours=found is None or found.st_uid == os.getuid()))
    return verdicts


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if something failed."""
    parser = argparse.ArgumentParser("python -m jaxgen.doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workdir", default="runs", help="where runs are to write, also in a bucket (default: runs)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for devices, for a bucket")
    parser.add_argument("--json", action="store_true", help="one JSON object for each finding, instead of a table")
    options = parser.parse_args(args)
    verdicts = examine(options.workdir, options.timeout)
    for verdict in verdicts:
        if options.json:
            print(json.dumps(verdict._asdict()))
        else:
            advice = f": {verdict.advice}" if verdict.advice else ""
            print(f"{verdict.grade:<5}{verdict.subject:<12} {verdict.found}{advice}")
    return int(any(verdict.grade == "FAIL" for verdict in verdicts))


def _plain(wanted: Any) -> str:
    """A requirement without its marker."""
    extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
    return f"{wanted.name}{extras}{wanted.specifier}"


if __name__ == "__main__":
    sys.exit(main())
