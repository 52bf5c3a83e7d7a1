"""The house: imports point down only, and the public functions keep the library's manners."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import jaxgen

ROOT = Path(jaxgen.__file__).parent
FLOORS = {
    **dict.fromkeys(["typing", "checks", "random", "memory"], 0),
    **dict.fromkeys(["attacks", "contrastive", "diffusion", "gan", "metrics", "nets", "testing"], 1),
    **dict.fromkeys(["train", "averaging", "momentum", "robust"], 2),
    **dict.fromkeys(["place", "plan", "hosts"], 3),
    **dict.fromkeys(
        ["data", "checkpoint", "run", "log", "images", "loop", "profile", "cli", "pretrained", "export"], 4
    ),
    **dict.fromkeys(["cloud", "doctor"], 4),
}
FAMILIES = {"attacks", "contrastive", "diffusion", "gan", "metrics", "nets"}
# Only the host's side may name these; jaxgen.train alone knows optimisers.
HOST_ONLY = {"grain", "tensorflow_datasets", "orbax", "tyro", "etils", "PIL", "matplotlib", "sklearn", "safetensors"}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module in {"jaxgen", "jax", "jax.experimental"}:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def room(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    here = room(file)
    if here == "__init__":
        return
    floor = FLOORS[here]
    for name in imports(file):
        top, _, rest = name.partition(".")
        if top == "jaxgen" and rest and rest != "__version__":
            there = rest.split(".")[0]
            assert FLOORS[there] <= floor, f"{here} (floor {floor}) imports {there} (floor {FLOORS[there]})"
            assert there == here or not {here, there} <= FAMILIES, f"the families {here} and {there} join"
        assert top not in HOST_ONLY or floor == 4, f"{here} imports {top}"
        assert top not in {"experiments", "benchmarks", "tests"}, f"{here} imports {top}"
        if name.startswith(("jax.sharding", "jax.experimental.topologies", "jax.experimental.mesh_utils", "libtpu")):
            assert here in {"place", "plan"}, f"{here} names shardings or topologies"
        if top == "flax":
            assert here == "nets", f"{here} imports flax"


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) <= 400


def publics():
    for name in (
        "attacks",
        "contrastive",
        "diffusion",
        "gan",
        "metrics",
        "metrics.moments",
        "metrics.predictions",
        "nets",
        "data",
        "random",
        "testing",
        "train",
        "averaging",
        "momentum",
        "robust",
        "place",
        "plan",
        "hosts",
        "plan.flops",
        "plan.hlo",
        "loop",
        "images",
        "pretrained",
        "export",
        "run",
    ):
        module = importlib.import_module(f"jaxgen.{name}")
        names = getattr(module, "__all__", None) or [
            n for n, value in vars(module).items()
            if not n.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]  # fmt: skip
        for public in names:
            value = getattr(module, public)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield pytest.param(value, id=f"{name}.{public}")
            else:
                assert not hasattr(value, "lower"), f"{name}.{public} is jitted: callers compile"


@pytest.mark.parametrize("public", list(publics()))
def test_publics_are_documented(public):
    text = inspect.getdoc(public)
    assert text
    assert not text.startswith(f"{public.__name__}("), "the docstring is NamedTuple's own"
    if inspect.isfunction(public):
        parameters = inspect.signature(public).parameters
        if "Args:" in text:
            documented = text.split("Args:")[1].split("Returns:")[0].split("Raises:")[0]
            for name in parameters:
                assert f"{name}:" in documented, f"{name} is not documented"


@pytest.mark.parametrize("public", [p for p in publics() if inspect.isfunction(p.values[0])])
def test_publics_keep_the_manners(public):
    parameters = list(inspect.signature(public).parameters.values())
    assert not {p.name for p in parameters} & {"rng", "prng", "prng_key", "seed_key"}, "a key is called key"
    # Options are keyword-only; a factory of values, all of whose arguments have defaults, may be called by position.
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if required:
        for p in parameters:
            assert p.default is p.empty or p.kind is p.KEYWORD_ONLY, f"the option {p.name} is not keyword-only"
