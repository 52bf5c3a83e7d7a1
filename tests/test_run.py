"""A run's directory belongs to one experiment with one configuration."""

import json
import subprocess
import sys

import pytest

from jaxgen import __version__
from jaxgen.run import claim, read_config

CONFIG = {"steps": 100, "optimiser": {"rate": 1e-3, "betas": (0.9, 0.99)}, "cap": float("inf"), "seed": None}


def test_claiming_writes_and_claiming_again_resumes(tmp_path):
    directory = tmp_path / "a" / "b"
    claim(directory, "digits", CONFIG)
    found = read_config(directory)
    assert found["experiment"] == "digits"
    assert found["jaxgen"] == __version__
    assert found["config"] == {**CONFIG, "optimiser": {"rate": 1e-3, "betas": [0.9, 0.99]}}
    before = (directory / "config.json").stat().st_mtime_ns
    (directory / "3").mkdir()
    claim(directory, "digits", dict(reversed(CONFIG.items())))
    assert (directory / "config.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in directory.iterdir()) == ["3", "config.json"]


def test_another_version_of_the_library_may_resume(tmp_path):
    claim(tmp_path, "digits", CONFIG)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace(__version__, "0.0.1"))
    claim(tmp_path, "digits", CONFIG)
    assert read_config(tmp_path)["jaxgen"] == "0.0.1"


def test_another_experiment_is_refused(tmp_path):
    claim(tmp_path, "digits", CONFIG)
    with pytest.raises(ValueError, match=rf"{tmp_path} is a run of 'digits', not of 'faces'. .*`--workdir`.*delete"):
        claim(tmp_path, "faces", CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 200}, "steps is 100 there, got 200"),
        ({"steps": 100.0}, "steps is 100 there, got 100.0"),
        ({"optimiser": {"rate": 1e-4, "betas": (0.9, 0.99)}}, "optimiser.rate is 0.001 there, got 0.0001"),
        (
            {"optimiser": {"rate": 1e-3, "betas": (0.9, 0.9)}},
            r"optimiser.betas is \[0.9, 0.99\] there, got \[0.9, 0.9\]",
        ),
        ({"ema": 0.9}, "ema is not there, got 0.9"),
        ({"optimiser": {"rate": 1e-3}}, r"optimiser.betas is \[0.9, 0.99\] there, got none"),
    ],
)
def test_other_settings_are_refused_by_field(tmp_path, change, message):
    claim(tmp_path, "digits", CONFIG)
    with pytest.raises(ValueError, match=rf"{tmp_path} .*other settings: {message}\. .*`--workdir`"):
        claim(tmp_path, "digits", {**CONFIG, **change})


def test_strangers_directories_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=rf"`directory` {tmp_path} holds \['thesis.tex'\] and no config.json"):
        claim(tmp_path, "digits", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_claim_that_was_killed_left_is_no_stranger(tmp_path):
    (tmp_path / ".config.json-0123").write_text('{"experi')  # written, and never renamed
    claim(tmp_path, "digits", CONFIG)
    assert read_config(tmp_path)["experiment"] == "digits"


def test_unreadable_and_absent_configurations_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`directory` {tmp_path} holds no config.json"):
        read_config(tmp_path)
    for content, message in [("{", "cannot be read"), ("[]", "cannot be read"), ("{}", r"has no \['config'")]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"{tmp_path}/config.json {message}.*delete {tmp_path}"):
            claim(tmp_path, "digits", CONFIG)


def test_unwritable_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"`directory` {tmp_path}/file/run cannot be written: Not a directory"):
        claim(tmp_path / "file" / "run", "digits", CONFIG)


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        claim(tmp_path / "run", "digits", {"activation": print})
    assert not (tmp_path / "run").exists()


def test_processes_that_claim_at_once_all_succeed(tmp_path):
    code = "import sys; from jaxgen.run import claim; sys.stdin.read(); claim(sys.argv[1], 'x', {'steps': 1})"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        process.stdin.close()
    for process in running:
        process.wait(60)
        message = process.stderr.read()
        process.stderr.close()
        assert process.returncode == 0, message
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"] == {"steps": 1}
    assert len(list((tmp_path / "run").iterdir())) == 1
