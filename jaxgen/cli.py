"""Command lines from dataclasses, one way for all experiments.

    python -m experiments.NAME [--option value ...]              train, or go on where the last run stopped
    python -m experiments.NAME --smoke                           the same, tiny: does everything in under a minute
    python -m experiments.NAME COMMAND [--option value ...]      what else the experiment offers, such as ``sample``

Options are the fields of a frozen dataclass and their help is its documentation (tyro). What the user got wrong is one
line on standard error and exit code 2; set JAXGEN_TRACEBACK=1 to see where it was found.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax

from jaxgen import hosts, memory
from jaxgen.loop import Stopped


class Command(NamedTuple):
    """What an experiment can do.

    Attributes:
        run: takes the options, a frozen dataclass.
        defaults: the options as they are when nothing is said.
        smoke: the options under ``--smoke``, if there is such a thing.
    """

    run: Callable[[Any], None]
    defaults: Any
    smoke: Any = None


def main(
    module: str,
    train: Command,
    commands: Mapping[str, Command] | None = None,
    *,
    args: Sequence[str] | None = None,
) -> None:
    """Parses a command line and runs what it asks for; an experiment's ``main`` is one call of this.

    Args:
        module: docstring of the experiment, shown by ``--help``.
        train: what runs when no command is named.
        commands: the other commands by name.
        args: the command line; the program's own by default.

    Raises:
        SystemExit: with 2 for bad input, 130 after SIGINT; with 0 after SIGTERM and ``--help``.
    """
    import tyro

    words = list(sys.argv[1:] if args is None else args)
    commands = dict(commands or {})
    command, name = (commands[words[0]], words.pop(0)) if words and words[0] in commands else (train, "")
    description = module if not name else type(command.defaults).__doc__ or ""
    if not name and commands:
        description += "\n\nOther commands, each with its own --help: " + ", ".join(commands)
    defaults = command.defaults
    fields: list[Any] = [("options", Annotated[type(defaults), tyro.conf.arg(name="")])]
    if command.smoke is not None:
        defaults = command.smoke if "--smoke" in words else defaults
        helptext = "run everything once, tiny, in under a minute"
        fields.append(("smoke", Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help=helptext)], False))
    parser = dataclasses.make_dataclass("Options", fields)
    program = f"python -m {_program()}" + (f" {name}" if name else "")
    given = tyro.cli(parser, prog=program, description=description, args=words, default=parser(defaults))
    _keep_compiled_programs()
    if args is None:  # else the process is another's
        _keep_freed_memory()
    try:
        command.run(given.options)
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        sys.exit(130 if stopped.signum == signal.SIGINT else 0)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("JAXGEN_TRACEBACK"):
            raise
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        hosts.leave(2)
    except RuntimeError as error:
        if not hosts.lost(error) or os.environ.get("JAXGEN_TRACEBACK"):
            raise
        why = str(error).splitlines()[0][:300]
        print(
            f"error: this is what one host sees when another is gone ({why}); start all of them again", file=sys.stderr
        )
        hosts.leave(1)


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def _keep_compiled_programs() -> None:
    """Points JAX's persistent cache at a directory of the user's own, unless the user has named one.

    A second sampling, or a resumed run, then starts without compiling.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = root / "jaxgen" / "compiled"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return  # a cache that cannot be kept costs time and nothing else
    jax.config.update("jax_compilation_cache_dir", str(directory))


def _keep_freed_memory() -> None:
    """Spares programs on the host fresh memory at every step, where it is sure that they will run there."""
    alone = jax.config.values["jax_num_cpu_devices"] <= 1  # several wait for one allocator longer than they gain
    others = importlib.util.find_spec("libtpu") or importlib.metadata.entry_points(group="jax_plugins")
    if alone and (jax.config.values["jax_platforms"] == "cpu" or not others):
        memory.keep_freed()
