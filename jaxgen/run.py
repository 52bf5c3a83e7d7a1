"""The identity of a run: ``config.json`` in its directory says which experiment it is, with which settings.

Resuming with other settings than a run began with gives numbers that no settings explain; so does writing
into the directory of another run. Both are refused before any work is done.
"""

import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

import jaxgen

_FILE = "config.json"


def claim(directory: str | os.PathLike[str], experiment: str, config: Mapping[str, Any]) -> None:
    """Makes ``directory`` the directory of this run, or finds that it is.

    Of several processes that claim a directory for one run at once, all succeed.

    Args:
        directory: made if it does not exist.
        experiment: the name of the experiment.
        config: its settings, of types that JSON has.

    Raises:
        ValueError: the directory belongs to another experiment or to other settings (names the fields), holds
            files and no ``config.json``, or holds one that cannot be read.
        TypeError: ``config`` holds what JSON has no type for.
        OSError: the directory cannot be written; names it.
    """
    from etils import epath

    path = epath.Path(directory)
    wanted = {"experiment": experiment, "jaxgen": jaxgen.__version__, "config": dict(config)}
    # allow_nan: an infinite setting is a legitimate one; sort_keys: files of two runs can be compared.
    text = json.dumps(wanted, indent=2, sort_keys=True) + "\n"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / _FILE).exists():
            # A bucket has no empty directories: what was just made may not be there.
            entries = path.iterdir() if path.exists() else ()
            strangers = sorted(entry.name for entry in entries if not entry.name.startswith(f".{_FILE}"))
            if strangers and not (path / _FILE).exists():
                raise ValueError(
                    f"`directory` {path} holds {strangers[:3]} and no {_FILE}: it is not the directory of a "
                    "run. Choose another `--workdir`, or empty it"
                )
            # A file of a name of its own, then renamed: no reader ever sees half of it.
            temporary = path / f".{_FILE}-{uuid.uuid4().hex}"
            temporary.write_text(text)
            temporary.replace(path / _FILE)
    except ImportError as error:  # of what knows the bucket, by its name
        raise ValueError(f"`directory` {path} cannot be reached: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"`directory` {path} cannot be written: {error.strerror or error}") from error

    found = read_config(path)
    advice = f"Choose another `--workdir`, or delete {path} to begin anew"
    if found["experiment"] != experiment:
        raise ValueError(f"{path} is a run of {found['experiment']!r}, not of {experiment!r}. {advice}")
    # Compared as read back, where tuples have become lists.
    differing = _differences("", found["config"], json.loads(text)["config"])
    if differing:
        raise ValueError(f"{path} is a run of {experiment!r} with other settings: {'; '.join(differing)}. {advice}")


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what ``claim`` wrote.

    Args:
        directory: of the run.

    Returns:
        ``{"experiment": name, "jaxgen": version, "config": settings}``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    from etils import epath

    file = epath.Path(directory) / _FILE
    if not file.exists():
        raise FileNotFoundError(f"`directory` {file.parent} holds no {_FILE}: it is not the directory of a run")
    try:
        found = json.loads(file.read_text())
        missing = {"experiment", "jaxgen", "config"} - found.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): delete {file.parent} to begin anew") from error
    if missing:
        raise ValueError(f"{file} has no {sorted(missing)}: delete {file.parent} to begin anew")
    return found


def _differences(name: str, found: Any, wanted: Any) -> list[str]:
    """One line for each setting that differs, by its path."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for key in sorted(found.keys() | wanted.keys()):
            path = f"{name}.{key}" if name else key
            if key not in found:
                lines.append(f"{path} is not there, got {wanted[key]!r}")
            elif key not in wanted:
                lines.append(f"{path} is {found[key]!r} there, got none")
            else:
                lines += _differences(path, found[key], wanted[key])
        return lines
    # NaN is the same setting as NaN; 1 and True are not the same.
    return [] if json.dumps(found) == json.dumps(wanted) else [f"{name} is {found!r} there, got {wanted!r}"]
