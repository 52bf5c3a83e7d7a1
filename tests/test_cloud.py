"""The commands of the cloud: exactly these calls, nothing of the user's is ever a shell's, failures are one line.

What plays gcloud here writes down what it is called with and does on this machine what a worker would do; what plays
systemd does likewise. Nobody is asked for a TPU.
"""

import dataclasses
import json
import os
import shlex
import stat
import subprocess
import sys
import tarfile

import pytest

from jaxgen import cloud

GCLOUD = ["gcloud", "compute", "tpus", "queued-resources"]
EVERY = ["--node=all", "--worker=all"]


@pytest.mark.parametrize(
    ("topology", "wanted"),
    [
        ("v5e:1x1", ["--node-id=mine", "--accelerator-type=v5litepod-1", "--runtime-version=v2-alpha-tpuv5-lite"]),
        ("v5e:4x4", ["--node-id=mine", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]),
        ("v6e:16x16", ["--node-id=mine", "--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e"]),
        ("v5p:2x2x1", ["--node-id=mine", "--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5"]),
        ("v5p:4x4x4", ["--node-id=mine", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]),
        ("v4:2x2x1", ["--node-id=mine", "--type=v4", "--topology=2x2x1", "--runtime-version=tpu-ubuntu2204-base"]),
        (
            "v6e:4x4*2",
            ["--node-count=2", "--node-prefix=mine", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"],
        ),
    ],
)
def test_tpus_are_asked_for_as_google_calls_them(topology, wanted):
    (command,) = cloud.create(cloud.Create(name="mine", topology=topology))
    assert command == [*GCLOUD, "create", "mine", *wanted]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:3x3", "`topology` of v5e must be one of 1x1, 2x2, .*, got 'v5e:3x3'"),
        ("v5p:2x2x3", "`topology` of v5p must be one of 2x2x1, .*, got"),
        ("v7x:2x2x1", "`topology` must be of v4, v5e, v5p, v6e, which Google lends as machines, got 'v7x:2x2x1'"),
        ("v5litepod-16", "`topology` must be"),
        ("v4:2x2x1 --zone", "`topology` must be"),
    ],
)
def test_what_google_has_not_is_refused(topology, message):
    with pytest.raises(ValueError, match=message):
        cloud.create(cloud.Create(topology=topology))


