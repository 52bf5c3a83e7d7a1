"""Command lines: what was asked for reaches the command, and what went wrong is one line and an exit code."""

import dataclasses
import os
import signal
import stat
import sys
import types
from pathlib import Path

import jax
import pytest

from jaxgen import cli
from jaxgen.loop import Stopped


@dataclasses.dataclass(frozen=True)
class Bake:
    """Bakes bread."""

    flour: str = "rye"
    """What it is made of."""
    loaves: int = 100
    """How many there are to be."""
    seeds: tuple[int, ...] = ()
    """What is strewn on top."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slices what was baked."""

    thickness: float = 1.5
    """In centimetres."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The directory of compiled programs as it is by default, under a home of the test's own."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXGEN_TRACEBACK", raising=False)
    yield tmp_path / "cache" / "jaxgen" / "compiled"
    jax.config.update("jax_compilation_cache_dir", before)


def run(*words, error=None):
    """What the commands were given by this command line; the commands raise ``error``, if there is one."""
    given = []

    def command(options):
        given.append(options)
        if error is not None:
            raise error

    train = cli.Command(command, Bake(), Bake(flour="white", loaves=2))
    cli.main("Bread.", train, {"slice": cli.Command(command, Slice())}, args=words)
    return given


def code(*words, error=None):
    with pytest.raises(SystemExit) as stopped:
        run(*words, error=error)
    return stopped.value.code


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("", Bake()),
        ("--loaves 3 --seeds 1 2", Bake(loaves=3, seeds=(1, 2))),
        ("--smoke", Bake("white", 2)),
        ("--smoke --loaves 100", Bake("white", 100)),
        ("--flour rye --smoke", Bake("rye", 2)),
        ("slice", Slice()),
        ("slice --thickness 2", Slice(2.0)),
    ],
)
def test_commands_are_given_what_was_asked_for(words, given):
    assert run(*words.split()) == [given]


def test_the_programs_own_command_line_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bread", "--loaves", "4"])
    given = []
    cli.main("Bread.", cli.Command(given.append, Bake()))
    assert given == [Bake(loaves=4)]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--loafs 3", "--loafs"),
        ("--loaves many", "--loaves"),
        ("slice --loaves 3", "--loaves"),
        ("slice --smoke", "--smoke"),
        ("toast", "toast"),
        ("--smoke slice", "slice"),
    ],
)
def test_what_there_is_not_is_named(words, named, capsys):
    assert code(*words.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert named in err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--help", [
            "usage: python -m experiments.bread [-h]", "Bread.", "Other commands, each with its own --help: slice",
            "--flour STR", "What it is made of.", "(default: rye)", "--loaves INT", "How many there are to be.",
            "--seeds", "What is strewn on top.", "--smoke", "run everything once, tiny",
        ]),
        ("--smoke --help", ["(default: white)"]),
        ("slice --help", [
            "usage: python -m experiments.bread slice [-h]", "Slices what was baked.", "--thickness FLOAT",
            "In centimetres.", "(default: 1.5)",
        ]),
    ],
)  # fmt: skip
def test_help_lists_the_fields_and_their_documentation(words, shown, monkeypatch, capsys):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", types.SimpleNamespace(name="experiments.bread"), raising=False)
    assert code(*words.split()) == 0
    out, err = capsys.readouterr()
    assert not err
    text = " ".join(out.replace("│", " ").split())
    assert not [part for part in shown if part not in text], out


@pytest.mark.parametrize("error", [ValueError, OSError, FileNotFoundError, FloatingPointError])
@pytest.mark.parametrize("command", ["", "slice"])
def test_what_the_user_got_wrong_is_one_line(error, command, monkeypatch, capsys):
    assert code(*command.split(), error=error("`loaves` must be 1,\n got 0")) == 2
    assert capsys.readouterr() == ("", "error: `loaves` must be 1,  got 0\n")
    monkeypatch.setenv("JAXGEN_TRACEBACK", "1")
    with pytest.raises(error, match="`loaves` must be 1"):
        run(*command.split(), error=error("`loaves` must be 1"))


@pytest.mark.parametrize("error", [TypeError, RuntimeError, KeyboardInterrupt])
def test_what_the_program_got_wrong_is_a_traceback(error):
    with pytest.raises(error):
        run(error=error())


@pytest.mark.parametrize(("signum", "wanted"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stop_that_was_asked_for_says_how_to_go_on(signum, wanted, capsys):
    assert code(error=Stopped(7, signum)) == wanted
    name = signal.Signals(signum).name
    message = f"stopped by {name} after step 7; the same command goes on from there\n"
    assert capsys.readouterr() == ("", message)


def cache_directory(*_):
    return jax.config.values["jax_compilation_cache_dir"]


def test_compiled_programs_are_kept_for_the_user_alone(cache):
    seen = []
    cli.main("", cli.Command(lambda options: seen.append(cache_directory()), Bake()), args=())
    assert seen == [str(cache)]  # before the command runs
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_without_xdg_compiled_programs_are_kept_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    run()
    assert cache_directory() == str(tmp_path / ".cache" / "jaxgen" / "compiled")


def test_the_users_own_directory_of_compiled_programs_stands(tmp_path, cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    run()
    assert cache_directory() == str(tmp_path / "mine")
    assert not cache.exists()


def test_who_cannot_keep_compiled_programs_runs_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("in the way")
    assert run() == [Bake()]

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert run() == [Bake()]
    assert cache_directory() is None


def test_asking_for_help_keeps_nothing(cache):
    assert code("--help") == 0
    assert not os.path.lexists(cache)


@pytest.mark.parametrize(("platforms", "devices", "others", "kept"), [
    ("cpu", -1, ["cuda"], True), (None, -1, [], True), (None, -1, ["cuda"], False), ("cpu", 2, [], False),
])  # fmt: skip
def test_a_program_on_the_host_keeps_freed_memory(platforms, devices, others, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(cli.memory, "keep_freed", lambda: calls.append(True))
    monkeypatch.setattr(cli.importlib.metadata, "entry_points", lambda group: others)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bread"])
    values = {**jax.config.values, "jax_platforms": platforms, "jax_num_cpu_devices": devices}
    monkeypatch.setattr(cli.jax, "config", types.SimpleNamespace(values=values, update=lambda *_: None))
    cli.main("", cli.Command(lambda options: None, Bake()))
    assert bool(calls) == kept
    cli.main("", cli.Command(lambda options: None, Bake()), args=())
    assert len(calls) == kept
