"""What the command line asks of a suite."""

import importlib
import inspect

import pytest

from benchmarks.__main__ import SUITES


@pytest.mark.parametrize(("name", "module"), [(name, module) for name, (module, _) in SUITES.items()])
def test_a_suite_is_one(name, module):
    suite = importlib.import_module(f"benchmarks.{module}")
    assert f"python -m benchmarks {name}" in suite.__doc__
    if hasattr(suite, "records"):
        assert list(inspect.signature(suite.records).parameters) == ["options"]
    else:
        assert suite.cases(False)
    for quick in (False, True):
        cases = suite.cases(quick) if hasattr(suite, "cases") else []
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert next(iter(case.sides)) == "jaxgen"