def test_each_command_is_these_calls():
    at = {"name": "mine", "zone": "us-west4-a", "project": "my-project"}
    place, plain = ["--zone=us-west4-a", "--project=my-project"], cloud.Resource(**at)
    assert cloud.create(cloud.Create(**at, spot=True))[0][-3:] == ["--spot", *place]
    assert cloud.describe(plain) == [[*GCLOUD, "describe", "mine", "--format=value(state.state)", *place]]
    assert cloud.delete(plain) == [[*GCLOUD, "delete", "mine", "--force", *place]]
    assert cloud.listed(plain) == [[*GCLOUD, "list", *place]]
    assert cloud.stop(plain) == [[*GCLOUD, "ssh", "mine", *EVERY, "--command=sudo systemctl stop jaxgen", *place]]
    mkdir, archive, copy, install = cloud.install(cloud.Install(**at, commit="v0.1.0"))
    assert mkdir == ["mkdir", "-p", "dist"]
    assert archive == ["git", "archive", "--format=tar.gz", "--output=dist/jaxgen.tar.gz", "v0.1.0"]
    assert copy == [*GCLOUD, "scp", "dist/jaxgen.tar.gz", "mine:jaxgen.tar.gz", *EVERY, *place]
    assert install[:-2] == [*GCLOUD, "ssh", "mine", *EVERY, f"--command={cloud.INSTALL}"]
    local = cloud.Profile(**at, workdir="runs/digits", out="here")
    assert cloud.profile(local) == [[*GCLOUD, "scp", "--recurse", "mine:runs/digits/profile", "here", *place]]
    bucket = dataclasses.replace(local, workdir="gs://bucket/run/")
    wanted = ["gcloud", "storage", "cp", "gs://bucket/run/profile", "here", "--recursive", "--project=my-project"]
    assert cloud.profile(bucket) == [wanted]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Mine"), ("name", "-mine"), ("name", "mine; rm -rf /"), ("name", "m" * 64), ("name", ""),
        ("name", "--help"), ("zone", "us west"), ("zone", "--x"), ("project", "$(id)"), ("project", "-p"),
    ],
)  # fmt: skip
def test_names_that_are_none_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is no {field} of Google Cloud's"):
        cloud.delete(cloud.Resource(**{field: value}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cloud.install(cloud.Install(commit="--output=/etc/passwd")), "`commit` must be a commit"),
        (lambda: cloud.run(cloud.Run(), []), "`run` needs a module behind --"),
        (lambda: cloud.run(cloud.Run(), ["rm -rf /"]), "`run` needs a module behind --"),
        (lambda: cloud.run(cloud.Run(), ["-c", "print()"]), "`run` needs a module behind --"),
        (lambda: cloud.run(cloud.Run(env=("PATH",)), ["a"]), "`env` must be NAME=VALUE, got 'PATH'"),
        (lambda: cloud.run(cloud.Run(env=("a b=c",)), ["a"]), "`env` must be NAME=VALUE"),
        (lambda: cloud.profile(cloud.Profile()), "`workdir` must be a directory, got ''"),
        (lambda: cloud.profile(cloud.Profile(workdir="--a=gs://b")), "`workdir` must be a directory"),
        (lambda: cloud.profile(cloud.Profile(workdir="a", out="-o")), "`out` must be a directory, got '-o'"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_printed_is_what_would_be_called(capsys):
    words = ["experiments.digits_diffusion", "--dataset", "it's; $(date) `id`"]
    cloud.main(["run", "--name", "mine", "--env", "A=b c", "--dry-run", "--", *words])
    line, rest = capsys.readouterr().out.split("\n", 1)
    assert not rest
    assert [shlex.split(line)] == cloud.run(cloud.Run(name="mine", env=("A=b c",)), words)
    cloud.main(["install", "--dry-run"])
    assert [shlex.split(line) for line in capsys.readouterr().out.splitlines()] == cloud.install(cloud.Install())


PLAYED = {
    # Writes down what it was called with, and runs what an ssh carries, as sshd would.
    "gcloud": """
        import json, os, shutil, subprocess, sys
        with open(os.environ["CALLS"], "a") as file:
            file.write(json.dumps(sys.argv) + "\\n")
        if "describe" in sys.argv:
            with open(os.environ["STATES"]) as file:
                states = file.read().split()
            with open(os.environ["STATES"], "w") as file:
                file.write(" ".join(states[1:] or states))
            print(states[0])
        if "scp" in sys.argv:
            shutil.copy(sys.argv[5], os.path.join(os.environ["WORKER"], sys.argv[6].split(":")[1]))
        for word in sys.argv:
            if word.startswith("--command="):
                worker = {**os.environ, "HOME": os.environ["WORKER"]}
                command = ["bash", "-c", word.removeprefix("--command=")]
                sys.exit(subprocess.run(command, cwd=os.environ["WORKER"], env=worker).returncode)
        sys.exit(int(os.environ.get("STATUS", "0")))
    """,
    "sudo": "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])",
    "systemd-run": "import json, sys; print(json.dumps(sys.argv[1:]))",
    "systemctl": "import sys; print('active' if 'is-active' in sys.argv else ' '.join(sys.argv[1:]))",
    "journalctl": "import sys; print('step 1'); print('step 2') if '--unit=jaxgen' in sys.argv else None",
    "hostname": "print('worker-7')",
    "python3": "import sys; print('python3', *sys.argv[1:])",
}


@pytest.fixture
def played(tmp_path, monkeypatch):
    """The machine's programs, played; gives what gcloud was called with."""
    programs, worker = tmp_path / "programs", tmp_path / "worker"
    programs.mkdir()
    worker.mkdir()
    for name, code in PLAYED.items():
        file = programs / name
        lines = [line[8:] if line.startswith(" " * 8) else line for line in code.splitlines()]
        file.write_text(f"#!{sys.executable}\n" + "\n".join(lines) + "\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name in ("CALLS", "STATES", "WORKER"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (tmp_path / "states").write_text("ACTIVE")
    monkeypatch.setattr(cloud, "POLL", 0.0)

    def calls():
        file = tmp_path / "calls"
        return [json.loads(line)[1:] for line in file.read_text().splitlines()] if file.exists() else []

    return calls


def test_a_run_arrives_word_by_word(played, tmp_path, capfd):
    words = ["experiments.digits_diffusion", "--workdir", 'gs://b/it\'s here; $HOME `id` "x" \\ %h', "--classes", "3 7"]
    cloud.main(["run", "--env", "XLA_FLAGS=--a=1 --b='2'", "B=$PATH", "--", *words])
    home = tmp_path / "worker"
    arrived = json.loads(capfd.readouterr().out.splitlines()[-1])
    program = arrived.index(f"{home}/jaxgen-env/bin/python")
    assert [word.replace("$$", "$") for word in arrived[program:]] == [arrived[program], "-m", *words]
    assert arrived[:program] == [
        "--unit=jaxgen", f"--uid={os.getuid()}", f"--gid={os.getgid()}", f"--working-directory={home}",
        "--property=KillMode=mixed", "--property=TimeoutStopSec=600",
        "--setenv=XLA_FLAGS=--a=1 --b='2'", "--setenv=B=$PATH",
    ]  # fmt: skip


def test_an_install_is_the_commit_and_no_more(played, tmp_path, monkeypatch, capfd):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    (checkout / "pyproject.toml").write_text("committed")
    author = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "m"]):
        subprocess.run(["git", *words], check=True)
    (checkout / "pyproject.toml").write_text("changed since")
    (checkout / "new.py").write_text("never added")
    uv = tmp_path / "worker" / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text("#!/bin/sh\necho uv $*\n")
    uv.chmod(0o700)
    (tmp_path / "worker" / "jaxgen-source").mkdir()
    (tmp_path / "worker" / "jaxgen-source" / "stale.py").write_text("of the last install")
    cloud.main(["install"])
    out, err = capfd.readouterr()
    assert "not committed, so not copied:\nM pyproject.toml" in err
    source = tmp_path / "worker" / "jaxgen-source"
    assert {file.name: file.read_text() for file in source.iterdir()} == {"pyproject.toml": "committed"}
    assert out.splitlines() == [
        "python3 -m pip install --quiet --user uv",
        "uv venv --quiet --allow-existing --python 3.12 jaxgen-env",
        "uv pip install --quiet --python jaxgen-env/bin/python -e ./jaxgen-source[tpu]",
    ]
    assert [call[3] for call in played()] == ["scp", "ssh"]
    with tarfile.open(checkout / "dist" / "jaxgen.tar.gz") as archive:
        assert archive.getnames() == ["pyproject.toml"]


def test_nothing_is_installed_from_where_no_checkout_is(played, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cloud.main(["install"])
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == "error: `install` copies the checkout in the present directory, and here is none\n"
    )
    assert not played()


def test_waiting_ends_when_the_tpus_are_there(played, tmp_path, capsys):
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    cloud.main(["wait"])
    assert capsys.readouterr().out.split() == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert len(played()) == 4


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING", "SUSPENDED"])
def test_waiting_ends_when_they_never_will_be(state, played, tmp_path, capsys):
    (tmp_path / "states").write_text(f"PROVISIONING {state}")
    with pytest.raises(SystemExit) as ended:
        cloud.main(["wait"])
    assert ended.value.code == 2
    advice = f"error: jaxgen is {state} and will not become ACTIVE: `delete` it, `create` it anew\n"
    assert capsys.readouterr().err == advice


def test_status_asks_workers_that_are_there(played, tmp_path, capfd):
    cloud.main(["status"])
    assert capfd.readouterr().out == "ACTIVE\nworker-7: active, step 1\n"
    (tmp_path / "states").write_text("PROVISIONING")
    cloud.main(["status"])
    assert capfd.readouterr().out == "PROVISIONING\n"


def test_logs_say_whose_they_are(played, capfd):
    cloud.main(["logs", "--lines", "7"])
    assert capfd.readouterr().out == "worker-7: step 1\nworker-7: step 2\n"
    assert "--lines=7 |" in played()[0][-1]


def test_a_doctor_that_finds_a_fault_is_heard(played, tmp_path, capfd):
    python = tmp_path / "worker" / "jaxgen-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "FAIL $*"; exit 1\n')
    python.chmod(0o700)
    with pytest.raises(SystemExit) as ended:
        cloud.main(["doctor", "--", "--workdir", "gs://b/it's"])
    assert ended.value.code == 1
    assert capfd.readouterr().out == "worker-7: FAIL -m jaxgen.doctor --workdir gs://b/it's\n"


def test_what_gcloud_refuses_ends_the_command_with_its_status(played, monkeypatch, capsys):
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(SystemExit) as ended:
        cloud.main(["delete"])
    assert ended.value.code == 3
    assert capsys.readouterr().err == (
        "error: ended with 3: gcloud compute tpus queued-resources delete jaxgen --force\n"
    )


def test_without_gcloud_one_line_says_where_it_is_to_be_had(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        cloud.main(["create"])
    assert ended.value.code == 2
    wanted = "error: `gcloud` is not installed here: see https://cloud.google.com/sdk/docs/install\n"
    assert capsys.readouterr().err == wanted
    cloud.main(["create", "--dry-run"])  # which needs none
    assert capsys.readouterr().out.startswith("gcloud compute tpus queued-resources create jaxgen ")


@pytest.mark.parametrize(
    "words",
    [["create", "--", "experiments.x"], ["crate"], ["create", "--topolgy", "v5e:1x1"], ["logs", "--lines", "x"]],
)
def test_what_there_is_not_is_named(words, played, capsys):
    with pytest.raises(SystemExit) as ended:
        cloud.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_the_default_lists(played):
    cloud.main([])
    assert played() == [[*GCLOUD[1:], "list"]]


def test_ctrl_c_ends_a_command(monkeypatch):
    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(SystemExit) as ended:
        cloud.main(["logs", "--follow"])
    assert ended.value.code == 130
