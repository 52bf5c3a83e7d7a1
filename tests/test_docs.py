"""docs/tpu.md says what is so: the calls are those that the tool prints, and the commands are there, with their options."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import image_settings
from jaxgen import cli, cloud

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "tpu.md").read_text()
LINES = [
    line for block in re.findall(r"^```\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE) for line in block.splitlines()
]
CLOUD = [shlex.split(line)[3:] for line in LINES if line.startswith("python -m jaxgen.cloud")]
BEHIND = [words[words.index("--") + 1 :] for words in CLOUD if words[:1] == ["run"]]
EXPERIMENTS = [shlex.split(line)[2:] for line in LINES if line.startswith("python -m experiments.")] + BEHIND


def printed(words, capsys):
    """What the command calls, as it says itself."""
    split = words.index("--") if "--" in words else len(words)
    cloud.main([*words[:split], "--dry-run", *words[split:]])
    return capsys.readouterr().out.splitlines()


def test_every_call_that_is_shown_is_one_that_a_shown_command_makes(capsys):
    calls = {line for words in CLOUD for line in printed(words, capsys)}
    shown = [line for line in LINES if line.startswith(("gcloud compute tpus", "git ", "mkdir "))]
    assert len(shown) > 10
    assert not [line for line in shown if line not in calls]


def test_the_calls_of_every_command_are_shown(capsys):
    used = {words[0] if words else "" for words in CLOUD}
    assert used == {"", "create", "wait", "install", "doctor", "run", "status", "logs", "stop", "profile", "delete"}
    for verb in used:
        of_verb = [printed(words, capsys) for words in CLOUD if (words[0] if words else "") == verb]
        assert any(all(line in LINES for line in calls) for calls in of_verb), verb


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_knows_every_option(tmp_path, capsys):
    """By its own parser, which asks nobody."""
    more = [
        ["create", "--topology", name, "--spot", "--zone", "a-b1-c"] for name in ("v4:2x2x1", "v5p:2x2x1", "v6e:4x4*2")
    ]
    lines = [line for words in [*CLOUD, *more] for line in printed(words, capsys)] + LINES
    # It splits words in a way of its own: what an ssh carries would not come through.
    plain = {re.sub("'--command=.*?'( |$)", r"--command=x\1", line).replace("'", "") for line in lines}
    commands = [{"command_string": line} for line in sorted(plain) if line.startswith("gcloud ")]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    ended = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/commands.json"],
        env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1"},
        capture_output=True,
        text=True,
    )
    found = json.loads(ended.stdout)
    assert len(found) == len(commands)
    assert not [(one["command_string"], one["error_message"]) for one in found if not one["success"]]


@pytest.mark.parametrize("words", EXPERIMENTS, ids=" ".join)
def test_experiments_take_these_options(words, monkeypatch):
    seen = []
    main = cli.main

    def parse(module, train, commands=None, *, args=None):
        commands = {name: command._replace(run=seen.append) for name, command in (commands or {}).items()}
        main(module, train._replace(run=seen.append), commands, args=words[1:])

    monkeypatch.setattr(cli, "main", parse)
    importlib.import_module(words[0]).main()
    (options,) = seen
    if isinstance(options, image_settings.Settings):
        image_settings.check(options)


def test_extras_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra for line in [*LINES, cloud.INSTALL] for extra in re.findall(r"(?:\.|jaxgen-source)\[([\w-]+)\]", line)
    }
    assert named == {"tpu", "tpu-aot"}
    assert named <= extras.keys()


def test_its_doctor_runs(tmp_path):
    assert "python -m jaxgen.doctor" in LINES
    command = [sys.executable, "-m", "jaxgen.doctor"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode in (0, 1), ended.stderr
    assert "devices" in ended.stdout


@pytest.mark.slow
def test_its_profile_is_recorded(tmp_path):
    (line,) = [line for line in LINES if line.startswith("python -m experiments.") and "--profile" in line]
    subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, check=True)
    assert list(tmp_path.glob("runs/*/profile/plugins/profile/*/*.xplane.pb"))


def test_links_lead_to_files():
    named = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in target]
    assert not [target for target in named if not (ROOT / "docs" / target).exists()]
