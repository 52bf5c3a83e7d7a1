"""The doctor: each verdict from what was found, and each finding from a machine that has it."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from jaxgen import doctor
from jaxgen.doctor import Holder, Verdict

TPU = {"platform": "tpu", "kind": "TPU v5 lite", "local": 4, "all": 4, "processes": 1}
CPU = {"platform": "cpu", "kind": "cpu", "local": 1, "all": 1, "processes": 1}


@pytest.mark.parametrize(
    ("found", "chips", "wanted"),
    [
        (TPU, 4, ("ok", "4 x TPU v5 lite (tpu)", "")),
        ({**TPU, "all": 16, "processes": 4}, 4, ("ok", "4 x TPU v5 lite (tpu), 16 in 4 processes", "")),
        (CPU, 4, ("FAIL", "1 x cpu (cpu), though there are 4 TPU chips", 'pip install "jax[tpu]"')),
        (CPU, 0, ("warn", "1 x cpu (cpu)", "no accelerator here: runs will be slow")),
        ({**CPU, "platform": "gpu", "kind": "NVIDIA"}, 0, ("ok", "1 x NVIDIA (gpu)", "")),
        ("no answer", 4, ("FAIL", "JAX does not compute: no answer", "see the other lines, then this error")),
    ],
)
def test_devices(found, chips, wanted):
    grade, shown, advice = wanted
    assert doctor.devices(found, chips) == Verdict(grade, "devices", shown, advice)


REQUIREMENTS = [
    "flax>=0.12.8", "etils[epath]>=1.10", 'jax[tpu]; extra == "tpu"', 'gcsfs; extra == "tpu"', 'torch>=2; extra == "peers"',
    "jaxlib<=0.10.2,>=0.10.1", 'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"', 'libtpu==0.0.42.*; extra == "tpu"',
    'nothing; python_version < "3"',
]  # fmt: skip
INSTALLED = {
    "jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1", "flax": "0.12.8", "etils": "1.15.0", "gcsfs": "2026.1",
}  # fmt: skip


def wrong(tpu=True, **changed):
    installed = {name: version for name, version in {**INSTALLED, **changed}.items() if version}
    first, *rest = doctor.versions(installed, REQUIREMENTS, tpu=tpu)
    assert first.subject == "versions"
    assert first.grade == ("warn" if rest else "ok")
    assert {verdict.grade for verdict in rest} <= {"FAIL"}
    return [(verdict.found, verdict.advice) for verdict in rest]


def test_versions_that_go_together():
    assert not wrong()
    assert not wrong(tpu=False, libtpu="", gcsfs="")
    assert not wrong(tpu=False, jaxlib="0.10.1")
    (verdict,) = doctor.versions(INSTALLED, REQUIREMENTS, tpu=True)
    assert verdict.found.endswith(", jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1, flax 0.12.8")


def test_versions_that_do_not():
    assert wrong(libtpu="0.0.41") == [
        ("libtpu is 0.0.41, and ==0.0.42.* is asked for", 'pip install "libtpu==0.0.42.*"')
    ]
    assert wrong(libtpu="") == [("libtpu is not installed", 'pip install "libtpu==0.0.42.*"')]
    assert [found for found, _ in wrong(jaxlib="0.10.3")] == [
        "jaxlib is 0.10.3, and <=0.10.2,>=0.10.1 is asked for", "jaxlib is 0.10.3, and <=0.10.2,>=0.10.2 is asked for",
    ]  # fmt: skip
    assert wrong(etils="1.9") == [("etils is 1.9, and >=1.10 is asked for", 'pip install "etils[epath]>=1.10"')]
    assert not wrong(flax="0.12.9rc1")
    assert [found for found, _ in wrong(flax="0.12.8rc1")] == ["flax is 0.12.8rc1, and >=0.12.8 is asked for"]


@pytest.mark.parametrize(
    ("holders", "left", "ours", "grade", "said"),
    [
        ([], False, True, "ok", ["free"]),
        ([], True, True, "ok", ["free"]),
        ([], True, False, "FAIL", ["another user's", "sudo rm /tmp/libtpu_lockfile"]),
        ([Holder(7, "python -m a")], True, True, "FAIL", ["held by process 7, python -m a", "kill 7"]),
        ([Holder(7, "a"), Holder(9, "b")], False, True, "FAIL", ["process 7, a; process 9, b", "kill 7 9"]),
    ],
)
def test_lock(holders, left, ours, grade, said):
    verdict = doctor.lock(holders, left=left, ours=ours)
    assert verdict.grade == grade
    assert not [part for part in said if part not in f"{verdict.found} {verdict.advice}"]


def test_ports():
    assert doctor.ports([]).grade == "ok"
    verdict = doctor.ports([8482])
    assert verdict.grade == "FAIL"
    assert verdict.found == "taken: 8482 (JAX's coordinator's port)"
    assert "sport = :8482" in verdict.advice


@pytest.mark.parametrize(("gib", "grade"), [(100, "ok"), (10, "ok"), (9.9, "warn"), (1, "warn"), (0.9, "FAIL")])
def test_disk(gib, grade):
    assert doctor.disk(int(gib * 2**30), "/home").grade == grade


def test_writable():
    assert doctor.writable("workdir", "gs://b/x", None).grade == "ok"
    bucket = doctor.writable("workdir", "gs://b/x", "403")
    assert (bucket.grade, bucket.found) == ("FAIL", "gs://b/x cannot be written: 403")
    assert bucket.advice.startswith("gcloud storage ls gs://b: ")
    assert doctor.writable("workdir", "/root/x", "no").advice == "who may write here? ls -ld /root/x"


@pytest.mark.parametrize(
    ("mode", "ours", "grade"),
    [(None, True, "ok"), (0o700, True, "ok"), (0o755, True, "ok"), (0o775, True, "warn"), (0o777, True, "warn"),
     (0o700, False, "warn")],
)  # fmt: skip
def test_cache(mode, ours, grade):
    assert doctor.cache("/home/c", mode, ours=ours).grade == grade


@pytest.mark.parametrize(
    ("environment", "chips", "wanted"),
    [
        ({}, 4, ["ok"]),
        ({"JAX_PLATFORMS": "cpu"}, 4, ["FAIL", "ok"]),
        ({"JAX_PLATFORMS": "cpu"}, 0, ["ok"]),
        ({"JAX_PLATFORMS": "tpu,cpu"}, 4, ["ok"]),
        ({"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}, 4, ["warn", "warn", "ok"]),
        ({"TPU_SKIP_MDS_QUERY": "1"}, 0, ["ok"]),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, 4, ["ok"]),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, 4, ["FAIL", "ok"]),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": ""}, 4, ["FAIL", "ok"]),
    ],
)
def test_hosts(environment, chips, wanted):
    verdicts = doctor.hosts(environment, chips)
    assert [verdict.grade for verdict in verdicts] == wanted
    for name, value in environment.items():
        if name not in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            assert f"{name}={value}" in verdicts[-1].found


def test_every_fault_says_what_to_do():
    faults = [
        *(doctor.devices(found, 4) for found in (CPU, "broken")), doctor.lock([Holder(1, "a")], left=True, ours=True),
        doctor.lock([], left=True, ours=False), doctor.ports([8476]), doctor.disk(0, "/"), doctor.disk(2**31, "/"),
        doctor.writable("workdir", "/a", "b"), doctor.cache("/a", 0o777, ours=True),
        doctor.cache("/a", 0o700, ours=False), *doctor.hosts({"JAX_PLATFORMS": "cpu"}, 1)[:-1],
    ]  # fmt: skip
    assert all(verdict.grade in ("warn", "FAIL") and verdict.advice for verdict in faults)


def test_who_holds_a_file_is_found(tmp_path):
    file = tmp_path / "lock"
    file.touch()
    assert doctor.find_holders([str(file)]) == []
    code = f"file = open({str(file)!r}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        (holder,) = doctor.find_holders(["/nowhere", str(file)])
        process.communicate("\n")
    assert holder.pid == process.pid
    assert holder.command.startswith(f"{sys.executable} -c file = open(")


def test_a_port_that_somebody_listens_on_is_taken():
    with socket.socket() as listening, socket.socket() as other:
        listening.bind(("", 0))
        listening.listen()
        other.bind(("", 0))
        free = other.getsockname()[1]
        other.close()
        taken = listening.getsockname()[1]
        assert doctor.find_taken([taken, free]) == [taken]


def test_a_directory_is_tried_and_left_as_it_was(tmp_path):
    assert doctor.find_error(str(tmp_path), 10) is None
    assert doctor.find_error(str(tmp_path / "to" / "be" / "made"), 10) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert doctor.find_error(str(tmp_path / "file"), 10).startswith("NotADirectoryError: ")


def test_a_bucket_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(epath, "Path", lambda directory: time.sleep(8))
    began = time.monotonic()
    assert doctor.find_error("gs://b/x", 0.1) == "no answer in 0.1 s"
    assert time.monotonic() - began < 6


def test_what_does_not_come_back_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(type(epath.Path()), "read_text", lambda self: "")
    assert doctor.find_error(str(tmp_path), 10) == "what was written does not come back"
    assert not list(tmp_path.iterdir())


def test_what_is_installed_here_goes_together():
    installed, requirements = doctor.find_requirements()
    assert {"jax", "jaxlib", "flax"} <= installed.keys()
    assert any(line.startswith("jaxlib") for line in requirements)
    assert [verdict.grade for verdict in doctor.versions(installed, requirements, tpu=False)] == ["ok"]


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("print('noise'); print('{\"platform\": \"tpu\"}')", {"platform": "tpu"}),
        ("raise RuntimeError('TPU is taken')", "RuntimeError: TPU is taken"),
        ("raise SystemExit(3)", "exit status 3"),
    ],
)
def test_what_jax_answers(code, wanted, monkeypatch):
    monkeypatch.setattr(doctor, "PROGRAM", code)
    assert doctor.find_devices(60) == wanted


def test_jax_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(doctor, "PROGRAM", "import time; time.sleep(60)")
    wanted = "no answer in 0.5 s; in a slice, all workers must be asked at once"
    assert doctor.find_devices(0.5) == wanted


def test_the_command_looks_at_this_machine(tmp_path, capsys):
    code = doctor.main(["--workdir", str(tmp_path / "run"), "--json"])
    verdicts = [Verdict(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    by_subject = {verdict.subject: verdict for verdict in verdicts}
    assert by_subject.keys() == {
        "versions", "environment", "TPU lock", "devices", "ports", "workdir", "disk", "cache",
    }  # fmt: skip
    assert by_subject["workdir"].grade == "ok"
    assert by_subject["devices"].found.endswith("(cpu)")
    assert code == any(verdict.grade == "FAIL" for verdict in verdicts)


@pytest.mark.parametrize(("grade", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_the_table(grade, code, monkeypatch, capsys):
    found = [Verdict("ok", "disk", "plenty"), Verdict(grade, "ports", "taken", "free them")]
    monkeypatch.setattr(doctor, "examine", lambda workdir, timeout: found)
    assert doctor.main([]) == code
    assert capsys.readouterr().out == f"ok   disk         plenty\n{grade:<5}ports        taken: free them\n"


def test_jax_is_not_asked_while_another_has_the_tpu(monkeypatch):
    monkeypatch.setattr(doctor, "find_holders", lambda paths: [Holder(7, "a")])
    monkeypatch.setattr(doctor, "find_devices", lambda timeout: pytest.fail("asked"))
    monkeypatch.setattr(doctor, "find_error", lambda directory, timeout: None)
    by_subject = {verdict.subject: verdict for verdict in doctor.examine("gs://b/x", 1)}
    assert by_subject["TPU lock"].grade == "FAIL"
    assert by_subject["devices"] == Verdict("warn", "devices", "not looked at, while another process has them")
    assert "disk" not in by_subject


def test_it_needs_nothing_that_may_be_broken():
    code = "import sys; import jaxgen.doctor; assert not {'jax', 'numpy', 'tyro', 'etils'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
